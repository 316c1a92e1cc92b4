"""The policy objective: every recipe against a version of its own in loops over rows and tokens, and what must hold for all."""
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from columns_for_tests import NAN, ON_POLICY, SETTINGS, close, f64, objective_for, outcome, rollouts, take
from torch import Tensor

from data_tools import Batch
from prefopt import diagnose, online, recipes
from prefopt.config import assemble
from prefopt.policy import Penalty

EVERY = pytest.mark.parametrize("name", ON_POLICY)


# ------------------------------------------------------------------------------ loops over rows, written from the papers
class Loop:
    """Columns as numbers: which rows are in a group, take part, are probes; their tokens, rewards and log-probabilities."""

    def __init__(self, columns: dict):
        self.c = columns
        self.n, self.width = columns["mask"].shape
        group, train = columns["group"].tolist(), columns["train"].tolist()
        self.R = columns["reward"].tolist()
        scored = [not math.isnan(r) for r in self.R]
        self.real = [bool(train[i]) and scored[i] for i in range(self.n)]
        self.groups = {g: [i for i in range(self.n) if group[i] == g] for g in set(group)}
        self.group = group
        self.probes = {g: [i for i in rows if not train[i] and scored[i]] for g, rows in self.groups.items()}
        self.tokens = [[t for t in range(self.width) if columns["mask"][i, t]] for i in range(self.n)]

    def of(self, column: str, i: int, t: int) -> float:
        return float(self.c[column][i, t].detach())

    def ratio_sum(self, now: str, old: str, i: int) -> float:
        return sum(self.of(now, i, t) - self.of(old, i, t) for t in self.tokens[i])

    def members(self, i: int) -> list[int]:
        return [j for j in self.groups[self.group[i]] if self.real[j]]

    def rewards(self, i: int) -> list[float]:
        return [self.R[j] for j in self.members(i)]

    def everyone(self) -> list[int]:
        return [i for i in range(self.n) if self.real[i]]


def mean(x) -> float:
    x = list(x)
    return x[0] if len(set(x)) == 1 else sum(x) / len(x)


def deviation(x) -> float:
    return statistics.stdev(x) if len(set(x)) > 1 else 0.0


def zscore(l: Loop, i: int, eps=1e-6) -> float:
    x = l.rewards(i)
    return (l.R[i] - mean(x)) / (deviation(x) + eps) if len(x) > 1 else 0.0


def centred(l, i):
    return l.R[i] - mean(l.rewards(i)) if len(l.rewards(i)) > 1 else 0.0


def leave_one_out(l, i):
    others = [l.R[j] for j in l.members(i) if j != i]
    return l.R[i] - sum(others) / len(others) if others else 0.0


def over_greedy(l, i):
    probes = l.probes[l.group[i]]
    return l.R[i] - mean(l.R[j] for j in probes) if probes else 0.0


def length_weighted(l, i):
    rows, x = l.members(i), l.rewards(i)
    if len(set(x)) == 1:
        return 0.0
    lengths = [len(l.tokens[j]) for j in rows]
    return l.R[i] - sum(a * b for a, b in zip(lengths, x, strict=True)) / sum(lengths)


def gpg(l, i, norm):
    rows = l.everyone()
    return len(rows) / sum(l.R[j] != 0 for j in rows) * centred(l, i) / norm


def beta_density(p, a, b):
    return math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) * p ** (a - 1) * (1 - p) ** (b - 1)


def bnpo(l, i, most):
    accuracy = [mean(l.R[j] / most for j in rows) for rows in ([j for j in g if l.real[j]] for g in l.groups.values()) if rows]
    if len(l.rewards(i)) == 1:
        return 0.0
    p, m, v = mean(l.rewards(i)) / most, mean(accuracy), statistics.variance(accuracy)
    k = m * (1 - m) / v - 1
    return (l.R[i] / most - p) / beta_density(p, max(1, 1 + k * m / 3), max(1, 1 + k * (1 - m) / 3))


