"""Questions in other words that keep their answer: reformulated (MQR) and paraphrased, by a model or by templates, verified."""
from __future__ import annotations

import difflib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from data_tools.augment.common import Generate, ask, failure, question, reworded, variant
from data_tools.columns import nearest
from data_tools.records import Group
from data_tools.rules import generator
from data_tools.select.grades import NUMBER, answer

__all__ = ["paraphrases", "reformulated", "reformulated_by_template"]

ASPECTS = {
    "background": "Put it into another story that has nothing to do with its mathematical core; where it has a story, use a more "
                  "complex one.",
    "term": "Invent an abstract term for one of its central concepts, define the term, and state the problem with it.",
    "sub_problem": "Replace one of its given numbers by a small problem of its own, from any branch of mathematics, whose answer "
                   "is that number.",
}
REFORMULATE = ("Rewrite the problem below. {aspect} Its answer must stay exactly the same, and must not be told. Write the new "
               "problem between <problem> and </problem>.\n\n{question}")
SOLVE = "Solve the problem step by step, and end with the answer (solution {k} of {n}).\n\n{question}"
PARAPHRASE = ("Write the text below in other words, as different as you can ({k} of {n}). Keep its meaning and all its numbers. "
              "Write the new text alone.\n\n{question}")


def near(a: str, b: str, most: float) -> bool:
    """Whether two texts are nearly the same: the share of words in common, in order."""
    return difflib.SequenceMatcher(None, a.lower().split(), b.lower().split(), autojunk=False).ratio() > most


def told(text: str, original: str, gold: str, pattern: str) -> bool:
    """Whether a text gives an answer away that the original does not."""
    said = {answer(m[0], pattern) for m in re.finditer(pattern, text)}
    return gold in said and gold not in {answer(m[0], pattern) for m in re.finditer(pattern, original)}


# ----------------------------------------------------------------------------------------------------------- by a model
def reformulated(shard: Sequence[Group], *, generate: Generate, aspects=tuple(ASPECTS), field="answer", pattern=NUMBER, samples=3,
                 most_alike=0.9) -> list[Group]:
    """Every prompt, and harder versions of it with the same answer, by a model that is checked (MQR).

    background   another, more complex story        term        an invented term for a central concept
    sub_problem  a given number becomes the answer of a small problem

    generate    prompts -> texts
    aspects     which of the three
    field       of the meta, which holds the answer
    pattern     its last match in a text is the answer; the last number
    samples     solutions of the new problem, of which most must give the answer; 3, and 0 does not check
    most_alike  a version that shares more of its words, in order, is a copy; 0.9
    Edge        a version without <problem>, that tells the answer, is a copy, or does not keep the answer is not used: a copy
                of the group says in meta["failed"] why
    Relations   versions have `meta["aspect"]` and no responses
    Departs     the generation script was not released: the prompts are ours
    Reference   MathForge, arXiv:2601.20614

    >>> texts = iter(["<problem>On the moon there are 3 cats and 4 dogs in a yard. How many?</problem>", "7"])
    >>> cats = Group("3 cats and 4 dogs. How many?", [], meta={"answer": "7"})
    >>> [g.prompt for g in reformulated([cats], generate=lambda p: [next(texts)], aspects=["background"], samples=1)][1]
    'On the moon there are 3 cats and 4 dogs in a yard. How many?'
    """
    for name in aspects:
        if name not in ASPECTS:
            raise ValueError(f"there is no aspect {name!r}{nearest(name, ASPECTS)}; aspects: {', '.join(ASPECTS)}")
    tasks = [(group, aspect) for group in shard for aspect in aspects]
    gold = {id(group): gold_of(group, field, pattern) for group in shard}
    found = ask(generate, [REFORMULATE.format(aspect=ASPECTS[a], question=question(g.prompt)) for g, a in tasks])
    drafts = [draft(text, wrong, question(g.prompt), gold[id(g)], pattern, most_alike)
              for (text, wrong), (g, _) in zip(found, tasks, strict=True)]
    solve = [SOLVE.format(question=text, k=k, n=samples) for text, wrong in drafts if not wrong for k in range(1, samples + 1)]
    solutions = iter(ask(generate, solve))
    made: dict[int, list[Group]] = {id(group): [group] for group in shard}
    for (group, aspect), (text, wrong) in zip(tasks, drafts, strict=True):
        said = [] if wrong else [answer(next(solutions)[0], pattern) for _ in range(samples)]
        right = said.count(gold[id(group)])
        if not wrong and samples and 2 * right <= samples:
            wrong = f"{right} of {samples} solutions of the new problem give the answer {gold[id(group)]}: {text}"
        made[id(group)].append(failure(group, f"reformulated {aspect}", wrong) if wrong else
                               variant(group, "reformulated", text, aspect=aspect))
    return [one for group in shard for one in made[id(group)]]


