"""Recipes of reward models: what they are next to each other, and what they can learn that others cannot."""
import math

import pytest
import torch
from columns_for_tests import close, columns_for, f64, objective_for, outcome, ready
from sklearn.metrics import f1_score
from torch import nn

from data_tools import Batch, labels
from prefopt import label_rules, margins, pairwise, recipes
from prefopt.recipes import reward_models


def head_step(outputs, relevance=(1.0, 0.0), group=None, **more):
    """Rows with these outputs of a head, in one group unless told."""
    outputs = f64(outputs)
    outputs = outputs[:, None] if outputs.ndim == 1 else outputs
    n = len(outputs)
    return Batch({"outputs": outputs.requires_grad_(), "relevance": f64(relevance),
                  "group": torch.zeros(n).long() if group is None else torch.tensor(group), **more})


def value(objective, batch):
    return float(objective.loss(objective.annotate(batch)).value.detach())


# ------------------------------------------------------------------------------------------------- identities
def test_bradley_terry_on_log_ratios_is_dpo():
    columns = columns_for("dpo")
    rho = ((columns["logp"] - columns["logp_ref"]) * columns["mask"]).sum(1)
    theirs, _ = outcome(recipes.dpo(beta=0.3, label_smoothing=0.1), columns)
    mine, _ = outcome(recipes.bradley_terry(label_smoothing=0.1), {**columns, "outputs": 0.3 * rho[:, None]})
    close(mine, theirs)


@pytest.mark.parametrize("mine, theirs", [
    (recipes.implicit_dpo, recipes.dpo), (recipes.implicit_kto, recipes.kto), (recipes.implicit_nca, recipes.nca)])
def test_implicit_recipes_are_the_policies_with_another_beta(mine, theirs):
    columns = columns_for(theirs.__name__)
    (a, g), (b, h) = outcome(mine(beta=0.3), columns), outcome(theirs(beta=0.3), columns)
    close(a, b)
    close(g["logp"], h["logp"])


def test_an_implicit_reward_is_an_outcome_model_of_log_ratios():
    columns = columns_for("implicit_ce")
    rho = ((columns["logp"] - columns["logp_ref"]) * columns["mask"]).sum(1)
    mine, _ = outcome(recipes.implicit_ce(beta=0.3), columns)
    close(mine, outcome(recipes.outcome(), {**columns, "outputs": 0.3 * rho[:, None]})[0])


def test_love_without_weights_is_outcome():
    columns = columns_for("love")
    close(outcome(recipes.love(), columns)[0], outcome(recipes.outcome(), columns)[0])


def test_centring_is_per_pair_as_in_trl():
    """-log sigmoid(3) + 0.1 (2 - 1)^2."""
    found = value(recipes.bradley_terry(centring=0.1), head_step([2.0, -1.0]))
    assert found == pytest.approx(math.log1p(math.exp(-3)) + 0.1, rel=1e-12)


def test_a_target_grows_with_the_rating():
    """Ratings 3 and 1 at half a unit of reward each: the difference of 2 counts as 1."""
    found = value(recipes.bradley_terry(target=0.5), head_step([2.0, 0.0], (3.0, 1.0)))
    assert found == pytest.approx(math.log1p(math.exp(-1)), rel=1e-12)


def test_votes_of_several_annotators():
    """Three annotators, one of another opinion: P(1 over 2) = 2/3, and the best difference is log 2."""
    wins = f64([labels.vote([[1, 0], [1, 0], [0, 1]])])
    wins = torch.where(torch.eye(2).bool(), math.nan, wins.nan_to_num())
    batch = head_step([math.log(2), 0.0], wins=wins)
    batch = Batch({k: v for k, v in batch.items() if k != "relevance"})
    objective = recipes.bradley_terry()
    slope, = torch.autograd.grad(objective.loss(objective.annotate(batch)).value, batch["outputs"])
    close(slope, torch.zeros(2, 1).double())


def test_flipped_labels_are_corrected():
    """E over flips of the corrected loss is the clean loss."""
    columns, flip = columns_for("aot"), 0.3
    columns["outputs"] = columns["outputs"][:, :1]
    corrected = recipes.bradley_terry().with_slots(labels=lambda wins: label_rules.unflip(wins, flip=flip))
    right, wrong = (outcome(corrected, {**columns, "relevance": y})[0] for y in (columns["relevance"],
                                                                                1 - columns["relevance"]))
    close((1 - flip) * right + flip * wrong, outcome(recipes.bradley_terry(), columns)[0])


