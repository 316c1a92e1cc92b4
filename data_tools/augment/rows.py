"""Rows added to pairs: why one response is preferred, and thinned variants of both."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from data_tools.augment.common import Generate, ask, extended, failure, preferred, question
from data_tools.describe import content
from data_tools.records import Group, Response
from data_tools.rules import generator, place

__all__ = ["degrees", "random_degrees", "rationales"]

GENERAL = "Explain in a few sentences why it is better."
SPECIFIC = "Explain why it is better, and point to the passages of both responses that decide it."


def rationales(shard: Sequence[Group], *, generate: Generate, ask_for=GENERAL, seed=0) -> list[Group]:
    """Pairs with a row that says why one response is preferred, for the recipe `rationale`.

    The row has a prompt of its own (the prompt, both responses, which is preferred, the question) and no label; its column
    `rationale` is True.

    generate    prompts -> texts
    ask_for     the question; `SPECIFIC` asks for passages
    seed        with the texts decides which response is called A, or position would tell the label
    Edge        a tie, or no text: the pair stays as it is, and a copy says in meta["failed"] why
    Departs     the paper always shows the preferred response first
    Reference   Just et al., Data-Centric Human Preference Optimization with Rationales, arXiv:2407.14477

    >>> pair = Group("2 + 2?", [Response("4"), Response("5")], relevance=[1.0, 0.0])
    >>> found, = rationales([pair], generate=lambda prompts: ["Because it is right."])
    >>> found.relevance, found.responses[2].text, found.responses[2].meta
    ([1.0, 0.0, None], 'Because it is right.', {'rationale': True})
    """
    chosen = [preferred(group, "rationales") for group in shard]
    asked = [pair and why(group, pair, ask_for, seed) for group, pair in zip(shard, chosen, strict=True)]
    texts = iter(ask(generate, [text for text in asked if text]))
    out = []
    for group, prompt in zip(shard, asked, strict=True):
        said, wrong = next(texts) if prompt else ("", "the pair is a tie")
        out += [group, failure(group, "rationales", wrong)] if wrong else \
            [extended(group, [Response(said, prompt=prompt, meta={"rationale": True})])]
    return out


def why(group: Group, pair: tuple[int, int], ask_for: str, seed: int) -> str:
    """The prompt of a rationale."""
    order = list(pair)
    generator(seed, "rationales", group.prompt, [r.text for r in group.responses]).shuffle(order)
    shown = "\n\n".join(f"Response {letter}:\n{content(group.responses[i].text)}" for letter, i in zip("AB", order, strict=True))
    return f"{question(group.prompt)}\n\n{shown}\n\nResponse {'AB'[order.index(pair[0])]} is preferred. {ask_for}"


# ------------------------------------------------------------------------------------------------- degrees of preference
def phrases(text: str) -> list[str]:
    """The different key phrases of a text by falling importance (RAKE): runs of words between stop words and punctuation,
    scored by the sum of their words' degree / frequency; equal ones in the order of the text.

    >>> phrases("The red fox and the lazy red dog: a dog.")              # 'red' stands in 5 places of phrases, twice
    ['lazy red dog', 'red fox', 'dog']
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
    found: list[list[str]] = []
    for piece in re.split(r"[^\w\s'-]+", text):
        run: list[str] = []
        for word in [*piece.split(), None]:
            if word is None or word.lower() in ENGLISH_STOP_WORDS:
                found += [run] if run else []
                run = []
            else:
                run.append(word)
    frequency, degree = Counter(), Counter()
    for run in found:
        for word in run:
            frequency[word.lower()] += 1
            degree[word.lower()] += len(run)
    score = {" ".join(run): sum(degree[w.lower()] / frequency[w.lower()] for w in run) for run in found}
    return sorted(score, key=lambda phrase: -score[phrase])


def without(text: str, removed: Sequence[str]) -> str:
    """The text without these phrases.

    >>> without("The red fox, the dog.", ["red fox"])
    'The, the dog.'
    """
    for phrase in sorted(removed, key=len, reverse=True):
        spelt = r"\s+".join(map(re.escape, phrase.split()))
        text = re.sub(rf"(?<!\w){spelt}(?!\w)", "", text)
    return re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"[ \t]{2,}", " ", text)).strip()


def thinned(group: Group, rule: str, count: int, share: float, order: Callable[[list[str], str], list[str]]) -> list[Group]:
    """The pair with `count` variants of each response, of which more and more phrases are removed, in this order."""
    if count < 2 or not 0 < share <= 1:
        raise ValueError(f"{rule} needs at least 2 degrees and a share in (0, 1], found degrees={count}, share={share}")
    pair = preferred(group, rule)
    if pair is None:
        return [group, failure(group, rule, "the pair is a tie")]
    rows, wrong = [], []
    for side, i in zip((1, 0), pair, strict=True):
        text = group.responses[i].text
        if not isinstance(text, str):
            raise ValueError(f"{place(group)}{rule} takes responses of plain text, and response {i + 1} is a list of messages")
        ranked = order(phrases(text), text)
        made = [without(text, ranked[:round(k / (count - 1) * share * len(ranked))]) for k in range(count)]
        if len(set(made)) < count or not all(made):
            wrong.append(f"response {i + 1} has {len(ranked)} phrases, too few for {count} different degrees")
        else:
            rows += [Response(t, meta={"degree": k, "side": side}) for k, t in enumerate(made)]
    return [extended(group, rows) if rows else group] + [failure(group, rule, "; ".join(wrong))] * bool(wrong)


def degrees(group: Group, *, degrees=3, share=0.5) -> list[Group]:
    """Pairs with variants of both responses that say less and less, for the recipe `spo_degree`.

    degree k of M removes the round(k / (M - 1) share P) most important of the P phrases

    degrees     M, as in the recipe; 3
    share       of the phrases that the last degree removes; 0.5
    Edge        too few phrases for M different texts: no variants of this response, and a copy of the pair says so in
                meta["failed"]
    Relations   variants are rows without a label; their columns are `degree`, and `side` 1 for the preferred response
    Departs     no code was released: the definition is ours
    Reference   Li et al., Self-supervised Preference Optimization, arXiv:2409.17791; Rose et al. 2010 (RAKE)

    >>> pair = Group("?", [Response("A red fox and a lazy dog."), Response("No.")], relevance=[1.0, 0.0])
    >>> [(r.text, r.meta) for r in degrees(pair, degrees=2)[0].responses[2:]]
    [('A red fox and a lazy dog.', {'degree': 0, 'side': 1}), ('A and a lazy dog.', {'degree': 1, 'side': 1})]
    """
    return thinned(group, "degrees", degrees, share, lambda ranked, text: ranked)


def random_degrees(group: Group, *, degrees=3, share=0.5, seed=0) -> list[Group]:
    """As `degrees`, with random phrases removed: the control, which shows what a model learns from length alone.

    degrees, share   as in `degrees`
    seed        with the text decides which
    Relations   the same number of phrases goes in each degree
    """
    def order(ranked: list[str], text: str) -> list[str]:
        return generator(seed, "random_degrees", text).sample(ranked, len(ranked))
    return thinned(group, "random_degrees", degrees, share, order)