def gold_of(group: Group, field: str, pattern: str) -> str:
    found = answer(str(group.meta[field]), pattern) if field in group.meta else None
    if found is None:
        there = f"{field} = {group.meta[field]!r}, in which there is no answer" if field in group.meta else \
            f"no {field!r}{nearest(field, group.meta)}"
        raise ValueError(f"{group.meta.get('place', 'a group')}: its meta has {there}; name the field of the answer with field=, "
                         f"and what an answer looks like with pattern=. There: {', '.join(group.meta) or 'nothing'}")
    return found


def draft(text: str, wrong: str, original: str, gold: str, pattern: str, most_alike: float) -> tuple[str, str]:
    """The problem that a model wrote, or what is wrong with it."""
    if wrong:
        return "", wrong
    inside = re.findall(r"<problem>(.*?)</problem>", text, re.DOTALL)
    if not inside or not inside[-1].strip():
        return "", f"there is no <problem> in what the model wrote: {text}"
    made = inside[-1].strip()
    if told(made, original, gold, pattern):
        return "", f"the answer {gold} stands in the new problem: {made}"
    return (made, "") if not near(made, original, most_alike) else ("", f"the new problem is a copy: {made}")


def paraphrases(shard: Sequence[Group], *, generate: Generate, n=2, most_alike=0.9) -> list[Group]:
    """Every group, and n of it whose prompt is put in other words; responses and labels stay.

    generate    prompts -> texts
    n           paraphrases of a prompt; 2
    most_alike  a paraphrase that shares more of its words, in order, with the prompt or an earlier one is a copy; 0.9
    Edge        one that loses or adds a number, or is a copy, is not used: a copy of the group says in meta["failed"] why
    Relations   `meta["paraphrase"]` counts them from 1: what answers one of a set should answer all

    >>> found = paraphrases([Group("Add 2 and 3.", [])], generate=lambda prompts: ["What is 2 plus 3?"], n=1)
    >>> [(g.prompt, g.meta) for g in found][1:]
    [('What is 2 plus 3?', {'rule': 'paraphrases', 'paraphrase': 1})]
    """
    asked = [PARAPHRASE.format(k=k, n=n, question=question(g.prompt)) for g in shard for k in range(1, n + 1)]
    texts = iter(ask(generate, asked))
    out = []
    for group in shard:
        original = question(group.prompt)
        out.append(group)
        known = [original]
        for k in range(1, n + 1):
            text, wrong = next(texts)
            if not wrong and numbers(text) != numbers(original):
                wrong = f"the numbers are not those of the prompt: {text}"
            if not wrong and any(near(text, other, most_alike) for other in known):
                wrong = f"a copy: {text}"
            known += [] if wrong else [text]
            out.append(failure(group, "paraphrases", wrong) if wrong else
                       replace(group, prompt=reworded(group.prompt, text),
                               meta={**group.meta, "rule": "paraphrases", "paraphrase": k}))
    return out


def numbers(text: str) -> Counter:
    return Counter(answer(found) for found in re.findall(NUMBER, text))


# --------------------------------------------------------------------------------------------------------- by templates
STORIES = (("A traveller tells this at an inn, between two tales of the sea.", "The innkeeper nods and asks for the solution."),
           ("An old notebook lies under the floor of a library, and one of its pages reads as follows.",
            "The librarian wants to know the result before the library opens."),
           ("During a pause of a chess tournament two players talk about something else.",
            "The player with the white hat has to find it before the game goes on."))
