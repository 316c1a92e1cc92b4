"""Checks of data: planted faults are found, sound data is left alone, repairs do what they say."""
import doctest
import importlib
import json
import math
import random
import re
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_tools.fields import DataError
from data_tools.formats import dump, load
from data_tools.labels import flip
from data_tools.quality import findings, noise, texts
from data_tools.quality.check import check
from data_tools.quality.describe import describe
from data_tools.quality.duplicates import candidates, ngrams, overlapping, signatures, twins, verdict
from data_tools.quality.findings import Finding, Tally, by_group, save
from data_tools.quality.fix import REPAIRS, fix, fixed
from data_tools.quality.words import chosen, chunks, counts, digest, identity, shingles, words
from data_tools.records import Group, Response
from data_tools.rules import keep

DATA = Path(__file__).parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the data subsets are not beside the repository")
MODULES = ("words", "findings", "duplicates", "texts", "noise", "check", "fix", "sampling", "describe", "view", "page")
VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "io", "u") for c in ("n", "r", "st", "lk", "mo")]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(f"data_tools.quality.{name}")).failed == 0


def pair(good, bad, prompt="p", **meta):
    return Group(prompt, [Response(good), Response(bad)], [1.0, 0.0], meta=meta)


def said(rng, count, words=VOCABULARY):
    return " ".join(rng.choices(words, k=count))


def random_groups(count, seed=0, size=2, length=40):
    rng = random.Random(seed)
    return [Group(said(rng, 15) + "?", [Response(said(rng, length) + ".") for _ in range(size)],
                  [float(size - k) for k in range(size)]) for _ in range(count)]


def kinds(findings):
    return Counter(f.kind for f in findings)


def changed(group, rng, share):
    """The group with a share of the words of its texts replaced, its responses in another order."""
    edit = lambda text: " ".join(rng.choice(VOCABULARY) if rng.random() < share else w for w in text.split())
    order = rng.sample(range(len(group.responses)), len(group.responses))
    group = keep(group, order)
    return Group(edit(group.prompt), [Response(edit(r.text)) for r in group.responses], group.relevance)


# --------------------------------------------------------------------------------------------------------------- words
def plain_words(text):
    return re.findall(r"[a-z0-9]+|[-+*/=<>%^$]", text.lower())


def test_words_are_those_of_a_plain_reading():
    rng = random.Random(0)
    sample = ["", "One, two; THREE!", "a-b c/d 3.5% $4", *("".join(rng.choices("ab cD.1-\n", k=30)) for _ in range(200))]
    found, expected = words(sample), [w for t in sample for w in plain_words(t)]
    assert len(found.number) == len(expected) and np.diff(found.start).tolist() == [len(plain_words(t)) for t in sample]
    by_number = {}
    for number, word in zip(found.number.tolist(), expected, strict=True):
        assert by_number.setdefault(number, word) == word      # one number, one word
    assert len(by_number) == len(set(expected))                # and one word, one number


def test_words_do_not_depend_on_company():
    alone = words(["some words"]).number.tolist()
    assert words(["x " * 5000, "some words", "日本"]).number[5000:5002].tolist() == alone


@pytest.mark.parametrize("one, other", [("ﬁne Ｗords", "fine words"), ("caf\u00e9", "cafe\u0301"), ("STRASSE", "strasse")])
def test_words_are_compared_after_normalisation(one, other):
    assert words([one]).number.tolist() == words([other]).number.tolist()


def test_scripts_without_blanks_are_divided():
    assert len(words(["日本語"]).number) == 3 and len(words(["ไทย"]).number) == 3 and len(words(["नमस्ते"]).number) == 1
    assert len(words(["half \ud800 pair 🙂🙂"]).number) == 4


@pytest.mark.parametrize("size", [1, 2, 3, 13])
def test_shingles_are_runs_of_words(size):
    rng = random.Random(size)
    sample = [said(rng, n, ["a", "b", "c"]) for n in (0, 1, 2, 3, 5, 12, 13, 14, 30)]
    number, text = shingles(words(sample), size)
    runs = []
    for n, t in enumerate(sample):
        w = t.split()
        runs += [(n, tuple(w[k:k + size])) for k in range(max(len(w) - size + 1, 1))] if w else []
    assert text.tolist() == [n for n, _ in runs]
    same = {}
    for k, (_, run) in enumerate(runs):
        assert same.setdefault(int(number[k]), run) == run
    assert len(same) == len({run for _, run in runs})


def test_counts_are_those_of_words_and_neighbours():
    sample = ["a b a b", "", "b a"]
    found = counts(words(sample), 1 << 18).toarray()
    assert found.sum(1).tolist() == [7, 0, 3] and sorted(found[0][found[0] > 0]) == [1, 2, 2, 2]       # ba; a, b, ab
    assert (found[0] * found[2]).sum() == 2 + 2 + 1            # a, b and ba


