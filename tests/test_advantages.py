"""Shaping, keeps, advantages, token rewards, credits and normalisers: hand values, loops over rows, identities, claims."""
import doctest
import itertools
import math
import statistics
import threading
from functools import partial

import pytest
import torch
from columns_for_tests import close, f64
from trl.rewards import get_soft_overlong_punishment

from data_tools import Batch
from prefopt import advantages, credits, keeps, normalisers, ops, shaping, token_rewards
from prefopt.parts import columns_read, kind

MODULES = {"shaping": shaping, "keeps": keeps, "advantages": advantages, "token_rewards": token_rewards, "credits": credits,
           "normalisers": normalisers}
NAN = math.nan
yes = lambda *shape: torch.ones(*shape, dtype=torch.bool)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    failed, tried = doctest.testmod(MODULES[module])
    assert not failed and tried >= len(MODULES[module].__all__)


@pytest.mark.parametrize("module, kinds", [("shaping", "Rows"), ("keeps", "Lists"), ("advantages", "Rows"),
                                           ("token_rewards", "Tokens"), ("credits", "Tokens"), ("normalisers", "Tokens")])
def test_kinds(module, kinds):
    assert {kind(getattr(MODULES[module], name)) for name in MODULES[module].__all__} == {kinds}


# ------------------------------------------------------------------------------------------ ragged groups, row by row
class Rollout:
    """Rows of ragged groups in random order: groups of 4, 1 (alone), 3 (equal rewards), 5, 2, one unscored, one with probes."""

    def __init__(self, seed=0, tokens=7):
        g = torch.Generator().manual_seed(seed)
        sizes, n = [4, 1, 3, 5, 2, 2, 4], 21
        group = torch.cat([torch.full((k,), 11 * b - 30) for b, k in enumerate(sizes)])
        reward = torch.rand(n, generator=g, dtype=torch.float64)
        reward[group == -8] = reward[group == -8][0]          # the group of three: equal rewards
        reward[group == 3] = reward[group == 3].round()
        reward[group == 25] = NAN
        reward[group == -30] = torch.where(torch.arange(4) == 2, NAN, reward[group == -30])
        self.n, order = n, torch.randperm(n, generator=g)
        mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (n, 1), generator=g)
        mask &= torch.rand(n, tokens, generator=g) < 0.8      # holes, as tool output has
        mask[:, 0] = True
        mask[n - 1] = False                                   # one empty response
        step = torch.rand(n, tokens, generator=g, dtype=torch.float64)
        step[torch.rand(n, tokens, generator=g) < 0.6] = NAN
        logp = -3 * torch.rand(3, n, tokens, generator=g, dtype=torch.float64)
        train = torch.ones(n, dtype=torch.bool)
        train[torch.tensor([17, 19])] = False                 # probes of the last group
        finished = torch.rand(n, generator=g) < 0.5
        self.columns = {k: v[order] for k, v in dict(
            group=group, reward=reward, mask=mask, step_reward=step, logp_old=logp[0], logp_ref=logp[1], value_old=logp[2],
            train=train, finished=finished, response_advantage=reward.nan_to_num(0.3), advantage=logp[2] * mask).items()}
        self.columns["reward_at"] = torch.where(torch.isnan(self.columns["step_reward"]), 0.1, self.columns["step_reward"])

    def grouped(self, empty=0.0, padding=None):
        """Columns as the parts see them; `padding` is put under the mask."""
        columns = dict(self.columns)
        batch = Batch(columns)
        scored = ~torch.isnan(columns["reward"])
        out = {"real": batch.grouped(scored & columns["train"])[0], "probe": batch.grouped(scored & ~columns["train"])[0],
               "length": batch.grouped(columns["mask"].sum(-1))[0], "mask": batch.grouped("mask")[0]}
        for key in ("reward", "finished", "step_reward", "logp_old", "logp_ref", "value_old", "reward_at", "advantage",
                    "response_advantage"):
            value = columns[key].clone()
            if padding is not None and value.ndim == 2:
                value[~columns["mask"]] = padding
            value = batch.grouped(value)[0]
            if key == "reward":
                value = torch.where(out["real"] | out["probe"], value, empty)
            out[key] = value
        out["coefficient"] = torch.full_like(out["reward"], 0.3)
        return batch, out

    def loops(self):
        """Each group as (rows that take part, probe rows)."""
        c, groups = self.columns, {}
        for i, g in enumerate(c["group"].tolist()):
            mine = groups.setdefault(g, ([], []))
            if not math.isnan(float(c["reward"][i])):
                mine[0 if c["train"][i] else 1].append(i)
        return list(groups.values())

    def R(self, i):
        return float(self.columns["reward"][i])

    def length(self, i):
        return int(self.columns["mask"][i].sum())


def run(part, columns):
    return part(*(columns[name] for name in columns_read(part)))


def std(values):
    return statistics.stdev(values) if len(set(values)) > 1 else 0.0


def by_group(one):
    """A row version: one(rewards of the group, place in it, rollout, rows) for each row that takes part."""
    def of(rollout):
        out = [0.0] * rollout.n
        for rows, probes in rollout.loops():
            for place, i in enumerate(rows):
                out[i] = one([rollout.R(j) for j in rows], place, rollout, rows, probes)
        return f64(out)
    return of


def alone(single, rest):
    """`rest` but for a group of one, whose reward is taken `single` times."""
    return lambda x, i, *more: single * x[0] if len(x) == 1 else rest(x, i, *more)


def mean(x):
    return x[0] if len(set(x)) == 1 else sum(x) / len(x)


def scored_rows(rollout):
    return [i for rows, _ in rollout.loops() for i in rows]


def by_lengths(x, i, rollout, rows, probes):
    lengths = [rollout.length(j) for j in rows]
    return x[i] - sum(a * b for a, b in zip(lengths, x, strict=True)) / sum(lengths) if len(set(x)) > 1 else 0.0


def alpha(rollout):
    rows = scored_rows(rollout)
    return len(rows) / sum(rollout.R(i) != 0 for i in rows)


