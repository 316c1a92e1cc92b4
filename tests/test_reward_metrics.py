"""Metrics of rewards against loops, enumeration, closed forms and other libraries."""
import doctest
import math
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, cohen_kappa_score, log_loss

from data_tools.records import Group, Response
from rewards import metrics as m

NAN = float("nan")


def group(*texts, **fields):
    return Group("?", [Response(t) for t in texts], **fields)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_doctests():
    found = doctest.testmod(m)
    assert found.attempted > 20 and not found.failed


# ------------------------------------------------------------------------------------------------------------- margins
def test_pairs_of_soft_wins_are_turned_to_the_preferred_side_and_unknown_ones_are_no_pairs():
    pairs = m.labelled_pairs([group("a", "b", "c", wins=[[0.5, 0.2, None], [0.8, 0.5, 0.5], [None, 0.5, 0.5]])])
    assert [tuple(map(float, row)) for row in zip(*pairs, strict=True)] == [(0, 1, 0, 0.8), (0, 1, 2, 0.5)]


def test_scores_and_the_wins_they_imply_give_the_same_margins():
    scores = rng().normal(size=5)
    by_scores = m.margins_of_scores(scores)
    assert np.allclose(m.margins_of_wins(expit(by_scores)), by_scores, rtol=1e-9)
    assert np.array_equal(by_scores, -by_scores.T)


def test_margins_of_certain_wins_are_finite_and_of_unknown_ones_nan():
    found = m.margins_of_wins([[0.5, 1.0, None], [0.0, 0.5, 0.5], [None, 0.5, 0.5]])
    assert math.isclose(found[0, 1], math.log((1 - 1e-6) / 1e-6)) and found[1, 0] == pytest.approx(-found[0, 1], rel=1e-9)
    assert np.isnan(found[0, 2]) and found[1, 2] == 0


def test_no_labels_are_no_pairs():
    pairs = m.labelled_pairs([group("a", "b"), group("c")])
    assert [len(column) for column in pairs] == [0, 0, 0, 0]


def test_relevance_of_wins_is_the_mean_over_the_others():
    assert m.relevance_of(group("a", "b", "c", wins=[[.5, 1, .5], [0, .5, 1], [.5, 0, .5]])) == [.75, .5, .25]
    assert m.relevance_of(group("a", "b", wins=[[.5, None], [None, .5]])) is None
    assert m.relevance_of(group("a", "b", relevance=[1.0, None])) is None


# ------------------------------------------------------------------------------------------------------------ accuracy
def test_accuracy_counts_ties_and_unscored_pairs():
    found = m.accuracy([2.0, -1.0, 0.0, NAN, 3.0])
    assert (found["right"], found["of"], found["tied"], found["unscored"], found["pairs"]) == (2, 4, 1, 1, 5)
    assert found["share"] == 0.5 and found["of_all"] == 0.4


def test_accuracy_of_nothing_is_none_and_not_zero():
    for margin in ([], [NAN, NAN]):
        found = m.accuracy(margin)
        assert found["share"] is None and found["interval"] is None and found["unscored"] == len(margin)


def test_wilson_by_hand_and_by_scipy():
    z, n, p = 1.959963984540054, 20, 15 / 20                    # (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [(p + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert m.share(15, 20)["interval"] == pytest.approx(expected, abs=5e-5)
    assert m.share(0, 20)["interval"][0] == 0 and m.share(20, 20)["interval"][1] == 1


def test_bootstrap_over_groups_is_wider_than_over_pairs_when_pairs_of_a_group_agree():
    right = np.repeat(rng().integers(0, 2, 40), 10)
    margin = np.where(right, 1.0, -1.0)
    grouped = m.accuracy(margin, np.repeat(np.arange(40), 10))["interval_groups"]
    single = m.accuracy(margin)["interval_groups"]
    assert (grouped[1] - grouped[0]) > 2.5 * (single[1] - single[0])     # sqrt(10) = 3.2 in the limit
    sd = right.std() / math.sqrt(40)
    assert 0.85 < (grouped[1] - grouped[0]) / (2 * 1.96 * sd) < 1.15                      # quantiles of 1000 draws