def test_chosen_words_are_those_of_the_texts_alone():
    found = chosen(words(["a b", "c", "", "d e f"]), np.array([0, 2, 3]))
    expected = words(["a b", "", "d e f"])
    assert all((x == y).all() for x, y in zip(found, expected, strict=True))


def test_identity_is_of_the_content():
    a = pair("x", "y", place="f:1")
    assert identity(a) == identity(pair("x", "y", place="g:2")) != identity(pair("y", "x"))


# ---------------------------------------------------------------------------------------------------------- duplicates
def test_signatures_estimate_jaccard():
    rng, off = random.Random(0), []
    for n in range(60):
        a = said(rng, 80).split()
        b = [w if rng.random() > n / 200 else rng.choice(VOCABULARY) for w in a]
        runs = [{tuple(w[k:k + 2]) for k in range(79)} for w in (a, b)]
        found = signatures(words([" ".join(a), " ".join(b)]), np.arange(2), 2)
        exact = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        off.append(((found[0] == found[1]).mean() - exact) / max(math.sqrt(exact * (1 - exact) / 128), 0.02))
    assert abs(np.mean(off)) < 0.4 and 0.6 < np.std(off) < 1.4 and np.abs(off).max() < 4        # as 128 fair draws do


def test_signature_of_several_texts_is_of_their_union():
    texts_ = ["a b c d e", "f g h i", "a b c d e f g h i"]
    found = signatures(words(texts_), np.array([0, 0, 1]), 3)
    split = signatures(words(texts_[:2]), np.arange(2), 2)
    assert not found[2].any() and (found[0] == signatures(words(texts_[:2]), np.array([0, 0]), 1)[0]).all()
    assert ((found[0] == split[0]) | (found[0] == split[1])).all()


def planted(count=1500, seed=1):
    """Groups, and which of them is a copy with few words changed; besides, groups that only look alike."""
    rng, groups = random.Random(seed), random_groups(count, seed)
    copies = [changed(groups[n], rng, 0.02) for n in rng.sample(range(count), 300)]
    alike = []
    for n in rng.sample(range(count), 300):
        g = groups[n]
        alike += [Group(g.prompt, [Response(said(rng, 40)) for _ in g.responses], g.relevance),           # another sampling
                  Group(g.prompt, [g.responses[0], Response(said(rng, 40))], g.relevance),                # half of it new
                  changed(g, rng, 0.3)]
    rows = [(g, False) for g in groups] + [(g, True) for g in copies] + [(g, False) for g in alike]
    head, rest = rows[:count], rows[count:]
    rng.shuffle(rest)
    return [g for g, _ in head + rest], [copy for _, copy in head + rest]


def test_planted_near_duplicates_are_found():
    groups, copies = planted()
    found = {f.group - 1 for f in check(groups, skip=["labels"]) if f.kind in ("near duplicate", "duplicate")}
    hit = sum(copies[n] for n in found)
    assert hit / sum(copies) >= 0.95 and hit / len(found) >= 0.95


@real
def test_planted_near_duplicates_of_real_problems():
    rng = random.Random(0)
    groups = [Group(g.prompt, [Response(g.meta["answer"])]) for g in load(str(DATA / "gsm8k" / "train.jsonl.gz"))]
    assert not {"duplicate", "near duplicate"} & set(kinds(check(groups, skip=["labels"])))
    copies = []
    for g in rng.sample(groups, 300):
        left_out, swapped = rng.sample(range(len(g.prompt.split())), 2)
        w = g.prompt.split()
        w[swapped] = "these"
        copies.append(Group(" ".join(w[:left_out] + w[left_out + 1:]), [Response(g.responses[0].text.replace("\n", " \n\n"))]))
    found = {f.group for f in check(groups + copies, skip=["labels"]) if f.kind == "near duplicate"}
    assert len(found & set(range(1501, 1801))) >= 0.95 * 300 and len(found - set(range(1501, 1801))) <= 0.05 * len(found)


def test_exact_duplicates_in_any_order_and_contradictions():
    a, b = pair("yes it is", "no it is not"), pair("one", "two", prompt="q")
    again = keep(a, [1, 0])
    against = Group("p", a.responses, [0.0, 1.0])
    quiet = Group("p", a.responses)
    found = [f for f in check([a, b, again, against, quiet], skip=["labels"]) if "duplicate" in f.kind]
    assert [(f.group, f.kind, f.sure) for f in found] == [(3, "duplicate", 1.0), (4, "contradictory duplicate", 1.0),
                                                          (5, "duplicate", 1.0)]
    assert verdict(a) == verdict(again) != verdict(against) and verdict(quiet) == 0


def test_a_sign_makes_a_difference():
    groups = [pair("it is 7", "it is 8", prompt=f"What is 12 {sign} 5?") for sign in "+-"]
    assert not [f for f in check(groups, skip=["labels"]) if "duplicate" in f.kind]