def best_minus_second(l, i):
    x = sorted(l.rewards(i))
    return (l.R[i] - x[-2]) / (deviation(x) + 1e-6) if len(x) > 1 and l.R[i] == x[-1] else 0.0


def jensen_shannon(l, i, beta):
    log_p = {j: sum(l.of("logp_ref", j, t) for t in l.tokens[j]) + l.R[j] / beta for j in l.members(i)}
    lp = lambda column, j: sum(l.of(column, j, t) for t in l.tokens[j])
    z = mean(math.exp(log_p[j] - lp("logp_rollout", j)) for j in log_p)
    t = math.exp(lp("logp_old", i) - log_p[i]) * z
    return math.log(1 + 1 / t) - math.log(2)


def whitened(l, a, eps=1e-8):
    flat = [a[i][t] for i in l.everyone() for t in l.tokens[i]]
    m, v = mean(flat), statistics.variance(flat)
    return [{t: (x - m) / math.sqrt(v + eps) for t, x in row.items()} for row in a]


def spread(l, of_row):
    """The row's advantage at each of its tokens."""
    return [{t: of_row(l, i) for t in l.tokens[i]} if l.real[i] else {} for i in range(l.n)]


def paid(l, i, beta):
    """Reward of each token: the response's at its last, less beta times the log-ratio to the reference."""
    return {t: (l.R[i] if t == l.tokens[i][-1] else 0.0) - beta * (l.of("logp_old", i, t) - l.of("logp_ref", i, t))
            for t in l.tokens[i]}


def to_go(l, beta, gamma):
    out = []
    for i in range(l.n):
        g, row = 0.0, {}
        if l.real[i]:
            received = paid(l, i, beta)
            for t in reversed(l.tokens[i]):
                g = received[t] + gamma * g
                row[t] = g
        out.append(row)
    return out


def gae(l, beta, gamma, lam):
    advantages, returns = [], []
    for i in range(l.n):
        a, ret, after, carried = {}, {}, 0.0, 0.0
        if l.real[i]:
            received = paid(l, i, beta)
            for t in reversed(l.tokens[i]):
                v = l.of("value_old", i, t)
                carried = received[t] + gamma * after - v + gamma * lam * carried
                after, a[t], ret[t] = v, carried, carried + v
        advantages.append(a)
        returns.append(ret)
    return advantages, returns


def of_steps(l):
    out = []
    for i in range(l.n):
        if not l.real[i]:
            out.append({})
            continue
        steps = {j: {t: l.of("step_reward", j, t) for t in l.tokens[j] if not math.isnan(l.of("step_reward", j, t))}
                 for j in l.members(i)}
        every = [r for row in steps.values() for r in row.values()]
        z = {t: (r - mean(every)) / (deviation(every) + 1e-6) if len(every) > 1 else 0.0 for t, r in steps[i].items()}
        out.append({t: sum(z[u] for u in z if u >= t) for t in l.tokens[i]})
    return out


# what a token's objective is, of d = log ratio with gradient, its advantage, and the row and token
def bounded(r, low, high):
    return min(max(r, f64(1.0 - low)), f64(1.0 + high))


def clip(low=0.2, high=0.2):
    return lambda d, a, *_: min(d.exp() * a, bounded(d.exp(), low, high) * a)


def dual(low, high, floor):
    def j(d, a, *_):
        inner = min(d.exp() * a, bounded(d.exp(), low, high) * a)
        return max(inner, f64(floor * a)) if a < 0 else inner
    return j


def score(d, a, l, i, t):
    return a * l.c["logp"][i, t]


def truncate(low, high):
    return lambda d, a, l, i, t: bounded(d.detach().exp(), low, high) * a * l.c["logp"][i, t]


