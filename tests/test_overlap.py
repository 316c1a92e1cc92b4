"""BLEU, ROUGE, chrF by hand, against row loops, and against values of sacreBLEU 2.6.0 and rouge-score 0.1.2."""
import math
import random
from functools import partial

import pytest

from data_tools.records import Group, Response
from rewards.base import ScoringError, score
from rewards.overlap import (
    bleu,
    bleu_rouge,
    chrf,
    common_subsequence,
    f_score,
    rouge_1,
    rouge_2,
    rouge_l,
    tagged,
    tokenise_13a,
)

# (response, references, chrF / 100, ROUGE-1/2/L F1, BLEU with add-k smoothing and without, for each reference alone).
# sacreBLEU: sentence_chrf(); BLEU(smooth_method="add-k", smooth_value=1) and "none"; rouge-score without stemming, best
# reference. One reference at a time, since sacreBLEU takes the closest length and this toolkit the shortest.
RECORDED = [
    ('10-20 (yes) sat 10-20 well-known "quoted" U.S. "quoted" A/B A/B sat',
     ['10-20 &amp; cat, "quoted" $5 on a it\'s $5 U.S. A/B the A/B (yes) 10-20 $5',
      "it's a sat (yes) well-known (yes) 10-20 A/B well-known"],
     0.3395311249198989, (0.6451612903225806, 0.27027027027027023, 0.46153846153846156),
     (0.25510377069001877, 0.15380639230075366), (0.21084755690729717, 0.0)),
    ("on sat 3.5 ? sat", ['3.5 ? mat. A/B (yes) 3.5 "quoted" cat, (yes) mat. 1,000 sat sat a well-known'],
     0.07808689440216787, (0.3333333333333333, 0.0909090909090909, 0.25), (0.006059759093468917,), (0.0,)),
    ("well-known", ["a the e-mail! 3.5"], 0.03787878787878787, (0.0, 0.0, 0.0), (0.0,), (0.0,)),
    ('? (yes) $5 "quoted" sat cat, cat, A/B 3.5 (yes) 3.5 3.5',
     ['? (yes) $5 "quoted" sat cat, cat, A/B 3.5 (yes) 3.5 3.5', "? A/B ? well-known mat. mat."],
     1.0, (1.0, 1.0, 1.0), (1.0, 0.09954705090717826), (1.0, 0.0))]


@pytest.mark.parametrize("text, references, characters, rouge, smoothed, plain", RECORDED)
def test_recorded_values_of_other_libraries(text, references, characters, rouge, smoothed, plain):
    assert chrf(text, references) == pytest.approx(characters, rel=1e-12)
    assert [f(text, references) for f in (rouge_1, rouge_2, rouge_l)] == pytest.approx(rouge, rel=1e-12)
    assert [bleu(text, r) for r in references] == pytest.approx(smoothed, rel=1e-12)
    assert [bleu(text, r, smooth_from=None) for r in references] == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("text, words", [
    ("cat, sat.", ["cat", ",", "sat", "."]), ("1,000 3.5 U.S.", ["1,000", "3.5", "U", ".", "S", "."]),
    ("10-20 a-b", ["10", "-", "20", "a-b"]), ("(a/b)", ["(", "a", "/", "b", ")"]),
    ("&lt;b&gt; &amp; &quot;", ["<", "b", ">", "&", '"']), ("split-\nword two\nlines", ["splitword", "two", "lines"]),
    ("it's", ["it's"]), ("a<skipped>b", ["ab"]), ("", [])])
def test_13a(text, words):
    assert tokenise_13a(text) == words


# ------------------------------------------------------------------------------------------------------------------ BLEU
def by_rows(words, references, smooth_from):
    """BLEU from its equations, with lists instead of counters."""
    total = 0.0
    for n in range(1, 5):
        grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
        clipped = 0
        for gram in set(grams):
            allowed = max(sum(tuple(r[i:i + n]) == gram for i in range(len(r) - n + 1)) for r in references)
            clipped += min(grams.count(gram), allowed)
        if smooth_from and n >= smooth_from:
            precision = (clipped + 1) / (len(grams) + 1)
        else:
            precision = clipped / len(grams) if grams else 0.0
        if precision == 0:
            return 0.0
        total += math.log(precision)
    shortest = min(map(len, references))
    return math.exp(total / 4) * (1.0 if len(words) > shortest else math.exp(1 - shortest / len(words)))


@pytest.mark.parametrize("smooth_from", [None, 1, 2])
def test_bleu_against_a_row_loop(smooth_from):
    r = random.Random(0)
    for _ in range(100):
        words = r.choices("abcd", k=r.randint(1, 12))
        references = [r.choices("abcd", k=r.randint(1, 12)) for _ in range(r.randint(1, 4))]
        assert bleu(" ".join(words), [" ".join(x) for x in references], smooth_from=smooth_from) == \
            pytest.approx(by_rows(words, references, smooth_from), rel=1e-12, abs=1e-15)


def test_bleu_by_hand():
    # p = 2/4 clipped unigrams, (1+1)/(3+1), (0+1)/(2+1), (0+1)/(1+1); length 4 against 2: no penalty
    assert bleu("a b a a", "a b") == pytest.approx((0.5 * 0.5 / 3 * 0.5) ** 0.25, rel=1e-12)
    assert bleu("a b", "a b c d") == pytest.approx(math.exp(-1), rel=1e-12)              # every p is 1, BP = exp(1 - 4/2)