def test_texts_without_words_are_not_alike():
    groups = [pair("!!!", "??", prompt="..."), pair(";;", "::", prompt="!?"), pair("!!!", "??", prompt="...")]
    assert [(f.group, f.kind) for f in check(groups, skip=["labels"]) if f.group] == [(3, "duplicate")]


def test_a_crowd_is_cheap_and_a_chain_is_cut():
    crowd = [pair("yes of course it is", "no it is not that", prompt="is it so or is it not?")] * 3000
    assert kinds(check(crowd, skip=["labels", "texts"]))["duplicate"] == 2999
    base = [f"word{n}" for n in range(100)]
    chain = [" ".join(f"new{n}" if n < 4 * k else w for n, w in enumerate(base)) for k in range(20)]
    signature = signatures(words(chain), np.arange(20), 20)
    found = twins(np.arange(20, dtype=np.uint64), signature, near=0.8)
    rest = {t.later: t.earlier for t in found}
    assert all(t.earlier not in rest for t in found) and all(t.similarity >= 0.8 for t in found)
    assert len(rest) < 19 and max(a - b for a, b in rest.items()) <= 5       # 5 steps: 20 of 100 words are new, J = 0.66


def test_bands_miss_hardly_any():
    """1 - (1 - s^4)^32 at s = 0.8 is 1 - 5e-8; independent draws at the exact share of equal places."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 1 << 16, (2000, 128), dtype=np.uint16)
    copy = np.where(rng.random((2000, 128)) < 0.8, base, rng.integers(0, 1 << 16, (2000, 128), dtype=np.uint16))
    later, earlier = candidates(np.concatenate([base, copy]), np.arange(4000))
    assert sum(a - b == 2000 for a, b in zip(later, earlier, strict=True)) >= 1999


def test_prompts_of_two_splits():
    one, other = "the first prompt here", "another one of them"
    groups = [pair("a", "b", one, split="train"), pair("c", "d", other, split="train"), pair("e", "f", one, split="test"),
              pair("g", "h", one, split="train")]
    found = [f for f in check(groups, skip=["labels"]) if f.kind == "prompt in two splits"]
    assert [f.group for f in found] == [1, 4] and all("split 'test'" in f.message for f in found)     # the small split stays


# --------------------------------------------------------------------------------------------------------------- tests
def test_contamination_by_hand():
    rng = random.Random(3)
    question = [f"q{n}" for n in range(20)]                    # 8 runs of 13 words
    sets = {"exam": [Group(" ".join(question), [], meta={"place": "exam.jsonl:1"}), Group("What now?", [])]}
    around = lambda inner: " ".join([said(rng, 10), *inner, said(rng, 10)])
    groups = [pair("a", around(question[3:16])), pair("a", around(question[3:15])), pair("a", around(question), prompt="z"),
              pair("a", "b", prompt="what, now"), pair("a", "b", prompt="what now indeed")]
    found = [f for f in check(groups, skip=["labels"], against=sets) if f.kind == "contaminated"]
    assert [(f.group, f.sure) for f in found] == [(1, 0.125), (3, 1.0), (4, 1.0)]
    assert "exam exam.jsonl:1" in found[0].message and "exam 2" in found[2].message


def test_templates_of_a_test_set_do_not_count():
    head = "answer the following question in a few words and say why you think so "
    known = ngrams({"t": [Group(head + f"item{n} and so on", []) for n in range(30)]})
    chunk = next(chunks([Group(head + "something else entirely", []), Group(head + "item7 and so on", [])]))
    assert [n for n, *_ in overlapping(chunk, known)] == [1]


def test_several_items_the_best_is_named():
    items = [" ".join(f"a{n}" for n in range(15)), " ".join(f"a{n}" for n in range(40))]
    known = ngrams({"t": [Group(i, []) for i in items]})
    assert list(overlapping(next(chunks([Group(items[0], [])])), known)) == [(0, 0, 1.0)]


# --------------------------------------------------------------------------------------------------------------- texts
GOOD = ("It’s naïve – 100 % “true”…", "São Paulo, Ångström, Ýmir, ÐÞ", "日本語のテキスト", "Ελλάδα и Россия", "tab\tand\nline",
        "👩‍👩‍👧 ok", "Â is a letter", "Ã quem", "5 Â° is odd")


@pytest.mark.parametrize("text", GOOD)
def test_sound_characters_are_left_alone(text):
    assert not [p for p in texts.encoding(text) if p.kind != "mojibake"] and texts.cleaned(text) in (text, "5 ° is odd")


@pytest.mark.parametrize("text", ["It’s naïve – “true”", "São Paulo", "Müller & Söhne", "日本", "Россия", "price: £5", "Ýmir"])
def test_mojibake_goes_back(text):
    spoilt = "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in text.encode())
    assert [p.kind for p in texts.encoding(spoilt) if p.kind == "mojibake"] and texts.cleaned(spoilt) == text


@pytest.mark.parametrize("text, kind", [("a\x00b", "control character"), ("a\x1b[2Jb", "control character"),
                                        ("a\u202eb", "invisible character"), ("x\ufeff", "invisible character"),
                                        ("what\ufffd", "lost character"), ("half \ud800", "lost character")])
def test_broken_characters(text, kind):
    assert [p.kind for p in texts.encoding(text)] == [kind]
    assert kind == "lost character" or not list(texts.encoding(texts.cleaned(text)))


REFUSES = ("I'm sorry, but I can't help with that.", "I cannot provide instructions for this.",
           "I can’t assist you with that request.", "As an AI language model, I do not have feelings.",
           "I apologize, but I am not able to do that.",
           "Sorry, I won't do that.", "I must respectfully decline.", "That goes against my guidelines, sorry.")
ANSWERS = ("I'm sorry to hear that! You can try restarting it.", "You can't divide by zero.", "I can't believe how good it is.",
           "The AI said it was sorry.", "Sorry is the hardest word.", "We cannot know the answer without x, so let x = 2.")


@pytest.mark.parametrize("text", REFUSES)
def test_refusals(text):
    assert [p.kind for p in texts.refusal(text)] == ["refusal"]


@pytest.mark.parametrize("text", ANSWERS)
def test_no_refusals(text):
    assert not list(texts.refusal(text))


WHOLE = ("Yes.", "42", "The answer is 3", "- one\n- two long item of a list without any end to it", "x = [1, 2]",
         "```py\nx = 1\n```", "He said “it is so, and we all know it is”", "#### 18",
         "| a | b |\n| 1 | a long cell of a table with some words |",
         "What a day for all of us here today 🎉", "see the page of the project at https://a.example/b")
CUT = ("```py\nx = 1\n", "We know that the answer to this must be one of those that",
       "Then, because of it,\nwe all went down the road to the",
       "1. Boil it well.\n2. Let it cool down.\n3. Fl")


@pytest.mark.parametrize("text", WHOLE)
def test_whole_responses(text):
    assert not list(texts.truncation(text))


@pytest.mark.parametrize("text", CUT)
def test_cut_responses(text):
    assert [p.kind for p in texts.truncation(text)] == ["truncated"]


@real
def test_cut_ends_on_real_answers():
    answers = [g.responses[0].text for g in load(str(DATA / "alpaca_eval" / "gpt4_1106_preview.outputs.jsonl.gz"))]
    long = [t for t in answers if len(t) > 400]
    rng = random.Random(0)
    cut = [t[:rng.randrange(200, len(t) - 50)] for t in long]
    assert np.mean([bool(list(texts.truncation(t))) for t in long]) <= 0.01
    assert np.mean([bool(list(texts.truncation(t))) for t in cut]) >= 0.55


PERSONAL = (("mail me: jo.smith+x@mail.posteo.net!", "email"), ("call +49 30 1234567 now", "phone"), ("(555) 867-5309", "phone"),
            ("card 4539 5787 6362 1486.", "card"), ("SSN 219-09-9999", "social security number"),
            ("IBAN DE89 3704 0044 0532 0130 00", "iban"),
            ("host 81.2.69.142 is up", "ip address"), ("key ghp_" + "a1B2" * 9, "secret key"))
HARMLESS = ("see you @ 5", "user@example.com", "3.14159 and 1,000,000,000", "card 4539 5787 6362 1487", "version 1.2.3.4.5",
            "127.0.0.1", "12345678901 - 12345", "2024-01-15", "f(x) = (123) 456", "call 911")


@pytest.mark.parametrize("text, kind", PERSONAL)
def test_personal_data(text, kind):
    assert [p.kind for p in texts.personal(text)] == [kind]
    assert f"[{kind}]" in texts.redacted(text) and not list(texts.personal(texts.redacted(text)))


@pytest.mark.parametrize("text", HARMLESS)
def test_no_personal_data(text):
    assert not list(texts.personal(text)) and texts.redacted(text) == text


SPEECH = {"en": "It is a truth that was known to all of them, and they had to be glad of it.",
          "de": "Es ist eine Wahrheit, die wir alle kennen, und sie war auch für den Mann nicht neu.",
          "fr": "C'est une vérité que nous avons dans le monde, et elle ne plaît pas à tous les hommes.",
          "es": "Es una verdad que todos conocen, y los hombres no están de acuerdo con ella por su interés.",
          "it": "È una verità che non piace alla gente, ma il mondo è come è anche per gli uomini del paese.",
          "pt": "É uma verdade que não agrada aos homens, mas o mundo foi sempre como é e está em paz.",
          "nl": "Het is een waarheid die wij allen kennen, en er is niet veel om aan toe te voegen voor de man.",
           "ru": "Это всем известная истина.", "ja": "これは有名な真理である。",
          "zh": "这是一个众所周知的真理。", "ko": "이것은 잘 알려진 진리이다."}


def test_languages():
    evidence, names = texts.language(list(SPEECH.values()), words(list(SPEECH.values())))
    assert [names[k] for k in evidence.argmax(1)] == list(SPEECH)


def test_language_of_a_response_and_wanted_ones():
    english, german = SPEECH["en"], SPEECH["de"]
    groups = [Group(english, [Response(english), Response(german)]), Group(german, [Response(german)])]
    strange = lambda *wanted: [(f.group, f.response) for f in check(groups, skip=["labels", "texts"], languages=wanted)
                               if f.kind == "language"]
    assert strange() == [(1, 2)] and strange("en") == [(1, 2), (2, 0), (2, 1)] and strange("en", "de") == []


def test_hooks():
    angry = lambda some: [0.9 if "fool" in t else 0.1 for t in some]
    groups = [pair("you fool", "fine"), pair("ok", "good", prompt="fool?")]
    found = [f for f in check(groups, skip=["labels"], hooks={"toxicity": angry}) if f.kind == "toxicity"]
    assert [(f.group, f.response, f.sure) for f in found] == [(1, 1, 0.9), (2, 0, 0.9)]
    for wrong in (lambda some: [0.1], lambda some: [math.nan] * len(some), lambda some: [2.0] * len(some)):
        with pytest.raises(ValueError, match="'toxicity' returned"):
            list(check(groups, skip=["labels"], hooks={"toxicity": wrong}))


# -------------------------------------------------------------------------------------------------------------- biases
def test_position_and_length_bias():
    groups = [pair(f"long answer {n}", f"no {n}") for n in range(80)] + [pair(f"ab {n}", f"long answer {n}") for n in range(20)]
    found = {f.kind: f.message for f in check(groups, skip=["labels"])}
    assert "100.0% of 100 pairs (10 standard errors" in found["position bias"]            # (1 - 1/2) / sqrt(1/4 / 100)
    assert "80.0% of 100 pairs (6 standard errors" in found["length bias"]
    fair = [g if n % 2 else keep(g, [1, 0]) for n, g in enumerate(random_groups(400))]
    assert not {"position bias", "length bias"} & set(kinds(check(fair, skip=["labels"])))
    lists = [Group(f"list {n}", [Response(f"{n} {k} " + "x" * k) for k in range(20)], [float(k) for k in range(20)])
             for n in range(4)]                               # four draws of 190 pairs: z = 4 d / sqrt(4 d^2) = 2
    assert not {"position bias", "length bias"} & set(kinds(check(lists, skip=["labels"])))


# --------------------------------------------------------------------------------------------------------------- noise
def test_margin_turns_with_the_labels():
    group = Group("?", [Response(t) for t in "abc"], [0.0, 2.0, 1.0])
    scores = [0.3, 1.1, 2.0]
    assert noise.margin(group, scores) == pytest.approx(((1.1 - 0.3) + (1.1 - 2.0) + (2.0 - 0.3)) / 3)
    assert noise.margin(next(flip([group], rate=1.0)), scores) == pytest.approx(-noise.margin(group, scores))
    assert math.isnan(noise.margin(Group("?", group.responses), scores)) and math.isnan(noise.margin(group, [None] * 3))


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.35])
def test_flip_rate_and_posterior_of_known_margins(rate):
    """Labels drawn from the model itself: the estimate is right, and so is P(turned), against the formula and against a count."""
    rng = np.random.default_rng(round(100 * rate))
    m = np.abs(rng.normal(0, 2, 40_000))
    right, turned = rng.random(len(m)) < 1 / (1 + np.exp(-1.5 * m)), rng.random(len(m)) < rate
    m = np.where(right ^ turned, m, -m)
    found = noise.flips(m)
    assert found.interval[0] <= rate <= found.interval[1] and abs(found.rate - rate) < 0.02 and found.groups == 40_000
    p = np.interp(m, found.margins, found.turned)
    s = 1 / (1 + np.exp(-1.5 * m))
    assert np.abs(p - rate * (1 - s) / (rate * (1 - s) + (1 - rate) * s)).max() < 0.06
    for low in (0.1, 0.5, 0.8):
        some = (p > low) & (p < low + 0.15)
        if some.sum() > 500:
            assert abs(p[some].mean() - turned[some].mean()) < 0.05


def test_flips_without_anything_to_know():
    assert noise.flips(np.full(10, np.nan)).groups == 0 and not noise.flips(np.zeros(0)).knows
    found = noise.flips(np.random.default_rng(0).normal(size=500))
    assert not found.knows


def quality_groups(count, seed=0, size=2):
    """Responses that are preferred for their good words, by some distance: a set where a model of the words can know."""
    rng = random.Random(seed)
    worth = {w: rng.gauss(0, 1) for w in VOCABULARY}
    out = []
    while len(out) < count:
        answers = [said(rng, 30) for _ in range(size)]
        values = [sum(worth[w] for w in a.split()) for a in answers]
        if max(values) - min(values) > 6:
            out.append(Group(said(rng, 12), [Response(a) for a in answers], values))
    return out


def precision(findings, groups, recall):
    """Of the surest suspected flips: the precision where `recall` of the planted ones are listed."""
    listed = sorted((f for f in findings if f.kind == "suspected flip"), key=lambda f: -f.sure)
    hits = np.cumsum([groups[f.group - 1].meta["flipped"] for f in listed])
    planted = sum(g.meta["flipped"] for g in groups)
    at = int(np.searchsorted(hits, recall * planted))
    assert at < len(hits), f"only {hits[-1] / planted:.2f} of the flips are listed"
    return hits[at] / (at + 1)


@pytest.mark.parametrize("size", [2, 4])
def test_planted_flips_are_listed(size):
    groups = list(flip(quality_groups(1500, size=size), rate=0.2, seed=2))
    found = list(check(groups, skip=["texts", "language", "duplicates"]))
    assert precision(found, groups, 0.6) >= 0.8
    told = next(f.message for f in found if f.kind == "label noise")
    low, high = map(int, re.search(r"\((\d+)% to (\d+)%\)", told).groups())
    assert low <= 20 <= high


@real
def test_planted_flips_on_real_answers():
    """GPT-4's answers preferred to those of a 7B model: their style is known from the words."""
    strong, weak = ({g.prompt: g.responses[0] for g in load(str(DATA / "alpaca_eval" / f"{name}.outputs.jsonl.gz"))}
                    for name in ("gpt4_1106_preview", "alpaca-7b"))
    groups = [Group(p, [strong[p], weak[p]], [1.0, 0.0]) for p in strong if p in weak]
    groups = list(flip(groups, rate=0.2, seed=1))
    assert precision(check(groups, skip=["texts", "duplicates"]), groups, 0.6) >= 0.8