def bnpo_weight(rollout, x, single=0.0, largest=1e6):
    """1 / density of the Beta distribution, with the gamma function of the standard library."""
    accuracy = lambda y: (1 - single) * y[0] if len(y) == 1 else mean(y)
    p = [accuracy([rollout.R(i) for i in rows]) for rows, _ in rollout.loops() if rows]
    m, v, mine = statistics.mean(p), statistics.variance(p), accuracy(x)
    a, b = (max(1.0, 1 + (m * (1 - m) / v - 1) * share / 3) for share in (m, 1 - m))
    density = math.gamma(a + b) / math.gamma(a) / math.gamma(b) * mine ** (a - 1) * (1 - mine) ** (b - 1)
    return min(1 / density if density else math.inf, largest)


def bnpo(single):
    return lambda x, i, r, *more: bnpo_weight(r, x, single) * (single * x[0] if len(x) == 1 else x[i] - mean(x))


def lead(x, i):
    others = sorted(x[:i] + x[i + 1:])
    return max(0.0, x[i] - others[-1]) if others else 0.0


ADVANTAGES = {
    "zscore": (advantages.zscore, alone(0, lambda x, i, *_: (x[i] - mean(x)) / (std(x) + 1e-6) if std(x) else 0.0)),
    "zscore raw": (partial(advantages.zscore, single=1.0, eps=0.01),
                   alone(1 / 1.01, lambda x, i, *_: (x[i] - mean(x)) / (std(x) + 0.01))),
    "zscore_biased": (partial(advantages.zscore_biased, eps=0.01), alone(0, lambda x, i, *_: (x[i] - mean(x)) / (
        statistics.pstdev(x) + 0.01))),
    "zscore_biased raw": (partial(advantages.zscore_biased, eps=0.01, single=1.0), alone(1 / 1.01, lambda x, i, *_: (
        x[i] - mean(x)) / (statistics.pstdev(x) + 0.01))),
    "centre": (advantages.centre, alone(0, lambda x, i, *_: x[i] - mean(x))),
    "centre raw": (partial(advantages.centre, single=1.0), alone(1, lambda x, i, *_: x[i] - mean(x))),
    "leave_one_out": (advantages.leave_one_out, alone(0, lambda x, i, *_: x[i] - mean(x[:i] + x[i + 1:]))),
    "leave_one_out raw": (partial(advantages.leave_one_out, single=1.0), alone(1, lambda x, i, *_: x[i] - mean(
        x[:i] + x[i + 1:]))),
    "length_weighted": (advantages.length_weighted, by_lengths),
    "length_weighted raw": (partial(advantages.length_weighted, single=1.0), alone(1, by_lengths)),
    "gpg": (partial(advantages.gpg, norm=2.0), lambda x, i, r, *_: alpha(r) * (x[i] - mean(x)) / 2),
    "gpg raw": (partial(advantages.gpg, single=1.0), lambda x, i, r, *_: alpha(r) * alone(1, lambda x, i: x[i] - mean(x))(x, i)),
    "beta_normalised": (advantages.beta_normalised, bnpo(0.0)),
    "beta_normalised raw": (partial(advantages.beta_normalised, single=1.0), bnpo(1.0)),
    "raw": (advantages.raw, lambda x, i, *_: x[i]),
    "batch_centre": (advantages.batch_centre, lambda x, i, r, *_: x[i] - mean([r.R(j) for j in scored_rows(r)])),
    "greedy_baseline": (advantages.greedy_baseline, lambda x, i, r, rows, probes: x[i] - mean(
        [r.R(j) for j in probes]) if probes else 0.0),
    "best_minus_second": (advantages.best_minus_second, lambda x, i, *_: lead(x, i)),
    "best_minus_second_scaled": (partial(advantages.best_minus_second_scaled, eps=0.01), lambda x, i, *_: lead(x, i) / (
        (std(x) if len(x) > 1 else 0) + 0.01) if lead(x, i) else 0.0),
    "best_of_n": (advantages.best_of_n, lambda x, i, *_: float(i == x.index(max(x)))),
    "above": (partial(advantages.above, threshold=0.4), lambda x, i, *_: float(x[i] > 0.4)),
    "positive": (advantages.positive, lambda x, i, *_: max(0.0, x[i])),
    "negative": (advantages.negative, lambda x, i, *_: min(0.0, x[i] - 1)),
    "weighted_signs": (partial(advantages.weighted_signs, positive=0.3), lambda x, i, *_: 0.3 * x[i] if x[i] > 0 else -1.0),
}


def test_every_advantage_has_a_row_version():
    assert {key.split()[0] for key in ADVANTAGES} == set(advantages.__all__)


@pytest.mark.parametrize("key", ADVANTAGES)
def test_advantages_row_by_row(key):
    part, one = ADVANTAGES[key]
    for seed in range(3):
        rollout = Rollout(seed)
        batch, columns = rollout.grouped()
        out = run(part, columns)
        close(batch.rows(out), by_group(one)(rollout), 1e-12)
        assert not out[~columns["real"]].any()


@pytest.mark.parametrize("key", ADVANTAGES)
def test_advantages_laws(key):
    """Empty slots may hold anything, responses and groups may move, double stays double, none of it is needed at all."""
    part, _ = ADVANTAGES[key]
    _, columns = Rollout().grouped()
    out = run(part, columns)
    for junk in (NAN, math.inf, -math.inf):
        close(run(part, Rollout().grouped(empty=junk)[1]), out, 1e-15)
    ties = key == "best_of_n"                                 # the first of several
    for axis in (0,) if ties else (0, 1):
        order = torch.randperm(out.shape[axis], generator=torch.Generator().manual_seed(1))
        moved = {k: v.index_select(axis, order) for k, v in columns.items()}
        close(run(part, moved), out.index_select(axis, order), 1e-13)
    single = run(part, {k: v.float() if v.is_floating_point() else v for k, v in columns.items()})
    half = run(part, {k: v.bfloat16() if v.is_floating_point() else v for k, v in columns.items()})
    assert (out.dtype, single.dtype, half.dtype) == (torch.float64, torch.float32, torch.float32)
    for b, k in ((0, 3), (2, 1), (2, 3)):
        nothing = {name: torch.zeros(b, k, *value.shape[2:], dtype=value.dtype) for name, value in columns.items()}
        close(run(part, nothing), torch.zeros(b, k, dtype=torch.float64))


