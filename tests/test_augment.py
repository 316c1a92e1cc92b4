"""Augmentation: what is made keeps what it promises, checked by code of its own; what is not made says why."""
import copy
import doctest
import importlib
import inspect
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from small_tokenizers import Letters

from data_tools import augment, load
from data_tools.augment import common, safety
from data_tools.augment.choices import negated
from data_tools.augment.levels import CONSTRAINTS, sentences
from data_tools.augment.questions import ASPECTS, TEMPLATES, WHOLE, numbers
from data_tools.augment.rows import SPECIFIC, phrases, without
from data_tools.collate import collate
from data_tools.records import Group, Response
from rewards.verifiable import choice, choice_share

DATA = Path(__file__).parents[1].parent / "shared" / "data"
MODULES = ["common", "rows", "levels", "questions", "choices", "safety"]
FOX, DOG = "The red fox is quick, and it runs.", "I think a lazy dog sleeps\nall day"


def pair(a=FOX, b=DOG, relevance=(1.0, 0.0), prompt="Which animal?", **meta):
    return Group(prompt, [Response(a), Response(b)], relevance=list(relevance), meta=meta)


def failed(groups):
    return [g.meta["failed"] for g in groups if "failed" in g.meta]


def made(groups):
    return [g for g in groups if "failed" not in g.meta]


def nobody(prompts):
    raise ConnectionError("no model")


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    found = doctest.testmod(importlib.import_module(f"data_tools.augment.{name}"))
    assert found.failed == 0 and found.attempted >= 2


# ------------------------------------------------------------------------------------------------------- laws of all rules
def calls():
    """Every rule on a group that it fits."""
    labelled = pair(prompt_id="1")
    scored = Group("?", [Response("bad", scores={"safe": 0.1, "helpful": 0.9})], meta={"prompt_id": "1"})
    asked = Group("Ann has 12 eggs and 5 pans. How many eggs?", [], meta={"answer": "12", "topic": "t", "prompt_id": "1"})
    options = Group("?", [], meta={"right": ["a"], "wrong": ["b", "c"], "prompt_id": "1"})
    chosen, = augment.multiple_choice(options)
    one = lambda rule, **settings: lambda group: rule([group], **settings)
    return {"rationales": (one(augment.rationales, generate=lambda p: ["why"] * len(p)), labelled),
            "degrees": (augment.degrees, labelled), "random_degrees": (augment.random_degrees, labelled),
            "mapl": (augment.mapl, labelled), "reformulated_by_template": (augment.reformulated_by_template, asked),
            "reformulated": (one(augment.reformulated, generate=solver), asked),
            "paraphrases": (one(augment.paraphrases, generate=lambda p: ["Are 12 eggs and 5 pans there?"] * len(p)), asked),
            "multiple_choice": (augment.multiple_choice, options), "inverted": (lambda g: augment.inverted(g, share=1), chosen),
            "attacks": (lambda g: list(augment.attacks([g])), asked), "safety_pairs": (augment.safety_pairs, scored),
            "lookalike_pairs": (augment.lookalike_pairs, scored)}


def solver(prompts):
    return ["<problem>Nobody knows who put all of these eggs there, or is it a dozen?</problem>" if p.startswith("Rewrite") else
            "It is 12." for p in prompts]


@pytest.mark.parametrize("name", augment.__all__)
def test_a_rule_is_pure_and_what_it_makes_keeps_its_source(name):
    call, group = calls()[name]
    before = copy.deepcopy(group)
    found = call(group)
    assert group == before and call(group) == found and found
    for one in found:
        assert one.meta["prompt_id"] == "1"
        assert Group.from_json(one.to_json()) == one


@pytest.mark.parametrize("name", augment.__all__)
def test_every_setting_is_explained(name):
    function = getattr(augment, name)
    lines = re.findall(r"^(\w+(?:, \w+)*) {2,}\S", inspect.getdoc(function), re.MULTILINE)
    explained = [name for line in lines for name in line.split(", ")]
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            assert p.name in explained, p.name


