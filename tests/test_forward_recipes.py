"""One optimiser step of every recipe on a tiny model: micro-batches, and which models run."""
from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny_models import Float64, adapted, batch, same, tiny
from torch import nn

from data_tools.batch import Batch
from prefopt import recipes
from prefopt.forward import fill, forward, frozen_models, needs_critic, pieces
from prefopt.models import Head, Models, head_of

CRITIC = Head("AutoModelForTokenClassification", "TOKEN_CLS", 1)


@pytest.fixture(autouse=True)
def double():
    with Float64():
        yield


def preferences(reads: set[str]) -> tuple[Batch, Batch]:
    """Four groups of a pair and whatever else a recipe reads, and the same groups shifted by one for mismatched rows."""
    sizes = [(3, 4, 2), (2, 1, 6), (4, 3, 3), (2, 5, 1)]
    rows, columns = [], {"relevance": [], "reward": [], "level": [], "contrast": [], "rationale": [], "online": [],
                         "degree": [], "side": [], "position": [], "from_reference": []}

    def add(group, prompt, response, **values):
        default = {"relevance": float("nan"), "reward": 0.3, "level": 0, "contrast": 0, "rationale": False, "online": False,
                   "degree": -1, "side": -1, "position": 1, "from_reference": False}
        rows.append((group, prompt, response))
        for key, value in {**default, **values}.items():
            columns[key].append(value)

    for group, (prompt, *lengths) in enumerate(sizes):
        level = group % 2 if "level" in reads else 0
        for place, length in enumerate(lengths):
            add(group, prompt, length, relevance=float(1 - place), reward=place - 0.4 * group, level=level,
                position=place + 1, from_reference=place == group % 2)
        if "online" in reads:
            add(group, prompt, 3, online=True), add(group, prompt, 2, online=True)
        if "rationale" in reads and group != 1:
            add(group, prompt + 1, 3, rationale=True)
        if "degree" in reads:
            add(group, prompt, 2, degree=group % 3, side=1), add(group, prompt, 1, degree=1, side=0)
    if "contrast" in reads:
        for sign, prompt in ((1, 4), (-1, 4), (-1, 2), (1, 2)):
            add(len(sizes), prompt, 3, level=2, contrast=sign)
    made = {k: torch.tensor(v, dtype=torch.float64 if k in ("relevance", "reward") else None) for k, v in columns.items()
            if k in reads | {"relevance"}}
    whole = batch(rows, seed=3, padding="left", right=1, **made)
    random = torch.Generator().manual_seed(4)
    if "rewards" in reads:
        whole = whole.with_columns(rewards=torch.rand(whole.N, 2, generator=random))
    if "segment" in reads:
        whole = whole.with_columns(segment=torch.randint(4, whole["mask"].shape, generator=random).double())
    if "step_label" in reads:
        marks = torch.rand(whole["mask"].shape, generator=random).round()
        whole = whole.with_columns(step_label=torch.where(whole["mask"].bool(), marks, torch.nan))
    return whole, Batch({**whole, "group": (whole["group"] + 1) % whole.groups}, whole.width)


def sampled(reads: set[str]) -> Batch:
    """Five groups of sampled responses, ragged, with rewards, one of them unknown, and a probe row beside each."""
    sizes = [(3, 4, 2, 5), (2, 1, 6), (4, 3, 3, 2), (2, 5), (3, 2, 2)]
    rows = [(group, prompt, length) for group, (prompt, *lengths) in enumerate(sizes) for length in [*lengths, 2]]
    random = torch.Generator().manual_seed(4)
    last = torch.tensor([n + 1 == len(rows) or rows[n][0] != rows[n + 1][0] for n in range(len(rows))])
    made = batch(rows, seed=3, padding="left", right=1, train=~last, finished=torch.rand(len(rows), generator=random) < 0.5,
                 reward=torch.rand(len(rows), generator=random).index_fill(0, torch.tensor([1]), torch.nan))
    shape = made["mask"].shape
    return made.with_columns(step_reward=torch.rand(shape, generator=random), noise=torch.rand(shape, generator=random),
                             logp_rollout=-4 * torch.rand(shape, generator=random))


def policies(name: str) -> Models:
    """What the recipe trains, a language model or one with its head, a reference, and a critic where values are read."""
    objective = recipes.find(name)()
    critic = tiny("llama", head=CRITIC, seed=2) if needs_critic(objective.reads()) else None
    return Models(tiny("llama", head=head_of(objective)), tiny("llama", seed=1), critic=critic)


