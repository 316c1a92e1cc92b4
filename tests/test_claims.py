"""What the papers claim of their losses, where a closed form, an enumeration or a few steps of descent can show it."""
import math

import pytest
import torch
from columns_for_tests import close, f64, gradient_of, step, value_of

from data_tools import Batch
from prefopt import diagnose, pairwise, recipes


def test_lambda_weights_see_graded_labels():
    """Labels far apart or close together in the same order: the pair and list losses cannot tell, lambda's can (LiPO)."""
    far, near = ((0.99, 0.50, 0.01), (0.51, 0.50, 0.49))
    for recipe in (recipes.lipo, recipes.lipo_list_mle):
        close(gradient_of(recipe(), step([0.3, 0.1, -0.2], relevance=far)),
              gradient_of(recipe(), step([0.3, 0.1, -0.2], relevance=near)), 1e-15)
    norms = [gradient_of(recipes.lipo_lambda(), step([0.3, 0.1, -0.2], relevance=y)).norm() for y in (far, near)]
    assert norms[0] > 20 * norms[1] > 0


def test_lambda_is_allrank_times_ideal_dcg():
    """allRank's lambdaRank scheme (natural log, sum) divides the gains by the ideal DCG."""
    psi, s = [0.9, 0.1, 0.6, 0.3], [0.2, 0.8, -0.4, 0.1]
    order = sorted(range(4), key=lambda i: -s[i])
    position = {i: k + 1 for k, i in enumerate(order)}
    ideal = sum((2 ** y - 1) / math.log2(2 + k) for k, y in enumerate(sorted(psi, reverse=True)))
    allrank = 0.0
    for i in range(4):
        for j in range(4):
            if psi[i] > psi[j]:
                discount = abs(1 / math.log2(1 + position[i]) - 1 / math.log2(1 + position[j]))
                allrank += discount * abs(2 ** psi[i] - 2 ** psi[j]) / ideal * math.log1p(math.exp(-(s[i] - s[j])))
    ours = value_of(recipes.lipo_lambda(beta=0.5), step([2 * x for x in s], relevance=psi))
    assert float(ours.detach()) == pytest.approx(allrank * ideal, rel=1e-12)


def test_ranking_threshold():
    """A pair is ranked right by the policy exactly when its DPO loss is at most -log sigmoid(beta c), c = lr_l - lr_w."""
    g = torch.Generator().manual_seed(0)
    policy, reference = (2 * torch.randn(1000, 2, generator=g, dtype=torch.float64) for _ in range(2))
    right = diagnose.ranking_policy(policy[..., None], torch.ones(1000, 2, 1))[:, 0, 1].bool()
    loss = pairwise.logistic(0.1 * ((policy - reference) @ f64([1.0, -1.0])))
    threshold = pairwise.logistic(0.1 * (reference[:, 1] - reference[:, 0]))
    assert torch.equal(right, loss <= threshold) and 300 < int(right.sum()) < 700


@pytest.mark.parametrize("beta, right", [(1.0, 0.0), (0.5, 1.0)])
def test_idealised_ranking(beta, right):
    """alpha = 3/4 and a reference ratio of 1/5: the optimum's ratio is 3/5 at beta 1, 9/5 at beta 1/2."""
    wins = f64([[[math.nan, 0.75], [0.25, math.nan]]])
    reference = torch.tensor([[[0.0], [math.log(5)]]], dtype=torch.float64)
    assert float(diagnose.idealised(reference, torch.ones(1, 2, 1), wins, beta=beta)[0, 0, 1]) == right


def descend(objective, rate):
    """Margins along sixty steps of gradient descent of three arms on one deterministic pair."""
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    path = []
    for _ in range(60):
        logp = theta.log_softmax(0)
        batch = Batch({"logp": logp[:2, None], "logp_ref": torch.full((2, 1), -math.log(3)).double(),
                       "mask": torch.ones(2, 1).bool(), "group": torch.zeros(2).long(),
                       "relevance": torch.tensor([1.0, 0.0])})
        gradient, = torch.autograd.grad(value_of(objective, batch), theta)
        theta = (theta - rate * gradient).detach().requires_grad_()
        path.append(float((theta[0] - theta[1]).detach()))
    return path


def test_one_deterministic_pair():
    """IPO stops at its target margin, the hinge stops once the margin is 1/beta, DPO goes on."""
    assert descend(recipes.ipo_summed(tau=0.25), 0.1)[-1] == pytest.approx(2.0, abs=1e-9)
    dpo = descend(recipes.dpo(beta=1.0), 1.0)
    assert dpo[-1] > 4 and dpo[-1] - dpo[-10] > 0.05
    hinge = recipes.hinge(beta=1.0)
    assert not gradient_of(hinge, step([1.5, 0.0])).any() and gradient_of(recipes.dpo(beta=1.0), step([1.5, 0.0])).all()


def test_dpo_recovers_the_reward():
    """On Bradley-Terry labels the implicit reward has slope 1 on the true one; rdpo keeps it under flips, dpo does not."""
    g = torch.Generator().manual_seed(0)
    reward = torch.randn(8, generator=g, dtype=torch.float64)
    i, j = torch.combinations(torch.arange(8)).T
    p = torch.sigmoid(reward[i] - reward[j])                  # exact label probabilities instead of samples

    def slope(objective, flip):
        theta = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        n = len(i)
        wins = torch.full((n, 2, 2), math.nan, dtype=torch.float64)
        wins[:, 0, 1] = p * (1 - flip) + (1 - p) * flip
        wins[:, 1, 0] = 1 - wins[:, 0, 1]
        arms = torch.stack([i, j], 1).flatten()
        fixed = {"logp_ref": torch.full((2 * n, 1), -math.log(8)).double(), "mask": torch.ones(2 * n, 1).bool(),
                 "group": torch.arange(2 * n) // 2, "wins": wins}
        optimizer = torch.optim.LBFGS([theta], max_iter=60, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = value_of(objective, Batch({**fixed, "logp": theta.log_softmax(0)[arms][:, None]}))
            value.backward()
            return value

        optimizer.step(closure)
        implicit = (theta.detach() - theta.detach().mean()) * 0.5
        centred = reward - reward.mean()
        return float(implicit @ centred / (centred @ centred))

    assert slope(recipes.dpo(beta=0.5), 0.0) == pytest.approx(1.0, abs=1e-3)
    assert slope(recipes.rdpo(beta=0.5, flip=0.2), 0.2) == pytest.approx(1.0, abs=1e-3)
    assert slope(recipes.dpo(beta=0.5), 0.2) < 0.6