def test_flips_by_a_given_score():
    rng = random.Random(0)
    groups = []
    for g in quality_groups(600):
        rows = [Response(r.text, scores={"reward": v + rng.gauss(0, 1)}) for r, v in zip(g.responses, g.relevance, strict=True)]
        groups.append(Group(g.prompt, rows, g.relevance))
    groups = list(flip(groups, rate=0.2, seed=4))
    assert precision(check(groups, score="reward", skip=["texts"]), groups, 0.6) >= 0.8
    with pytest.raises(ValueError, match="'rewards'.*did you mean 'reward'"):
        list(check(groups, score="rewards"))


def test_crossfit_has_not_seen_what_it_judges():
    """Coin tosses for labels: any model that had seen them would agree with more than half."""
    rng = random.Random(0)
    groups = [Group(f"prompt {n // 3}", [Response(said(rng, 30)), Response(said(rng, 30))], rng.choice([[1.0, 0.0], [0.0, 1.0]]))
              for n in range(600)]
    found = list(check(groups, skip=["texts", "language", "duplicates"]))
    told = next(f.message for f in found if f.kind == "label noise")
    assert "no more than chance" in told and not kinds(found)["suspected flip"]


def test_crossfit_does_not_depend_on_order():
    groups = quality_groups(200)
    there, back = (noise.crossfit(order)(next(chunks(groups))) for order in (groups, groups[::-1]))
    assert np.abs(there - back).max() < 1e-3 * np.abs(there).max()


