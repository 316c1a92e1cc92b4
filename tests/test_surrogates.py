"""Ratios, surrogates, selections, penalties, corrections, critic losses and f-divergences against independent versions:
values by hand, loops over rows and tokens, TRL's own code, closed forms by enumeration, and limits."""
import doctest
import importlib
import itertools
import math
import threading
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from columns_for_tests import close

from prefopt import accepts, corrections, critics, divergences, listwise, penalties, ratios, reductions, selections, surrogates
from prefopt.parts import bind, columns_read, kind

f64 = partial(torch.tensor, dtype=torch.float64)
N, T = 6, 5


def columns(seed=0, spread=1.0, token_advantage=False):
    """Off-policy rows with holes in the mask, one empty response, and a row of advantage 0."""
    g = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)
    mask = uniform(N, T) < 0.7
    mask[:, 0], mask[2] = True, False
    logp_old = -3 * uniform(N, T) - 0.05
    logp = logp_old + spread * (2 * uniform(N, T) - 1)
    advantage = 4 * uniform(N, T if token_advantage else 1).expand(N, T) - 2
    advantage = torch.where(mask, advantage, 0.0)
    advantage[4] = 0.0
    return {"logp": logp, "logp_old": logp_old, "logp_ref": -3 * uniform(N, T), "logp_rollout": logp_old + uniform(N, T) - 0.5,
            "mask": mask, "advantage": advantage, "selected": mask & (uniform(N, T) < 0.4), "entropy": uniform(N, T),
            "coefficient": uniform(N), "value": uniform(N, T), "value_old": uniform(N, T), "returns": uniform(N, T)}


JUNK = ("logp", "logp_old", "logp_ref", "logp_rollout", "entropy", "value", "value_old", "returns")


def with_junk(c, fill):
    return {k: torch.where(c["mask"], v, fill) if k in JUNK else v for k, v in c.items()}


def value_and_gradient(of, c, wrt="logp"):
    leaf = c[wrt].clone().requires_grad_()
    value = of({**c, wrt: leaf})
    return value.detach(), torch.autograd.grad(value, leaf, allow_unused=True)[0]


def loss(ratio, surrogate, reduce):
    """What the objective makes of these slots."""
    def of(c):
        c = {**c, "log_ratio": bind(ratio, c)} if ratio else c
        unit = reduce(c["mask"].double()[None])[0]
        return -torch.where(unit != 0, unit * bind(surrogate, c), 0.0).sum()
    return of


# ------------------------------------------------------------------ loops over rows and tokens, written from the papers
def exp(x):
    return torch.exp(x)


def bounded(r, low, high):
    return min(max(r, f64(1 - low)), f64(1 + high))


def of_token(j):
    """J(log ratio, A, row, t) with the ratio of the token."""
    return lambda c, i, t: j(c["logp"][i, t] - c["logp_old"][i, t], c["advantage"][i, t], c, i, t)


def of_row(log_ratio, j):
    return lambda c, i, t: j(log_ratio(c, i, t), c["advantage"][i, t], c, i, t)


def tokens(c, i):
    return [t for t in range(T) if c["mask"][i, t]]


def row_sum(c, i, t):
    return sum(c["logp"][i, u] - c["logp_old"][i, u] for u in tokens(c, i))


def row_mean(c, i, t):
    return row_sum(c, i, t) / len(tokens(c, i))


def row_mean_token(c, i, t):
    return row_mean(c, i, t).detach() + c["logp"][i, t] - c["logp"][i, t].detach()


def row_geometric(c, i, t, low=0.3, high=0.2):
    each = []
    for u in tokens(c, i):
        d, a = c["logp"][i, u] - c["logp_old"][i, u], c["advantage"][i, u]
        each.append(min(d, f64(high)) if a > 0 else max(d, f64(-low)) if a < 0 else 0 * d)
    return sum(each) / len(each)


def j_clip(low, high):
    return lambda d, a, *_: min(exp(d) * a, bounded(exp(d), low, high) * a)


def j_dual(low, high, floor):
    def j(d, a, *_):
        inner = max(-a * exp(d), -a * bounded(exp(d), low, high))
        return -(min(inner, -a * floor) if a < 0 else inner)
    return j


def j_capped(low, high, delta):
    return lambda d, a, *_: min(min(exp(d), f64(delta)) * a, bounded(exp(d), low, high) * a)


def j_sapo(d, a, *_):
    tau = 1.0 if a > 0 else 1.05
    return 4 / tau / (1 + exp(-tau * (exp(d) - 1))) * a


def j_truncate(low, high):
    return lambda d, a, c, i, t: bounded(exp(d), low, high).detach() * a * c["logp"][i, t]


def per_token(c, j):
    every = [j(c, i, t) for i in range(N) for t in tokens(c, i)]
    return -sum(every) / len(every)


def per_row(c, j, divide=len):
    rows = [i for i in range(N) if tokens(c, i)]
    return -sum(sum(j(c, i, t) for t in tokens(c, i)) / divide(tokens(c, i)) for i in rows) / len(rows)