@pytest.mark.parametrize("rule", [augment.rationales, augment.paraphrases, augment.reformulated])
def test_a_model_that_fails_is_told_for_each_record_and_the_records_go_on(rule):
    groups = [pair(prompt=f"Is {k} red?", answer="7", place=f"f:{k}") for k in (3, 4)]
    found = rule(groups, generate=nobody)
    assert made(found) == groups and set(re.findall("ConnectionError: no model", " ".join(failed(found))))
    assert {g.meta["place"] for g in found if "failed" in g.meta} == {"f:3", "f:4"}

    def one_bad(prompts):
        if any("Is 3" in p for p in prompts):
            raise RuntimeError("no text for 3")
        return ["Would you say that 4 is red?" for _ in prompts]
    if rule is not augment.reformulated:
        found = rule(groups, generate=one_bad)
        assert all("RuntimeError: no text for 3" in why for why in failed(found)) or rule is augment.paraphrases
        assert {g.meta["place"] for g in found if "no text" in g.meta.get("failed", "")} == {"f:3"}
        assert any(g != groups[1] and g.meta["place"] == "f:4" for g in made(found))


def test_texts_that_are_none_and_texts_that_are_too_few():
    assert common.ask(lambda p: ["", None], ["a", "b"]) == [("", "the model gave no text")] * 2
    with pytest.raises(ValueError, match="returned 1 texts for 2 prompts"):
        common.ask(lambda p: ["x"], ["a", "b"])
    assert common.ask(nobody, []) == []


@pytest.mark.parametrize("rule", [augment.mapl, augment.degrees, lambda g: augment.rationales([g], generate=nobody)])
def test_rules_of_pairs_say_so(rule):
    with pytest.raises(ValueError, match="takes pairs, and this group has 3 labelled responses: make pairs first"):
        rule(Group("?", [Response(t) for t in "abc"], relevance=[1.0, 0.0, 2.0]))
    with pytest.raises(ValueError, match="has 0 labelled responses"):
        rule(Group("?", [Response(t) for t in "ab"]))


# ------------------------------------------------------------------------------------------------------------- rationales
def test_a_rationale_is_asked_for_without_telling_by_position():
    asked = []
    groups = [pair(prompt=f"prompt {k}") for k in range(200)]
    augment.rationales(groups, generate=lambda p: asked.extend(p) or ["why"] * len(p), ask_for=SPECIFIC)
    letters = Counter()
    for text in asked:
        a, b = re.search(r"Response A:\n(.*)\n\nResponse B:\n(.*)\n\nResponse ([AB]) is preferred", text, re.DOTALL).groups()[:2]
        letter = re.search(r"Response ([AB]) is preferred", text)[1]
        assert {"A": a, "B": b}[letter] == FOX and text.endswith(SPECIFIC)
        letters[letter] += 1
    assert abs(letters["A"] - 100) < 4 * math.sqrt(50)


def test_rationales_of_either_label_and_of_ties():
    groups = [pair(relevance=(0.0, 1.0)), pair(relevance=(1.0, 1.0)),
              Group("?", [Response("a"), Response("b")], wins=[[0.5, 0.2], [0.8, 0.5]])]
    found = augment.rationales(groups, generate=lambda p: [f"{len(p)} asked"] * len(p))
    assert failed(found) == ["rationales: the pair is a tie"] and found[1] == groups[1]
    assert found[0].responses[2].text == "2 asked" and found[3].wins == [[0.5, 0.2, None], [0.8, 0.5, None], [None, None, 0.5]]
    assert ":\nb\n" in re.split(r"Response [AB] is", found[3].responses[2].prompt)[0]


def test_the_rows_reach_a_batch_as_the_recipes_read_them():
    batch = collate(augment.rationales([pair()], generate=lambda p: ["why"]), Letters())
    assert batch["rationale"].tolist() == [False, False, True] and batch["relevance"].isnan().tolist() == [False, False, True]
    batch = collate(augment.degrees(pair()), Letters())
    assert batch["degree"].tolist() == [-1, -1, 0, 1, 2, 0, 1, 2] and batch["side"].tolist() == [-1, -1, 1, 1, 1, 0, 0, 0]
    groups = augment.mapl(pair())
    batch = collate(groups, Letters())
    assert batch["level"].tolist() == [0, 0, 1, 1, 1, 1, *[2] * 4 * (len(groups) - 3)]
    assert batch["contrast"].tolist()[6:10] == [1, -1, -1, 1]