def test_too_few_labels_to_learn_from():
    assert "30 groups" in next(f.message for f in check(quality_groups(30)) if f.kind == "label noise")
    assert not kinds(check([Group("a", [Response("b")])]))["label noise"]
    with pytest.raises(noise.Unlearnable, match="of 3 groups"):
        noise.crossfit(quality_groups(3))
    same = [Group("", g.responses, g.relevance) for g in quality_groups(80)]
    assert "of 80 groups 80 have prompts of one fold" in next(f.message for f in check(same) if f.kind == "label noise")


def test_disagreement_gives_back_the_error_rate():
    rng = random.Random(0)
    ballots = []
    for _ in range(20_000):
        truth = rng.random() < 0.5
        ballots.append([truth ^ (rng.random() < 0.1) for _ in range(3)])
    assert abs(noise.disagreement(ballots)["error rate"] - 0.1) < 0.01
    assert noise.disagreement([(1,)]) == {"items": 0} and noise.disagreement([(1, 0)])["error rate"] == 0.5


@real
def test_annotators_of_real_data():
    found = kinds(check(load(str(DATA / "pandalm" / "*.gz")), skip=["texts"]))
    assert found["annotators differ"] == 104 and found["annotator noise"] == 1           # 85 % unanimous, as its paper says


# --------------------------------------------------------------------------------------------------------------- check
def test_sound_data_has_no_findings():
    groups = [g if n % 2 else keep(g, [1, 0]) for n, g in enumerate(random_groups(120))]
    assert set(kinds(check(groups))) <= {"label noise"}


