"""Rows that weigh nothing in a policy's step are not computed, and nothing else changes."""
import pytest
import torch
from loop_cases import ROLLOUT, go, workplace
from test_forward_recipes import policies, sampled
from tiny_models import Float64, same

from data_tools.batch import Batch
from prefopt import recipes, train
from prefopt.forward import fill, forward
from prefopt.online import weighing

POLICIES = [name for name in recipes.__all__ if not recipes.find(name)().whole_groups]


def step(name: str, models, chosen) -> tuple[dict, dict, int]:
    """Loss and metrics, gradients, and tokens computed with a gradient, of a step whose rows go through `chosen`."""
    objective = recipes.find(name)()
    reads, model = objective.reads(), models.policy
    trunk = models.policy_model()
    whole = objective.annotate(fill(models, sampled(reads), reads, whole_groups=False))
    model.zero_grad()
    before, found, total = trunk.calls["trained"], {}, 0.0
    for micro in chosen(whole).microbatches(40, whole_groups=False):
        loss = objective.loss(forward(models, micro, reads | {"entropy"}))
        torch.autograd.backward(loss.value)
        total += float(loss.value.detach())
        for key, value in loss.metrics.items():
            found[key] = found.get(key, 0.0) + float(value)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": total, **found}, gradients, trunk.calls["trained"] - before


@pytest.mark.parametrize("name", POLICIES)
def test_what_weighs_nothing_is_not_computed(name):
    """Each of five groups has a probe of 2 tokens, and one response has no reward."""
    models = policies(name)
    with Float64():
        whole, rest = step(name, models, lambda b: b), step(name, models, weighing)
    assert rest[2] < whole[2]
    assert rest[0] == pytest.approx(whole[0], rel=0, abs=1e-10)
    same(rest[1], whole[1])


def units(*rows: list[float], **more: torch.Tensor) -> Batch:
    unit = torch.tensor(rows)
    return Batch({"tokens": torch.ones_like(unit).long(), "attend": torch.ones_like(unit), "mask": torch.ones_like(unit),
                  "group": torch.tensor([4, 4, 7][:len(rows)]), "token_unit": unit, **more})


def test_which_rows_weigh():
    """A weight in any term counts; without weights, and where all are 0, everything is computed."""
    assert weighing(units([0, 0.5], [0, 0], [0.5, 0]))["group"].tolist() == [4, 7]
    critic = torch.tensor([[0.0, 0], [0, 0.1], [0, 0]])
    assert weighing(units([0, 0.5], [0, 0], [0, 0], **{"token_unit@critic": critic}))["group"].tolist() == [4, 4]
    for untouched in (units([0.0, 0], [0, 0]), units([0.1, 0], [0, 0.1])):
        assert weighing(untouched) is untouched
    pairs = Batch({k: v for k, v in units([0.0, 0], [0, 0]).items() if k != "token_unit"})
    assert weighing(pairs) is pairs


def test_a_run_computes_no_probes(tmp_path, monkeypatch):
    """Greedy responses beside the samples of ReMax: scored and read for baselines, never in a pass with gradient."""
    seen, known = [], []
    monkeypatch.setattr(train, "forward", lambda models, micro, reads: seen.append(micro) or forward(models, micro, reads))
    monkeypatch.setattr(train, "fill", lambda models, batch, *a, **k: known.append(batch) or fill(models, batch, *a, **k))
    go(workplace(tmp_path), "remax", "run", rollout=ROLLOUT, **{"train.steps": 1, "data.eval": None, "train.eval_every": None})
    assert sum(int((~b["train"].bool()).sum()) for b in known) == 6
    assert seen and all(bool(micro["train"].all()) for micro in seen) and sum(micro.N for micro in seen) == 18
