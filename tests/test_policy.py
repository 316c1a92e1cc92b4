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
from prefopt import penalties, recipes, reductions
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
    if p in (0, 1):
        return 0.0
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
        **dict.fromkeys(("nash_md_pg", "nash_ema"), Method(rows_of(lambda l, i: l.R[i]), score, summed,
                                                           reward=lambda l, i: less_kl(0.3)(l, i) - 0.5)),
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
        weight = dict(zip(c["group"].unique().tolist(), (0.3, 1.0, 2.5), strict=True))
        c["weight"] = torch.tensor([weight[g] for g in c["group"].tolist()])
    return c


def test_every_recipe_has_a_version_of_its_own():
    assert not set(ON_POLICY) - set(METHODS)


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


# ------------------------------------------------------------------------------------------------------ steps and pieces
def rows_alone(batch: Batch) -> list[Batch]:
    return [Batch({k: v[[i]] for k, v in batch.items()}) for i in range(batch.N)]


@EVERY
def test_single_rows_add_up(name):
    """Value, gradients and every metric of the step are the sums of those of its rows."""
    columns = rollouts()
    expected = outcome(objective_for(name), columns)
    found = outcome(objective_for(name), columns, rows_alone)
    close(found[0], expected[0])
    for key, gradient in expected[1].items():
        close(found[1][key], gradient)
    objective = objective_for(name)
    batch = objective.annotate(Batch(columns))
    whole, parts = objective.loss(batch).metrics, [objective.loss(row).metrics for row in rows_alone(batch)]
    assert {"loss/surrogate", "ratio/mean", "kl/old", "entropy", "advantage/size", "gap/rollout"} <= set(whole)
    for key, value in whole.items():
        close(sum(part[key] for part in parts), value)


@EVERY
def test_several_updates_of_one_rollout(name):
    """Advantages are those of the whole rollout, reductions and selections those of an update, and memory is asked once."""
    columns = rollouts()
    objective = objective_for(name)
    batch = objective.estimate(Batch(columns))
    states = {key: part.state_dict() for key, part in objective.states().items()}
    again = objective.estimate(batch)
    assert again is batch
    everyone = Batch(columns).index
    for groups in ([0, 3, 4], [1, 2, 5, 6]):
        rows = torch.isin(everyone, torch.tensor(groups)).nonzero().squeeze(1)
        changed, other = leaves(columns), leaves(columns)
        part = batch.select(rows).with_columns(logp=changed["logp"][rows], value=changed["value"][rows])
        value = objective.loss(objective.annotate(part)).value
        expected, _ = by_hand(name, other, rows.tolist())
        close(value, expected)
        for got, wanted in zip(gradients(value, changed), gradients(expected, other), strict=True):
            close(got, wanted)
    assert {key: part.state_dict() for key, part in objective.states().items()} == states


def test_a_controller_goes_on_from_rollout_to_rollout():
    """The coefficient of a rollout is that of the KL before it: coef (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)."""
    objective, columns = recipes.ppo_adaptive(start=0.3, target=0.01, horizon=50), rollouts()
    first, second = (objective.estimate(Batch(columns))["coefficient"] for _ in range(2))
    l = Loop(columns)
    kl = mean(l.ratio_sum("logp_old", "logp_ref", i) for i in l.everyone())
    close(first, torch.full_like(first, 0.3))
    factor = 1 + min(max(kl / 0.01 - 1, -0.2), 0.2) * len(l.everyone()) / 50
    close(second, torch.full_like(second, 0.3 * factor))
    assert abs(factor - 1) > 0.01


# ------------------------------------------------------------------------------------------------ rows that take no part
@EVERY
def test_rows_without_a_reward_are_as_good_as_absent(name):
    """Neither in statistics nor in the loss nor in denominators, whatever their tokens are."""
    columns = rollouts()
    known = ~columns["reward"].isnan()
    for key in ("logp", "logp_old", "logp_ref", "logp_rollout", "value", "value_old"):
        columns[key][~known & columns["train"]] += 0.7
    expected = outcome(objective_for(name), {k: v[known | ~columns["train"]] for k, v in columns.items()})
    found = outcome(objective_for(name), columns)
    close(found[0], expected[0])
    for key, gradient in found[1].items():
        assert not gradient[~known].any()
        close(gradient[known | ~columns["train"]], expected[1][key])