def test_ties_are_counted_by_bt_ties_alone():
    batch = head_step([1.0, 1.0, 0.0, 0.0], (1.0, 1.0, 1.0, 0.0), group=[0, 0, 1, 1])
    assert value(recipes.bradley_terry(), batch) == pytest.approx(math.log(2), rel=1e-12)
    assert value(ready(recipes.bt_ties(nu=2.0)), batch) == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-6)
    fixed = recipes.bt_ties().with_slots(ranking=pairwise.davidson)
    assert value(fixed, batch) == pytest.approx(math.log(3), rel=1e-12)


def test_normal_link_by_slots():
    made = recipes.gaussian(entropy=0.0).with_slots(margin=margins.gaussian_probit, ranking=pairwise.probit)
    found = value(made, head_step([[5.0, math.log(3)], [0.0, math.log(4)]]))      # Phi(1)
    assert found == pytest.approx(-math.log(0.5 * (1 + math.erf(1 / math.sqrt(2)))), rel=1e-12)


def test_multi_objective_by_hand():
    """Aspect 0: (1 - 0)^2 and (2 - 2)^2, mean 1/2; aspect 1: one label, (0 - 3)^2."""
    batch = head_step([[1.0, 0.0], [2.0, 7.0]], rewards=f64([[0.0, 3.0], [2.0, math.nan]]))
    assert value(recipes.multi_objective(), batch) == pytest.approx(9.5, rel=1e-12)
    pair = math.log1p(math.exp(-1))                           # aspect 0 prefers the second; aspect 1 compares nothing
    assert value(recipes.multi_preference(), batch) == pytest.approx(pair, rel=1e-12)


# ------------------------------------------------------------------------------------------------- what they read
@pytest.mark.parametrize("name, reads", [
    ("bradley_terry", {"outputs", "relevance"}), ("general_preference", {"outputs", "relevance"}),
    ("gpm_gated", {"outputs", "prompt_state", "relevance"}), ("ordinal", {"outputs", "relevance"}),
    ("multi_objective", {"outputs", "rewards"}), ("process", {"token_reward", "step_label", "mask"}),
    ("dice", {"outputs", "outputs_old", "relevance"}), ("implicit_ce", {"logp", "logp_ref", "mask", "relevance"})])
def test_what_a_recipe_reads(name, reads):
    assert recipes.find(name)().reads() == reads


def test_heads_have_the_width_that_recipes_ask_for():
    widths = {n: recipes.find(n)().outputs for n in recipes.__all__ if recipes.find(n)().outputs}
    assert widths == {"anyloss": 1, "bradley_terry": 1, "bt_list": 1, "bt_ties": 1, "dice": 1, "gaussian": 2,
                      "general_preference": 4, "gpm_gated": 4, "love": 1, "multi_objective": 2, "multi_preference": 2,
                      "ordinal": 4, "outcome": 1, "process": 1}
    assert recipes.ordinal(levels=3).outputs == 2 and recipes.multi_objective(aspects=5).outputs == 5
    assert {n for n, f in vars(reward_models).items() if callable(f) and f.__module__ == reward_models.__name__
            and n[0] != "_"} <= set(recipes.__all__)