C = surrogates
CASES = {
    "ppo": (ratios.token, partial(C.clip, low=0.1, high=0.3), reductions.term_mean, per_token, of_token(j_clip(0.1, 0.3))),
    "grpo": (ratios.token, C.clip, reductions.sequence_mean, per_row, of_token(j_clip(0.2, 0.2))),
    "dr_grpo": (ratios.token, C.clip, partial(reductions.fixed_length, length=8), partial(per_row, divide=lambda _: 8),
                of_token(j_clip(0.2, 0.2))),
    "norm": (ratios.token, C.clip, partial(reductions.fixed_total, length=8),
             lambda c, j: 5 * per_row(c, j, divide=lambda _: 8), of_token(j_clip(0.2, 0.2))),
    "dual": (ratios.token, partial(C.dual_clip, floor=1.5), reductions.sequence_sum, partial(per_row, divide=lambda _: 1),
             of_token(j_dual(0.2, 0.2, 1.5))),
    "capped": (ratios.token, partial(C.capped, delta=1.5), reductions.term_mean, per_token, of_token(j_capped(0.2, 0.2, 1.5))),
    "capped inside": (ratios.token, partial(C.capped, delta=1.1, high=0.4), reductions.term_mean, per_token,
                      of_token(j_capped(0.2, 0.4, 1.1))),
    "gspo": (ratios.sequence_token, partial(C.clip, low=0.1, high=0.15), reductions.sequence_mean, per_row,
             of_row(row_mean_token, j_clip(0.1, 0.15))),
    "gspo trl": (ratios.sequence, partial(C.clip, low=0.1, high=0.15), reductions.term_mean, per_token,
                 of_row(row_mean, j_clip(0.1, 0.15))),
    "rloo trl": (ratios.sequence_sum, partial(C.clip, low=0.9, high=2.0), reductions.sequence_mean, per_row,
                 of_row(row_sum, j_clip(0.9, 2.0))),
    "gmpo": (partial(ratios.geometric, low=0.3, high=0.2), C.plain, reductions.sequence_mean, per_row,
             of_row(row_geometric, lambda d, a, *_: exp(d) * a)),
    "cispo": (ratios.token, partial(C.truncate, low=0.3), reductions.term_mean, per_token, of_token(j_truncate(0.3, 0.28))),
    "gpg": (None, C.likelihood, reductions.term_mean, per_token, of_token(lambda d, a, c, i, t: a * c["logp"][i, t])),
    "sapo": (ratios.token, C.soft_gate, reductions.sequence_mean, per_row, of_token(j_sapo)),
    "clip_cov": (ratios.token, C.clip_except_selected, reductions.term_mean, per_token,
                 lambda c, i, t: 0.0 if c["selected"][i, t] else of_token(j_clip(0.2, 0.2))(c, i, t)),
    "kl_cov": (ratios.token, partial(C.kl_selected, coef=0.7), reductions.term_mean, per_token,
               of_token(lambda d, a, c, i, t: exp(d) * a - 0.7 * abs(d) * c["selected"][i, t])),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("token_advantage", [False, True])
def test_loops(name, token_advantage):
    ratio, surrogate, reduce, aggregate, j = CASES[name]
    for seed in range(3):
        c = columns(seed, token_advantage=token_advantage)
        found = value_and_gradient(loss(ratio, surrogate, reduce), c)
        for got, want in zip(found, value_and_gradient(lambda c: aggregate(c, j), c), strict=True):
            close(got, want)
        assert found[1].abs().max() > 1e-3
        for fill in (math.nan, math.inf, -math.inf):
            for got, want in zip(value_and_gradient(loss(ratio, surrogate, reduce), with_junk(c, fill)), found, strict=True):
                close(got, want)


# ------------------------------------------------------------------ every part of these modules
MODULES = {m.__name__.split(".")[1]: m for m in (ratios, surrogates, penalties, corrections, critics)}
PARTS = {f"{home}.{name}": getattr(m, name) for home, m in MODULES.items() for name in m.__all__
         if kind(getattr(m, name)) == "Tokens"}
GRADIENT = ("logp", "entropy", "value", "log_ratio")


def call(part, c):
    c = {"log_ratio": ratios.token(c["logp"], c["logp_old"], c["mask"]), "correction": None, **c}
    return bind(part, c)


@pytest.mark.parametrize("key", PARTS)
def test_rows_and_groups_agree(key):
    """(N, T) and (B, K, T) alike, and one row at a time."""
    c = columns(7, token_advantage=True)
    rows = call(PARTS[key], c)
    assert rows.shape == (N, T)
    grouped = {k: v.reshape(2, 3, *v.shape[1:]) for k, v in c.items()}
    assert torch.equal(call(PARTS[key], grouped).reshape(N, T), rows)
    for i in range(N):
        assert torch.equal(call(PARTS[key], {k: v[i:i + 1] for k, v in c.items()}), rows[i:i + 1])
    assert not rows[~c["mask"]].any()


@pytest.mark.parametrize("key", PARTS)
def test_padding_and_precision(key):
    part = PARTS[key]
    c = columns(3)
    expected = call(part, c)
    for fill in (math.nan, math.inf, -math.inf):
        junk = with_junk(c, fill)
        leaves = {k: junk[k].clone().requires_grad_() for k in GRADIENT if k in columns_read(part) and k in junk}
        out = call(part, {**junk, **leaves})
        close(out, expected)
        if leaves:
            out.sum().backward()
            for leaf in leaves.values():
                assert leaf.grad.isfinite().all() and not leaf.grad[~c["mask"]].any()
    if expected.is_floating_point():
        assert expected.dtype == torch.float64
        half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in c.items()}
        assert call(part, {**half, "advantage": half["advantage"].float(), "coefficient": half["coefficient"].float()}
                    ).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key", PARTS)
def test_extremes(key, dtype):
    """log-probabilities of -1e4 on either side: finite, also in gradient; and no token, no row."""
    part = PARTS[key]
    for new, old in ((-1e4, -1.0), (-1.0, -1e4), (-1e4, -1e4)):
        for sign in (1.0, -1.0, 0.0):
            c = {k: v.to(dtype) if v.is_floating_point() else v for k, v in columns(1).items()}
            c = {**c, "logp": torch.full_like(c["logp"], new), "advantage": sign * c["mask"].to(dtype)}
            c |= {k: torch.full_like(c["logp"], old) for k in ("logp_old", "logp_ref", "logp_rollout")}
            leaves = {k: c[k].clone().requires_grad_() for k in GRADIENT if k in columns_read(part) and k in c}
            if "log_ratio" in columns_read(part):
                for ratio in (ratios.token, ratios.sequence, ratios.sequence_sum, ratios.sequence_token):
                    leaf = c["logp"].clone().requires_grad_()
                    out = call(part, {**c, "logp": leaf, "log_ratio": ratio(leaf, c["logp_old"], c["mask"])})
                    out.sum().backward()
                    assert out.isfinite().all() and leaf.grad.isfinite().all()
                    assert sign or key.startswith("pen") or "kl_selected" in key or not (out.any() or leaf.grad.any())
                continue
            out = call(part, {**c, **leaves})
            assert out.isfinite().all()
            if leaves:
                out.sum().backward()
                assert all(x.grad.isfinite().all() for x in leaves.values())
    for rows, width in ((0, T), (3, 0)):
        few = {k: v[:rows, :width] if v.ndim == 2 else v[:rows] for k, v in columns(1).items()}
        assert call(part, few).shape == (rows, width)


STRAIGHT = {"ratios.sequence_token", "surrogates.truncate", "penalties.k1_score", "penalties.k3_straight"}  # sg[] by definition


@pytest.mark.parametrize("key", [k for k in PARTS if k not in STRAIGHT and not k.startswith("corrections")])
def test_gradcheck(key):
    part, c = PARTS[key], columns(5, token_advantage=True)
    c["log_ratio"] = ratios.token(c["logp"], c["logp_old"], c["mask"])
    at = [k for k in GRADIENT if k in columns_read(part)]
    wrt = [c[k].clone().requires_grad_() for k in at]
    assert torch.autograd.gradcheck(lambda *x: bind(part, {**c, **dict(zip(at, x, strict=True))}), wrt)


def test_corrections_have_no_gradient():
    c = columns()
    leaf = c["logp_old"].clone().requires_grad_()
    for name in corrections.__all__:
        assert not bind(getattr(corrections, name), {**c, "logp_old": leaf}).requires_grad, name


@pytest.mark.parametrize("module", ["ratios", "surrogates", "selections", "penalties", "corrections", "critics", "divergences"])
def test_docstrings_work(module):
    failed, tried = doctest.testmod(importlib.import_module(f"prefopt.{module}"))
    assert tried and not failed


# ------------------------------------------------------------------ surrogates: identities and limits
def surrogate_gradient(part, log_ratio, advantage):
    x = log_ratio.clone().requires_grad_()
    out = part(x, advantage)
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


def test_clipping_by_hand():
    log_r, a = f64([2.0, 2.0, 0.5, 0.5, 1.1, 4.0]).log(), f64([1.0, -1.0, 1.0, -1.0, 3.0, -2.0])
    value, slope = surrogate_gradient(C.clip, log_r, a)
    close(value, f64([1.2, -2.0, 0.5, -0.8, 3.3, -8.0]))
    close(slope, f64([0.0, -2.0, 0.5, 0.0, 3.3, -8.0]))       # r A, or nothing
    value, slope = surrogate_gradient(C.dual_clip, log_r, a)
    close(value, f64([1.2, -2.0, 0.5, -0.8, 3.3, -6.0]))
    close(slope, f64([0.0, -2.0, 0.5, 0.0, 3.3, 0.0]))
    value, slope = surrogate_gradient(partial(C.capped, delta=3.0), log_r, a)
    close(value, f64([1.2, -2.0, 0.5, -0.8, 3.3, -6.0]))
    close(slope, f64([0.0, -2.0, 0.5, 0.0, 3.3, 0.0]))
    value, slope = surrogate_gradient(partial(C.capped, delta=0.9), f64([math.log(1.05)]), f64([1.0]))
    close(value, f64([0.9]))                                  # below 1 + high the cap also binds for A > 0