def gate(tau_positive, tau_negative):
    def j(d, a, *_):
        tau = tau_positive if a > 0 else tau_negative
        return 4 / tau / (1 + torch.exp(-tau * (d.exp() - 1))) * a
    return j


def token(l, i, t, a):
    return l.c["logp"][i, t] - l.c["logp_old"][i, t]


def whole(l, i, t, a):
    return sum(token(l, i, u, a) for u in l.tokens[i])


def average(l, i, t, a):
    return whole(l, i, t, a).detach() / len(l.tokens[i]) + l.c["logp"][i, t] - l.c["logp"][i, t].detach()


def geometric(low, high):
    def ratio(l, i, t, a):
        each = [token(l, i, u, a) for u in l.tokens[i]]
        each = [min(d, f64(high)) if a > 0 else max(d, f64(-low)) if a < 0 else 0 * d
                for d in each]
        return sum(each) / len(each)
    return ratio


def k2(l, i, t):
    return (l.c["logp"][i, t] - l.c["logp_ref"][i, t]) ** 2 / 2


def k3(l, i, t):
    d = l.c["logp"][i, t] - l.c["logp_ref"][i, t]
    return torch.exp(-d) - 1 + d


def critic(clip):
    def cost(l, i, t, target):
        v, old = l.c["value"][i, t], l.c["value_old"][i, t]
        near = min(max(v, old - clip), old + clip)
        return max((v - target) ** 2, (near - target) ** 2) / 2
    return cost


# how much a token counts, of the rows (with their tokens) that count at all
def by_tokens(rows):
    return dict.fromkeys(rows, 1 / max(1, sum(map(len, rows.values()))))


def by_rows(rows):
    some = sum(bool(tokens) for tokens in rows.values())
    return {i: 1 / max(1, len(tokens)) / max(1, some) for i, tokens in rows.items()}


def summed(rows, length=1):
    return dict.fromkeys(rows, 1 / length / max(1, sum(bool(tokens) for tokens in rows.values())))


@dataclass
class Method:
    """A recipe in loops: advantages of the rollout, the objective of a token, its weight, costs, and tokens without gradient."""
    advantage: Callable                                       # Loop -> [{token: advantage}]
    objective: Callable
    unit: Callable = by_tokens
    ratio: Callable = token
    reward: Callable = lambda l, i: l.R[i]
    keep: Callable = lambda l, rows: True
    penalties: list = field(default_factory=list)             # (weight, cost of a token)
    targets: Callable | None = None                           # Loop -> [{token: return}], for a cost with a critic
    value: tuple | None = None
    selected: Callable | None = None                          # Loop, rows -> {(row, token)}
    on_selected: Callable = lambda d, a, j: 0 * d


def less_kl(beta):
    return lambda l, i: l.R[i] - beta * l.ratio_sum("logp_old", "logp_ref", i)


def over_limit(limit, buffer):
    return lambda l, i: l.R[i] + min(0.0, (limit - buffer - len(l.tokens[i])) / buffer)


def contrast(l, rows):
    x = [l.R[i] for i in rows if l.real[i]]
    return len(x) == 1 or len(set(x)) > 1


def rows_of(advantage, **settings):
    return lambda l: spread(l, lambda l, i: advantage(l, i, **settings))


def covariances(l, a, rows):
    every = [(i, t) for i in rows for t in l.tokens[i]]
    lp, ad = mean(l.of("logp_now", i, t) for i, t in every), mean(a[i][t] for i, t in every)
    return {(i, t): (l.of("logp_now", i, t) - lp) * (a[i][t] - ad) for i, t in every}


def band(share, low, high, clip_low, clip_high):
    def chosen(l, a, rows):
        c = covariances(l, a, rows)
        candidates = []
        for i, t in c:
            r = math.exp(l.of("logp_now", i, t) - l.of("logp_old", i, t))
            clipped = a[i][t] > 0 and r > 1 + clip_high or a[i][t] < 0 and r < 1 - clip_low
            if low < c[i, t] < high and not clipped:
                candidates.append((i, t))
        return set(sorted(candidates, key=lambda at: l.of("noise", *at))[:max(1, int(share * len(c)))])
    return chosen