@EVERY
def test_probe_rows_do_not_train(name):
    """And but for ReMax nothing changes without them."""
    columns = rollouts()
    value, gradients = outcome(objective_for(name), columns)
    assert not any(g[~columns["train"]].any() for g in gradients.values())
    if name == "remax":
        return
    expected = outcome(objective_for(name), take(columns, columns["train"]))
    close(value, expected[0])
    for key, gradient in gradients.items():
        close(gradient[columns["train"]], expected[1][key])


@EVERY
def test_groups_that_are_dropped_are_as_good_as_absent(name):
    columns = rollouts()
    l = Loop(columns)
    kept = torch.tensor([contrast(l, l.groups[g]) for g in l.group])
    objective = lambda: assemble(name, {**SETTINGS[name], "keep": "contrast"} if name in SETTINGS else {"keep": "contrast"})
    value, gradients = outcome(objective(), columns)
    expected = outcome(objective_for(name), take(columns, kept))
    close(value, expected[0])
    for key, gradient in gradients.items():
        assert not gradient[~kept].any()
        close(gradient[kept], expected[1][key])
    batch = objective().estimate(Batch(columns))
    assert torch.equal(batch["train"], columns["train"] & kept) and 0 < int((~kept).sum()) < batch.N


COMPARED = [n for n in ON_POLICY if objective_for(n).least_responses() > 1 and n not in ("fdpg", "kl_cov")]       # these pull


@pytest.mark.parametrize("name", COMPARED)
def test_equal_rewards_and_single_responses_teach_nothing(name):
    """Nothing at all: not rounding in units of eps."""
    columns = rollouts(rewards=[[0.1] * 7, [1 / 3] * 3, [0.7]], probes=[[0.5]] * 3)
    settings = {k: v for k, v in SETTINGS.get(name, {}).items() if k != "beta"}
    batch = assemble(name, settings).annotate(Batch(leaves(columns)))
    assert not batch["advantage"].any()
    assert not torch.autograd.grad(assemble(name, settings).loss(batch).value, batch["logp"])[0].any()


def test_a_prompt_whose_greedy_response_has_no_reward_takes_no_part():
    """In ReMax; a prompt that was sampled without a greedy response is an error."""
    columns = rollouts(rewards=[[0.2, 0.9], [1.0, 0.0]], probes=[[NAN], [0.5]])
    advantage = recipes.remax().estimate(Batch(columns))["advantage"]
    blind = Loop(columns)
    without = torch.tensor([not blind.probes[g] for g in blind.group])
    assert not advantage[without].any() and advantage[~without & columns["train"]].any()
    with pytest.raises(ValueError, match="1 of 2 groups have no probe row, from which the advantage takes its baseline"):
        recipes.remax().estimate(Batch(rollouts(rewards=[[0.2, 0.9], [1.0, 0.0]], probes=[[], [0.5]])))
    with pytest.raises(ValueError, match="2 of 2 groups have no probe row"):
        recipes.remax().estimate(Batch({k: v for k, v in columns.items() if k != "train"}))


@EVERY
def test_nothing_to_learn_from(name):
    """No reward known, no token, no row: a loss of 0 with gradients of 0."""
    unknown, empty = rollouts(), rollouts()
    unknown["reward"][:] = NAN
    empty["mask"][:] = False
    for columns, width in ((unknown, None), (empty, None), (take(rollouts(), torch.tensor([], dtype=torch.long)), 4)):
        value, found = outcome(objective_for(name), columns, width=width)
        assert float(value) == 0 and not any(g.any() for g in found.values())