# ---------------------------------------------------------------------------------------------------------------- degrees
def test_rake_by_hand():
    """Phrases: red fox | quick brown fox | fox. fox: frequency 3, degree 2 + 3 + 1 = 6, hence 2; red 2; quick, brown 3."""
    assert phrases("A red fox is a quick brown fox, and a fox.") == ["quick brown fox", "red fox", "fox"]
    assert phrases("and the of") == [] and phrases("") == []


def test_degrees_remove_more_and_more_of_what_matters_most():
    text = "Green tea leaves, strong black coffee, milk, plain cold tap water and sugar."
    rows = augment.degrees(pair(a=text), degrees=3, share=1.0)[0].responses[2:5]
    assert [r.text for r in rows][0] == text and rows[2].text == ",,, and."
    ranked = phrases(text)
    assert rows[1].text == without(text, ranked[:round(len(ranked) / 2)]) and ranked[0] not in rows[1].text
    control = augment.random_degrees(pair(a=text), degrees=3, share=1.0)[0].responses[2:5]
    assert control[2].text == rows[2].text and control[0].text == text


def test_too_few_phrases_leave_out_a_side_and_say_so():
    found = augment.degrees(pair(b="And so."))
    assert [r.meta["side"] for r in found[0].responses[2:]] == [1, 1, 1] and found[0].relevance == [1.0, 0.0, *[None] * 3]
    assert failed(found) == ["degrees: response 2 has 0 phrases, too few for 3 different degrees"]
    assert augment.degrees(pair(a="And.", b="So."))[0] == pair(a="And.", b="So.")
    assert failed(augment.degrees(pair(relevance=(1.0, 1.0)))) == ["degrees: the pair is a tie"]
    for settings in (dict(degrees=1), dict(share=0.0), dict(share=1.1)):
        with pytest.raises(ValueError, match="at least 2 degrees and a share"):
            augment.degrees(pair(), **settings)


# ------------------------------------------------------------------------------------------------------------------- MAPL
def texts_of(seed, count):
    r = random.Random(seed)
    known = ["Yes.", "no,", "However", "3", "tree?", "- item", "\n", '"quoted"', "because", "Sky", "walks.", "and"]
    return [" ".join(r.choices(known, k=r.randint(0, 25))).strip() for _ in range(count)]


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_constraint_is_kept_and_broken_as_it_promises(name):
    constraint, seen = CONSTRAINTS[name], Counter()
    for n, text in enumerate(texts_of(0, 300)):
        kept, broken = constraint.values(text, random.Random(n))
        for value, right in ((kept, True), (broken, False)):
            if value is not None:
                assert constraint.holds(text, value) is right, (text, value)
                assert constraint.say(value).endswith(".")
                seen[right] += 1
    assert min(seen[True], seen[False]) > 100


def test_counts_by_hand():
    assert sentences("It is 3.5 m. Really?\nYes") == ["It is 3.5 m.", "Really?", "Yes"] and sentences(" ") == []
    at_most = CONSTRAINTS["words_at_most"]
    assert at_most.holds("it's a b", 3) and not at_most.holds("it's a b", 2) and at_most.say(1) == "Use at most 1 word."
    used = CONSTRAINTS["word_used"]
    assert used.holds("The Sky.", "sky") and not used.holds("skyline", "sky")


def instructions(prompt):
    """What a prompt of MAPL asks for, read back from its words."""
    said = prompt.split("\n\n")[-1]
    found = []
    for constraint in CONSTRAINTS.values():
        for value in [True, False, *range(60), *re.findall(r'"(\w+)"', said)]:
            wrong_kind = isinstance(value, bool) != (constraint.topic not in ("words", "sentences", "word")) \
                or isinstance(value, str) != (constraint.topic == "word")
            if not wrong_kind and constraint.say(value) in said:
                found.append((constraint, value))
    return {c.say(v): (c, v) for c, v in found}.values()


