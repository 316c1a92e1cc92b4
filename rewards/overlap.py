"""Overlap with one or several reference answers: BLEU, ROUGE, chrF.

All are functions of one row: `text` is the response, `reference` a text or a list of texts. Scores lie in [0, 1]; a blank
response scores 0, by definition of the measures. With `tag="answer"` only what stands in the last <answer>...</answer>
counts, and a response without it is a blank one (pair it with a format reward).
"""
from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["bleu", "bleu_rouge", "chrf", "rouge_1", "rouge_2", "rouge_l", "tagged", "tokenise_13a"]


def tagged(text: str, tag: str | None) -> str:
    """What stands in the last <tag>...</tag>; nothing where there is none; the whole text without a tag to look for.

    >>> tagged("<think>3</think><answer> 4 </answer>", "answer"), tagged("4", "answer"), tagged("4", None)
    ('4', '', '4')
    """
    if tag is None:
        return text
    found = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.DOTALL)
    return found[-1].strip() if found else ""


def texts_of(reference: str | Sequence[str]) -> list[str]:
    references = [reference] if isinstance(reference, str) else list(reference)
    if not references or not all(isinstance(r, str) and r.strip() for r in references):
        raise ValueError(f"'reference' should be a text or a list of texts, none of them blank, found {reference!r:.80}")
    return references


def ngrams(items: Sequence, n: int) -> Counter:
    return Counter(zip(*(items[i:] for i in range(n)), strict=False))


def f_score(precision: float, recall: float, *, beta: float = 1.0) -> float:
    """(1 + beta^2) P R / (beta^2 P + R), 0 where both are 0.

    >>> f_score(0.5, 1.0)
    0.6666666666666666
    """
    total = beta ** 2 * precision + recall
    return (1 + beta ** 2) * precision * recall / total if total else 0.0


# ------------------------------------------------------------------------------------------------------------------ BLEU
def tokenise_13a(text: str) -> list[str]:
    """Words and punctuation as the tokeniser of mteval-v13a has them: entities are undone, punctuation stands alone, full
    stops and commas stay within numbers, a hyphen leaves only the digit before it.

    >>> tokenise_13a("Pay $1,000.50 now, &quot;please&quot;.")
    ['Pay', '$', '1,000.50', 'now', ',', '"', 'please', '"', '.']
    """
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, sign)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def bleu(text, reference, *, smooth_from: int | None = 2, order: int = 4, tag: str | None = None) -> float:
    """BLEU of one response, as a reward.

    BLEU = BP exp(mean_n log p_n),   p_n = clipped matches / n-grams,   BP = min(1, exp(1 - shortest reference / length))

    smooth_from   n from which one is added to both sides of p_n: 2 (unigrams unsmoothed), 1 (all), None (no smoothing)
    order       the longest n-gram; 4
    tag         score only what stands in this tag
    Edge        a blank response or any p_n = 0: 0; a response equal to a shortest reference: 1, without smoothing only from
                `order` tokens on
    Relations   matches are clipped by the maximum over references, so their order and duplicates do not matter; a further
                reference never lowers the matches, but may change the brevity penalty
    Departs     sacreBLEU: 0..100, closest reference length, exponential smoothing
    Reference   Papineni et al. 2002; Lin & Och 2004 (smoothing); Chang et al., BLEUBERI, arXiv:2505.11080

    >>> bleu("the cat sat", "the cat sat on the mat") == math.exp(1 - 6 / 3)     # every p_n is 1, (0 + 1) / (0 + 1) for n = 4
    True
    """
    words, references = tokenise_13a(tagged(text, tag)), [tokenise_13a(r) for r in texts_of(reference)]
    logs = []
    for n in range(1, order + 1):
        counts, allowed = ngrams(words, n), Counter()
        for other in references:
            allowed |= ngrams(other, n)
        added = smooth_from is not None and n >= smooth_from
        matches, possible = (counts & allowed).total() + added, counts.total() + added
        if not matches:
            return 0.0
        logs.append(math.log(matches / possible))
    return math.exp(sum(logs) / order + min(0.0, 1 - min(map(len, references)) / len(words)))