def test_both_smoothings_differ_in_unigrams_only():
    assert bleu("x y z w", "a b c d") == 0.0                                              # p_1 = 0
    assert bleu("x y z w", "a b c d", smooth_from=1) == pytest.approx((1 / 5 * 1 / 4 * 1 / 3 * 1 / 2) ** 0.25, rel=1e-12)
    assert bleu("a b c d", "a b c d", smooth_from=1) == 1.0


@pytest.mark.parametrize("text", ["a", "a b", "a b c", "a b c d", "a b c d e"])
def test_an_equal_response_is_1_without_smoothing_from_four_tokens_on(text):
    assert bleu(text, text) == 1.0
    assert bleu(text, text, smooth_from=None) == float(len(text.split()) >= 4)


def test_references_are_a_set():
    text, refs = "a b c d e f", ["a b c x y z", "q d e f g h i j", "a c e g"]
    value = bleu(text, refs)
    assert all(bleu(text, x) == value for x in (refs[::-1], refs * 2, refs[1:] + refs[:1]))
    assert value == max(value, bleu(text, refs[0]))                                       # more matches, shorter shortest
    assert bleu("a b c d", ["a b c d e f g h"]) < bleu("a b c d", ["a b c d e f g h", "z"])   # the penalty goes away
    assert rouge_l(text, refs) == max(rouge_l(text, r) for r in refs) and chrf(text, refs) == max(chrf(text, r) for r in refs)


@pytest.mark.parametrize("measure", [bleu, rouge_1, rouge_2, rouge_l, chrf, bleu_rouge])
def test_edges_and_range(measure):
    assert measure("", "a b") == measure(" \n ", ["a"]) == 0.0
    assert measure("completely other", "a b c") >= 0.0
    assert measure("one two three four five", "one two three four five") == pytest.approx(1.0, abs=1e-15)
    for reference in ("", [], ["a", " "], [1]):
        with pytest.raises(ValueError, match="'reference' should be"):
            measure("a", reference)


# ----------------------------------------------------------------------------------------------------------- ROUGE, chrF
def test_common_subsequence_against_the_table():
    r = random.Random(0)
    for _ in range(200):
        a, b = r.choices("abc", k=r.randint(0, 15)), r.choices("abc", k=r.randint(0, 15))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert common_subsequence(a, b) == table[-1][-1] == common_subsequence(b, a)


def test_rouge_by_hand():
    # shared unigrams a b (clipped), P = 2/3, R = 2/4; bigrams "a b" only: P = 1/2, R = 1/3; the subsequence is a b
    assert rouge_1("A, b! b", "a b c d") == pytest.approx(f_score(2 / 3, 1 / 2), rel=1e-12)
    assert rouge_2("A, b! b", "a b c d") == pytest.approx(f_score(1 / 2, 1 / 3), rel=1e-12)
    assert rouge_l("A, b! b", "a b c d") == pytest.approx(f_score(2 / 3, 1 / 2), rel=1e-12)
    assert rouge_l("b a", "a b") == 0.5 and rouge_1("b a", "a b") == 1.0


def test_chrf_by_hand():
    # n = 1: 2 of 2, 2 of 3; n = 2: 1 of 1, 1 of 2; no longer n in the response
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert chrf("ab", "a bc") == pytest.approx(5 * precision * recall / (4 * precision + recall), rel=1e-12)
    assert chrf("ab", "abc", beta=1.0) < chrf("abc", "ab", beta=2.0)                      # beta = 2 favours recall
    assert chrf("a b", "ab") == 1.0


def test_f1_of_bleu_and_rouge():
    text, reference = "the cat sat", "the cat lay"
    b, r = bleu(text, reference), rouge_l(text, reference)
    assert bleu_rouge(text, reference) == pytest.approx(2 * b * r / (b + r), rel=1e-12)
    assert f_score(0.0, 0.0) == 0.0


def test_answer_tags():
    text = "<think>a b c d</think> <answer>x</answer> <answer>\na b c d\n</answer>"
    assert bleu(text, "a b c d", tag="answer") == 1.0 > bleu(text, "a b c d")
    assert bleu("a b c d", "a b c d", tag="answer") == rouge_l("a b c d", "a b c d", tag="answer") == 0.0
    assert tagged("<answer>a", "answer") == "" and tagged("a", None) == "a"


def test_as_rewards_of_rows():
    group = Group("q", [Response("a b c d"), Response("a")], meta={"reference": ["a b c d", "a b"]})
    score([group], {"bleu": bleu, "plain": partial(bleu, smooth_from=None)})
    assert group.responses[0].scores == {"bleu": 1.0, "plain": 1.0}
    assert group.responses[1].scores == {"bleu": math.exp(-1), "plain": 0.0}
    with pytest.raises(ScoringError, match="'reference'"):
        score([Group("q", [Response("a")])], [bleu])


def test_agreement_with_the_truth_grows_with_the_number_of_references():
    """The claim small: k edits of one of four paraphrases; BLEU against more paraphrases ranks pairs better."""
    r = random.Random(0)
    right = {1: 0, 2: 0, 4: 0}
    for _ in range(300):
        base = [f"w{r.randint(0, 60)}" for _ in range(20)]
        paraphrases = [" ".join(f"s{n}{w}" if r.random() < 0.6 else w for w in base) for n in range(4)]
        def edited(count, source):
            words = source.split()
            for i in r.sample(range(20), count):
                words[i] = f"e{i}"
            return " ".join(words)
        few, many = edited(4, r.choice(paraphrases)), edited(9, r.choice(paraphrases))
        for n in right:
            a, b = bleu(few, paraphrases[:n]), bleu(many, paraphrases[:n])
            right[n] += (a > b) + 0.5 * (a == b)
    assert right[1] < right[2] < right[4] and right[4] > 0.95 * 300
