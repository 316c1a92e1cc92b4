"""The studies: their mathematics by hand, their claims in seconds, and, marked slow, in full."""
import doctest
import json
import math

import numpy as np
import pytest
import torch

from cookbook import tiny
from cookbook.lipo_lambda import study as lipo
from cookbook.rdpo_noise import bandit
from cookbook.rdpo_noise import study as rdpo
from cookbook.sparsepo_masks import study as sparse
from prefopt.config import assemble

STUDIES = {"rdpo_noise": rdpo, "lipo_lambda": lipo, "sparsepo_masks": sparse}


@pytest.mark.parametrize("module", [tiny, lipo, sparse], ids=lambda m: m.__name__)
def test_doctests(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


# ---------------------------------------------------------------------------------------------------------- rdpo_noise
def test_counted_pairs_are_the_pairs_one_by_one():
    """Weights on distinct pairs give the loss of the list of all pairs, here written as plain softplus."""
    b = bandit.draw(0, flip=0.3, pairs=300, arms=5)
    assert b.clean.sum() == b.noisy.sum() == 300 and not b.clean.diagonal().any()
    logp = torch.randn(5, dtype=torch.float64).log_softmax(0)
    batch, arm = bandit.pairs_of(b.noisy, b.ref)
    objective = assemble("rdpo", {"beta": 0.5, "flip": 0.3})
    own = objective.loss(objective.annotate(batch).with_columns(logp=logp[arm, None])).value
    loss = 0.0
    for i in range(5):
        for j in range(5):
            h = 0.5 * float(logp[i] - b.ref[i] - logp[j] + b.ref[j])
            loss += float(b.noisy[i, j]) / 300 * (math.log1p(math.exp(-h)) - 0.3 / 0.4 * h)
    assert float(own) == pytest.approx(loss, rel=1e-6)


def test_ipo_fit_is_least_squares():
    """IPO solves the normal equations of sum n_ij (x_i - x_j - 1/(2 tau))^2; corrected labels scale their right side."""
    b = bandit.draw(1, flip=0.3, pairs=2000, arms=6)
    total = b.noisy + b.noisy.T
    laplacian = torch.diag(total.sum(1)) - total
    for correction, scale in (({}, 1.0), (rdpo.UNFLIP, 1 / (1 - 2 * rdpo.FLIP))):
        right = scale * (b.noisy.sum(1) - b.noisy.sum(0)) / (2 * 0.5)
        x = torch.linalg.pinv(laplacian) @ right
        fit = bandit.fit("ipo", {"tau": 0.5, **correction}, b.noisy, b.ref)
        torch.testing.assert_close(fit - fit.mean(), x - x.mean(), rtol=1e-5, atol=1e-6)


def test_only_rdpo_keeps_the_slope():
    slopes = rdpo.rates(5, 9000, [0.3])
    mean = {name: np.mean(found[0.3]) for name, found in slopes.items()}
    assert abs(mean["rDPO"] - 1) < 0.15
    assert mean["cDPO"] < mean["DPO"] < 0.6


def test_a_failed_claim_is_seen():
    """Were rDPO as DPO is, the claims would not hold."""
    slopes = rdpo.rates(2, 4000, [0.3])
    slopes["rDPO"] = slopes["DPO"]
    recovered = {"logistic": {"as it is": [0.3, 0.3], "corrected": [0.3, 0.3]}}
    table = {"DPO": {"slope": 0.3, "reward": 0.5}, "rDPO": {"slope": 0.3, "reward": 0.5}}
    verdicts = rdpo.claims(slopes, recovered, [table])
    assert [claim for claim, held in verdicts.items() if held] == \
        ["bandit, 30% flips: DPO's slope is below 0.6 and cDPO's below DPO's"]


# --------------------------------------------------------------------------------------------------------- lipo_lambda
def test_lambda_gradient_by_hand():
    """Scores 0.05 logp = (0.05, 0, -0.05) rank as the labels do: pairs weigh |gain gap| |discount gap|."""
    logp, relevance = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), lipo.WIDE
    gain, discount = [2 ** y - 1 for y in relevance], [1 / math.log2(1 + t) for t in (1, 2, 3)]
    expected = [0.0, 0.0, 0.0]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        weight = (gain[i] - gain[j]) * (discount[i] - discount[j])
        pull = 0.05 * weight / (1 + math.exp(0.05 * float(logp[i] - logp[j])))
        expected[i] -= pull
        expected[j] += pull
    assert lipo.gradient("lipo_lambda", logp, relevance).tolist() == pytest.approx(expected, rel=1e-5)