# ------------------------------------------------------------------------------------------------- what they learn
def cyclic(n_items, prompts, steps, recipe, *, noise=0.1, seed=0):
    """Share of right pairs of rock-paper-scissors with n items on each prompt (odd prompts reversed), after training.

    An item beats the (n - 1) / 2 that follow it. A two-layer net sees noisy features of the prompt and the item.
    """
    g = torch.Generator().manual_seed(seed)
    items, heads = torch.randn(n_items, 8, generator=g), torch.randn(prompts, 8, generator=g)
    objective = recipe()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, objective.outputs))
    for module in objective.modules():
        module.setup(layers=1, width=8)
    optimizer = torch.optim.Adam([*net.parameters(), *(p for m in objective.modules() for p in m.parameters())], 1e-2)

    def batch(size):
        i, step = torch.randint(n_items, (size,), generator=g), torch.randint(1, (n_items + 1) // 2, (size,), generator=g)
        prompt = torch.randint(prompts, (size,), generator=g)
        both = torch.stack([i, (i + torch.where(prompt % 2 == 1, -step, step)) % n_items], 1).flatten()
        x = torch.cat([items[both], heads[prompt].repeat_interleave(2, 0)], 1)
        x = x + noise * torch.randn(x.shape, generator=g)
        return Batch({"outputs": net(x), "prompt_state": heads[prompt].repeat_interleave(2, 0),
                      "group": torch.arange(2 * size) // 2, "relevance": torch.tensor([1.0, 0.0]).repeat(size)})

    for _ in range(steps):
        loss = objective.loss(objective.annotate(batch(128))).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test = batch(1000)
    return float(objective.loss(objective.annotate(test)).metrics["accuracy"])


@pytest.mark.parametrize("n_items, dim", [(3, 4), (5, 6), (9, 8)])
def test_cycles_fit_a_general_preference(n_items, dim):
    """And no scores: Bradley-Terry cannot rank more than the share of the best order of a tournament (2/3 for three)."""
    assert cyclic(n_items, 1, 200, lambda: recipes.general_preference(dim=dim)) >= 0.99
    if n_items == 3:
        assert cyclic(3, 1, 200, recipes.bradley_terry) <= 2 / 3 + 0.05


def test_a_gate_follows_the_prompt():
    """Prompts that reverse the cycle, with a net that sees them and a gate on top."""
    assert cyclic(3, 4, 300, recipes.gpm_gated) >= 0.99


@pytest.mark.parametrize("name", ["anyloss", "dice"])
def test_rare_positives(name):
    """2 % positives: F1 at the threshold 1/2 is 5 points above that of cross-entropy after as many steps."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(10, generator=g), torch.randn(8000, 10, generator=g)
    y = (torch.rand(8000, generator=g) < torch.sigmoid(x @ (1.5 * w / w.norm()) - 5)).float()

    def trained(objective, steps, start=None):
        theta = torch.zeros(11) if start is None else start.clone()
        theta.requires_grad_()
        optimizer = torch.optim.Adam([theta], 0.05)
        for _ in range(steps):
            batch = Batch({"outputs": (x[:4000] @ theta[:10] + theta[10])[:, None], "group": torch.arange(4000),
                           "relevance": y[:4000]})
            loss = objective.loss(objective.annotate(batch)).value
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return theta.detach()

    def f1(theta):
        return f1_score(y[4000:].numpy(), (x[4000:] @ theta[:10] + theta[10] > 0).numpy())

    warm = trained(recipes.outcome(), 30)
    assert f1(trained(recipes.find(name)(), 150, warm)) > f1(trained(recipes.outcome(), 150, warm)) + 0.05


def test_ordinal_ranks_by_the_expected_grade():
    """One latent, four grades: the model's thresholds and its score follow."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 5, generator=g)
    latent = x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0]) + torch.logit(torch.rand(2000, generator=g))
    y = (latent[:, None] > torch.tensor([-1.0, 0.5, 3.0])).sum(1).float()
    objective = recipes.ordinal(levels=4, tie=0.1)
    net = nn.Linear(5, 3, bias=False)
    for module in objective.modules():
        module.setup(layers=1, width=5)
    optimizer = torch.optim.Adam([*net.parameters(), *objective.modules()[0].parameters()], 0.05)
    for _ in range(200):
        batch = Batch({"outputs": net(x), "group": torch.arange(2000), "relevance": y})
        loss = objective.loss(objective.annotate(batch)).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    thresholds = objective.modules()[0].thresholds.detach()
    assert (thresholds - torch.tensor([-1.0, 0.5, 3.0])).abs().max() < 0.3
    assert (net.weight.detach() - torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0])).abs().max() < 0.3
    assert net.weight.detach().diff(dim=0).abs().max() < 0.1                # tied, softly


def test_modules_are_found():
    assert [type(m).__name__ for m in objective_for("ordinal").modules()] == ["Thresholds"]
    assert [type(m).__name__ for m in objective_for("gpm_gated").modules()] == ["EigenvalueGate"]
    assert [type(m).__name__ for m in objective_for("bt_ties").modules()] == ["Davidson"]