def test_bootstrap_of_uneven_groups_weighs_pairs_and_is_reproducible():
    a = m.resampled([1, 1, 1, 0], ["x", "x", "x", "y"], draws=4000)
    assert set(a) == {1.0, 0.0, 0.75} and abs((a == 0.75).mean() - 0.5) < 3 * math.sqrt(0.25 / 4000)
    assert np.array_equal(a, m.resampled([1, 1, 1, 0], ["x", "x", "x", "y"], draws=4000))


def test_slices_add_up():
    margin, keys = rng().normal(size=60), [str(k) for k in rng(1).integers(0, 3, 60)]
    found = m.by_slice(margin, keys)
    assert list(found) == ["0", "1", "2"] and sum(f["right"] for f in found.values()) == (margin > 0).sum()


# --------------------------------------------------------------------------------------------------------------- lists
def tau_b(x, y):
    pairs = list(combinations(range(len(x)), 2))
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in pairs]
    both = sum(a * b for a, b in signs)
    return both / math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))


def ndcg_over_orders(scores, grades):
    """Mean DCG over all orders that sort the scores, over the ideal DCG."""
    dcg = lambda order: sum((2 ** grades[i] - 1) / math.log2(2 + k) for k, i in enumerate(order))
    orders = [o for o in permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in zip(o, o[1:], strict=False))]
    return np.mean([dcg(o) for o in orders]) / max(dcg(o) for o in permutations(range(len(scores))))


def test_ranking_against_loops():
    scores, grades = rng().integers(0, 4, (30, 5)), rng(1).integers(0, 3, (30, 5))
    grades[:, 0], grades[:, 1] = 0, 2                          # no flat list
    scores[:, 2] = scores[:, 3] + 1                            # no constant scores
    found = m.ranking(scores, grades)
    tau = np.mean([tau_b(s, g) for s, g in zip(scores, grades, strict=True)])
    assert found["kendall"]["mean"] == pytest.approx(tau, rel=1e-12)
    ranked = lambda x: np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x])
    rho = np.mean([np.corrcoef(ranked(s), ranked(g))[0, 1] for s, g in zip(scores, grades, strict=True)])
    assert found["spearman"]["mean"] == pytest.approx(rho, rel=1e-12)
    dcg = np.mean([ndcg_over_orders(s, g) for s, g in zip(scores, grades, strict=True)])
    assert found["ndcg"]["mean"] == pytest.approx(dcg, rel=1e-12)


def test_ranking_counts_what_it_leaves_out_and_flat_scores_are_no_correlation():
    found = m.ranking([[1, 2], [NAN, 1], [3, 3], [1, 2]], [[0, 1], [0, 1], [0, 1], [1, 1]])
    assert (found["lists"], found["unscored"], found["flat"]) == (2, 1, 1) and found["kendall"]["mean"] == 0.5
    assert m.ranking([], [])["ndcg"] == {"mean": None, "interval": None}


def test_kendall_of_pairs_is_accuracy():
    scores = rng().normal(size=(50, 2))
    found = m.ranking(scores, np.tile([1.0, 0.0], (50, 1)))["kendall"]["mean"]
    assert found == pytest.approx(2 * m.accuracy(scores[:, 0] - scores[:, 1])["share"] - 1, rel=1e-12)