def test_bounds_may_be_infinite_or_tensors():
    c = columns(2, spread=3.0, token_advantage=True)
    log_r, a = ratios.token(c["logp"], c["logp_old"], c["mask"]), c["advantage"]
    inf = math.inf
    for got, want in ((partial(C.clip, low=inf, high=inf), C.plain), (partial(C.dual_clip, floor=inf), C.clip),
                      (partial(C.capped, delta=inf), C.clip), (partial(C.kl_selected, coef=0.0), None),
                      (partial(C.capped, delta=3.0), C.dual_clip)):
        if want is None:
            got, want = (lambda x, a, got=got: got(x, a, c["selected"])), C.plain
        for left, right in zip(surrogate_gradient(got, log_r, a), surrogate_gradient(want, log_r, a), strict=True):
            close(left, right)
    low, high = torch.rand(N, T, dtype=torch.float64), torch.rand(N, T, dtype=torch.float64)
    for part in (C.clip, C.dual_clip, C.capped, lambda x, a, **b: C.clip_except_selected(x, a, c["selected"], **b),
                 lambda x, a, **b: C.truncate(c["logp"], x, a, **b)):
        whole = part(log_r, a, low=low, high=high)
        for i, t in itertools.product(range(N), range(T)):
            one = part(log_r, a, low=float(low[i, t]), high=float(high[i, t]))
            close(whole[i, t], one[i, t])
    close(ratios.geometric(c["logp"], c["logp_old"], c["mask"], a, low=low * 0 + 0.3, high=high * 0 + 0.2),
          ratios.geometric(c["logp"], c["logp_old"], c["mask"], a, low=0.3, high=0.2))
    close(C.clip(log_r, a, low=0.2, high=0.3 + 0 * high), C.clip(log_r, a, low=0.2, high=0.3))


def test_on_policy_gradients_coincide():
    """At r = 1 every surrogate has the gradient of the likelihood, whatever its ratio (token forms, row-wise advantages)."""
    c = columns(4)
    c["logp_old"] = c["logp"].clone()
    reduce = reductions.sequence_mean
    want = value_and_gradient(loss(None, C.likelihood, reduce), c)[1]
    every = C.clip, C.plain, C.dual_clip, C.capped, C.truncate, C.soft_gate, C.kl_selected
    for ratio, surrogate in (*((ratios.token, x) for x in every), (ratios.sequence_token, C.clip), (ratios.sequence, C.clip),
                             (ratios.geometric, C.plain)):
        close(value_and_gradient(loss(ratio, surrogate, reduce), c)[1], want)


def test_sequence_ratios():
    c = columns(4)
    one = {**c, "mask": c["mask"] & (torch.arange(T) == 0)}   # one token in each response
    want = value_and_gradient(loss(ratios.token, C.clip, reductions.sequence_mean), one)
    for ratio in (ratios.sequence, ratios.sequence_token, ratios.sequence_sum):
        for got, expected in zip(value_and_gradient(loss(ratio, C.clip, reductions.sequence_mean), one), want, strict=True):
            close(got, expected)
    forms = [value_and_gradient(loss(ratio, C.clip, reductions.sequence_mean), c)
             for ratio in (ratios.sequence, ratios.sequence_token)]
    close(forms[0][0], forms[1][0])                           # equal advantages in a row: equal gradients
    close(forms[0][1], forms[1][1])
    unbounded = ratios.geometric(c["logp"], c["logp_old"], c["mask"], c["advantage"] + c["mask"] * 9, low=99.0, high=99.0)
    close(unbounded, ratios.sequence(c["logp"], c["logp_old"], c["mask"]))
    far = ratios.sequence_token(f64([[0.0, 0.0]]).requires_grad_(), f64([[-30.0, -2.0]]), torch.ones(1, 2))
    assert far.tolist() == [[10.0, 10.0]]                     # 16, capped


def test_token_ratio_is_clamped_without_gradient():
    logp = f64([[-1.0, -50.0, -2.0]]).requires_grad_()
    out = ratios.token(logp, f64([[-30.0, -1.0, -3.0]]), torch.ones(1, 3))
    assert out.tolist() == [[20.0, -20.0, 1.0]]
    assert torch.autograd.grad(out.sum(), logp)[0].tolist() == [[0.0, 0.0, 1.0]]


def test_cispo_never_drops_a_token_ppo_does():
    c = columns(1, spread=2.0)
    acts = c["mask"] & (c["advantage"] != 0)
    cispo, ppo = (value_and_gradient(loss(ratios.token, s, reductions.term_mean), c)[1] for s in (C.truncate, C.clip))
    assert (cispo[acts] != 0).all() and (ppo[acts] == 0).any()
    free = partial(C.truncate, low=math.inf, high=math.inf)
    close(value_and_gradient(loss(ratios.token, free, reductions.term_mean), c)[1],
          value_and_gradient(loss(ratios.token, C.plain, reductions.term_mean), c)[1])


def test_trl_convention_of_cispo():
    """TRL's epsilon_high is the weight itself: 5.0 there is high = 4 here."""
    log_r, a, logp = f64([9.0, 3.0]).log(), f64([1.0, 1.0]), f64([-1.0, -1.0])
    close(C.truncate(logp, log_r, a, high=4.0), log_r.exp().clamp(max=5.0) * a * logp)


def test_soft_gate_is_smooth_and_fades():
    """Slope r A 4 sigmoid'(tau (r - 1)): A at r = 1, smaller than `plain` elsewhere, more so with a higher temperature."""
    log_r = f64([-3.0, 0.0, 1.0, 3.0])
    for a, tau in ((2.0, 1.0), (-2.0, 1.05)):
        slope = surrogate_gradient(C.soft_gate, log_r, torch.full_like(log_r, a))[1]
        r = log_r.exp()
        gate = torch.sigmoid(tau * (r - 1))
        close(slope, 4 * gate * (1 - gate) * r * a)
        assert slope[1] == a and (slope.abs() < (r * a).abs() + 1e-12).all()
    tiny = partial(C.soft_gate, tau_positive=1e-6, tau_negative=1e-6)
    close(surrogate_gradient(tiny, log_r, torch.ones_like(log_r))[1], log_r.exp(), 1e-5)


def test_zero_advantage_meets_infinite_ratio():
    log_r, zero, logp = f64([math.inf, -math.inf, math.nan]), torch.zeros(3, dtype=torch.float64), f64([-math.inf] * 3)
    for part in (C.clip, C.plain, C.dual_clip, C.capped, C.soft_gate):
        value, slope = surrogate_gradient(part, log_r, zero)
        assert not value.any() and not slope.any()
    assert not C.truncate(logp, log_r, zero).any() and not C.likelihood(logp, zero).any()