# ---------------------------------------------------------------------------------------------------------- the contract
def test_the_public_contract():
    """Two of three responses right: advantages (1/3, 1/3, -2/3) / (sqrt(1/3) + 1e-6)."""
    logp = f64([[-1.0, -2.0], [-2.0, 0.0], [-1.5, -1.0]]).requires_grad_()
    objective = recipes.grpo(low=0.2, high=0.2)
    batch = objective.annotate(Batch(dict(
        logp=logp, logp_old=f64([[-1.5, -2.0], [-1.0, 9.0], [-1.0, -2.0]]), mask=torch.tensor([[1, 1], [1, 0], [1, 1]]),
        group=torch.tensor([7, 7, 7]), reward=torch.tensor([1.0, 1.0, 0.0]))))
    up, down = (x / (math.sqrt(1 / 3) + 1e-6) for x in (1 / 3, -2 / 3))
    close(batch["advantage"], f64([[up, up], [up, 0.0], [down, down]]), 1e-14)
    loss = objective.loss(batch).value
    loss.backward()
    # exp(0.5) is clipped at 1.2; exp(-1) < 0.8 at a good token and exp(1) > 1.2 at a bad one still count, exp(-0.5) does not
    close(loss, f64(-(up * (1.2 + 1) / 2 + up * math.exp(-1) + down * (0.8 + math.e) / 2) / 3), 1e-14)
    close(logp.grad, -f64([[0.0, up / 2], [up * math.exp(-1), 0.0], [0.0, down * math.e / 2]]) / 3, 1e-14)


@EVERY
def test_advantages_of_ones_own(name):
    """Given ones are taken, for rows with or without a reward; with what the critic learns beside them."""
    columns = rollouts()
    batch = objective_for(name).estimate(Batch(columns))
    made = {k: batch[k] for k in ("advantage", "returns", "coefficient", "train") if k in batch}
    close(outcome(objective_for(name), {**columns, **made})[0], outcome(objective_for(name), columns)[0])
    twice = {**columns, **made, "advantage": 2 * made["advantage"]}
    assert torch.equal(objective_for(name).annotate(Batch(twice))["advantage"], twice["advantage"])
    trained = take({**columns, **made}, made.get("train", columns["train"]) & ~columns["reward"].isnan())
    unrewarded = {k: v for k, v in trained.items() if k not in ("reward", "train")}
    close(outcome(objective_for(name), unrewarded)[0], outcome(objective_for(name), columns)[0])


@EVERY
def test_rewards_of_any_type(name):
    """Numbers, whole numbers and truth values are the same rewards; float32 log-probabilities stay float32."""
    columns = rollouts(**CASES["binary"])
    expected = outcome(objective_for(name), columns)[0]
    for dtype in (torch.float32, torch.float16, torch.long, torch.bool):
        close(outcome(objective_for(name), {**columns, "reward": columns["reward"].to(dtype)})[0], expected)
    small = {k: v.float() if v.is_floating_point() else v for k, v in columns.items()}
    batch = objective_for(name).estimate(Batch(small))
    assert {v.dtype for k, v in batch.items() if v.is_floating_point()} == {torch.float32}


def test_order_of_the_slots():
    """keep sees rewards before shaping, the advantage those after it; neither shaping nor keep sees what is made of them."""
    columns = rollouts(rewards=[[1.0, 1.0, 1.0], [1.0, 0.0, 0.5]], probes=[[], []])
    seen = {}

    def keep(reward, real):
        seen["keep"] = reward.clone()
        return real.any(-1)

    def shape(reward):
        seen["shape"] = reward.clone()
        return 3 * reward

    def later(reward):
        return reward - 1

    objective = recipes.grpo().with_slots(keep=keep, shaping={"shape": shape, "later": later},
                                          advantage=lambda reward, real: seen.setdefault("advantage", reward))
    objective.estimate(Batch(columns))
    assert torch.equal(seen["keep"], seen["shape"]) and torch.equal(seen["advantage"], 3 * seen["keep"] - 1)
    with pytest.raises(KeyError, match="reads column 'response_advantage', which is not there"):
        recipes.grpo().with_slots(keep=lambda response_advantage: response_advantage.any(-1)).estimate(Batch(columns))