# ----------------------------------------------------------------------------------------------------------- best of n
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    proxy, gold = rng().permutation(7).astype(float), rng(1).normal(size=7)
    subsets = [gold[max(s, key=lambda i: proxy[i])] for s in combinations(range(7), n)]
    assert m.best_of_n(proxy, gold, n) == pytest.approx(np.mean(subsets), rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_best_of_n_breaks_ties_at_random(n):
    proxy, gold = np.array([1.0, 1, 2, 2, 2, 0]), rng(2).normal(size=6)
    picks = [np.mean([gold[i] for i in s if proxy[i] == max(proxy[j] for j in s)]) for s in combinations(range(6), n)]
    assert m.best_of_n(proxy, gold, n) == pytest.approx(np.mean(picks), rel=1e-9)


def test_best_of_n_of_a_large_pool_is_finite_and_near_the_order_statistic():
    uniform = (np.arange(20000) + 0.5) / 20000
    assert m.best_of_n(uniform, uniform, 9) == pytest.approx(0.9, rel=1e-4)           # E max of n uniforms = n / (n + 1)


def test_best_of_n_out_of_range():
    with pytest.raises(ValueError, match="a pool of 2 responses and n = 3"):
        m.best_of_n([1, 2], [1, 2], 3)


def test_best_of_n_kl_is_exact_in_the_continuous_limit_and_bounds_the_discrete_one():
    for n in (1, 2, 4, 16):
        x = (np.arange(200000) + 0.5) / 200000                 # density of the best of n against the base: n x^(n-1)
        density = n * x ** (n - 1)
        assert m.best_of_n_kl(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)
    p = np.array([0.25, 0.75])                                 # best of 2 from (1/2, 1/2) with rewards (0, 1)
    kl = (p * np.log(p / 0.5)).sum()
    assert kl == pytest.approx(0.1308, abs=5e-5) and m.best_of_n_kl(2) == pytest.approx(0.1931, abs=5e-5)


def test_over_optimisation_shows_a_hacked_proxy():
    x = rng().normal(size=(60, 64))
    gold = x - 0.5 * x ** 2                                    # more x is better up to 1 only
    found = m.over_optimisation(list(x), list(gold))
    assert [c["n"] for c in found["curve"]] == [1, 2, 4, 8, 16, 32, 64]
    curve = [c["gold"]["mean"] for c in found["curve"]]
    assert max(curve) > curve[0] and curve[-1] < max(curve) - 0.3
    assert np.all(np.diff([c["proxy"] for c in found["curve"]]) > 0)
    honest = m.over_optimisation(list(gold), list(gold))
    assert np.all(np.diff([c["gold"]["mean"] for c in honest["curve"]]) > 0) and honest["regret"]["mean"] == 0
    assert found["curve"][-1]["gold"]["mean"] == pytest.approx(gold[np.arange(60), x.argmax(1)].mean(), rel=1e-9)


def test_over_optimisation_counts_pools_that_are_not_scored():
    found = m.over_optimisation([[1, 2, NAN], [1, 2, 3]], [[0, 1, 2], [0, 1, 2]], sizes=[1, 3])
    assert (found["pools"], found["unscored"]) == (1, 1) and [c["gold"]["mean"] for c in found["curve"]] == pytest.approx([1, 2])
    assert m.over_optimisation([[NAN, 1]], [[0, 1]])["curve"] == []


# --------------------------------------------------------------------------------------------------------- calibration
def test_calibration_against_scikit_learn():
    margin, y = rng().normal(size=300) * 2, rng(1).integers(0, 2, 300).astype(float)
    found = m.calibration(margin, y)
    assert found["log_loss"] == pytest.approx(log_loss(y, expit(margin)), rel=1e-9)
    assert found["brier"] == pytest.approx(brier_score_loss(y, expit(margin)), rel=1e-9)


def test_ece_by_hand():
    up = math.log(0.9 / 0.1)                                   # confidence 0.9, right 3 of 4 times: |0.9 - 0.75|
    found = m.calibration([up, up, up, -up, 0.0], [1.0] * 5)   # and a tie: confidence 0.5, right half the time
    assert found["ece"] == pytest.approx(0.8 * 0.15, rel=1e-9)
    assert [c["pairs"] for c in found["curve"]] == [1, 4] and found["curve"][1]["outcome"] == 0.75


def test_calibration_does_not_depend_on_the_order_within_pairs():
    margin, y = rng().normal(size=200), rng(1).choice([0.0, 0.5, 0.8, 1.0], 200)
    turned = rng(2).choice([-1, 1], 200)
    a, b = m.calibration(margin, y), m.calibration(margin * turned, np.where(turned > 0, y, 1 - y))
    for key in ("ece", "brier", "log_loss", "temperature"):
        assert a[key] == pytest.approx(b[key], rel=1e-9)


def test_temperature_is_the_minimum_and_scales_with_the_margins():
    margin = rng().normal(size=4000) * 3
    y = (rng(1).random(4000) < expit(margin / 2.5)).astype(float)
    t = m.temperature(margin, y)
    q = expit(margin / 2.5)
    error = 1 / math.sqrt((margin ** 2 * q * (1 - q)).sum())   # of 1 / T, from the Fisher information
    assert abs(1 / t - 1 / 2.5) < 3 * error
    direct = minimize(lambda a: m.cross_entropy(margin * a[0], y), [0.3], tol=1e-12).x[0]
    assert t == pytest.approx(1 / direct, rel=1e-4)
    assert m.temperature(1e8 * margin, y) == pytest.approx(1e8 * t, rel=1e-6)
    assert m.temperature(1e-8 * margin, y) == pytest.approx(1e-8 * t, rel=1e-6)


def test_temperature_limits():
    assert m.temperature([1.0, 2.0], [1.0, 1.0]) == 0          # separated
    assert m.temperature([-1.0, 1.0], [1.0, 1.0]) == math.inf  # no information
    assert m.temperature([0.0], [1.0]) == m.temperature([], []) == math.inf
    assert m.calibration([-1.0, 1.0], [1.0, 1.0])["log_loss_at_temperature"] == pytest.approx(math.log(2))


def test_calibration_counts_unscored():
    assert m.calibration([NAN, 1.0], [1.0, 1.0])["unscored"] == 1
    empty = m.calibration([NAN], [1.0])
    assert empty["pairs"] == 0 and empty["ece"] is None and empty["curve"] == []


# --------------------------------------------------------------------------------------------------- length and style
def test_length_bias_of_a_fair_and_of_a_biased_model():
    first, second = rng().integers(1, 500, (2, 4000))
    d = m.relative_difference(first, second)
    label = (rng(1).random(4000) < 0.5).astype(float)
    turn = np.where(label > 0.5, 1, -1)                        # preferred first
    a, b = np.where(label > 0.5, first, second), np.where(label > 0.5, second, first)
    quality = rng(2).normal(size=4000) + 1.0
    fair = m.length_bias(quality, np.ones(4000), a, b)
    biased = m.length_bias(quality + 3 * d * turn, np.ones(4000), a, b)
    assert abs(fair["bias"]) < 0.1 and biased["bias"] > 0.5
    assert biased["chosen_longer"]["share"] > fair["chosen_longer"]["share"] > biased["chosen_shorter"]["share"]
    assert abs(fair["length_only"]["share"] - 0.5) < 3 * math.sqrt(0.25 / 4000)
    assert sum(c["pairs"] for c in fair["curve"]) == fair["pairs"]


def test_length_bias_counts_by_hand():
    found = m.length_bias([1.0, -1.0, NAN, 1.0, 0.0, 1.0], [1, 1, 1, 1, 1, 0.5], [5, 5, 5, 5, 2, 9], [1, 1, 1, 5, 8, 1])
    assert (found["pairs"], found["unscored"], found["equally_long"], found["tied_labels"]) == (3, 1, 1, 1)
    assert found["longer_preferred"] == 0.5                    # yes, no, and a tie
    assert found["chosen_longer"]["right"] == 1 and found["chosen_longer"]["of"] == 2
    assert found["chosen_shorter"]["right"] == 0 and found["chosen_shorter"]["of"] == 1
    assert found["length_only"]["share"] == 2 / 3 and found["longer_is_better"] == 2 / 3
    assert "bias" not in m.length_bias([NAN], [1.0], [1], [2])


def test_logistic_coefficients_against_a_general_optimiser():
    x, y = rng().normal(size=(200, 2)), rng(1).choice([0.0, 0.3, 1.0], 200)
    loss = lambda b: (np.logaddexp(0, x @ b) - y * (x @ b)).sum() + (b @ b) / 2000
    assert m.logistic_coefficients(x, y) == pytest.approx(minimize(loss, np.zeros(2), tol=1e-12).x, rel=1e-4)
    turned = rng(2).choice([-1, 1], 200)
    assert m.logistic_coefficients(x * turned[:, None], np.where(turned > 0, y, 1 - y)) == pytest.approx(
        m.logistic_coefficients(x, y), rel=1e-6)


def test_style_counts():
    text = "# Title\n\n- one\n* two\n3. three\n4) four\nplain - no list\n**bold** and __bold__\n#not a header"
    assert m.style_counts([text, ""]).tolist() == [[len(text), 4, 1, 2], [0, 0, 0, 0]]


def test_style_control_takes_style_out_and_leaves_the_rest():
    n = 3000
    quality, style = rng().normal(size=n), rng(1).uniform(-1, 1, (n, 1))
    turn = np.where(rng(2).random(n) < expit(2 * quality + 1.5 * style[:, 0]), 1, -1)          # labels like both
    x = style * turn[:, None]
    good, vain = quality * turn, (quality + 4 * style[:, 0]) * turn
    a, b = (m.style_control(score, np.ones(n), x, ["length"]) for score in (good, vain))
    assert a["style_free"]["share"] == b["style_free"]["share"]
    size, g = np.sqrt((style ** 2).mean()), np.sqrt((good ** 2).mean())
    assert b["score_on_style"]["length"] - a["score_on_style"]["length"] == pytest.approx(4 * size, rel=1e-9)
    q = expit(2 * quality + 1.5 * style[:, 0])                 # the labels' own law: coefficients within three standard errors
    z = np.stack([good / g, x[:, 0] / size], 1)
    error = np.sqrt(np.diag(np.linalg.inv((z * (q * (1 - q))[:, None]).T @ z)))
    found = np.array([a["score_given_style"], a["labels_on_style"]["length"]])
    assert (np.abs(found - [2 * g, 1.5 * size]) < 3 * error).all()


def test_style_control_without_style_is_the_plain_accuracy():
    margin = rng().normal(size=50)
    found = m.style_control(margin, np.ones(50), np.zeros((50, 4)))
    assert found["style_free"] == found["raw"] == m.share(int((margin > 0).sum()), 50)
    assert set(found["score_on_style"].values()) == {0.0} and list(found["labels_on_style"]) == list(m.STYLE)


def test_a_score_that_is_style_alone_ties_without_it():
    x = rng().normal(size=(80, 2))
    found = m.style_control(x @ [2.0, -1.0], np.ones(80), x, ["a", "b"])
    assert found["style_free"]["right"] == 0 and 0 < found["raw"]["right"] < 80


# ---------------------------------------------------------------------------------------------------------- robustness
def test_position_bias_of_a_judge_that_always_says_first():
    found = m.position_bias([1.0] * 4, [1.0] * 4, [1.0, 1.0, 0.0, 0.5])
    assert found["bias"] == 0.5 and found["consistency"]["share"] == 0 and found["averaged"]["right"] == 0
    assert (found["given_order"]["right"], found["given_order"]["of"], found["swapped_order"]["right"]) == (2, 3, 1)


def test_swapping_removes_an_additive_bias():
    true = rng().normal(size=4000) * 2
    label = (rng(1).random(4000) < expit(true)).astype(float)
    bias = 1.5
    found = m.position_bias(expit(true + bias), expit(-true + bias), label)
    assert found["given_order"]["share"] < found["averaged"]["share"] - 0.02 and found["bias"] > 0.15
    fair = m.position_bias(expit(true), expit(-true), label)
    assert fair["bias"] == pytest.approx(0, abs=1e-12) and fair["consistency"]["share"] == 1
    assert fair["averaged"] == found["averaged"]               # the sign of the average is that of the unbiased logit


def test_position_bias_counts_and_ties():
    found = m.position_bias([NAN, 0.5, 0.5], [0.1, 0.5, 0.7])
    assert found["unscored"] == 1 and found["consistency"]["right"] == 1 and found["consistency"]["of"] == 2
    assert m.position_bias([NAN], [1.0])["bias"] is None


def test_consistency_under_rewording():
    found = m.consistency([1.0, 0.0, -1.0, 2.0], [3.0, 0.0, 1.0, NAN])
    assert (found["agree"]["right"], found["pairs"], found["unscored"]) == (2, 3, 1)
    assert found["mean_change"] == pytest.approx((2 + 0 + 2) / 3)
    assert m.consistency([NAN], [1.0])["mean_change"] is None


def test_cyclic_triples_of_a_random_tournament_and_of_scores():
    upper = np.triu(rng().choice([-1, 1], (60, 9, 9)), 1)
    random = upper - np.swapaxes(upper, 1, 2)
    found = m.cyclic_triples(list(random))
    assert found["of"] == 60 * 84 and abs(found["share"] - 0.25) < 3 * math.sqrt(0.1875 / 5040)
    for one in random[:5]:                                      # Kendall and Babington Smith: C(K, 3) - sum C(out-degree, 2)
        wins = (one > 0).sum(1)
        assert m.cyclic_triples([one])["right"] == math.comb(9, 3) - sum(math.comb(int(w), 2) for w in wins)
    assert m.cyclic_triples([m.margins_of_scores(rng().normal(size=9))])["right"] == 0


def test_cyclic_triples_with_ties_and_unknown_pairs_are_undecided():
    tied, unknown = np.zeros((3, 3)), np.full((3, 3), NAN)
    found = m.cyclic_triples([tied, unknown])
    assert (found["of"], found["undecided"], found["share"]) == (0, 2, None)


def test_agreement_by_hand_and_by_scikit_learn():
    a, b = rng().normal(size=100) + 0.5, rng(1).normal(size=100) + 0.2
    found = m.agreement({"a": a, "b": b, "c": np.append(a[:50], np.full(50, NAN))})
    assert found["verdicts"][0][1] == ((a > 0) == (b > 0)).mean()
    p, q = (a > 0).mean(), (b > 0).mean()
    chance = p * q + (1 - p) * (1 - q)
    assert found["kappa"][0][1] == pytest.approx((found["verdicts"][0][1] - chance) / (1 - chance), rel=1e-9)
    assert found["kappa"][0][1] == pytest.approx(cohen_kappa_score(a > 0, b > 0), rel=1e-9)
    assert found["pairs"][0] == [100, 100, 50] and found["kappa"][0][2] == found["kendall"][0][2] == 1
    assert found["kendall"][0][1] == pytest.approx(tau_b(a, b), rel=1e-9)


def test_agreement_of_constant_and_of_unscored_models():
    found = m.agreement({"flat": [0.0, 0.0], "right": [1.0, 2.0], "silent": [NAN, NAN]})
    assert found["verdicts"][0][1] == 0 and found["kendall"][0][1] is None and found["kappa"][0][0] == 1
    assert found["pairs"][0][2] == 0 and found["verdicts"][0][2] is None


def test_worst_is_sorted_by_how_sure_the_model_is():
    margin = rng().normal(size=40)
    found = m.worst(margin)
    assert sorted(found) == sorted(np.flatnonzero(margin <= 0)) and np.all(np.diff(margin[found]) >= 0)


def test_every_interval_holds_the_truth_about_as_often_as_it_says():
    hits = [low <= 0.7 <= high for low, high in (m.share(int(k), 80)["interval"] for k in rng().binomial(80, 0.7, 400))]
    assert binomtest(sum(hits), 400, 0.95).pvalue > 1e-3