def top(share):
    def chosen(l, a, rows):
        c = covariances(l, a, rows)
        return set(sorted(c, key=lambda at: -c[at])[:max(1, int(share * len(c)))])
    return chosen


def methods(s: Callable[[str], dict]) -> dict[str, Method]:
    """Every recipe; s gives the settings of one."""
    clips = lambda n: {k: s(n)[k] for k in ("low", "high") if k in s(n)}
    grpo = lambda n, **more: Method(**{**dict(advantage=rows_of(zscore, eps=1e-6), objective=clip(**clips(n)), unit=by_rows,
                                              penalties=[(s(n)["beta"], k3)]), **more})
    ppo = lambda n, beta: Method(
        lambda l: whitened(l, gae(l, beta, s(n)["gamma"], s(n)["lam"])[0]), clip(**clips(n)),
        targets=lambda l: gae(l, beta, s(n)["gamma"], s(n)["lam"])[1], value=(s(n).get("value_weight", 0.5), critic(0.2)))
    return {
        "reinforce": Method(rows_of(lambda l, i: l.R[i] - mean(l.R[j] for j in l.everyone())), score, summed),
        "rloo": Method(rows_of(leave_one_out), clip(**clips("rloo")), by_rows, whole, less_kl(0.3)),
        "remax": Method(rows_of(over_greedy), score, summed, reward=less_kl(0.3)),
        "reinforce_plus_plus": Method(lambda l: whitened(l, to_go(l, 0.3, 0.9)), clip(**clips("reinforce_plus_plus"))),
        "reinforce_plus_plus_baseline": Method(lambda l: whitened(l, spread(l, centred)), clip(), penalties=[(0.3, k2)]),
        "grpo": grpo("grpo", advantage=rows_of(zscore, eps=s("grpo")["eps"])), "gspo": grpo("gspo", ratio=average),
        "grpo_process": grpo("grpo_process", advantage=of_steps),
        "dr_grpo": grpo("dr_grpo", advantage=rows_of(centred), unit=lambda rows: summed(rows, 7)),
        "dapo": Method(rows_of(zscore), dual(**clips("dapo"), floor=1.4), reward=over_limit(6, 4), keep=contrast),
        "cispo": Method(rows_of(zscore), truncate(**clips("cispo"))),
        "sapo": Method(rows_of(zscore), gate(1.3, 1.7), by_rows), "opo": Method(rows_of(length_weighted), score),
        "gpg": Method(rows_of(gpg, norm=0.7), score), "bnpo": Method(rows_of(bnpo, most=2.0), dual(0.15, 0.25, 1.4), summed),
        "gmpo": Method(rows_of(zscore), lambda d, a, *_: d.exp() * a, by_rows, geometric(0.2, 0.3)),
        "pass_at_k": Method(rows_of(best_minus_second), clip(**clips("pass_at_k"))),
        "clip_cov": Method(rows_of(zscore), clip(**clips("clip_cov")), selected=band(0.1, 0.01, 0.9, 0.15, 0.25)),
        "kl_cov": Method(rows_of(zscore), lambda d, a, *_: d.exp() * a, selected=top(0.2),
                         on_selected=lambda d, a, j: j - 0.7 * abs(d)),
        "ppo": ppo("ppo", 0.3), "ppo_adaptive": ppo("ppo_adaptive", 0.3),
        "fdpg": Method(rows_of(jensen_shannon, beta=0.3), lambda d, a, *_: d.exp() * a, by_rows, whole),
        "best_of_n": Method(rows_of(lambda l, i: float(i == max(l.members(i), key=lambda j: l.R[j]))), score),
        "rejection": Method(rows_of(lambda l, i: float(l.R[i] > 0.6)), score),
    }