def test_weights_corrections_and_acceptance():
    """Tokens of cut responses are in no denominator; weights multiply the surrogate alone; a penalty has its own reduction."""
    columns = leaves(rollouts())
    objective = assemble("grpo", {"eps": 0.01, "accept": "accept_finished", "correction": {"truncated": {"cap": 1.05}},
                                  "weight": "uncertain"})
    objective = objective.with_slots(penalties={"entropy": Penalty(penalties.entropy_bonus, 0.3, reductions.sequence_sum)})
    l = Loop(columns)
    rows = {i: l.tokens[i] if bool(columns["finished"][i]) else [] for i in l.everyone()}
    unit, other, expected = by_rows(rows), summed(rows), 0.0
    for i, tokens in rows.items():
        for t in tokens:
            a, d, p = zscore(l, i, 0.01), token(l, i, t, None), columns["logp"][i, t].detach().exp()
            gap = math.exp(l.of("logp_old", i, t) - l.of("logp_rollout", i, t))
            expected = expected - unit[i] * p * (1 - p) * min(gap, 1.05) * clip()(d, a)
            expected = expected - 0.3 * other[i] * columns["entropy"][i, t]
    value = objective.loss(objective.annotate(Batch(columns))).value
    close(value, expected)
    close(gradients(value, columns)[0], gradients(expected, columns)[0])


# ------------------------------------------------------------------------------------------------------------- mistakes
def test_mistakes():
    columns = rollouts()
    with pytest.raises(KeyError, match="call objective.annotate"):
        recipes.grpo().loss(Batch(columns))
    with pytest.raises(KeyError, match="token reads column 'logp_old', which is not there"):
        objective = recipes.grpo()
        objective.loss(objective.annotate(Batch({k: v for k, v in columns.items() if k != "logp_old"})))
    with pytest.raises(KeyError, match="grpo_process reads column 'step_reward'"):
        recipes.grpo_process().estimate(Batch({k: v for k, v in columns.items() if k != "step_reward"}))
    wrong = {**columns, "reward": columns["reward"].clone()}
    wrong["reward"][columns["train"].nonzero()[0]] = math.inf
    for name in ON_POLICY:
        with pytest.raises(FloatingPointError, match="reward is not finite"):
            objective_for(name).estimate(Batch(wrong))
    with pytest.raises(ValueError, match="beta_normalised takes rewards between"):
        recipes.bnpo().estimate(Batch({**columns, "reward": columns["reward"] * 3}))
    with pytest.raises(ValueError, match=r"returned .* where rows of tokens .* are expected"):
        objective = recipes.grpo().with_slots(surrogate=lambda log_ratio: log_ratio.sum(-1))
        objective.loss(objective.annotate(Batch(columns)))
    with pytest.raises(FloatingPointError, match="kl_in_reward is not finite"):
        recipes.rloo(beta=0.1).estimate(Batch({**columns, "logp_ref": columns["logp_ref"] - math.inf}))


# -------------------------------------------------------------------------------------- exact gradients, by enumeration
LOGITS, REWARD = [0.3, -0.5, 1.0], [1.0, 0.2, 0.0]