def test_only_lambda_sees_the_distance_of_labels():
    found = lipo.gradients()
    assert all(max(found[name]["gap"]) == 0 for name in ("lipo", "lipo_hinge", "lipo_list_mle"))
    assert min(w / n for w, n in zip(found["lipo_lambda"]["wide"], found["lipo_lambda"]["narrow"], strict=True)) > 20
    assert all(min(row["wide"]) > 0 for row in found.values())


def test_quality_of_a_list():
    """Score order (2nd, 1st, 3rd) of 4: dcg = g2 + g1/log2(3) + g3/2 against g1 + g2/log2(3) + g3/2; one of six pairs wrong."""
    reward, score = np.array([[4.0, 3.0, 2.0, 1.0]]), np.array([[3.0, 4.0, 2.0, 1.0]])
    g1, g2, g3 = (2 ** (p / 8) - 1 for p in (7, 5, 3))
    ndcg = (g2 + g1 / math.log2(3) + g3 / 2) / (g1 + g2 / math.log2(3) + g3 / 2)
    assert lipo.quality(score, reward) == {"ndcg": pytest.approx(ndcg), "best": 0.0, "accuracy": pytest.approx(5 / 6)}


def test_lists_are_labelled_as_lipo_labels_ranks():
    groups = lipo.lists(tiny.Language(0, words=24), 5)
    assert all(sorted(g.relevance) == [(2 * k + 1) / 16 for k in range(8)] for g in groups)
    assert all(len({r.text for r in g.responses}) == 8 for g in groups)


# ------------------------------------------------------------------------------------------------------ sparsepo_masks
def test_one_token_in_ten_decides():
    world = sparse.Language(0)
    rows = world.responses(200)
    opinion = rows >= sparse.FIRST
    assert (opinion.sum(1) == 1).all() and rows.shape == (200, 10)
    loud = (rows == sparse.WORDS.index("shouts")).any(1)
    assert set(np.abs(world.value(rows[loud])).round(3)) == {2.0, 0.667}
    assert set(np.abs(world.value(rows[~loud])).round(3)) == {0.5, 0.167}
    swapped = rows.copy()
    swapped[~opinion & (rows < sparse.FILLERS)] = 0           # fillers do not matter
    np.testing.assert_array_equal(world.value(swapped), world.value(rows))


# -------------------------------------------------------------------------------------------------------------- runs
def test_language_has_unit_variance():
    world = tiny.Language(3)
    reward = world.reward(world.responses(20000))
    assert abs(reward.mean()) < 0.05 and abs(reward.std() - 1) < 0.05


def test_masks_find_the_opinion(tmp_path):
    """50 steps of a tiny model: the learned mask is on opinions, and off elsewhere."""
    arm = {"L1 0.01": sparse.arms([0.01])["L1 0.01"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "arms", lambda weights: arm)
        found, strips = sparse.study(tmp_path, 60, 60, [0.01], 0)
    mask = found["L1 0.01"]["reward_mask"]
    assert mask["opinions"] > 3 * mask["others"] and mask["opinions"] > 0.3
    assert np.shape(strips["masks"]["L1 0.01"]) == (4, 10)


def main(study, monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["study", *map(str, arguments)])
    return study.main()


@pytest.mark.parametrize("name", ["rdpo_noise", "lipo_lambda"])
def test_toy(name, tmp_path, monkeypatch):
    """The shortened study holds its claims, and says so."""
    assert main(STUDIES[name], monkeypatch, "--toy", "--out", tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["claims"]) >= 5 and all(results["claims"].values())
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_seeds_in_two_processes_come_in_order():
    assert tiny.over_seeds(math.factorial, 3) == [1, 1, 2]


def test_exit_code_of_a_failed_claim(tmp_path, capsys):
    assert tiny.conclude(tmp_path, {}, {"two is one": False, "one is one": True}) == 1
    assert tiny.conclude(tmp_path, {}, {"one is one": True}) == 0
    assert "FAILS  two is one" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_full(name, tmp_path, monkeypatch):
    assert main(STUDIES[name], monkeypatch, "--out", tmp_path) == 0