def trained(name: str, models: Models, *, split: bool = False) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients of policy and parts, and number of micro-batches of one optimiser step of a recipe.

    `split` makes micro-batches as small as whole groups allow, and small chunks in the head.
    """
    objective = recipes.find(name)()
    torch.manual_seed(5)
    parts = nn.ModuleList(objective.modules())
    for module in parts:
        module.setup(layers=models.policy_model().layer_count, width=models.policy_model().width)
        module.double()
        for p in module.parameters():
            nn.init.normal_(p, 0.5, 0.2)
    both = nn.ModuleDict({"policy": models.policy, "parts": parts, **({"critic": models.critic} if models.critic else {})})
    both.zero_grad()
    reads = objective.reads()
    whole, other = preferences(reads) if objective.whole_groups else (sampled(reads), None)
    lengths = whole["attend"].sum(1)
    largest = torch.zeros(whole.groups).long().index_add(0, whole.index, lengths) if objective.whole_groups else lengths
    sizes = dict(tokens=int(largest.max()) if split else None, whole_groups=objective.whole_groups)
    whole = objective.annotate(fill(models, whole, reads, other=other, **sizes))
    value, pieces = 0.0, 0
    for micro in whole.microbatches(**sizes):
        loss = objective.loss(forward(models, micro, reads, chunk=7 if split else None)).value
        torch.autograd.backward(loss)
        value, pieces = value + float(loss.detach()), pieces + 1
    return value, {n: p.grad.clone() for n, p in both.named_parameters() if p.grad is not None}, pieces


def filled(name: str) -> tuple[Models, object, set[str], Batch]:
    """A recipe's models, its objective, what that reads, and a step's batch before the passes with a gradient."""
    models, objective = policies(name), recipes.find(name)()
    for module in objective.modules():
        module.setup(layers=models.policy_model().layer_count, width=models.policy_model().width)
        module.double()
    reads = objective.reads()
    whole, other = preferences(reads) if objective.whole_groups else (sampled(reads), None)
    return models, objective, reads, objective.annotate(fill(models, whole, reads, other=other))


@pytest.mark.parametrize("name", recipes.__all__)
def test_microbatches_do_not_matter(name):
    models = policies(name)
    one, many = trained(name, models), trained(name, models, split=True)
    assert one[2] == 1 and many[2] >= 3
    assert many[0] == pytest.approx(one[0], rel=1e-12, abs=1e-10)
    same(one[1], many[1])
    assert max(g.abs().max() for g in one[1].values()) > 1e-6
    assert any(key.startswith("parts") for key in one[1]) == bool(recipes.find(name)().modules())
    owners = {key.split(".")[0] for key, gradient in one[1].items() if gradient.abs().max() > 1e-6}
    assert "policy" in owners and ("critic" in owners) == needs_critic(recipes.find(name)().reads())


@pytest.mark.parametrize("name", recipes.__all__)
def test_the_reference_runs_only_for_recipes_that_read_it(name):
    models = policies(name)
    trained(name, models)
    reads = recipes.find(name)().reads()
    assert (models._reference.calls["forwards"] > 0) == bool(frozen_models(reads))
    passes = len(reads & {"logp_ref", "activation_mask", "mismatched"}) + bool(reads & {"token_kl", "states_ref"})
    assert models._reference.calls["forwards"] == passes
    before = reads & {"logp_old", "logp_now", "entropy_old", "outputs_old", "mismatched"}
    assert models.policy_model().calls["forwards"] == 1 + len(before)
    if needs_critic(reads):
        assert models.critic_model().calls["forwards"] == len(reads & {"value", "value_old"}) == 2
    if not frozen_models(reads):
        trained(name, Models(policies(name).policy, critic=policies(name).critic))         # none need be there
        assert not reads & {"logp_ref", "states_ref", "token_kl", "mismatched", "activation_mask"}


def test_a_recipe_that_reads_the_reference_says_so_when_none_is_loaded():
    with pytest.raises(ValueError, match="no reference model"):
        trained("dpo", Models(tiny("llama")))


@pytest.mark.parametrize("name", ["dpo", "kto", "tdpo", "mapo", "sparsepo"])
def test_adapters_off_equal_a_separate_reference(name):
    policy, base = adapted(tiny("llama")), tiny("llama").requires_grad_(False)
    one, two = trained(name, Models(policy), split=True), trained(name, Models(policy, base))
    assert one[0] == pytest.approx(two[0], abs=1e-10)
    same(one[1], two[1])


@pytest.mark.parametrize("name", [name for name in recipes.__all__ if name != "ordinal"])                # which checks its grades
def test_no_micro_batch_waits_for_the_device(name):
    """On a device without numbers nothing can be read back: making micro-batches, forward, loss and backward ask it nothing."""
    models, objective, reads, whole = filled(name)
    forward(models, whole, reads)                             # the checks of the first batch are done
    for module in filter(None, (models.policy, models.reference, models.critic, *objective.modules())):
        module.to("meta")
    away = whole.to("meta")
    assert away["tokens"].is_meta and away.host["tokens"].equal(whole["tokens"])
    count, largest = 0, int(torch.zeros(whole.groups).long().index_add(0, whole.index, whole["attend"].sum(1)).max())
    for (_, micro), _ in pieces(models, away, largest, objective.whole_groups):
        loss = objective.loss(forward(models, micro, reads, chunk=7))
        torch.autograd.backward(loss.value)
        count += 1
    assert count > 1 and loss.value.is_meta and any(p.grad is not None for p in models.policy.parameters())


@pytest.mark.parametrize("name", recipes.__all__)
def test_a_micro_batch_goes_when_it_is_done(name):
    """With its graph, and not when garbage is collected some time: what holds itself keeps memory for many micro-batches."""
    models, objective, reads, whole = filled(name)
    gc.disable()
    try:
        micro = forward(models, whole, reads)
        loss = objective.loss(micro)
        torch.autograd.backward(loss.value)
        left = [weakref.ref(x) for x in (micro, loss.value, *(x for x in micro.values() if x.requires_grad))]
        del micro, loss
        assert len(left) > 2 and [one() for one in left] == [None] * len(left)
    finally:
        gc.enable()