# ------------------------------------------------------------------ reductions of tokens
def test_token_reductions_by_hand():
    """Loss rows [1, 1] and [3]: the card's values."""
    terms, value = f64([[[1, 1], [1, 0], [0, 0]]]), f64([[[1, 1], [3, 7], [7, 7]]])
    for reduce, want in ((reductions.term_mean, 5 / 3), (reductions.sequence_mean, 2.0), (reductions.sequence_sum, 2.5),
                         (partial(reductions.fixed_length, length=2), 1.25), (partial(reductions.fixed_total, length=2), 2.5)):
        close((reduce(terms) * value).sum(), f64(want))
        assert not reduce(torch.zeros_like(terms)).any()
    full = torch.ones(2, 3, 4, dtype=torch.float64)
    for reduce in (reductions.sequence_mean, partial(reductions.fixed_length, length=4), lambda t: reductions.sequence_sum(t) / 4,
                   lambda t: reductions.fixed_total(t, length=4) / 6, reductions.group_mean):
        close(reduce(full), reductions.term_mean(full))       # equal lengths


def together(monkeypatch, *calls):
    """Each call as a process of its own: `total` sums over all of them, `gather` joins, in step."""
    barrier, box, me = threading.Barrier(len(calls)), {}, threading.local()

    def exchange(x):
        box[me.rank] = x
        barrier.wait()
        found = [box[r] for r in range(len(calls))]
        barrier.wait()
        return found

    def gather(x):
        found = exchange(x)
        return torch.cat(found), sum(len(y) for y in found[:me.rank])

    for module in (reductions, selections, penalties):
        monkeypatch.setattr(module, "total", lambda x: sum(exchange(x)))
    monkeypatch.setattr(selections, "gather", gather)
    out = [None] * len(calls)

    def work(rank):
        me.rank = rank
        try:
            out[rank] = calls[rank]()
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(r,)) for r in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(x is not None for x in out)
    return out


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_reductions_over_processes(cut, monkeypatch):
    terms = (torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    terms[1, 2] = 0
    every = [reductions.sequence_mean, reductions.sequence_sum, partial(reductions.fixed_length, length=7),
             partial(reductions.fixed_total, length=7)]
    whole = [reduce(terms) for reduce in every]
    parts = together(monkeypatch, *(lambda t=t: [reduce(t) for reduce in every] for t in (terms[:cut], terms[cut:])))
    for want, left, right in zip(whole, *parts, strict=True):
        close(torch.cat([left, right]), want)


# ------------------------------------------------------------------ selections
def step(seed=0, b=3, k=4, t=6):
    g = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)
    real = torch.ones(b, k, dtype=torch.bool)
    real[1, -1] = False
    mask = uniform(b, k, t) < 0.8
    now = -3 * uniform(b, k, t)
    return {"logp_now": now, "logp_old": now + 0.6 * (uniform(b, k, t) - 0.5), "mask": mask, "real": real,
            "advantage": (4 * uniform(b, k, 1) - 2).expand(b, k, t) * mask, "noise": uniform(b, k, t)}


def loop_covariance(s):
    """[(c, group, slot, token)] of all valid tokens, one by one."""
    at = [x for x in itertools.product(*map(range, s["mask"].shape)) if s["mask"][x] and s["real"][x[:2]]]
    lp, a = ([float(s[key][x]) for x in at] for key in ("logp_now", "advantage"))
    mean_lp, mean_a = sum(lp) / len(at), sum(a) / len(at)
    return {x: (p - mean_lp) * (q - mean_a) for x, p, q in zip(at, lp, a, strict=True)}


BAND = dict(share=0.1, low=0.2, high=1.5, clip_low=0.1, clip_high=0.15)


@pytest.mark.parametrize("seed", range(4))
def test_covariance_selections(seed):
    s = step(seed)
    c = loop_covariance(s)
    n = max(1, int(0.1 * len(c)))
    top = bind(partial(selections.covariance_top, share=0.1), s)
    assert {tuple(x) for x in top.nonzero().tolist()} == set(sorted(c, key=lambda x: -c[x])[:n])

    def unclipped(x):
        r, a = math.exp(s["logp_now"][x] - s["logp_old"][x]), float(s["advantage"][x])
        return not (a > 0 and r > 1.15 or a < 0 and r < 0.9)

    candidates = [x for x in c if 0.2 < c[x] < 1.5 and unclipped(x)]
    band = bind(partial(selections.covariance_band, **BAND), s)
    assert len(candidates) > n and any(0.2 < c[x] < 1.5 and not unclipped(x) for x in c)
    assert {tuple(x) for x in band.nonzero().tolist()} == set(sorted(candidates, key=lambda x: float(s["noise"][x]))[:n])


def test_selection_limits():
    s = step()
    band, top = selections.covariance_band, selections.covariance_top
    assert not bind(partial(band, low=99.0), s).any()         # no candidate: plain PPO
    assert int(bind(partial(band, **{**BAND, "share": 1.0}), s).sum()) < int(s["mask"].sum())         # fewer than n: all of them
    assert int(bind(band, s).sum()) == int(bind(top, s).sum()) == 1           # at least one, 2e-4 of 60 tokens
    quiet = {**s, "advantage": torch.zeros_like(s["advantage"])}
    assert not bind(partial(band, low=0.0), quiet).any() and int(bind(top, quiet).sum()) == 1
    empty = {**s, "mask": torch.zeros_like(s["mask"])}
    for part in (band, top):
        assert not bind(part, empty).any()
        assert bind(part, {k: v[:0] for k, v in s.items()}).shape == (0, 4, 6)
        hidden = ~(s["mask"] & s["real"][..., None])
        junk = {k: torch.where(hidden, math.nan, v) if v.is_floating_point() else v for k, v in s.items()}
        assert torch.equal(bind(part, junk), bind(part, s))


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_selections_over_processes(cut, monkeypatch):
    s = step(5)
    parts = partial(selections.covariance_band, **BAND), partial(selections.covariance_top, share=0.1)
    whole = [bind(p, s) for p in parts]
    halves = [{k: v[:cut] for k, v in s.items()}, {k: v[cut:] for k, v in s.items()}]
    found = together(monkeypatch, *(lambda h=h: [bind(p, h) for p in parts] for h in halves))
    for want, left, right in zip(whole, *found, strict=True):
        assert torch.equal(torch.cat([left, right]), want)


def test_clip_cov_and_kl_cov_act_on_selected_tokens_alone():
    c = columns(3)
    one = loss(ratios.token, C.clip_except_selected, reductions.term_mean)
    removed = value_and_gradient(loss(ratios.token, C.clip, reductions.term_mean), c)[1] - value_and_gradient(one, c)[1]
    assert removed[c["selected"]].any() and not removed[~c["selected"]].any()
    held = value_and_gradient(loss(ratios.token, C.kl_selected, reductions.term_mean), c)[1]
    extra = held - value_and_gradient(loss(ratios.token, C.plain, reductions.term_mean), c)[1]
    sign = (c["logp"] - c["logp_old"]).sign() * c["selected"] / c["mask"].sum()
    close(extra, sign)