def test_every_pair_of_prompts_has_the_right_order_by_an_oracle():
    """Oracle: the share of a prompt's instructions that a response keeps. Level 1: it prefers the first prompt. Level 2: its
    gap between the responses widens where contrast says so."""
    def kept(prompt, text):
        asked = list(instructions(prompt))
        return sum(c.holds(text, v) for c, v in asked) / max(len(asked), 1), len(asked)
    levels, signs = Counter(), Counter()
    texts = [t for t in texts_of(1, 160) if t]
    for n, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=False)):
        for group in augment.mapl(pair(a=a, b=b, prompt=f"prompt {n}"), count=3)[1:]:
            rows = group.responses
            score = [kept(r.prompt, r.text) for r in rows]
            levels[rows[0].meta["level"]] += 1
            if rows[0].meta["level"] == 1:
                assert rows[0].text == rows[1].text and group.relevance == [1.0, 0.0]
                assert score[0][0] == 1 > score[1][0] and score[0][1] == score[1][1] > 0
                assert rows[0].prompt.startswith(f"prompt {n}\n\n")
            else:
                assert group.relevance is None and [r.text for r in rows] == [a, b, a, b]
                assert rows[2].prompt == rows[3].prompt == f"prompt {n}" and rows[0].prompt == rows[1].prompt
                assert sum(r.meta["contrast"] * s[0] for r, s in zip(rows, score, strict=True)) == 1
                signs[rows[0].meta["contrast"]] += 1
    assert levels[1] == 2 * (len(texts) // 2) and min(signs[1], signs[-1]) > 50


def test_mapl_of_messages_ties_and_equal_texts():
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}]
    found = augment.mapl(pair(prompt=asked))
    prompt = found[1].responses[0].prompt
    assert prompt[0] == asked[0] and prompt[1]["content"].startswith("Why?\n\n") and asked[1]["content"] == "Why?"
    assert [g.responses[0].meta["level"] for g in augment.mapl(pair(relevance=(1.0, 1.0)))[1:]] == [1, 1]
    assert len(augment.mapl(pair(a="same", b="same"))) == 3   # nothing tells them apart
    with pytest.raises(ValueError, match="at least 1, found 0"):
        augment.mapl(pair(), count=0)


def test_what_the_prompt_says_already_is_not_said_again():
    everything = " ".join(c.say(v) for c in CONSTRAINTS.values() if c.topic not in ("words", "sentences", "word")
                          for v in (True, False))
    for seed in range(10):
        for group in augment.mapl(pair(prompt=everything), count=2, seed=seed)[1:]:
            said = group.responses[0].prompt.split("\n\n")[-1]
            assert re.fullmatch(r'((Use at (most|least) \d+ (word|sentence)s?|(Use|Do not use) the word "\w+")\. ?)+', said)