def test_findings_say_where(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": "p1", "chosen": "fine", "rejected": "a\x00b"}, {"prompt": "p2", "chosen": "", "rejected": "b"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows[:1]) + "{broken\n" + json.dumps(rows[1]) + "\n")
    tally = save(check(load(str(path))), tmp_path / "found.jsonl")
    assert tally.counts == {"control character": 1, "empty response": 1, "unreadable": 1, "label noise": 1}
    found = {f.kind: f for f in findings.load(tmp_path / "found.jsonl")}
    assert found["control character"].place == f"{path}:1" and found["control character"].response == 2
    assert found["unreadable"].place == f"{path}:2" and found["empty response"].place == f"{path}:3"
    assert str(found["control character"]).startswith(f"{path}:1 response 2: U+0000")
    assert "unreadable: 1" in str(tally) and f"{path}:2: malformed json" in str(tally)


def test_findings_do_not_depend_on_the_chunk(monkeypatch):
    groups = planted(300)[0][-400:]
    plain = list(check(groups, skip=["labels"]))
    monkeypatch.setattr("data_tools.quality.check.chunks", lambda groups: chunks(groups, 23))
    other = list(check(groups, skip=["labels"]))
    assert sorted(plain, key=str) == sorted(other, key=str)


def test_conversations_and_odd_groups():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]
    groups = [Group(chat, [Response([{"role": "assistant", "content": "a\x00"}]), Response("ok", meta={"finished": False})]),
              Group("no responses", []), Group("", [Response("x")], [1.0])]
    found = kinds(check(groups))
    assert found == {"control character": 1, "truncated": 1, "empty prompt": 1}
    assert [f.kind for f in check([])] == ["no groups"]


@pytest.mark.parametrize("options, words_", [
    ({"skip": ["duplicate"]}, "did you mean 'duplicates'"), ({"languages": ["english"]}, "languages names 'english'"),
    ({"skip": ["nothing like it"]}, "known: records")])
def test_misspelt_settings(options, words_):
    with pytest.raises(ValueError, match=words_):
        check([], **options)


def test_an_iterator_is_refused_for_labels_alone():
    with pytest.raises(ValueError, match="skip=\\['labels'\\]"):
        check(iter(random_groups(3)))
    assert list(check(iter(random_groups(3)), skip=["labels"])) == []


@pytest.mark.slow
def test_throughput_and_memory():
    """A twentieth of 200,000 groups of 4 in a twentieth of 8 minutes, and no more than 2 KB for each further group."""
    groups = random_groups(10_000, size=4, length=60)
    start = time.process_time()
    tally = Tally()
    for one in check(groups):
        tally.note(one)
    describe(groups)
    assert time.process_time() - start < 24 and tally.counts["duplicate"] == 0

    def peak(count):
        tracemalloc.start()
        list(check((random_groups(1, n, 4)[0] for n in range(count)), skip=["labels", "texts"]))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)                                                   # what is made once
    assert (peak(6000) - peak(3000)) / 3000 < 2048