def test_covariance_selection_keeps_entropy():
    """Bandit of 20 arms, 4 steps on each rollout: both methods keep more entropy than their surrogate alone."""
    reward = torch.linspace(0, 1, 20, dtype=torch.float64)

    def train(surrogate, select):
        g = torch.Generator().manual_seed(0)
        theta = torch.zeros(20, dtype=torch.float64, requires_grad=True)
        for _ in range(60):
            old = theta.detach().log_softmax(-1)
            y = torch.multinomial(old.exp(), 64, True, generator=g)
            a = reward[y] - reward[y].mean()
            c = {"advantage": (a / (a.std() + 1e-6))[:, None], "logp_old": old[y][:, None], "mask": torch.ones(64, 1).bool()}
            for _ in range(4):
                c["logp"] = theta.log_softmax(-1)[y][:, None]
                if select is not None:
                    groups = {k: v[None] for k, v in {**c, "logp_now": c["logp"].detach()}.items()}
                    groups |= {"real": torch.ones(1, 64).bool(), "noise": torch.rand(1, 64, 1, generator=g)}
                    c["selected"] = bind(select, groups)[0]
                gradient, = torch.autograd.grad(loss(ratios.token, surrogate, reductions.term_mean)(c), theta)
                theta = (theta - 1.0 * gradient).detach().requires_grad_()
        p = theta.softmax(-1).detach()
        return float(-(p * p.log()).sum()), float((p * reward).sum())

    entropy, value = train(C.clip, None)
    band = partial(selections.covariance_band, share=0.3, low=0.3, high=50.0)
    held, held_value = train(C.clip_except_selected, band)
    assert held > 1.2 * entropy and held_value > value - 0.1
    plain, plain_value = train(C.plain, None)
    top, top_value = train(partial(C.kl_selected, coef=5.0), partial(selections.covariance_top, share=0.3))
    assert top > 1.2 * plain and top_value > plain_value - 0.1


# ------------------------------------------------------------------ penalties
def test_penalties_by_hand():
    """pi = 1/2, ref = 1: d = -log 2."""
    c = {"logp": f64([0.5]).log(), "logp_ref": f64([1.0]).log(), "mask": torch.ones(1), "log_ratio": f64([2.0]).log()}
    d = -math.log(2)
    slopes = {"k1": (d, 1), "absolute": (-d, -1), "k2": (d * d / 2, d), "k3": (1 + d, -1), "k1_score": (d, d),
              "k3_straight": (1 + d, d), "k3_reverse": (2 * (1 + d), -2)}
    for name, (want, slope) in slopes.items():
        value, gradient = value_and_gradient(lambda c, n=name: bind(getattr(penalties, n), c).sum(), c)
        close(value, f64(want))
        close(gradient, f64([slope]))
    with_ratio = lambda c: penalties.k3_reverse(c["logp"], c["logp_ref"], c["logp"] - f64([0.25]).log(), c["mask"]).sum()
    close(value_and_gradient(with_ratio, c)[1], f64([2 * d]))                  # r d when the ratio moves along
    same = {**c, "logp_ref": c["logp"]}
    for name in slopes:
        value, gradient = value_and_gradient(lambda c, n=name: bind(getattr(penalties, n), c).sum(), same)
        assert value == 0 and (gradient == 0 or name == "k1")


def test_k3_clamps():
    logp = f64([-1.0, -5.0, -3.0, -40.0]).requires_grad_()
    out = penalties.k3(logp, f64([-3.0, -1.0, -1.0, -1.0]), torch.ones(4), largest=10.0)
    close(out, f64([math.exp(-2) - 1 + 2, 10.0, math.exp(2) - 1 - 2, 10.0]))
    close(torch.autograd.grad(out.sum(), logp)[0], f64([1 - math.exp(-2), 0.0, 1 - math.exp(2), 0.0]))
    far = penalties.k3(f64([-40.0]), f64([-1.0]), torch.ones(1))
    close(far, f64([math.exp(20) - 21]))


def distributions(seed=0, k=5):
    g = torch.Generator().manual_seed(seed)
    theta, ref, old = (torch.randn(k, generator=g, dtype=torch.float64) for _ in range(3))
    return theta.requires_grad_(), ref.log_softmax(-1), old.log_softmax(-1)


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def test_kl_gradients_by_enumeration():
    """sum_y pi(y) grad k(y) over 5 symbols against autograd of the closed forms."""
    theta, ref, old = distributions()
    logp = theta.log_softmax(-1)
    grad = lambda x: torch.autograd.grad(x, theta, retain_graph=True)[0]
    mask, weight = torch.ones(5), logp.exp().detach()
    reverse, forward = grad(kl(logp, ref)), grad(kl(ref, logp))
    assert (reverse - forward).abs().max() > 1e-2
    expected = {"k1": 0 * reverse, "k2": reverse, "k1_score": reverse, "k3": forward, "k3_straight": reverse}
    for name, want in expected.items():
        out = getattr(penalties, name)(logp, ref, mask)
        close(grad((weight * out).sum()), want)
        if name != "k2":
            close((weight * out).sum(), kl(logp, ref))
    # off policy: samples of old, ratio pi / old
    out = penalties.k3_reverse(logp, ref, ratios.token(logp, old, mask), mask)
    close((old.exp() * out).sum(), kl(logp, ref))
    close(grad((old.exp() * out).sum()), reverse)
    score = (logp.exp().detach() * (logp - ref).detach() * logp).sum()         # k1 in the reward, without baseline
    close(grad(score), reverse)


def test_regularisers_alone():
    """Expected steps on each penalty: k1 leaves the policy where it is, k2 and k3 end at the reference."""
    for name, moves in (("k1", False), ("k2", True), ("k3", True)):
        theta, ref, _ = distributions(3)
        start = theta.detach().log_softmax(-1)
        for _ in range(400):
            logp = theta.log_softmax(-1)
            value = (logp.exp().detach() * getattr(penalties, name)(logp, ref, torch.ones(5))).sum()
            theta = (theta - torch.autograd.grad(value, theta)[0]).detach().requires_grad_()
        end = theta.log_softmax(-1)
        close(end.detach(), ref if moves else start, 1e-3 if moves else 1e-10)


def test_controlled_penalties():
    c = columns()
    for name, base in (("controlled_k2", penalties.k2), ("controlled_k3", penalties.k3),
                       ("controlled_entropy", penalties.entropy_bonus)):
        rows = zip(bind(base, c), c["coefficient"], strict=True)
        close(bind(getattr(penalties, name), c), torch.stack([row * weight for row, weight in rows]))
    assert penalties.entropy_bonus(f64([2.0, math.nan]), torch.tensor([1, 0])).tolist() == [-2.0, 0.0]


def groups(kl_each, mask=None):
    """Groups (1, K, 2) whose rows have these KL sums."""
    each = f64(kl_each)
    logp_old = (each / 2)[None, :, None].expand(1, -1, 2).clone()
    return logp_old, torch.zeros_like(logp_old), torch.ones_like(logp_old).bool(), torch.ones(1, len(kl_each)).bool()


def test_adaptive_kl():
    control = penalties.AdaptiveKL(start=0.5, target=6.0, horizon=100)
    # mean KL 6.6: error 0.1; 2 rows
    assert control(*groups([6.0, 7.2])).tolist() == [[0.5, 0.5]]               # of this step: before the update
    assert control.coefficient == pytest.approx(0.5 * (1 + 0.1 * 2 / 100))
    before = control.coefficient
    control(*groups([600.0]))
    assert control.coefficient == pytest.approx(before * (1 + 0.2 / 100))      # clipped
    before = control.coefficient
    control(*groups([-5.0] * 3))
    assert control.coefficient == pytest.approx(before * (1 - 0.2 * 3 / 100))
    before = control.coefficient
    lp, ref, mask, real = groups([6.0, 50.0])
    lp[0, 1], mask[0, 0, 1] = math.nan, False                  # a slot without a row, a masked token: KL of 3
    control(lp, ref, mask, real & torch.tensor([[True, False]]))
    assert control.coefficient == pytest.approx(before * (1 - 0.2 / 100))
    before = control.coefficient
    assert control(lp[:0], ref[:0], mask[:0], real[:0]).shape == (0, 2) and control.coefficient == before
    assert not control(lp, ref, mask, real & False).isnan().any() and control.coefficient == before
    other = penalties.AdaptiveKL(**control.spec())
    assert other.coefficient == 0.5
    other.load_state_dict(control.state_dict())
    assert other(*groups([6.0])).tolist() == control(*groups([6.0])).tolist() == [[before]]
    penalties.AdaptiveKL(horizon=1)(*groups([1.0] * 4))
    with pytest.raises(ValueError, match="5 rows .* horizon above 1"):
        penalties.AdaptiveKL(horizon=1)(*groups([1.0] * 5))