# ----------------------------------------------------------------------------------------------------------------- ROUGE
def tokenise_rouge(text: str) -> list[str]:
    """Lower-case runs of ASCII letters and digits.

    >>> tokenise_rouge("It's 3.5!")
    ['it', 's', '3', '5']
    """
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_n(text: str, reference: str | Sequence[str], n: int) -> float:
    """The best F1 of n-gram overlap over the references."""
    found = ngrams(tokenise_rouge(text), n)
    against = [ngrams(tokenise_rouge(r), n) for r in texts_of(reference)]
    return max(shared_f(((found & other).total()), found.total(), other.total()) for other in against)


def shared_f(shared: int, found: int, wanted: int) -> float:
    return f_score(shared / found, shared / wanted) if shared else 0.0


def rouge_1(text, reference, *, tag: str | None = None) -> float:
    """ROUGE-1: F1 of the words that response and reference share, the best over references.

    tag         score only what stands in this tag
    Edge        nothing shared: 0
    Departs     no stemming (as rouge-score with use_stemmer=False)
    Reference   Lin 2004; google-research/rouge

    >>> rouge_1("a b", "b c")
    0.5
    """
    return rouge_n(tagged(text, tag), reference, 1)


def rouge_2(text, reference, *, tag: str | None = None) -> float:
    """ROUGE-2: the same for pairs of words that follow each other.

    >>> rouge_2("a b c", "a b d")
    0.5
    """
    return rouge_n(tagged(text, tag), reference, 2)


def rouge_l(text, reference, *, tag: str | None = None) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, the best over references.

    tag         score only what stands in this tag
    Edge        nothing shared: 0
    Departs     no stemming; the whole text is one sequence (rouge-score's `rougeL`, not `rougeLsum`)
    Reference   Lin 2004; google-research/rouge

    >>> rouge_l("a x b y", "a b c d")                                   # a b: 2 / 4 both ways
    0.5
    """
    words = tokenise_rouge(tagged(text, tag))
    against = [tokenise_rouge(r) for r in texts_of(reference)]
    return max(shared_f(common_subsequence(words, other), len(words), len(other)) for other in against)


def common_subsequence(a: Sequence, b: Sequence) -> int:
    """Length of the longest common subsequence, a whole row of the table at a time in the bits of one integer.

    >>> common_subsequence("abcbdab", "bdcaba")
    4
    """
    where: dict = {}
    for i, item in enumerate(a):
        where[item] = where.get(item, 0) | 1 << i
    row = full = (1 << len(a)) - 1                            # a 0 bit: the subsequence grows at this place
    for item in b:
        matches = row & where.get(item, 0)
        row = (row + matches | row - matches) & full
    return len(a) - row.bit_count()


def bleu_rouge(text, reference, *, smooth_from: int | None = 2, tag: str | None = None) -> float:
    """F1 of BLEU and ROUGE-L, 2 B R / (B + R), 0 where both are 0.

    Reference   Chang et al., BLEUBERI, arXiv:2505.11080

    >>> bleu_rouge("a b c d", "a b c d")
    1.0
    """
    return f_score(bleu(text, reference, smooth_from=smooth_from, tag=tag), rouge_l(text, reference, tag=tag))


# ------------------------------------------------------------------------------------------------------------------ chrF
def chrf(text, reference, *, order: int = 6, beta: float = 2.0, tag: str | None = None) -> float:
    """Character n-gram F-score, the best over references.

    chrF = (1 + beta^2) P R / (beta^2 P + R),   P, R means over n = 1..order of n-gram precision and recall

    order       longest n-gram, without white space; 6
    beta        recall counts beta times as much; 2
    tag         score only what stands in this tag
    Edge        orders longer than either text are left out of both means; nothing shared: 0
    Relations   P, R are averaged first and combined once, as the paper has it
    Departs     [0, 1] as in the paper; sacreBLEU prints it times 100
    Reference   Popovic 2015

    >>> chrf("abc", "abdc", order=1, beta=1)                             # P = 1, R = 3/4: 2 P R / (P + R)
    0.8571428571428571
    """
    characters = "".join(tagged(text, tag).split())
    return max(chrf_of(characters, "".join(r.split()), order, beta) for r in texts_of(reference))


def chrf_of(text: str, reference: str, order: int, beta: float) -> float:
    precision, recall = [], []
    for n in range(1, min(order, len(text), len(reference)) + 1):
        found, wanted = ngrams(text, n), ngrams(reference, n)
        shared = (found & wanted).total()
        precision.append(shared / found.total())
        recall.append(shared / wanted.total())
    return f_score(sum(precision) / len(precision), sum(recall) / len(recall), beta=beta) if precision else 0.0