def every_group(logits: Tensor, behaviour: Tensor, reward, g: int, lengths=None) -> dict:
    """All groups of g draws from softmax(behaviour), each weighted by its probability: a loss is then an expectation.

    The first token of a response is the draw; the others, of which some responses have more, are certain.
    """
    arms = torch.cartesian_prod(*[torch.arange(len(logits))] * g)
    p = behaviour.softmax(0)[arms].prod(-1)
    lengths = torch.ones(len(logits)) if lengths is None else torch.tensor(lengths)
    arm, width = arms.flatten(), int(lengths.max())
    first = torch.arange(width) == 0
    lp, old = (torch.where(first, x.log_softmax(0)[arm][:, None], f64(0.0)) for x in (logits, behaviour))
    n = len(arm)
    return {"logp": lp, "logp_old": old.detach(), "mask": torch.arange(width) < lengths[arm][:, None],
            "group": torch.arange(n) // g, "reward": f64(reward)[arm], "weight": (p * len(p)).repeat_interleave(g)}


def ascent(objective, logits, behaviour, reward, g, **more) -> Tensor:
    """The expected direction of the objective, exactly."""
    logits = logits.clone().requires_grad_()
    batch = objective.annotate(Batch(every_group(logits, behaviour, reward, g, **more)))
    return -torch.autograd.grad(objective.loss(batch).value, logits)[0]


def policy_gradient(logits, reward):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(logits.softmax(0) @ f64(reward), logits)[0]


@pytest.mark.parametrize("g", [2, 3, 4])
def test_rloo_is_unbiased_on_and_off_policy(g):
    """And the mean of the group as baseline is (g - 1)/g of it."""
    logits = f64(LOGITS)
    exact = policy_gradient(logits, REWARD)
    close(ascent(recipes.rloo(), logits, logits, REWARD, g), exact)
    close(ascent(recipes.rloo(low=math.inf, high=math.inf), logits, f64([0.0, 0.4, -0.3]), REWARD, g), exact)
    close(ascent(recipes.dr_grpo(length=1), logits, logits, REWARD, g), (g - 1) / g * exact)
    assert exact.norm() > 0.1


@pytest.mark.parametrize("g", [2, 4, 7])
def test_bias_of_grpo(g):
    """Right or wrong: its update is sqrt((g - 1)/g) E sqrt(k/g (1 - k/g)) in the place of p (1 - p); at g = 2 a constant."""
    ratios = []
    for logit in (-2.0, 0.0):
        logits, p = f64([logit, 0.0]), 1 / (1 + math.exp(-logit))
        found = ascent(recipes.grpo(eps=0.0), logits, logits, [1.0, 0.0], g)
        share = [math.comb(g, k) * p ** k * (1 - p) ** (g - k) * math.sqrt(k / g * (1 - k / g)) for k in range(g + 1)]
        close(found[0], f64(math.sqrt((g - 1) / g) * sum(share)))
        ratios.append(float(found[0]) / (p * (1 - p)))
    if g == 2:
        close(ratios, [math.sqrt(0.5)] * 2)
    else:
        assert ratios[0] > 1.02 * ratios[1]                   # a hard prompt is pushed more


@pytest.mark.parametrize("name, drifts", [("grpo", True), ("dr_grpo", False)])
def test_length_bias(name, drifts):
    """Wrong answers of 1 and of 10 tokens, equally wrong: with the mean over tokens the long ones are pushed down less."""
    objective, rate = (recipes.grpo(), 2.0) if drifts else (recipes.dr_grpo(length=10), 20.0)
    logits = f64([0.0, 0.0, 0.0])
    for _ in range(60):
        logits = logits + rate * ascent(objective, logits, logits, [1.0, 0.0, 0.0], 3, lengths=[1, 1, 10])
    odds = float((logits[2] - logits[1]).exp())
    assert float(logits.softmax(0)[0]) > 0.8
    assert odds > 2 if drifts else abs(odds - 1) < 1e-9


# ------------------------------------------------------------------------------------------------- whole trainers of TRL
EPS = {"advantage": {"zscore": {"eps": 1e-4}}}                # TRL's
TRAINED = {                                                   # recipe, TRL's trainer, its settings
    "grpo": ("grpo", dict(beta=0.1, **EPS), "GRPO", dict(loss_type="grpo", beta=0.1, use_bias_correction_kl=False)),
    "grpo, weighted KL": ("grpo", {"penalties": [{"k3_reverse": {"weight": 0.1}}], **EPS}, "GRPO",
                          dict(loss_type="grpo", beta=0.1, use_bias_correction_kl=True)),
    "gspo": ("gspo", {"low": 0.05, "high": 0.06, "ratio": "sequence", **EPS}, "GRPO",
             dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.05, epsilon_high=0.06)),
    "dapo": ("dapo", {"high": 0.28, "keep": None, "limit": 16, "buffer": 1, **EPS}, "GRPO",
             dict(loss_type="dapo", epsilon_high=0.28)),
    "dr_grpo": ("dr_grpo", dict(length=9), "GRPO", dict(loss_type="dr_grpo", scale_rewards="none", max_completion_length=9)),
    "cispo": ("cispo", dict(high=0.1, **EPS), "GRPO", dict(loss_type="cispo", epsilon_high=1.1)),
    "sapo": ("sapo", EPS, "GRPO", dict(loss_type="sapo")),
    "rloo": ("rloo", dict(beta=0.1), "RLOO", dict(beta=0.1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("key", TRAINED)
def test_two_updates_are_those_of_trl(key, tmp_path, monkeypatch):
    """TRL's trainer and our objective on the same responses and rewards: weights after two updates of one rollout."""
    from copy import deepcopy

    import tiny_models
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from prefopt.forward import fill, forward
    from prefopt.models import Models
    trl = pytest.importorskip("trl")
    name, settings, trainer_name, theirs = TRAINED[key]
    rate, k, seen = 0.02, 4, {}
    start = AutoModelForCausalLM.from_pretrained(tiny_models.saved(tmp_path / "model"))
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (3 * k,), generator=draw).tolist()
    responses = [torch.randint(8, tiny_models.VOCABULARY, (n,), generator=draw).tolist() for n in lengths]
    rewards = torch.rand(3 * k, generator=draw).tolist()

    def generated(prompt_ids, *rest):
        seen["prompts"] = prompt_ids
        return (responses, None) if trainer_name == "GRPO" else responses

    model = deepcopy(start)
    config = getattr(trl, f"{trainer_name}Config")(
        output_dir=str(tmp_path), per_device_train_batch_size=3 * k, num_generations=k, num_iterations=2, max_steps=2,
        max_grad_norm=0.0, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        lr_scheduler_type="constant", shuffle_dataset=False, bf16=False, gradient_checkpointing=False,
        **{"max_completion_length": 16, **theirs})
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    trainer = getattr(trl, f"{trainer_name}Trainer")(
        model=model, args=config, reward_funcs=lambda completions, **_: rewards, processing_class=tiny_models.tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2 w3", "w4", "w5 w6"]}),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)))
    monkeypatch.setattr(trainer, "_generate_single_turn", generated)
    trainer.train()

    rows = [(p, r) for p, r in zip(seen["prompts"], responses, strict=True)]
    width = max(len(p) + len(r) for p, r in rows)
    tokens, attend, mask = (torch.zeros(3 * k, width, dtype=torch.long) for _ in range(3))
    for i, (p, r) in enumerate(rows):
        tokens[i, :len(p) + len(r)], attend[i, :len(p) + len(r)] = torch.tensor([*p, *r]), 1
        mask[i, len(p):len(p) + len(r)] = 1
    objective, policy = assemble(name, settings), deepcopy(start)
    models, reads = Models(policy, deepcopy(start)), objective.reads()
    batch = objective.estimate(fill(models, Batch({
        "tokens": tokens, "attend": attend, "mask": mask, "group": torch.arange(3 * k) // k, "reward": torch.tensor(rewards),
        "prompt_length": torch.tensor([len(p) for p, _ in rows])}), reads | {"logp_old"}))
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    for _ in range(2):
        optimizer.zero_grad()
        objective.loss(forward(models, objective.annotate(batch), reads)).value.backward()
        optimizer.step()
    ours, wanted, before = (torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in (policy, model, start))
    assert (wanted - before).norm() > 1e-3
    assert (ours - wanted).norm() < 1e-4 * (wanted - before).norm()
