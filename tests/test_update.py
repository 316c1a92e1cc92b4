"""Update rules and moving references by hand values."""
import copy

import pytest
import torch
from loop_cases import go, lines, workplace

from prefopt.references import Frozen, Moving
from prefopt.setup import optimization
from prefopt.update import extragradient, plain


def saddle(start=(1.0, 1.0)):
    """x y: the game whose gradient field is a rotation, (y, -x) for the player who minimises over x and maximises over y."""
    x, y = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in start)
    seen = []

    def gradient():
        x.grad, y.grad = y.detach().clone(), -x.detach().clone()
        seen.append((x.item(), y.item()))
        return len(seen)

    return (x, y), gradient, seen


def test_plain_by_hand():
    (x, y), gradient, seen = saddle()
    assert plain((x, y), torch.optim.SGD((x, y), lr=0.5), gradient) == 1
    assert (x.item(), y.item(), seen) == (0.5, 1.5, [(1.0, 1.0)])


def test_extragradient_by_hand():
    """theta = (1, 1), g = (1, -1), look-ahead (0.5, 1.5); g' = (1.5, -0.5), theta <- (1 - 0.75, 1 + 0.25)."""
    (x, y), gradient, seen = saddle()
    assert extragradient((x, y), torch.optim.SGD((x, y), lr=0.5), gradient) == 1      # the metrics are those at theta
    assert (x.item(), y.item()) == (0.25, 1.25) and seen == [(1.0, 1.0), (0.5, 1.5)]


def test_extragradient_converges_where_plain_spirals_out():
    """On x y with step h plain multiplies |theta|^2 by 1 + h^2, extragradient by 1 - h^2 + h^4."""
    h = 0.5
    for rule, factor in ((plain, 1 + h**2), (extragradient, 1 - h**2 + h**4)):
        (x, y), gradient, _ = saddle()
        optimizer = torch.optim.SGD((x, y), lr=h)
        for _ in range(10):
            rule((x, y), optimizer, gradient)
        assert (x**2 + y**2).item() == pytest.approx(2 * factor**10, rel=1e-12)


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
                                  lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_extragradient_against_two_optimisers(make):
    """A copy of the parameters and of the optimiser looks ahead; the optimiser counts one step."""
    torch.manual_seed(0)
    matrix = torch.randn(4, 4, dtype=torch.float64)

    def gradient_of(p):
        def gradient():
            p.grad = torch.tanh(matrix @ p.detach())
        return gradient

    ours = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
    theirs = torch.nn.Parameter(ours.detach().clone())
    a, b = make([ours]), make([theirs])
    for step in range(1, 4):
        extragradient([ours], a, gradient_of(ours))
        ahead = torch.nn.Parameter(theirs.detach().clone())
        c = make([ahead])
        c.load_state_dict(copy.deepcopy(b.state_dict()))
        gradient_of(ahead)()
        c.step()
        gradient_of(ahead)()
        theirs.grad = ahead.grad
        b.step()
        assert torch.equal(ours, theirs)
        if "step" in a.state[ours]:
            assert float(a.state[ours]["step"]) == step


def test_failed_second_gradient_leaves_everything():
    (x, y), gradient, seen = saddle()
    optimizer = torch.optim.SGD((x, y), lr=0.5, momentum=0.9)
    plain((x, y), optimizer, gradient)
    before, state = (x.item(), y.item()), copy.deepcopy(optimizer.state_dict())

    def failing():
        if len(seen) == 2:
            raise FloatingPointError
        gradient()

    with pytest.raises(FloatingPointError):
        extragradient((x, y), optimizer, failing)
    assert (x.item(), y.item()) == before and optimizer.state_dict() == state


# -------------------------------------------------------------------------------------------------------- moving references
def test_moving_by_hand():
    """ref 0, policy 1, alpha 1/4, every 2: 0, 1/4, 1/4, 7/16."""
    moving, ref, policy = Moving(alpha=0.25, every=2), torch.zeros(1), torch.ones(1)
    seen = []
    for step in range(1, 5):
        moving.step(step, [ref], [policy])
        seen.append(float(ref))
    assert seen == [0.0, 0.25, 0.25, 0.4375]


def test_moving_by_one_copies():
    ref, policy = torch.zeros(3), torch.randn(3)
    Moving(alpha=1.0, every=1).step(1, [ref], [policy])
    assert torch.equal(ref, policy)