def test_adaptive_kl_settles_at_its_target():
    """KL that answers the coefficient as 1 / coefficient: within 20 % of the target, from either side."""
    for start in (0.01, 3.0):
        control = penalties.AdaptiveKL(start=start, target=6.0, horizon=1000)
        for _ in range(400):
            found = 1 / control.coefficient
            control(*groups([found] * 64))
        assert 0.8 * 6.0 < found < 1.2 * 6.0


def test_adaptive_entropy():
    control = penalties.AdaptiveEntropy(target=1.0, rate=0.5, largest=0.4)
    entropy, mask, real = f64([[[0.2, 0.6], [9.0, 9.0]]]), torch.ones(1, 2, 2), torch.tensor([[True, False]])
    assert control(entropy, mask, real).tolist() == [[0.0, 0.0]]
    assert control.coefficient == pytest.approx(0.3)           # 0.5 (1 - 0.4)
    assert control(entropy, mask, real).tolist() == [[pytest.approx(0.3)] * 2]
    assert control.coefficient == 0.4                          # 0.6, capped
    control(entropy + 9, mask, real)
    assert control.coefficient == 0.0                          # never a penalty on entropy
    control.coefficient = 0.2
    control(entropy * math.nan, mask * 0, real)
    assert control.coefficient == 0.2
    assert penalties.AdaptiveEntropy(**control.spec()).spec() == control.spec()


def test_controllers_over_processes(monkeypatch):
    lp, ref, mask, real = groups([3.0, 9.0, 30.0])
    alone = penalties.AdaptiveKL(horizon=10)
    alone(lp, ref, mask, real)

    def share(rows):
        control = penalties.AdaptiveKL(horizon=10)
        control(lp[:, rows], ref[:, rows], mask[:, rows], real[:, rows])
        return control.coefficient

    assert together(monkeypatch, lambda: share(slice(0, 1)), lambda: share(slice(1, 3))) == [pytest.approx(alone.coefficient)] * 2


# ------------------------------------------------------------------ corrections
def test_corrections_by_hand():
    """w = 3, 1/2, 1 in the first row; the product is 1.5."""
    old, roll = f64([[0.9, 0.3, 0.5], [0.5, 0.1, 0.1]]).log(), f64([[0.3, 0.6, 0.5], [0.1, 0.1, 0.1]]).log()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    cap = corrections
    close(cap.exact(old, roll, mask), f64([[3, 0.5, 1], [5, 1, 0]]))
    close(cap.truncated(old, roll, mask), f64([[2, 0.5, 1], [2, 1, 0]]))
    close(cap.truncated_sequence(old, roll, mask), f64([[1.5] * 3, [2, 2, 0]]))
    close(cap.masked_ratio(old, roll, mask), f64([[0, 0.5, 1], [0, 1, 0]]))
    close(cap.masked_out(old, roll, mask, low=0.6), f64([[0, 0, 1], [0, 1, 0]]))
    assert accepts.accept_token(old, roll, mask, low=0.6).tolist() == [[False, False, True], [False, True, False]]
    whole = accepts.accept_sequence(old, roll, mask, low=0.9, high=1.2)           # 1.5^(1/3), 5^(1/2)
    assert whole.tolist() == [[True] * 3, [False] * 3]
    close(cap.beyond(old, roll, mask), f64([[1, 0, 0], [1, 0, 0]]))
    close(cap.squared_weight(cap.exact(old, roll, mask), mask), f64([[9, 0.25, 1], [25, 1, 0]]))
    assert accepts.accept_token(old, roll, mask, low=0.0, high=math.inf).sum() == 5
    same = {name: getattr(cap, name)(old, old, mask) for name in cap.__all__}
    for name, out in same.items():
        assert torch.equal(out.double(), mask.double()), name  # equal probabilities: weight 1, nothing turned down