CENTRED = ["zscore", "zscore_biased", "centre", "leave_one_out", "length_weighted", "gpg", "beta_normalised",
           "best_minus_second", "best_minus_second_scaled"]


@pytest.mark.parametrize("name", CENTRED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_nothing(name, dtype):
    """Also where the mean is rounded: 0.1, 0.7, ... of 3, 7, 12 responses, and with eps = 0."""
    part = getattr(advantages, name)
    if name.startswith("zscore"):
        part = partial(part, eps=0.0)
    for value, k in itertools.product((0.1, 0.7, 1 / 3, 0.9999), (1, 3, 7, 12)):
        reward = torch.tensor([[value] * k, [0.25] * (k - 1) + [0.5]], dtype=dtype)
        out = run(part, {"reward": reward, "real": yes(2, k), "length": torch.arange(1, k + 1).expand(2, k)})
        assert torch.equal(out[0], torch.zeros(k, dtype=dtype))
        assert k == 1 or out[1].any()


@pytest.mark.parametrize("name", ["zscore", "zscore_biased", "centre", "leave_one_out", "beta_normalised"])
def test_a_group_sums_to_nothing(name):
    reward = torch.rand(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    close(getattr(advantages, name)(reward, yes(5, 6)).sum(-1), torch.zeros(5, dtype=torch.float64), 1e-12)


# ------------------------------------------------------------------------------------------ hand values, identities
def test_hand_values():
    """G = 4, k right: sqrt((1 - p)/p (G - 1)/G) = sqrt(3)/2 at k = 2; 3/2 and -1/2 at k = 1."""
    reward = f64([[1, 1, 0, 0], [1, 0, 0, 0]])
    half = math.sqrt(3) / 2
    close(advantages.zscore(reward, yes(2, 4), eps=0.0), f64([[half, half, -half, -half], [1.5, -0.5, -0.5, -0.5]]))
    close(advantages.zscore(reward, yes(2, 4))[1, 0], f64(0.75 / (0.5 + 1e-6)), 1e-15)
    close(advantages.zscore(f64([[2.0]]), yes(1, 1), single=1.0), f64([[2 / (1 + 1e-6)]]), 1e-15)       # verl's raw reward
    close(advantages.gpg(reward, yes(2, 4)), 8 / 3 * advantages.centre(reward, yes(2, 4)))
    close(advantages.length_weighted(f64([[1, 0]]), torch.tensor([[10, 30]]), yes(1, 2)), f64([[0.75, -0.25]]))
    close(advantages.best_minus_second_scaled(f64([[3, 1, 2]]), yes(1, 3), eps=0.0), f64([[1, 0, 0]]))  # std 1
    close(advantages.best_minus_second(f64([[1, 1, 0]]), yes(1, 3)), f64([[0, 0, 0]]))                  # a tie at the top


def test_binary_closed_forms():
    for g, k in ((2, 1), (4, 1), (8, 3), (16, 15)):
        p, reward = k / g, f64([[1.0] * k + [0.0] * (g - k)])
        up, down = math.sqrt((1 - p) / p * (g - 1) / g), -math.sqrt(p / (1 - p) * (g - 1) / g)
        z = advantages.zscore(reward, yes(1, g), eps=0.0)
        close(z, f64([[up] * k + [down] * (g - k)]))
        close((z ** 2).sum(), f64(g - 1))
        close(z.abs().sum(), f64(2 * g * math.sqrt(p * (1 - p) * (g - 1) / g)))
        close(advantages.centre(reward, yes(1, g)), f64([[1 - p] * k + [-p] * (g - k)]))
        close(advantages.centre(reward, yes(1, g)).abs().sum(), f64(2 * g * p * (1 - p)))


def test_identities():
    reward, real = Rollout().grouped()[1]["reward"], Rollout().grouped()[1]["real"]
    n = real.sum(-1, keepdim=True).double()
    of = lambda name, *more, **settings: getattr(advantages, name)(reward, *more, real, **settings)
    many = n.expand_as(real) > 1
    close(of("leave_one_out")[many], (n / (n - 1) * of("centre"))[many])
    close(of("zscore_biased", eps=0.0)[many], (of("zscore", eps=0.0) * (n / (n - 1)) ** 0.5)[many])
    close(of("length_weighted", torch.full_like(real, 7, dtype=torch.long)), of("centre"))
    close(advantages.zscore(3 * reward - 2, real, eps=0.0), of("zscore", eps=0.0))
    close(of("gpg", norm=1.0) * (reward[real] != 0).sum() / real.sum(), of("centre"))
    close(advantages.gpg(2 * (reward > 0.5).double() - 1, real), advantages.centre(2 * (reward > 0.5).double() - 1, real))
    binary = (reward > 0.5).double()
    both = advantages.positive(binary, real) + advantages.negative(binary, real)
    close(both, torch.where(real, 2 * binary - 1, 0.0))
    close(advantages.weighted_signs(binary, real, positive=1.0), both)
    close(advantages.weighted_signs(binary, real, positive=0.0), advantages.negative(binary, real))
    close(advantages.positive(binary, real), advantages.raw(binary, real))
    close(advantages.above(binary, real), advantages.raw(binary, real))
    one = real & (torch.arange(len(real)) == 0)[:, None]      # a batch of one group
    close(advantages.batch_centre(reward, one), advantages.centre(reward, one))
    assert not advantages.greedy_baseline(reward, real, torch.zeros_like(real)).any()
    assert torch.equal(of("best_minus_second") > 0, (of("best_of_n") > 0) & (of("best_minus_second") > 0))
    assert torch.equal(of("best_of_n").sum(-1), real.any(-1).double())


def test_length_weighted_is_zero_over_tokens():
    """The baseline minimises sum |y| (R - b)^2: the tokens' advantages of a group sum to 0."""
    _, c = Rollout().grouped()
    out = advantages.length_weighted(c["reward"], c["length"], c["real"])
    close((c["length"] * out).sum(-1), torch.zeros(len(out), dtype=torch.float64), 1e-12)


def accuracies(p, g=4):
    """Groups of g with k = p g right responses."""
    return f64([[1.0] * round(x * g) + [0.0] * (g - round(x * g)) for x in p])


def test_beta_normalised_limits(monkeypatch):
    # p = 0, 1: M = 1/2, V = 1/2, k = -1/2, so alpha = beta = 1 and the advantage is the centred reward
    reward = accuracies([0, 1, 0.5])
    close(advantages.beta_normalised(reward, yes(3, 4)), advantages.centre(reward, yes(3, 4)))
    # p = 1/2 +- d, V = 2 d^2; a = b = k/2 = 3/2 makes alpha = beta = 3/2: 1/4 / V - 1 = 3, V = 1/16, d = sqrt(1/32)
    d = math.sqrt(1 / 32)
    r = f64([[0.5 + d, 1.0, d + d], [0.5 - d, 0.0, 1 - d - d]])
    p = f64([[0.5 + d], [0.5 - d]])
    close(r.mean(-1, keepdim=True), p)
    out = advantages.beta_normalised(r, yes(2, 3))
    close(out, math.pi / 8 * (r - p) / (p * (1 - p)).sqrt())
    binary = accuracies([0.5, 0.25], 8)
    monkeypatch.setattr(advantages, "Beta", lambda a, b, **_: torch.distributions.Beta(f64(1.5), f64(1.5)))
    close(advantages.beta_normalised(binary, yes(2, 8)), math.pi / 8 * advantages.zscore_biased(binary, yes(2, 8), eps=0.0))


def test_beta_normalised_guards():
    equal = accuracies([0.25, 0.25, 0.25])                    # no variance between prompts: weight 1
    close(advantages.beta_normalised(equal, yes(3, 4)), advantages.centre(equal, yes(3, 4)))
    one = accuracies([0.25])
    close(advantages.beta_normalised(one, yes(1, 4)), advantages.centre(one, yes(1, 4)))
    g = torch.Generator().manual_seed(1)
    one = torch.rand(99, generator=g, dtype=torch.float64)
    turned = torch.stack([one[torch.randperm(99, generator=g)] for _ in range(9)])   # equal accuracies but for rounding
    assert turned.mean(-1).var() > 0
    close(advantages.beta_normalised(turned, yes(9, 99)), advantages.centre(turned, yes(9, 99)))
    some = accuracies([0, 0.25, 0.5, 0.5, 0.75, 0.5, 1])      # alpha, beta > 1: the density of p = 0 and 1 is 0
    out = advantages.beta_normalised(some, yes(7, 4))
    assert not out[[0, -1]].any() and out.isfinite().all() and out[1:-1].all()
    close(advantages.beta_normalised(3 * some - 1, yes(7, 4), low=-1.0, high=2.0), out)
    centred = advantages.centre(some, yes(7, 4))
    assert out[1, 0] / centred[1, 0] > out[2, 0] / centred[2, 0]                     # p = 1/4 weighs more than p = 1/2
    close(advantages.beta_normalised(some, yes(7, 4), largest=0.1), 0.1 * centred)


def test_bad_input():
    with pytest.raises(ValueError, match="rewards between low=0.0 and high=1.0, and 2 are outside: the first is -0.5"):
        advantages.beta_normalised(f64([[-0.5, 1.5, 0.5]]), yes(1, 3))
    advantages.beta_normalised(f64([[7.0, 0.5, 0.5]]), torch.tensor([[False, True, True]]))
    with pytest.raises(ValueError, match="low is below high"):
        advantages.beta_normalised(f64([[0.5]]), yes(1, 1), low=1.0, high=1.0)
    for buffer in (0, -1, 200):
        with pytest.raises(ValueError, match="0 < buffer <= limit"):
            shaping.overlong(f64([[0.5]]), torch.tensor([[3]]), limit=100, buffer=buffer)


def test_trl_formulas():
    """TRL 1.16 on a rectangular batch with unscorable rows: nan-aware mean, std and leave-one-out, then zeros."""
    g = torch.Generator().manual_seed(3)
    r = torch.rand(6, 4, generator=g, dtype=torch.float64)
    r[torch.rand(6, 4, generator=g) < 0.25] = NAN
    r[0, 1:] = NAN
    real = ~torch.isnan(r)
    m, count = r.nanmean(1, keepdim=True), real.sum(1, keepdim=True)
    sd = (((r - m) ** 2).nanmean(1, keepdim=True) * count / (count - 1)).sqrt()
    close(advantages.zscore(r.nan_to_num(0.0), real, eps=1e-4), ((r - m) / (sd + 1e-4)).nan_to_num(0.0))
    others = (r.nansum(1, keepdim=True) - r) / (count - 1)
    rloo = (r - others).nan_to_num(0.0)
    close(advantages.leave_one_out(r.nan_to_num(0.0), real), rloo)
    known = rloo[real & (count > 1)]
    tokens = credits.broadcast(rloo, yes(6, 4, 3))
    whitened = normalisers.whiten_rows(tokens, yes(6, 4, 3), real & (count > 1))
    close(whitened[real & (count > 1)][:, 0], (known - known.mean()) / (known.std() + 1e-4))


# ------------------------------------------------------------------------------------------ shaping and keeps
def test_overlong_is_that_of_trl():
    theirs = get_soft_overlong_punishment(max_completion_len=50, soft_punish_cache=20)
    length = torch.arange(51)
    expected = f64(theirs(completion_ids=[[1] * int(n) for n in length]))
    close(shaping.overlong(torch.zeros(1, 51, dtype=torch.float64), length[None], limit=50, buffer=20), expected[None])
    ends = shaping.overlong(f64([[3, 3, 3]]), torch.tensor([[50, 30, 40]]), limit=50, buffer=20, factor=2.0)
    close(ends, f64([[1, 3, 2]]))                             # factor at the limit, nothing at limit - buffer


def test_shaping_row_by_row():
    batch, c = Rollout().grouped()
    mask, rows = c["mask"], Rollout().columns
    expected = [sum(float(o - q) for o, q, m in zip(rows["logp_old"][i], rows["logp_ref"][i], rows["mask"][i], strict=True) if m)
                for i in range(Rollout().n)]
    reward = batch.rows(c["reward"])
    close(batch.rows(run(partial(shaping.kl_in_reward, beta=0.3), c)), reward - 0.3 * f64(expected))
    close(batch.rows(run(partial(shaping.unfinished, penalty=0.7), c)),
          reward - 0.7 * f64([0.0 if done else 1.0 for done in rows["finished"].tolist()]))
    _, junk = Rollout().grouped(padding=NAN)
    close(run(shaping.kl_in_reward, junk), run(shaping.kl_in_reward, c))
    empty = shaping.kl_in_reward(c["reward"], c["logp_old"], c["logp_ref"], torch.zeros_like(mask))
    assert torch.equal(empty, c["reward"])
    close(shaping.scaled(f64([[2]]), factor=3.0, shift=-1.0), f64([[5]]))
    close(shaping.clipped(f64([[-2, 0.5, 2]]), low=-1.0, high=1.0), f64([[-1, 0.5, 1]]))
    for name in shaping.__all__:
        part = partial(getattr(shaping, name), **{"overlong": dict(limit=9, buffer=3), "clipped": dict(low=0.0, high=1.0)}.get(
            name, {}))
        assert run(part, c).dtype == torch.float64
        assert run(part, {k: v.bfloat16() if v.is_floating_point() else v for k, v in c.items()}).dtype == torch.float32


def test_keeps_row_by_row():
    for seed in range(3):
        rollout = Rollout(seed)
        _, c = rollout.grouped()
        groups = {}
        for i, g in enumerate(rollout.columns["group"].tolist()):
            mine = groups.setdefault(g, [])
            if rollout.columns["train"][i] and not math.isnan(rollout.R(i)):
                mine.append(rollout.R(i))
        groups = [groups[g] for g in sorted(groups)]
        assert keeps.contrast(c["reward"], c["real"]).tolist() == [len(x) == 1 or len(set(x)) > 1 for x in groups]
        assert keeps.contrast(c["reward"], c["real"], least=0.2).tolist() == [
            len(x) == 1 or (len(x) > 1 and statistics.pstdev(x) > 0.2) for x in groups]
        share = [sum(r > 0.4 for r in x) / len(x) if x else -1 for x in groups]
        assert keeps.share_between(c["reward"], c["real"], low=0.25, high=0.75, threshold=0.4).tolist() == [
            0.25 <= s <= 0.75 for s in share]
        assert keeps.everything(c["real"]).tolist() == [bool(x) for x in groups]
        _, junk = rollout.grouped(empty=NAN)
        for part in (keeps.contrast, partial(keeps.share_between, low=0.2, high=0.8)):
            assert torch.equal(run(part, junk), run(part, c))


def test_keeps_edges():
    equal = torch.full((1, 7), 0.1)                           # its mean is not 0.1 in float32
    assert keeps.contrast(equal, yes(1, 7)).tolist() == [False]
    assert keeps.contrast(f64([[0.1, 0.1 + 1e-9]]), yes(1, 2)).tolist() == [True]
    tenths = f64([[1.0] * 9 + [0.0]])                         # the bounds are included: 9/10
    assert keeps.share_between(tenths, yes(1, 10), low=0.9, high=1.0).tolist() == [True]
    assert keeps.share_between(1 - tenths, yes(1, 10), low=0.0, high=0.1).tolist() == [True]
    binary = (draw(20, 4) > 0).double()
    assert torch.equal(keeps.contrast(binary, yes(20, 4)), keeps.share_between(binary, yes(20, 4), low=0.01, high=0.99))


# ------------------------------------------------------------------------------------------ token rewards and credits
def rows_of(name, **settings):
    """A loop over the tokens that train of each row, last to first."""
    def at_end(c, i, tokens):
        return {t: (float(c["reward"][i]) if t == tokens[-1] else 0.0) for t in tokens}

    def kl(c, i, t):
        return float(c["logp_old"][i, t] - c["logp_ref"][i, t])

    def discounted(c, i, tokens, lam, gamma, values):
        out, advantage, following = {}, 0.0, 0.0
        for t in reversed(tokens):
            v = float(c["value_old"][i, t]) if values else 0.0
            advantage = float(c["reward_at"][i, t]) + gamma * following - v + gamma * lam * advantage
            out[t], following = advantage, v
        return out

    one = {
        "at_end": at_end,
        "at_end_with_kl": lambda c, i, tokens: {t: r - 0.05 * kl(c, i, t) for t, r in at_end(c, i, tokens).items()},
        "at_end_with_coefficient": lambda c, i, tokens: {t: r - 0.3 * kl(c, i, t) for t, r in at_end(c, i, tokens).items()},
        "steps_and_end": lambda c, i, tokens: {
            t: r + (0.0 if math.isnan(c["step_reward"][i, t]) else 0.7 * float(c["step_reward"][i, t]))
            for t, r in at_end(c, i, tokens).items()},
        "broadcast": lambda c, i, tokens: {t: float(c["response_advantage"][i]) for t in tokens},
        "gae": lambda c, i, tokens: discounted(c, i, tokens, 0.9, 0.8, True),
        "returns": lambda c, i, tokens: {t: a + float(c["value_old"][i, t])
                                         for t, a in discounted(c, i, tokens, 0.9, 0.8, True).items()},
        "reward_to_go": lambda c, i, tokens: discounted(c, i, tokens, 1.0, 0.8, False),
    }[name]

    def of(columns):
        out = torch.zeros_like(columns["logp_old"])
        for i in range(len(out)):
            tokens = columns["mask"][i].nonzero().flatten().tolist()
            for t, value in one(columns, i, tokens).items():
                out[i, t] = value
        return out
    return of


TOKENS = {"at_end": token_rewards.at_end, "at_end_with_kl": token_rewards.at_end_with_kl,
          "at_end_with_coefficient": token_rewards.at_end_with_coefficient,
          "steps_and_end": partial(token_rewards.steps_and_end, weight=0.7), "broadcast": credits.broadcast,
          "gae": partial(credits.gae, gamma=0.8, lam=0.9), "returns": partial(credits.returns, gamma=0.8, lam=0.9),
          "reward_to_go": partial(credits.reward_to_go, gamma=0.8)}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_row_by_row(name):
    for seed in range(3):
        rollout = Rollout(seed)
        batch, c = rollout.grouped()
        out = run(TOKENS[name], c)
        rows = {**rollout.columns, "reward": batch.rows(c["reward"])}
        close(batch.rows(out), rows_of(name)(rows), 1e-12)
        for padding in (NAN, math.inf):
            close(run(TOKENS[name], rollout.grouped(padding=padding)[1]), out, 1e-15)
        assert run(TOKENS[name], {k: v.bfloat16() if v.is_floating_point() else v for k, v in c.items()}).dtype == torch.float32


@pytest.mark.parametrize("name", [*TOKENS, "grpo_process", "whiten", "whiten_rows"])
def test_tokens_of_nothing(name):
    part = TOKENS.get(name) or {**vars(credits), **vars(normalisers)}[name]
    _, c = Rollout().grouped()
    for b, k, t in ((0, 2, 3), (2, 3, 0), (2, 3, 4), (1, 1, 0)):
        nothing = {key: torch.zeros(b, k, *([t] if v.ndim == 3 else []), dtype=v.dtype) for key, v in c.items()}
        close(run(part, nothing), torch.zeros(b, k, t, dtype=torch.float64))


def test_gae_by_hand():
    """rew [0, 0, 1], V = 1/2: lam = 1 gives 1/2 everywhere and returns of 1; lam = 0 gives (0, 0, 1/2)."""
    reward, value, mask = f64([[[0, 0, 1]]]), f64([[[0.5, 0.5, 0.5]]]), yes(1, 1, 3)
    close(credits.gae(reward, value, mask, lam=1.0), f64([[[0.5, 0.5, 0.5]]]))
    close(credits.returns(reward, value, mask, lam=1.0), f64([[[1, 1, 1]]]))
    close(credits.gae(reward, value, mask, lam=0.0), f64([[[0, 0, 0.5]]]))
    close(credits.returns(reward, value, mask, lam=0.0), f64([[[0.5, 0.5, 1]]]))
    close(credits.gae(reward, value, mask, lam=0.5, gamma=0.5)[0, 0], f64([-0.25 - 0.125 / 4, -0.25 + 0.25 * 0.5, 0.5]))
    hole = torch.tensor([[[True, False, True]]])              # the reward and value in the hole are never seen
    close(credits.gae(f64([[[0, 9, 1]]]), f64([[[0.5, 9, 0.5]]]), hole, lam=0.0), f64([[[0, 0, 0.5]]]))
    close(credits.gae(f64([[[0, 9, 1]]]), f64([[[0.5, 9, 0.25]]]), hole, gamma=0.5, lam=1.0), f64([[[0, 0, 0.75]]]))


def test_credit_identities():
    _, c = Rollout().grouped()
    mask, reward_at, value = c["mask"], c["reward_at"], c["value_old"]
    kept = torch.where(mask, reward_at, 0.0)
    to_come = torch.where(mask, kept.flip(-1).cumsum(-1).flip(-1), 0.0)
    close(credits.gae(reward_at, value, mask, lam=1.0), to_come - torch.where(mask, value, 0.0))
    close(credits.returns(reward_at, value, mask, lam=1.0), to_come)
    close(credits.reward_to_go(reward_at, mask), to_come)
    close(credits.gae(reward_at, 0 * value, mask, gamma=0.9, lam=1.0), credits.reward_to_go(reward_at, mask, gamma=0.9))
    close(credits.reward_to_go(token_rewards.at_end(c["reward"], mask), mask), credits.broadcast(c["reward"], mask))
    close(token_rewards.at_end_with_coefficient(c["reward"], mask, c["logp_old"], c["logp_ref"], c["coefficient"]),
          token_rewards.at_end_with_kl(c["reward"], mask, c["logp_old"], c["logp_ref"], beta=0.3))
    some = mask.any(-1)
    whole = token_rewards.at_end_with_kl(c["reward"], mask, c["logp_old"], c["logp_ref"], beta=0.3).sum(-1)
    close(whole[some], shaping.kl_in_reward(c["reward"], c["logp_old"], c["logp_ref"], mask, beta=0.3)[some])
    nan = torch.full_like(reward_at, NAN)
    close(token_rewards.steps_and_end(c["reward"], nan, mask), token_rewards.at_end(c["reward"], mask))


def test_reward_to_go_is_that_of_verl_without_gaps():
    """verl multiplies the running return by the mask after each token: equal on one piece, 0 before a gap otherwise."""
    reward = draw(2, 3, 6)

    def verl(mask, gamma):
        out, running = torch.zeros_like(reward), torch.zeros(2, 3, dtype=torch.float64)
        for t in reversed(range(6)):
            running = reward[..., t] * mask[..., t] + gamma * running
            out[..., t] = running
            running = running * mask[..., t]
        return out * mask

    piece = torch.arange(6) < torch.tensor([[6, 3, 1], [0, 2, 5]])[..., None]
    close(credits.reward_to_go(reward, piece, gamma=0.9), verl(piece, 0.9))
    gap = piece & (torch.arange(6) != 2)
    ours, theirs = credits.reward_to_go(reward, gap, gamma=0.9), verl(gap, 0.9)
    close(ours[0, 0, 3:], theirs[0, 0, 3:])
    close(ours[0, 0, :2] - theirs[0, 0, :2], ours[0, 0, 3] * f64([0.81, 0.9]))


def test_grpo_process():
    # steps of the group: 1, 0 | 0.5: mean 1/2, unbiased std sqrt((1/4 + 1/4) / 2) = 1/2; normalised 1, -1 | 0
    step = f64([[[NAN, 1, 0, 7], [0.5, NAN, NAN, NAN]]])
    mask = torch.tensor([[[1, 1, 1, 0], [1, 1, 1, 1]]]).bool()
    close(credits.grpo_process(step, mask, yes(1, 2), eps=0.0), f64([[[0, 0, -1, 0], [0, 0, 0, 0]]]))
    swapped = f64([[[0, NAN, 1, 7], [NAN, 0.5, NAN, NAN]]])
    close(credits.grpo_process(swapped, mask, yes(1, 2), eps=0.0), f64([[[0, 1, 1, 0], [0, 0, 0, 0]]]))
    batch, c = Rollout().grouped()
    last = token_rewards.at_end(c["reward"], c["mask"])
    place = c["mask"].cumsum(-1)
    ends = c["mask"] & (place == place[..., -1:])
    real = c["real"] & c["mask"].any(-1)
    outcome = credits.broadcast(advantages.zscore(c["reward"], real), c["mask"])
    close(credits.grpo_process(torch.where(ends, last, NAN), c["mask"], real), outcome)      # a single final step
    expected = torch.zeros_like(batch.rows(last))
    rows = Rollout().columns
    for members, _ in Rollout().loops():
        steps = {(i, t): float(rows["step_reward"][i, t]) for i in members for t in rows["mask"][i].nonzero().flatten().tolist()
                 if not math.isnan(rows["step_reward"][i, t])}
        values = list(steps.values())
        z = {at: (s - mean(values)) / (std(values) + 1e-6) if std(values) else 0.0 for at, s in steps.items()}
        for i in members:
            for t in rows["mask"][i].nonzero().flatten().tolist():
                expected[i, t] = sum(s for (j, e), s in z.items() if j == i and e >= t)
    found = run(credits.grpo_process, c)
    close(batch.rows(found), expected, 1e-12)
    for padding in (NAN, math.inf):
        close(run(credits.grpo_process, Rollout().grouped(padding=padding)[1]), found, 1e-15)
    equal = credits.grpo_process(torch.full((1, 2, 3), 0.1), yes(1, 2, 3), yes(1, 2))
    assert not equal.any()


# ------------------------------------------------------------------------------------------ normalisers
def test_whiten_row_by_row():
    for seed in range(3):
        rollout = Rollout(seed)
        batch, c = rollout.grouped(padding=NAN)
        rows, part = rollout.columns, sorted(scored_rows(rollout))
        tokens = {(i, t): float(rows["advantage"][i, t]) for i in part for t in rows["mask"][i].nonzero().flatten().tolist()}
        m, v = statistics.mean(tokens.values()), statistics.variance(tokens.values())
        expected = torch.zeros_like(rows["advantage"])
        for at, a in tokens.items():
            expected[at] = (a - m) / math.sqrt(v + 1e-8)
        close(batch.rows(run(normalisers.whiten, c)), expected, 1e-12)
        means = [statistics.mean(a for (j, _), a in tokens.items() if j == i) for i in part if rows["mask"][i].any()]
        for at, a in tokens.items():
            expected[at] = (a - statistics.mean(means)) / (statistics.stdev(means) + 1e-4)
        close(batch.rows(run(normalisers.whiten_rows, c)), expected, 1e-12)


@pytest.mark.parametrize("name", normalisers.__all__)
def test_whiten_edges(name):
    part = getattr(normalisers, name)
    one = torch.tensor([[[True, False]]])
    close(part(f64([[[0.7, NAN]]]), one, yes(1, 1)), f64([[[0.7, 0]]]))              # one token: left as it is
    assert not part(f64([[[0.1] * 7]]).float(), yes(1, 1, 7), torch.zeros(1, 1).bool()).any()
    equal = part(torch.full((2, 3, 7), 0.1), yes(2, 3, 7), yes(2, 3))
    assert torch.equal(equal, torch.zeros(2, 3, 7))           # 0 exactly: nothing of the mean's rounding is blown up
    a = draw(3, 4, 5)
    out = part(a, yes(3, 4, 5), yes(3, 4), eps=0.0)
    close(part(3 * a - 2, yes(3, 4, 5), yes(3, 4), eps=0.0), out)
    statistic = out if name == "whiten" else out.mean(-1)
    close(statistic.mean(), f64(0.0))
    close(statistic.var(), f64(1.0))
    assert part(a.bfloat16(), yes(3, 4, 5), yes(3, 4)).dtype == torch.float32


def test_reinforce_plus_plus_baseline():
    """verl: centred (a group of one its raw reward), spread over tokens, whitened over all tokens, masked again."""
    _, c = Rollout(1).grouped()
    mask, real = c["mask"], c["real"]
    n = real.sum(-1, keepdim=True)
    kept = torch.where(real, c["reward"], 0.0)
    centred = torch.where(real, kept - torch.where(n == 1, 0.0, kept.sum(-1, keepdim=True) / n.clamp(min=1)), 0.0)
    flat = (centred[..., None] * mask)[mask & real[..., None]]
    var = ((flat - flat.mean()) ** 2).mean() * len(flat) / (len(flat) - 1)
    theirs = (centred[..., None] - flat.mean()) * torch.rsqrt(var + 1e-8) * mask * real[..., None]
    ours = credits.broadcast(advantages.centre(c["reward"], real, single=1.0), mask)
    close(normalisers.whiten(ours, mask, real), theirs, 1e-9)


# ------------------------------------------------------------------------------------------ two processes
BATCH_WIDE = {"gpg": advantages.gpg, "beta_normalised": advantages.beta_normalised, "batch_centre": advantages.batch_centre,
              "whiten": normalisers.whiten, "whiten_rows": normalisers.whiten_rows}


def together(part, shares, monkeypatch):
    """The part in one thread per process; `total` is a sum that waits for everybody, as an all-reduce does."""
    barrier, desk, out = threading.Barrier(len(shares), timeout=20), [None] * len(shares), [None] * len(shares)
    me = threading.local()

    def total(x):
        desk[me.rank] = x
        barrier.wait()
        sum_ = torch.stack(desk).sum(0)
        barrier.wait()
        return sum_

    def work(rank):
        me.rank = rank
        try:
            out[rank] = run(part, shares[rank])
        except BaseException:
            barrier.abort()
            raise

    for module in (advantages, normalisers):
        monkeypatch.setattr(module, "total", total)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(out)


@pytest.mark.parametrize("name", BATCH_WIDE)
@pytest.mark.parametrize("first", [0, 1, 3, 7])
def test_two_processes_are_one(name, first, monkeypatch):
    """A share of no group at all included. Each by itself would be something else."""
    _, columns = Rollout().grouped()
    whole = run(BATCH_WIDE[name], columns)
    shares = [{k: v[part] for k, v in columns.items()} for part in (slice(0, first), slice(first, None))]
    close(together(BATCH_WIDE[name], shares, monkeypatch), whole, 1e-12)
    monkeypatch.undo()
    if 0 < first < 7:
        assert not torch.allclose(torch.cat([run(BATCH_WIDE[name], share) for share in shares]), whole)


def test_no_other_part_joins_processes(monkeypatch):
    def forbidden(x):
        raise AssertionError("a part of groups joins processes")
    for module in (ops, advantages, normalisers):
        monkeypatch.setattr(module, "total", forbidden)
    _, c = Rollout().grouped()
    for key, (part, _) in ADVANTAGES.items():
        if key.split()[0] not in BATCH_WIDE:
            run(part, c)
    for part in TOKENS.values():
        run(part, c)


# ------------------------------------------------------------------------------------------ claims, by enumeration
class Bandit:
    """A softmax over arms; every group of G draws with its probability, so that expectations are sums."""

    def __init__(self, logits, reward, g):
        self.p = f64(logits).softmax(0)
        arms = torch.tensor(list(itertools.product(range(len(logits)), repeat=g)))
        self.reward, self.weight = f64(reward)[arms], self.p[arms].prod(-1)
        self.score = torch.eye(len(logits), dtype=torch.float64)[arms] - self.p         # grad log pi, (groups, G, arms)
        self.real = torch.ones_like(arms, dtype=torch.bool)
        self.exact = self.p * (f64(reward) - (self.p * f64(reward)).sum())

    def gradients(self, part):
        """Estimate of each group, mean over its draws of A grad log pi."""
        return (part(self.reward, self.real)[..., None] * self.score).mean(1)

    def mean(self, part):
        return (self.weight[:, None] * self.gradients(part)).sum(0)

    def variance(self, part):
        """Trace of the covariance, and the same in units of the squared mean."""
        each, m = self.gradients(part), self.mean(part)
        trace = float((self.weight[:, None] * (each - m) ** 2).sum())
        return trace, trace / float((m ** 2).sum())


LOGITS, REWARD = [0.3, -0.5, 1.0, 0.1], [1.0, 0.2, 0.0, 0.5]


@pytest.mark.parametrize("g", [2, 3, 5])
def test_leave_one_out_is_unbiased(g):
    """And the group's mean as baseline is (G - 1)/G of it; no baseline is unbiased too."""
    bandit = Bandit(LOGITS, REWARD, g)
    close(bandit.weight.sum(), f64(1.0))
    close(bandit.mean(advantages.leave_one_out), bandit.exact, 1e-12)
    close(bandit.mean(advantages.raw), bandit.exact, 1e-12)
    close(bandit.mean(advantages.centre), (g - 1) / g * bandit.exact, 1e-12)


def test_zscore_is_biased_by_a_factor_of_the_prompt():
    """Its expected update of right and wrong arms grows as sqrt(p (1 - p)) and not as p (1 - p): hard prompts count more."""
    size = {p: float(Bandit([math.log(p / (1 - p)), 0.0], [1.0, 0.0], 6).mean(advantages.zscore)[0]) / (p * (1 - p))
            for p in (0.05, 0.5)}
    assert size[0.05] > 1.1 * size[0.5]


def test_baselines_reduce_variance():
    """Mean reward far from 0: more than 2x less variance than REINFORCE without a baseline, in absolute terms and for a
    gradient of the same length."""
    bandit = Bandit(LOGITS, [r + 3 for r in REWARD], 4)
    plain = bandit.variance(advantages.raw)
    for part in (advantages.zscore, advantages.centre, advantages.leave_one_out):
        assert all(p > 2 * b for p, b in zip(plain, bandit.variance(part), strict=True)), part.__name__


@pytest.mark.parametrize("g", [2, 3, 4])
def test_best_minus_second_is_the_gradient_of_the_best(g):
    """sum_i A_i grad log pi(y_i) is unbiased for the gradient of the expected best reward of G draws."""
    bandit = Bandit(LOGITS, REWARD, g)
    logits = f64(LOGITS).requires_grad_()
    arms = torch.tensor(list(itertools.product(range(4), repeat=g)))
    best = (logits.softmax(0)[arms].prod(-1) * f64(REWARD)[arms].amax(-1)).sum()
    exact, = torch.autograd.grad(best, logits)
    close(g * bandit.mean(advantages.best_minus_second), exact, 1e-12)


def test_whitening_leaves_a_noisy_prompt_small():
    """One prompt whose rewards differ by 1e-3 alone: under a z-score its gradient counts like any other's, under one
    whitening over the batch less than a third of that."""
    g = torch.Generator().manual_seed(0)
    reward = (torch.rand(8, 6, generator=g) < 0.5).double()
    reward[0] = 0.5 + 1e-3 * draw(6)
    score = draw(8, 6, 5)
    mask = yes(8, 6, 3)

    def share(advantage):
        norms = (advantage[..., :1] * score).sum(1).norm(dim=-1)
        return float(norms[0] / norms.sum())

    local = share(credits.broadcast(advantages.zscore(reward, yes(8, 6)), mask))
    whole = share(normalisers.whiten(credits.broadcast(advantages.centre(reward, yes(8, 6)), mask), mask, yes(8, 6)))
    assert whole < local / 3