def test_tally_counts_groups_once():
    tally = Tally(keep=1)
    for n in (1, 1, 2):
        tally.note(Finding("k", "m", group=n))
    assert tally.counts["k"] == 3 and tally.groups["k"] == 2 and "and 2 more" in str(tally)
    assert str(Tally()) == "nothing was found"


def test_a_file_that_holds_no_findings(tmp_path):
    (tmp_path / "findings.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="does not exist, did you mean 'findings.jsonl'"):
        list(findings.load(tmp_path / "finding.jsonl"))
    (tmp_path / "f.jsonl").write_text('{"kind": "a", "message": "b"}\n{"prompt": "c"}\n')
    with pytest.raises(DataError, match="f.jsonl:2: this line is no finding"):
        list(findings.load(tmp_path / "f.jsonl"))


# ----------------------------------------------------------------------------------------------------------------- fix
def test_check_fix_check(tmp_path):
    rng = random.Random(0)
    groups = random_groups(60, size=3)
    groups += [groups[0], changed(groups[1], rng, 0.01)]
    groups += [Group(said(rng, 9), [Response(t), Response(said(rng, 20) + "."), Response(said(rng, 20) + ".")], [2.0, 1.0, 0.0])
               for t in (f"caf\u00c3\u00a9 {said(rng, 20)}.", f"mail jo@posteo.net {said(rng, 9)}.", f"{said(rng, 9)} or the")]
    path, out = tmp_path / "d.jsonl", tmp_path / "clean.jsonl"
    dump(groups, path)
    before = path.read_bytes()
    found = [f for f in check(load(str(path))) if f.kind != "label noise"]
    wanted = {"duplicate", "near duplicate", "mojibake", "email", "truncated", "position bias"}
    assert set(kinds(found)) == wanted | {"repeated prompts"}
    counts_ = fixed(load(str(path)), found, out, repairs=wanted)
    assert counts_["groups"] == 63 and {"drop": 2, "clean": 1, "redact": 1, "drop response": 1}.items() <= counts_.items()
    assert path.read_bytes() == before and not {*kinds(check(load(str(out))))} & wanted
    log = [json.loads(line) for line in (tmp_path / "clean.jsonl.log.jsonl").read_text().splitlines()]
    assert Counter(e["repair"] for e in log) == {k: v for k, v in counts_.items() if k != "groups"}
    dropped = next(e for e in log if e["repair"] == "drop")
    assert dropped["after"] is None and dropped["before"]["responses"] == groups[0].to_json()["responses"]
    assert dropped["place"] == f"{path}:61" and "the same prompt and responses" in dropped["because"][0]
    with pytest.raises(FileExistsError, match="never overwrite"):
        fixed(load(str(path)), found, out, repairs=["duplicate"])
    with pytest.raises(ValueError, match="did you mean 'duplicate'"):
        fixed(load(str(path)), found, tmp_path / "other.jsonl", repairs=["duplicat"])
    assert not list(tmp_path.glob("*other*"))


def finding(group, kind, repair="", number=1, **more):
    return Finding(kind, "m", repair=repair, group=number, id=identity(group), **more)


def repaired(group, repair, **more):
    return list(fix([group], [finding(group, "k", repair, **more)], repairs=["k"]))


def test_repairs_by_hand():
    three = Group("p", [Response("a"), Response("b"), Response("c")], [2.0, 1.0, 0.0], meta={"x": 1})
    assert repaired(three, "drop") == []
    assert repaired(three, "drop response", response=2) == [Group("p", [Response("a"), Response("c")], [2.0, 0.0], meta={"x": 1})]
    assert repaired(pair("a", "b"), "drop response", response=2) == []
    assert repaired(three, "flip")[0].relevance == [0.0, 1.0, 2.0] and repaired(three, "unlabel")[0].relevance is None
    wins = Group("p", three.responses, wins=[[0.5, 1.0, 0.8], [0.0, 0.5, 0.3], [0.2, 0.7, 0.5]])
    assert repaired(wins, "drop response", response=1)[0].wins == [[0.5, 0.3], [0.7, 0.5]]
    dirty = Group([{"role": "user", "content": "x\x00"}], [Response("y\x00", tokens=[1], logp=[0.1]), Response("z", tokens=[2])])
    clean = repaired(dirty, "clean")[0]
    assert clean.prompt == [{"role": "user", "content": "x"}] and clean.responses == [Response("y"), Response("z", tokens=[2])]


def test_shuffle_keeps_labels_with_their_responses():
    groups = random_groups(200, size=3)
    found = list(fix(groups, [Finding("position bias", "m", repair="shuffle")], repairs=["position bias"]))
    for before, after in zip(groups, found, strict=True):
        there = lambda g: {r.text: v for r, v in zip(g.responses, g.relevance, strict=True)}
        assert there(before) == there(after)
    first = np.mean([g.relevance[0] == 3.0 for g in found])
    assert abs(first - 1 / 3) < 0.11                           # 3.3 standard errors of 200 draws


def test_only_the_sure_and_the_chosen_are_repaired():
    a = pair("a", "b")
    found = [finding(a, "k", "drop", sure=0.7), finding(a, "l", "flip")]
    assert list(fix([a], found, repairs=["k"])) == [a] and list(fix([a], found, repairs=["k"], sure=0.7)) == []
    assert list(fix([a], found, repairs={"k": "unlabel"}, sure=0.5))[0].relevance is None
    assert list(fix([a], found, repairs=[])) == [a]


def test_repairs_that_cannot_be():
    a = pair("a", "b")
    with pytest.raises(ValueError, match="did you mean 'duplicate'"):
        fix([a], [finding(a, "duplicate", "drop")], repairs=["duplicates"])
    with pytest.raises(ValueError, match="'refusal' has no repair of its own: write .*drop"):
        fix([a], [finding(a, "refusal")], repairs=["refusal"])
    with pytest.raises(ValueError, match="did you mean 'unlabel'"):
        fix([a], [finding(a, "refusal")], repairs={"refusal": "unlable"})
    with pytest.raises(ValueError, match="whole data set"):
        fix([a], [Finding("unreadable", "m")], repairs={"unreadable": "drop"})
    with pytest.raises(DataError, match="Run the check again"):
        list(fix([pair("a", "changed")], [finding(a, "duplicate", "drop")], repairs=["duplicate"]))


def test_every_proposed_repair_exists():
    """The names that checks propose are read from their source."""
    import data_tools.quality as package
    source = "".join(p.read_text() for p in Path(package.__file__).parent.glob("*.py"))
    for name in ("drop", "drop response", "flip", "clean", "redact", "shuffle"):
        assert f'"{name}"' in source and name in REPAIRS


def test_by_group_and_digest():
    a, b, whole = Finding("k", "m", group=2), Finding("l", "m", group=2), Finding("w", "m")
    assert by_group([a, whole, b]) == {2: [a, b], 0: [whole]}
    assert digest("a") == digest("a") != digest("b") and digest("\ud800") >= 0
