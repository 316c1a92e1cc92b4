"""Aspects made into one reward: ridge regression, verbosity taken out, the gate on the prompt."""
import math

import numpy as np
import pytest
import torch
from columns_for_tests import close
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge

from rewards import multi_objective as mo


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- regression
def test_ridge_is_that_of_scikit_learn():
    x, y = draw(30, 5), draw(30, seed=1)
    theirs = Ridge(alpha=0.7, fit_intercept=False).fit(x.numpy(), y.numpy()).coef_
    close(mo.ridge(x, y, 0.7), torch.from_numpy(theirs))


def test_alpha_is_chosen_by_validation():
    """Many noisy features and few rows want a strong penalty, an exact relation a weak one; labels may be missing."""
    x, w = draw(60, 40), draw(40, seed=1)
    labels = torch.stack([x @ w, draw(60, seed=2)], 1)
    labels[::2, 1] = math.nan
    x = torch.cat([x, draw(60, 40, seed=3)])
    labels = torch.cat([labels, torch.stack([x[60:] @ w, torch.full((60,), math.nan).double()], 1)])
    weights, alphas = mo.ridge_by_validation(x, labels)
    assert alphas[0] <= 0.01 and alphas[1] >= 10
    assert (weights[0] - w).abs().max() < 0.01
    changed = x.clone()
    changed[60:] += 7                                         # rows without a label of the second aspect
    close(mo.ridge_by_validation(changed, labels)[0][1], weights[1])


def test_an_aspect_without_labels_is_an_error():
    with pytest.raises(ValueError, match="aspect 1 has 1 labels"):
        mo.ridge_by_validation(draw(3, 2), torch.tensor([[1.0, 1.0], [2.0, math.nan], [3.0, math.nan]]).double())


# ------------------------------------------------------------------------------------------------- verbosity
def test_verbosity_is_taken_out():
    verbose, own = draw(500).numpy(), draw(500, 3, seed=1).numpy()
    rewards = np.stack([own[:, 0] + 0.3 * verbose, verbose, own[:, 1] - verbose, 3 * verbose + 0.1 * own[:, 2]], 1)
    p = mo.verbosity_penalties(rewards, 1)
    assert p[1] == 1 and p[2] == 0 and p[3] == 1               # itself; already below; never reached
    place = mo.PENALTIES.index(p[0])
    for candidate, reached in ((mo.PENALTIES[place], True), (mo.PENALTIES[place - 1], False)):
        assert (spearmanr(rewards[:, 0] - candidate * verbose, verbose).statistic <= 0.03) == reached
    after = mo.debiased(torch.from_numpy(rewards), torch.from_numpy(p), 1)
    assert not after[:, 1].any()
    close(after[:, 0], torch.from_numpy(rewards[:, 0] - p[0] * verbose))


def test_the_candidates_of_the_release():
    assert mo.PENALTIES[:9] == (0, .01, .025, .05, .075, .1, .125, .15, .2) and mo.PENALTIES[-1] == .95
    assert len(mo.PENALTIES) == 24 and list(mo.PENALTIES) == sorted(mo.PENALTIES)


# ------------------------------------------------------------------------------------------------- gate
def test_a_hot_gate_is_even():
    gate = mo.Gate(4, 3, hidden=8, temperature=1e9).eval()
    torch.testing.assert_close(gate(draw(5, 4).float()), torch.full((5, 3), 1 / 3))
    gate.scale.data.fill_(2.0)
    torch.testing.assert_close(gate(draw(5, 4).float()).sum(-1), torch.full((5,), 2.0))


def test_a_gate_beats_every_fixed_weighting():
    """Two aspects in conflict, the prompt says which one counts: more than 10 points of accuracy over the best weights."""
    g = torch.Generator().manual_seed(0)
    prompts = torch.randn(3000, 4, generator=g)
    gap = torch.randn(3000, 1, generator=g).abs() * torch.tensor([1.0, -1.0]) * (1 + torch.rand(3000, 2, generator=g))
    kind = (prompts[:, 0] < 0).long()
    sign = torch.sign(gap.gather(1, kind[:, None]))
    chosen, rejected = sign * gap / 2, -sign * gap / 2
    torch.manual_seed(0)
    gate = mo.train_gate(mo.Gate(4, 2, hidden=32, temperature=1.0), prompts[:2000], chosen[:2000], rejected[:2000], steps=200,
                         batch=256)
    test = (chosen - rejected)[2000:]
    with torch.no_grad():
        gated = float(((gate(prompts[2000:]) * test).sum(-1) > 0).float().mean())
    fixed = max(float(((c * test[:, 0] + (1 - c) * test[:, 1]) > 0).float().mean()) for c in torch.linspace(0, 1, 21))
    assert gated > 0.9 and gated > fixed + 0.1, (gated, fixed)


def test_training_the_gate_can_be_repeated():
    x, a, b = draw(50, 4).float(), draw(50, 2, seed=1).float(), draw(50, 2, seed=2).float()
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(mo.train_gate(mo.Gate(4, 2, hidden=8), x, a, b, steps=5)(x))
    assert torch.equal(*found)