def test_frozen_stays():
    ref = torch.zeros(3)
    Frozen().step(1, [ref], [torch.ones(3)])
    assert torch.equal(ref, torch.zeros(3)) and not Frozen().moves and Moving().moves


@pytest.mark.parametrize("settings, said", [({"alpha": 0.0}, "alpha must be in"), ({"alpha": 1.1}, "alpha must be in"),
                                            ({"every": 0}, "every must be at least 1")])
def test_moving_out_of_range(settings, said):
    with pytest.raises(ValueError, match=said):
        Moving(**settings)


# ----------------------------------------------------------------------------------------------------- optimiser, schedule
class Some:
    """Stands for models: a matrix and a vector that train."""
    matrix, vector = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    critic = None

    def trainable(self):
        return [("matrix", self.matrix), ("vector", self.vector)]


def run_with(tmp_path, recipe="simpo", **settings):
    from loop_cases import plan
    return plan(tmp_path, recipe, "out", **settings)


def rates(tmp_path, steps: int, **settings) -> list[float]:
    """The learning rate of each step."""
    run = run_with(tmp_path, **{"train.lr": 1.0, **settings})
    optimizer, scheduler = optimization(run, Some(), run.objective(), steps)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_by_hand(tmp_path):
    """Warm-up rises by 1/w from 0; then constant, down to 0 in a line, or half a cosine."""
    assert rates(tmp_path, 4, **{"train.schedule": "constant", "train.warmup": 2}) == [0, 0.5, 1, 1]
    assert rates(tmp_path, 6, **{"train.schedule": "linear", "train.warmup": 2}) == [0, 0.5, 1, 0.75, 0.5, 0.25]
    cosine = rates(tmp_path, 4, **{"train.schedule": "cosine", "train.warmup": 0})
    assert cosine == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])
    assert rates(tmp_path, 10, **{"train.schedule": "constant", "train.warmup": 0.2})[:3] == [0, 0.5, 1]


def test_groups_of_the_optimiser(tmp_path):
    """Matrices decay, vectors do not, learned parts have settings of their own."""
    run = run_with(tmp_path, "sparsepo", **{"train.weight_decay": 0.3, "train.modules.lr": 0.5,
                                             "train.modules.weight_decay": 0.2, "train.warmup": 0})
    objective = run.objective()
    (module,) = objective.modules()
    module.setup(layers=2, width=3)
    optimizer, _ = optimization(run, Some(), objective, 4)
    matrices, vectors, learned = optimizer.param_groups
    assert [g["params"] for g in (matrices, vectors)] == [[Some.matrix], [Some.vector]]
    assert {id(p) for p in learned["params"]} == {id(p) for p in module.parameters()}
    assert [(g["weight_decay"], g["lr"]) for g in optimizer.param_groups] == [(0.3, 0.01), (0.0, 0.01), (0.2, 0.5)]


def test_optimiser_with_arguments(tmp_path):
    run = run_with(tmp_path, **{"train.optimizer": {"SGD": {"momentum": 0.8, "nesterov": True}}, "train.warmup": 0})
    optimizer, _ = optimization(run, Some(), run.objective(), 4)
    assert isinstance(optimizer, torch.optim.SGD) and len(optimizer.param_groups) == 2
    assert optimizer.param_groups[0]["momentum"] == 0.8 and optimizer.param_groups[0]["nesterov"]


# --------------------------------------------------------------------------------------------------------------- in the loop
def test_extragradient_in_the_loop(tmp_path, monkeypatch):
    """Two gradients a step; with a learning rate of nothing its metrics are those of plain; with one they are not."""
    from prefopt import train
    place, counted, logged = workplace(tmp_path), [], train.logged
    monkeypatch.setattr(train, "logged", lambda sums: counted.append(1) or logged(sums))
    still = {"train.optimizer": {"SGD": {"momentum": 0.5}}, "train.lr": 1e-12, "train.warmup": 0, "train.epochs": 1}
    go(place, "dpo", "plain", **still)
    assert len(counted) == 3
    go(place, "dpo", "extra", update="extragradient", **still)
    assert len(counted) == 3 + 6
    for a, b in zip(lines(place / "plain"), lines(place / "extra"), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)
    moved = {**still, "train.lr": 0.1}
    go(place, "dpo", "plain_moved", **moved)
    go(place, "dpo", "extra_moved", update="extragradient", **moved)
    (one, *_, a), (first, *_, b) = (lines(place / n) for n in ("plain_moved", "extra_moved"))
    assert one == first and abs(a["eval/loss"] - b["eval/loss"]) > 1e-5