COINED = ("blonet", "quandle", "torvin", "mirelot", "zaspet")
NOT_COUNTED = ("more", "less", "fewer", "does", "did", "was", "will", "would", "can", "could", "are", "were", "have", "has",
               "times")
WHOLE = re.compile(r"(?<![\w$€£.,:/%^*+=()-])\d{1,4}(?![\w%:/^*+=()-]|[.,]\d)")   # no part of a name, unit, price or formula


def background(text: str, draw: random.Random) -> str | None:
    """A story around the problem, without numbers."""
    before, after = draw.choice(STORIES)
    return f"{before} {text} {after}"


def term(text: str, draw: random.Random) -> str | None:
    """A coined word for what is counted ('how many eggs'), with its definition."""
    counted = re.search(r"\b[Hh]ow (?:many|much) (?:more |fewer |less )?([a-z]{3,})\b", text)
    if counted is None or counted[1] in NOT_COUNTED:
        return None
    coined = draw.choice([w for w in COINED if w not in text])
    return f'Let "{coined}" be another word for "{counted[1]}". ' + re.sub(rf"\b{counted[1]}\b", coined, text)


def sub_problem(text: str, draw: random.Random) -> str | None:
    """One whole number becomes the answer of a small problem."""
    places = [m for m in WHOLE.finditer(text) if int(m[0]) >= 2]
    if not places:
        return None
    found = draw.choice(places)
    return text[:found.start()] + draw.choice(SMALL)(int(found[0]), draw) + text[found.end():]


def as_sum(n: int, draw: random.Random) -> str:
    part = draw.randint(1, n - 1)
    return f"(the sum of {part} and {n - part})"


def as_remainder(n: int, draw: random.Random) -> str:
    divisor = n + draw.randint(1, 9)
    return f"(the remainder of {divisor * draw.randint(2, 6) + n} divided by {divisor})"


def as_divisor(n: int, draw: random.Random) -> str:
    a = draw.randint(2, 6)
    b = draw.choice([b for b in range(2, 12) if math.gcd(a, b) == 1])
    return f"(the greatest common divisor of {a * n} and {b * n})"


def as_equation(n: int, draw: random.Random) -> str:
    a, b = draw.randint(2, 9), draw.randint(1, 20)
    return f"(the solution x of {a}x + {b} = {a * n + b})"


SMALL = (as_sum, as_remainder, as_divisor, as_equation)
TEMPLATES: dict[str, Callable[[str, random.Random], str | None]] = {"background": background, "term": term,
                                                                  "sub_problem": sub_problem}
WHY = {"term": "the prompt does not ask how many of something", "sub_problem": "the prompt has no whole number from 2 on that "
       "stands alone"}


def reformulated_by_template(group: Group, *, aspects=tuple(ASPECTS), seed=0) -> list[Group]:
    """Every prompt, and versions of it with the same answer by templates: no model, and nothing to check.

    background   a story before and after     term   a coined word for what is counted, defined
    sub_problem  a whole number n becomes a sum, a remainder, a greatest common divisor or an equation whose answer is n

    aspects     which of the three
    seed        with the prompt decides story, word, number and problem
    Edge        no 'how many', no number that stands alone (not in 3D, Q3, $5, 50%, 1/2): the version is left out, and a copy
                of the group says in meta["failed"] why; one of several equal numbers is replaced
    Relations   `reformulated` does it with a model
    Reference   MathForge, arXiv:2601.20614 (aspects; the templates are ours)

    >>> group = Group("Ann has 12 eggs. How many eggs are 2 less?", [], meta={"answer": "10"})
    >>> [g.prompt for g in reformulated_by_template(group, aspects=["term"])][1]
    'Let "zaspet" be another word for "eggs". Ann has 12 zaspet. How many zaspet are 2 less?'
    """
    text, out = question(group.prompt), [group]
    for aspect in aspects:
        if aspect not in TEMPLATES:
            raise ValueError(f"there is no aspect {aspect!r}{nearest(aspect, TEMPLATES)}; aspects: {', '.join(TEMPLATES)}")
        made = TEMPLATES[aspect](text, generator(seed, "reformulated_by_template", aspect, text))
        out.append(variant(group, "reformulated_by_template", made, aspect=aspect) if made else
                   failure(group, f"reformulated_by_template {aspect}", WHY[aspect]))
    return out