def test_expected_weight_is_one():
    """E_rollout[w] = 1 by enumeration of 3-token responses; the product of token weights is the response's."""
    g = torch.Generator().manual_seed(1)
    old, roll = (torch.randn(3, 4, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    lo, lr = (x[torch.arange(3), every] for x in (old, roll))
    p, mask = lr.sum(-1).exp(), torch.ones_like(lo)
    whole, each = corrections.truncated_sequence(lo, lr, mask, cap=math.inf), corrections.exact(lo, lr, mask)
    close(whole[:, 0], each.prod(-1))
    close((p * whole[:, 0]).sum(), f64(1.0))
    close((p[:, None] * each).sum(0), torch.ones(3, dtype=torch.float64))
    close((p * corrections.rollout_kl(lo, lr, mask)[:, 1]).sum(), kl(roll[1], old[1]))
    assert (p * corrections.truncated(lo, lr, mask)[:, 0]).sum() < 1
    # top-k sampling: renormalised probabilities are larger, w is the mass that was kept
    top = old.topk(2).indices
    cut = torch.full_like(old, -math.inf).scatter(-1, top, old.gather(-1, top)).log_softmax(-1)
    kept = corrections.exact(old.gather(-1, top), cut.gather(-1, top), torch.ones(3, 2))
    assert (kept <= 1).all()
    close(kept[:, 0], old.gather(-1, top).exp().sum(-1))


def test_bias_of_the_correction():
    """Sampler with another policy than the trainer's, 3 tokens, all 4^3 responses: the uncorrected gradient is biased, that of
    truncated token weights less, the response's weight without cap is exact; so is the ratio to the sampler itself."""
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(3, 4, generator=g, dtype=torch.float64).requires_grad_()
    roll = (theta.detach() + 0.5 * torch.randn(3, 4, generator=g, dtype=torch.float64)).log_softmax(-1)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    reward = torch.randn(64, 1, generator=g, dtype=torch.float64)
    at = lambda x: x[torch.arange(3), every]
    logp, lr, mask = at(theta.log_softmax(-1)), at(roll), torch.ones(64, 3)
    grad = lambda x: torch.autograd.grad(x.sum(), theta, retain_graph=True)[0]
    true, p = grad(logp.sum(-1).exp() * reward[:, 0]), lr.sum(-1).exp()[:, None]
    old = logp.detach()
    j = C.likelihood(logp, reward.expand(64, 3))
    error = {name: (grad(p * w * j) - true).norm() / true.norm() for name, w in {
        "none": 1.0, "token": corrections.truncated(old, lr, mask), "exact token": corrections.exact(old, lr, mask),
        "response": corrections.truncated_sequence(old, lr, mask, cap=math.inf)}.items()}
    assert error["response"] < 1e-12 < error["exact token"] < error["none"] and error["token"] < error["none"]
    assert error["none"] > 0.1
    whole = C.plain(ratios.sequence_sum(logp, lr, mask), reward.expand(64, 3))
    close(grad(p * whole / 3), true)


# ------------------------------------------------------------------ critics
def test_value_loss():
    value, old = f64([1.0, 0.1, -1.0, 0.5]), f64([0.0, 0.0, 0.0, 0.0])
    returns = f64([1.0, 1.0, 1.0, 0.9])
    leaf = value.clone().requires_grad_()
    out = critics.value_loss(leaf, returns, old, torch.tensor([1, 1, 1, 0]))
    close(out, f64([0.32, 0.405, 2.0, 0.0]))                  # clipped to .2; inside; the unclipped error is larger; masked
    close(torch.autograd.grad(out.sum(), leaf)[0], f64([0.0, -0.9, -2.0, 0.0]))
    c = columns()
    plain = bind(critics.value_loss_plain, c)
    close(bind(partial(critics.value_loss, clip=math.inf), c), plain)
    close(plain, torch.where(c["mask"], torch.nn.functional.mse_loss(c["value"], c["returns"], reduction="none") / 2, 0.0))
    for clip in (0.2, 0.05):                                  # as verl writes it
        clipped = torch.clamp(c["value"], c["value_old"] - clip, c["value_old"] + clip)
        want = 0.5 * torch.max((c["value"] - c["returns"]) ** 2, (clipped - c["returns"]) ** 2)
        close(bind(partial(critics.value_loss, clip=clip), c), torch.where(c["mask"], want, 0.0))


# ------------------------------------------------------------------ CoPG
def test_copg_forms():
    g = torch.Generator().manual_seed(0)
    score, reward = torch.randn(4, 3, generator=g, dtype=torch.float64), torch.randn(4, 3, generator=g, dtype=torch.float64)
    real = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    junk = torch.where(real, reward, math.nan)
    leaf = score.clone().requires_grad_()
    out = listwise.copg(leaf, junk, real)
    for b, row in enumerate(real.tolist()):
        d = [float(reward[b, i] - score[b, i]) for i, here in enumerate(row) if here]
        close(out[b], f64(sum((x - y) ** 2 for x, y in itertools.combinations(d, 2)) / max(len(d) - 1, 1)))
    slope = torch.autograd.grad(out.sum(), leaf)[0]
    for b, row in enumerate(real.tolist()):                   # leave-one-out REINFORCE with rewards R - s
        at = [i for i, here in enumerate(row) if here]
        for i in at:
            rest = [float(reward[b, j] - score[b, j]) for j in at if j != i]
            a = float(reward[b, i] - score[b, i]) - sum(rest) / len(rest) if rest else 0.0
            close(slope[b, i], f64(-2 * a))
    assert not slope[~real].any()
    close(listwise.copg(score, reward + 7, real), out.detach())
    beta, h = 0.3, score[:2, 0] - score[:2, 1]                # rewards +-1/2: IPO with tau = beta / 2
    half, two = f64([[0.5, -0.5]] * 2), torch.ones(2, 2).bool()
    close(listwise.copg(beta * score[:2, :2], half, two), beta ** 2 * (h - 1 / (2 * (beta / 2))) ** 2)
    assert torch.autograd.gradcheck(lambda s: listwise.copg(s, junk, real), leaf)


def test_copg_learns_off_policy():
    """Six arms, data of a skewed fixed policy: CoPG ends at pi_ref exp(R / beta), the policy gradient without baseline and
    importance weights does not."""
    g = torch.Generator().manual_seed(0)
    reward = torch.rand(6, generator=g, dtype=torch.float64)
    ref = torch.randn(6, generator=g, dtype=torch.float64).log_softmax(-1)
    behaviour = (1.2 * torch.arange(6, dtype=torch.float64)).softmax(-1)
    beta, target = 0.5, (ref + reward / 0.5).log_softmax(-1)
    i, j = torch.tensor(list(itertools.combinations(range(6), 2))).T
    weight = behaviour[i] * behaviour[j]                      # expectation over pairs of distinct samples

    def contrast(logp):
        s = beta * (logp - ref)
        both = torch.ones(len(i), 2).bool()
        return (weight * listwise.copg(torch.stack([s[i], s[j]], 1), torch.stack([reward[i], reward[j]], 1), both)).sum()

    def naive(logp):
        shaped = reward - beta * (logp - ref)
        return -(behaviour * C.likelihood(logp, shaped.detach())).sum()

    def end(objective):
        theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([theta], max_iter=400, tolerance_grad=1e-12, tolerance_change=0) \
            if objective is contrast else torch.optim.SGD([theta], lr=0.5)

        def closure():
            optimiser.zero_grad()
            value = objective(theta.log_softmax(-1))
            value.backward()
            return value

        for _ in range(1 if objective is contrast else 1500):
            optimiser.step(closure)
        return float(kl(target, theta.detach().log_softmax(-1)))

    assert end(contrast) < 1e-6 and end(naive) > 0.05


# ------------------------------------------------------------------ f-divergences
def js(p, q):
    m = torch.logaddexp(p, q) - math.log(2)
    return kl(p, m) + kl(q, m)


DIVERGENCES = {
    "fdpg_forward": (lambda p, t: kl(t, p), 1.0), "fdpg_reverse": (kl, -1.0), "fdpg_js": (js, 0.0),
    "fdpg_tv": (lambda p, t: (p.exp() - t.exp()).abs().sum() / 2, 0.0),
    "fdpg_chi2_forward": (lambda p, t: ((t.exp() - p.exp()) ** 2 / p.exp()).sum(), 0.0),
    "fdpg_chi2_reverse": (lambda p, t: ((t.exp() - p.exp()) ** 2 / t.exp()).sum(), 0.0)}


def one_group(*logs):
    """Single-token columns (1, K, 1) of a group that holds every outcome once."""
    return [x.detach()[None, :, None] for x in logs]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_f_divergence_gradients(name):
    """All outcomes of a uniform sampler in one group: Z is exact, and the importance-weighted gradient is that of D_f."""
    divergence, centre = DIVERGENCES[name]
    part, beta, k = getattr(divergences, name), 0.7, 5
    theta, ref, _ = distributions(2)
    g = torch.Generator().manual_seed(9)
    reward = torch.randn(k, generator=g, dtype=torch.float64)
    logp, uniform = theta.log_softmax(-1), torch.full((k,), -math.log(k), dtype=torch.float64)
    target = (ref + reward / beta).log_softmax(-1)
    want = torch.autograd.grad(divergence(logp, target), theta, retain_graph=True)[0]
    lp, lr, lq = one_group(logp, ref, uniform)
    mask, real = torch.ones(1, k, 1, dtype=torch.float64), torch.ones(1, k).bool()
    args = (reward[None], lp, lr, lq, mask, real)
    for baseline in (0.0, 0.4):
        advantage = part(*args, beta=beta, baseline=baseline)[0, :, None]
        row = logp[:, None]
        j = C.plain(ratios.sequence_sum(row, row.detach(), mask[0]), advantage)
        j = j * corrections.truncated_sequence(row.detach(), lq[0], mask[0], cap=math.inf)
        unit = reductions.sequence_mean(mask)[0]
        close(torch.autograd.grad(-(unit * j).sum(), theta, retain_graph=True)[0], want)
    at_target = (reward[None], *one_group(target, ref, uniform), mask, real)
    assert part(*at_target, beta=beta, baseline=centre).abs().max() < 1e-12 or name == "fdpg_tv"
    shifted = part(reward[None] + 3, lp, lr, lq, mask, real, beta=beta)        # Z takes it up
    close(shifted, part(*args, beta=beta))


def test_f_divergence_edges():
    lp, real = f64([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]).log()[..., None], torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()
    reward, mask = f64([[0.0, -math.inf, math.nan], [-math.inf, -math.inf, 0.0]]), torch.ones(2, 3, 1)
    # P = 0 for one response: t = inf; Z = 0 in the second group: no advantage at all
    for name, want in (("fdpg_forward", 0.0), ("fdpg_js", -math.log(2)), ("fdpg_tv", -0.5), ("fdpg_reverse", -21.0)):
        out = getattr(divergences, name)(reward, lp, lp, lp, mask, real)
        assert out.isfinite().all() and not out[~real].any() and not out[1].any()
        close(out[0, 1], f64(want), 1e-8)
    # reverse KL: 1/beta times r - beta (log pi - log pi_ref), but for a constant of the group
    lp, ref = f64([[[-1.0], [-2.0]]]), f64([[[-1.5], [-1.0]]])
    r = f64([[1.0, 0.2]])
    a = divergences.fdpg_reverse(r, lp, ref, lp, torch.ones(1, 2, 1), torch.ones(1, 2), beta=0.1)
    regularised = (r - 0.1 * (lp - ref)[..., 0]) / 0.1
    close(a - regularised, (a - regularised)[:, :1].expand(1, 2))
    # DPG: sampled by pi itself, the weight p / pi
    forward = divergences.fdpg_forward(r, lp, ref, lp, torch.ones(1, 2, 1), torch.ones(1, 2), beta=0.1)
    weight = (ref[..., 0] + r / 0.1 - lp[..., 0]).exp()
    close(forward, weight / weight.mean())


def test_forward_covers_reverse_commits():
    """Unimodal family, bimodal target: forward KL spreads over both modes, reverse KL takes one."""
    x = torch.arange(40, dtype=torch.float64)
    target = torch.logaddexp(-(x - 10) ** 2 / 8, -(x - 30) ** 2 / 8).log_softmax(-1)
    ends = {}
    for name, baseline in (("fdpg_forward", 1.0), ("fdpg_reverse", -1.0)):
        where, width = f64(14.0).requires_grad_(), f64(1.0).requires_grad_()
        optimiser = torch.optim.Adam([where, width], lr=0.1)
        for _ in range(300):
            logp = (-((x - where) / width.exp()) ** 2 / 2).log_softmax(-1)
            group = one_group(logp, target, torch.full_like(logp, -math.log(40)))
            a = getattr(divergences, name)(torch.zeros(1, 40), *group, torch.ones(1, 40, 1), torch.ones(1, 40).bool(),
                                           baseline=baseline)
            optimiser.zero_grad()
            (-(logp.exp() * a[0]).sum()).backward()
            optimiser.step()
        logp = logp.detach()
        ends[name] = float(kl(target, logp)), float(kl(logp, target)), float(-(logp.exp() * logp).sum())
    forward, reverse = ends["fdpg_forward"], ends["fdpg_reverse"]
    assert forward[0] < reverse[0] / 2 and reverse[1] < forward[1] / 2 and forward[2] > reverse[2] + 1


# ------------------------------------------------------------------ TRL's own code
TRL = {
    "grpo": dict(loss_type="grpo"), "bnpo": dict(loss_type="bnpo"), "dr_grpo": dict(loss_type="dr_grpo"),
    "dapo": dict(loss_type="dapo", epsilon_high=0.28), "delta": dict(loss_type="grpo", delta=1.4),
    "cispo": dict(loss_type="cispo", epsilon_high=1.3), "sapo": dict(loss_type="sapo"),
    "gspo": dict(loss_type="grpo", level="sequence", epsilon_low=0.05, epsilon_high=0.06),
    "kl": dict(loss_type="dapo", beta=0.3), "kl off policy": dict(loss_type="dapo", beta=0.3, use_bias_correction_kl=True),
    "weights": dict(loss_type="grpo", weights=True), "weights masked": dict(loss_type="dapo", weights=True, cap="mask"),
}


def trl_loss(c, *, loss_type, level="token", beta=0.0, epsilon_low=0.2, epsilon_high=0.2, delta=None,
             use_bias_correction_kl=False, weights=False, cap="truncate"):
    from trl import GRPOTrainer
    ratio = torch.where(c["mask"], (c["logp_old"] - c["logp_rollout"]).exp(), 1.0)
    ratio = ratio.clamp(max=1.2) if cap == "truncate" else ratio.masked_fill(ratio > 1.2, 0.0)
    args = SimpleNamespace(delta=delta, use_bias_correction_kl=use_bias_correction_kl, sapo_temperature_pos=1.0,
                           sapo_temperature_neg=1.05, steps_per_generation=1)
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    for name, value in dict(
            args=args, model=SimpleNamespace(training=True), aux_loss_enabled=False, top_entropy_quantile=1.0, beta=beta,
            off_policy_mask_threshold=None,
            importance_sampling_level=level, loss_type=loss_type, epsilon_low=epsilon_low, epsilon_high=epsilon_high,
            use_vllm=weights, vllm_importance_sampling_correction=weights, current_gradient_accumulation_steps=1,
            max_completion_length=9, _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
            accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x)).items():
        setattr(trainer, name, value)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (c["logp"], torch.zeros_like(c["logp"]), None)
    ids, mask = torch.zeros(len(c["mask"]), T, dtype=torch.long), c["mask"].double()
    inputs = dict(prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=mask, advantages=c["advantage"],
                  old_per_token_logps=c["logp_old"], ref_per_token_logps=c["logp_ref"], num_items_in_batch=mask.sum(),
                  importance_sampling_ratio=ratio)
    return trainer._compute_loss(None, inputs)


def our_loss(c, *, loss_type, level="token", beta=0.0, epsilon_low=0.2, epsilon_high=0.2, delta=None,
             use_bias_correction_kl=False, weights=False, cap="truncate"):
    ratio = {"token": ratios.token, "sequence": ratios.sequence}[level]
    bounds = dict(low=epsilon_low, high=epsilon_high)
    clipping = partial(C.clip, **bounds) if delta is None else partial(C.capped, **bounds, delta=delta)
    surrogate = {"cispo": partial(C.truncate, high=epsilon_high - 1), "sapo": C.soft_gate}.get(loss_type, clipping)
    reduce = {"grpo": reductions.sequence_mean, "sapo": reductions.sequence_mean,
              "dr_grpo": partial(reductions.fixed_length, length=9)}.get(loss_type, reductions.term_mean)
    c = {**c, "log_ratio": bind(ratio, c)}
    j = bind(surrogate, c)
    if weights:
        correction = partial(corrections.truncated, cap=1.2) if cap == "truncate" else partial(corrections.masked_ratio, high=1.2)
        j = j * bind(correction, c)
    if beta:
        j = j - beta * bind(penalties.k3_reverse if use_bias_correction_kl else penalties.k3, c)
    return -(reduce(c["mask"].double()[None])[0] * j).sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRL)
def test_same_as_trl(name):
    pytest.importorskip("trl")
    for seed in range(2):
        c = columns(seed)
        keep = c["mask"].any(-1)                              # TRL counts empty responses in its means
        c = {k: v[keep] for k, v in c.items()}
        ours, theirs = (value_and_gradient(partial(f, **TRL[name]), c) for f in (our_loss, trl_loss))
        tolerance = 1e-6 if name == "sapo" else 1e-10         # TRL keeps the temperatures in float32
        close(ours[0], theirs[0], tolerance)
        close(ours[1], theirs[1], tolerance)
        assert ours[1].any()