# --------------------------------------------------------------------------------------------------------- reformulation
def evaluated(text):
    """The text with every small problem solved, by code of its own."""
    rules = ((r"\(the sum of (\d+) and (\d+)\)", lambda a, b: a + b),
             (r"\(the remainder of (\d+) divided by (\d+)\)", lambda a, b: a % b),
             (r"\(the greatest common divisor of (\d+) and (\d+)\)", math.gcd),
             (r"\(the solution x of (\d+)x \+ (\d+) = (\d+)\)", lambda a, b, c: (c - b) // a if (c - b) % a == 0 else None))
    for pattern, solve in rules:
        text = re.sub(pattern, lambda m, solve=solve: str(solve(*map(int, m.groups()))), text)
    return text


def test_templates_keep_the_answer_of_every_synthetic_problem():
    r, kinds = random.Random(0), Counter()
    for n in range(300):
        a, b = r.randint(2, 99), r.randint(2, 99)
        group = Group(f"Ann has {a} plums and buys {b} more. How many plums does she have?", [], meta={"answer": a + b})
        found = augment.reformulated_by_template(group, seed=n)
        assert found[0] == group and [g.meta["aspect"] for g in found[1:]] == list(ASPECTS) and not failed(found)
        for one in found[1:]:
            assert one.meta["answer"] == a + b and one.responses == [] and one.prompt != group.prompt
            assert sum(map(int, re.findall(r"\d+", evaluated(one.prompt)))) == a + b              # solved: all numbers added
        assert evaluated(found[3].prompt) == group.prompt
        kinds[re.search(r"\(the (\w+)", found[3].prompt)[1]] += 1
        word = re.search(r'Let "(\w+)" be another word for "plums"\. (.*)', found[2].prompt)
        assert word[2].replace(word[1], "plums") == group.prompt and "plums" not in word[2]
        assert group.prompt in found[1].prompt
    assert min(kinds[k] for k in ("sum", "remainder", "greatest", "solution")) > 40


@pytest.mark.parametrize("text, found", [
    ("3D and Q3 for $5 at 50% or 1/2, 3.5 or 1,200 on 7-8 and 2+3", []), ("He has 12, she 3. And 7?", ["12", "3", "7"]),
    ("route66 has (9)", []), ("1 of 40", ["1", "40"])])
def test_which_numbers_stand_alone(text, found):
    assert WHOLE.findall(text) == found


def test_templates_that_do_not_fit_say_why():
    group = Group("Who is she?", [], meta={"place": "f:1"})
    found = augment.reformulated_by_template(group)
    assert len(made(found)) == 2 and [w.split(":")[0] for w in failed(found)] == [
        "reformulated_by_template term", "reformulated_by_template sub_problem"]
    assert failed(augment.reformulated_by_template(Group("I have 1 cat and 1 dog", [])))[1].endswith("stands alone")
    with pytest.raises(ValueError, match="did you mean 'background'"):
        augment.reformulated_by_template(group, aspects=["backgrounds"])
    assert set(TEMPLATES) == set(ASPECTS)


def test_exactly_one_of_several_equal_numbers_is_replaced():
    text = "5 cats, 5 dogs and 5 cows."
    found, = made(augment.reformulated_by_template(Group(text, []), aspects=["sub_problem"]))[1:]
    assert len(re.findall(r"(?<![\w(])5 (?:cats|dogs|cows)", found.prompt)) == 2 and evaluated(found.prompt) == text


ORIGINAL = "Ann has 3 cats and 4 dogs. How many animals does she have?"


@pytest.mark.parametrize("written, solutions, why", [
    ("On a ship live 3 cats, and 4 dogs guard them; how large is the crew?", ["7", "It is 7.0.", "8"], None),
    ("On a ship live 3 cats, and 4 dogs guard them; how large is the crew?", ["7", "8", "9"], "1 of 3 solutions"),
    ("On a ship live 3 cats, and 4 dogs guard them; how large is the crew?", ["7", "8", "no idea"], "1 of 3 solutions"),
    ("On a ship live 3 cats and 4 dogs, which makes 7; how many?", ["7"] * 3, "the answer 7 stands in the new problem"),
    (ORIGINAL, ["7"] * 3, "the new problem is a copy"), ("  ", ["7"] * 3, "there is no <problem>")])
def test_reformulations_are_verified(written, solutions, why):
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return [f"Here: <problem>{written}</problem>"] if prompts[0].startswith("Rewrite") else solutions
    group = Group(ORIGINAL, [Response("7")], [1.0], meta={"answer": "3 + 4 = 7\n#### 7"})
    found = augment.reformulated([group], generate=generate, aspects=["background"])
    assert found[0] == group and len(found) == 2 and asked[0].endswith(ORIGINAL)
    if why is None:
        assert found[1].prompt == written and found[1].responses == [] and found[1].meta["aspect"] == "background"
        assert len(set(asked)) == 4 and all(written in p for p in asked[1:])
    else:
        assert why in failed(found)[0]


def test_an_answer_that_the_original_tells_may_stay_and_text_without_tags_is_refused():
    group = Group("7 cats and 0 dogs?", [], meta={"answer": 7})
    text = "<problem>A ship carries 7 cats but no more than 0 dogs; what is their number in all?</problem>"
    assert len(made(augment.reformulated([group], generate=lambda p: [text] * len(p), samples=0))) == 4
    assert "there is no <problem>" in failed(augment.reformulated([group], generate=lambda p: ["7 cats"] * len(p)))[0]
    for meta, said in (({"anser": 1}, "no 'answer', did you mean 'anser'"), ({"answer": "none"}, "in which there is no answer")):
        with pytest.raises(ValueError, match=said):
            augment.reformulated([Group("?", [], meta=meta)], generate=nobody)


def test_paraphrases_keep_numbers_labels_and_differ():
    group = pair(prompt="Add 2 and 3,000 apples.")
    said = ["How much are 2 and 3000 apples?", "What do 2 and 3000 apples make?", "add 2 and 3,000 apples.", "Add two and 3000."]
    found = augment.paraphrases([group], generate=lambda p: said[:len(p)], n=4)
    assert [g.prompt for g in made(found)] == [group.prompt, *said[:2]]
    assert [g.meta.get("paraphrase") for g in made(found)] == [None, 1, 2]
    assert all(g.relevance == [1.0, 0.0] and g.responses == group.responses for g in made(found))
    assert "a copy" in failed(found)[0] and "numbers are not those" in failed(found)[1]
    assert numbers("1,000 and 1000.0") == Counter({"1000": 2})


# ---------------------------------------------------------------------------------------------------------------- choices
def test_inversion_turns_wrong_into_right():
    sizes = Counter()
    for n in range(400):
        group = Group("?", [], meta={"question": f"Why did {n} run?", "options": ["w1", "right", "w2", "w3"], "answer": "B"})
        found, = augment.inverted(group, share=1, seed=n)
        options, letters = found.meta["options"], found.meta["answer"].split(", ")
        named = {options["ABCD".index(letter)] for letter in letters}
        assert named == set(options) - {"right"} and "right" in options and len(named) == len(options) - 1
        assert found.prompt.startswith(f"Why didn't {n} run?\nA. {options[0]}\nB. ")
        sizes[len(letters)] += 1
        right = f"Answer: {found.meta['answer']}"
        assert choice(right, found.meta["answer"]) == choice_share(right, found.meta["answer"]) == 1.0
        assert choice_share(f"Answer: {letters[0]}", found.meta["answer"]) == 1 / len(letters)
        assert choice_share(f"Answer: {'ABCD'[options.index('right')]}", found.meta["answer"]) == 0.0
    assert all(abs(sizes[k] - 400 / 3) < 4 * math.sqrt(400 * 2 / 9) for k in (1, 2, 3))       # k ~ Uniform{1..3}


def test_half_of_the_questions_are_turned():
    groups = [Group(f"q{n}", [], meta={"question": f"q{n}", "options": ["a", "b"], "answer": "A"}) for n in range(400)]
    found = [augment.inverted(g) for g in groups]
    turned = [f[0] for f in found if f[0].meta.get("rule") == "inverted"]
    assert abs(len(turned) - 200) < 40 and all(len(f) == 1 for f in found)
    assert all(g.meta["options"]["AB".index(g.meta["answer"])] == "b" for g in turned)
    assert all(augment.inverted(g, share=0) == [g] for g in groups[:5])


@pytest.mark.parametrize("options, answer, why", [
    (["a", "a", "b"], "C", "two options are equal"), (["a", "All of the above"], "A", "an option speaks of the others"),
    (["a", "b", "c"], "A, B", "is not the letter of one option"), (["a"], "A", "there is no wrong option")])
def test_what_cannot_be_inverted_stays_and_says_why(options, answer, why):
    group = Group("?", [], meta={"question": "q", "options": options, "answer": answer})
    found = augment.inverted(group, share=1)
    assert found[0] == group and why in failed(found)[0] and len(found) == 2


def test_negation():
    assert negated("What is red?") == "What isn't red?" and negated("Is it red?").startswith("Which of these is not")
    assert negated("Why did") == 'Which of these is not a correct answer to "Why did"?'


def test_multiple_choice():
    group = Group("Which?", [], meta={"good": "r1; r2 ;r3;", "bad": [f"w{k}" for k in range(9)]})
    right = Counter()
    for n in range(300):
        found, = augment.multiple_choice(group, right="good", wrong="bad", options=5, most_right=2, seed=n)
        options, letters = found.meta["options"], found.meta["answer"].split(", ")
        assert len(options) == len(set(options)) == 5 and letters == sorted(letters)
        assert {options["ABCDE".index(x)] for x in letters} == {o for o in options if o[0] == "r"}
        right[len(letters)] += 1
    assert min(right[1], right[2]) > 100
    few, = augment.multiple_choice(Group("?", [], meta={"right": "a", "wrong": "b"}))
    assert sorted(few.meta["options"]) == ["a", "b"]
    both = augment.multiple_choice(Group("?", [], meta={"right": "a", "wrong": "a; b"}))
    assert failed(both) == ["multiple_choice: it has 1 right and 2 wrong answers, and is both: a"]
    assert "0 wrong" in failed(augment.multiple_choice(Group("?", [], meta={"right": "a", "wrong": ""})))[0]
    with pytest.raises(ValueError, match="no 'right', did you mean 'rigt'"):
        augment.multiple_choice(Group("?", [], meta={"rigt": "a", "wrong": "b"}))
    with pytest.raises(ValueError, match="of which fewer are right"):
        augment.multiple_choice(group, options=2, most_right=2)


def test_soft_credit_gives_more_groups_a_spread():
    """The claim small, by enumeration: each of 3 right options is named with p = 0.7; 4 responses to a prompt."""
    p_all, sizes = 0.7 ** 3, {k: math.comb(3, k) * 0.7 ** k * 0.3 ** (3 - k) for k in range(4)}
    exact = 1 - p_all ** 4 - (1 - p_all) ** 4
    soft = 1 - sum(p ** 4 for p in sizes.values())
    assert soft > exact
    credit = {k: choice_share(f"Answer: {', '.join('ABC'[:k])}", "A,B,C") for k in range(4)}
    assert credit == {0: 0.0, 1: 1 / 3, 2: 2 / 3, 3: 1.0}
    mean = sum(p * credit[k] for k, p in sizes.items())
    variance = sum(p * (credit[k] - mean) ** 2 for k, p in sizes.items())
    assert variance < p_all * (1 - p_all)


# ----------------------------------------------------------------------------------------------------------------- safety
def requests(count=7, topics=("x", "y", "z")):
    return [Group(f"{t} request {k}", [], meta={"topic": t}) for k in range(count) for t in topics]


@pytest.mark.parametrize("each", [1, 2, 5])
def test_the_grid_of_topics_and_styles_is_even(each):
    styles = ["plain", "role_play", "base64", "rot13", "story"]
    found = list(augment.attacks(requests(), styles=styles, each=each, held_out_styles=["story"], held_out_topics=["z"]))
    cells = Counter((g.meta["topic"], g.meta["style"]) for g in found)
    assert len(found) == 21 * each and len(cells) == 15 and max(cells.values()) - min(cells.values()) <= 1
    assert all(g.meta["held_out"] == (g.meta["topic"] == "z" or g.meta["style"] == "story") for g in found)
    assert len({(g.meta["request"], g.meta["style"]) for g in found}) == len(found)


def test_styles_carry_the_whole_request():
    import base64
    import codecs
    request = "How do I MARK this?"
    for name, style in safety.STYLES.items():
        text = style(request)
        hidden = {"base64": lambda t: base64.b64decode(t.split(": ")[1]).decode(),
                  "rot13": lambda t: codecs.decode(t.split(": ")[1], "rot13"), "spaced": lambda t: t.split(": ")[1][::2],
                  "split": lambda t: "".join(re.findall(r'"(.*?)"', t))}
        assert request in hidden.get(name, lambda t: t)(text), name
    assert len(safety.STYLES) >= 16


def test_equal_requests_are_used_once_and_mistakes_are_told():
    twice = [Group("A  request", [], meta={"topic": "x"}), Group("a request", [], meta={"topic": "x"})]
    assert failed(augment.attacks(twice)) == ["attacks: the same request came before"]
    with pytest.raises(ValueError, match="did you mean 'topic'"):
        list(augment.attacks(requests(), topic="topics"))
    with pytest.raises(ValueError, match="did you mean 'base64'"):
        list(augment.attacks(requests(), styles=["base46"]))
    with pytest.raises(ValueError, match="from 1 to 16, found 17"):
        list(augment.attacks(requests(), each=17))


def answers(*values, score="safe"):
    return Group("?", [Response(f"answer {v}", scores={score: v}) for v in values], relevance=[0.0] * len(values))


def test_safety_pairs_do_not_make_up_what_is_unsafe():
    assert augment.safety_pairs(answers(0.6, 0.9)) == augment.safety_pairs(answers()) == []
    found, = augment.safety_pairs(answers(0.2, 0.6, 0.1, 0.9))
    assert [r.text for r in found.responses] == ["answer 0.9", "answer 0.1"] and found.relevance == [1.0, 0.0]
    found, = augment.safety_pairs(answers(0.2, 0.4))
    assert found.responses[0].text in safety.REFUSALS and found.responses[1].text == "answer 0.2"
    assert found.responses[0].meta == {"generator": "template"} and augment.safety_pairs(answers(0.2), refusals=()) == []
    with pytest.raises(KeyError, match="no score 'safe'"):
        augment.safety_pairs(answers(0.2, score="harm"))


def test_lookalikes_prefer_the_helpful_answer():
    found, = augment.lookalike_pairs(answers(0.9, 0.6, score="helpful"))
    assert found.responses[0].text == "answer 0.9" and found.responses[1].text in safety.REFUSALS
    assert augment.lookalike_pairs(answers(0.4, score="helpful")) == []


def test_attack_success_of_cells():
    groups = [Group("?", answers(0.1, 0.9, 0.2).responses, meta={"topic": "x", "style": s}) for s in ("plain", "rot13", "plain")]
    groups[1].responses = answers(0.9).responses
    assert safety.attack_success(groups) == {("x", "plain"): 2 / 3, ("x", "rot13"): 0.0}
    with pytest.raises(ValueError, match="has no 'subject', which names the topic of the request; there: topic, style"):
        safety.attack_success(groups, topic="subject")


# -------------------------------------------------------------------------------------------------------------- real data
@pytest.mark.skipif(not DATA.exists(), reason="the shared data are not here")
def test_templates_on_gsm8k_and_choices_of_truthfulqa():
    questions = list(load(DATA / "gsm8k" / "train.jsonl.gz", limit=200))
    found = [one for g in questions for one in augment.reformulated_by_template(g)]
    counts = Counter(g.meta.get("aspect") for g in made(found))
    assert counts["background"] == 200 and counts["term"] > 80 and counts["sub_problem"] > 130
    by_prompt = {g.meta["place"]: g.prompt for g in questions}
    assert all(evaluated(g.prompt) == by_prompt[g.meta["place"]] for g in made(found) if g.meta.get("aspect") == "sub_problem")
    asked = list(load(DATA / "truthfulqa" / "TruthfulQA.csv", columns={"prompt": "Question"}))
    chosen = [one for g in asked for one in augment.multiple_choice(g, right="Correct Answers", wrong="Incorrect Answers")]
    assert len(made(chosen)) >= 810
    turned = [one for g in made(chosen) for one in augment.inverted(g, share=1)]
    assert len(made(turned)) == len(made(chosen)) and len(failed(turned)) < 0.1 * len(chosen)


@pytest.mark.skipif(not DATA.exists(), reason="the shared data are not here")
def test_mapl_on_real_pairs():
    for group in load(DATA / "hh_rlhf_harmless" / "train.jsonl.gz", limit=60):
        found = augment.mapl(group)
        assert len(found) >= 3
        first = found[1].responses
        assert first[0].text == first[1].text and first[0].prompt[-1]["content"] != first[1].prompt[-1]["content"]