METHODS = methods(lambda name: SETTINGS.get(name, {}))


def by_hand(name: str, columns: dict, rows=None) -> tuple[Tensor, list[dict[int, float]]]:
    """Loss of one optimiser step, of the groups that `rows` belong to, and the advantages of the rollout."""
    method, l = METHODS[name], Loop(columns)
    kept = [method.keep(l, l.groups[g]) for g in l.group]
    l.R = [method.reward(l, i) if not math.isnan(l.R[i]) else NAN for i in range(l.n)]
    l.real = [r and k for r, k in zip(l.real, kept, strict=True)]
    a = method.advantage(l)
    targets = method.targets(l) if method.targets else None
    counted = {i: l.tokens[i] for i in (range(l.n) if rows is None else rows) if l.real[i]}
    unit = method.unit(counted)
    chosen = method.selected(l, a, list(counted)) if method.selected else set()
    total = 0 * columns["logp"].sum() + 0 * columns["value"].sum()
    for i, tokens in counted.items():
        weight = unit[i] * (float(columns["weight"][i]) if "weight" in columns else 1.0)
        for t in tokens:
            d = method.ratio(l, i, t, a[i][t])
            j = method.objective(d, a[i][t], l, i, t)
            if (i, t) in chosen:
                j = method.on_selected(d, a[i][t], j)
            total = total - weight * j
            for share, cost in method.penalties:
                total = total + weight * share * cost(l, i, t)
            if targets:
                share, cost = method.value
                total = total + weight * share * cost(l, i, t, targets[i][t])
    return total, a


def dense(a: list[dict[int, float]], shape) -> Tensor:
    out = torch.zeros(shape, dtype=torch.float64)
    for i, row in enumerate(a):
        for t, x in row.items():
            out[i, t] = x
    return out


def leaves(columns: dict) -> dict:
    return {**columns, **{k: columns[k].clone().requires_grad_() for k in ("logp", "value")}}


def gradients(value: Tensor, columns: dict) -> list[Tensor]:
    made = torch.autograd.grad(value, [columns["logp"], columns["value"]], allow_unused=True)
    return [torch.zeros_like(columns["logp"]) if g is None else g for g in made]


RANDOM = [[0.2, 0.9, 0.4, 0.4, 0.7], [1.0, 0.0], [0.3, 0.8, 0.1]]
CASES = {"ragged": {}, "other tokens": {"seed": 5}, "binary": {"rewards": [[1.0, 0.0, 1.0, 1.0], [0.0, 0.0], [0.0, 1.0, 0.0]],
         "probes": [[1.0], [0.0], [1.0]], "seed": 2}, "weights": {"rewards": RANDOM, "probes": [[0.5], [0.5], [0.2]]}}


def case(key: str) -> dict:
    c = rollouts(**CASES[key])
    if key == "weights":                                      # alike for all rows of a group
        weight = {g: w for g, w in zip(c["group"].unique().tolist(), (0.3, 1.0, 2.5), strict=True)}
        c["weight"] = torch.tensor([weight[g] for g in c["group"].tolist()])
    return c


def test_every_recipe_has_a_version_of_its_own():
    assert sorted(METHODS) == sorted(ON_POLICY)


@EVERY
@pytest.mark.parametrize("key", CASES)
def test_value_gradient_and_advantage(name, key):
    theirs, ours = leaves(case(key)), leaves(case(key))
    expected, advantage = by_hand(name, theirs)
    batch = objective_for(name).annotate(Batch(ours))
    value = objective_for(name).loss(batch).value
    close(value, expected)
    close(batch["advantage"], dense(advantage, batch["mask"].shape))
    found = gradients(value, ours)
    for got, wanted in zip(found, gradients(expected, theirs), strict=True):
        close(got, wanted)
    assert found[0].any() and bool(found[1].any()) == (METHODS[name].value is not None)
