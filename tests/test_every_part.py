"""Laws of every part of every slot module, found by introspection of `__all__`."""
import doctest
import importlib
import inspect
import math

import pytest
import torch
from columns_for_tests import close

from data_tools.columns import COLUMNS
from prefopt.parts import columns_read, hyperparameters, kind

SLOTS = ["scores", "masks", "margins", "label_rules", "pairwise", "pointwise", "listwise", "pair_weights", "regularisers",
         "reductions", "annotations", "shaping", "keeps", "advantages", "divergences", "token_rewards", "credits", "normalisers",
         "ratios", "surrogates", "token_weights", "accepts", "corrections", "selections", "penalties", "critics"]
# these see rows (N, ...), the others groups (B, K, ...); parts of tokens see either
ROW_SLOTS = {"scores", "masks", "ratios", "surrogates", "token_weights", "corrections", "penalties", "critics"}
HOMES = {f"{slot}.{name}": (slot, name) for slot in SLOTS for name in importlib.import_module(f"prefopt.{slot}").__all__}
EVERY = pytest.mark.parametrize("key", HOMES)

REQUIRED = {"overlong": dict(limit=6, buffer=4), "clipped": dict(low=0.2, high=0.7), "share_between": dict(low=0.2, high=0.7),
            "fixed_length": dict(length=7), "fixed_total": dict(length=7), "AdaptiveEntropy": dict(target=1.0),
            "covariance_top": dict(share=0.1), "covariance_band": dict(share=0.1, low=0.1), "shifted": dict(gamma=0.3),
            "squared": dict(goal=0.7), "squared_goal": dict(goal=0.7),
            "smooth": dict(label_smoothing=0.2), "unflip": dict(flip=0.2), "Thresholds": dict(levels=6)}
PAIRS = {"match_margins", "match_scores"}                     # groups of two
CONTROLLERS = ("AdaptiveKL", "AdaptiveEntropy")
B, K, T, D, L = 3, 4, 6, 5, 2                                 # all different, so that an axis is known by its size
CARRIES_GRADIENT = {"logp", "score", "margin", "token_kl", "reward_mask", "kl_mask", "last_state", "outputs", "prompt_state",
                    "token_reward", "embedding", "gate", "grade_logits", "log_ratio", "value", "entropy"}
TOKENS = {"logp", "logp_ref", "logp_old", "collision", "token_kl", "activation_mask", "reward_mask", "kl_mask", "states_ref",
          "token_reward", "step_label", "logp_now", "logp_rollout", "value", "value_old", "returns", "entropy", "noise",
          "step_reward", "reward_at", "log_ratio", "advantage"}
SLOTTED = {"score", "relevance", "reward", "mismatched", "position", "transported", "wins", "rewards",
           "grade_logits"}
# the value is not what is differentiated, by definition
SURROGATE = {"online_kl", "aot_unpaired", "linearised", "sequence_token", "truncate", "k1_score", "k3_straight"}


def every(condition):
    return pytest.mark.parametrize("key", [key for key in HOMES if condition(key)])


def is_row_part(key: str) -> bool:
    return HOMES[key][0] in ROW_SLOTS and HOMES[key][1] not in ("DegreeHead", *CONTROLLERS)


def part_of(key: str):
    """The part, ready to be called: hyperparameters without a default given, classes made, modules set up alike."""
    slot, name = HOMES[key]
    part = getattr(importlib.import_module(f"prefopt.{slot}"), name)
    if not inspect.isclass(part):
        given = REQUIRED.get(name, {})
        return (lambda *x: part(*x, **given)), part
    made = part(**REQUIRED.get(name, {}))
    if isinstance(made, torch.nn.Module):
        torch.manual_seed(0)
        made.setup(layers=L, width=D)
        made.double()
    return made, made


def inputs(key: str, *, seed=0, dtype=torch.float64, b=B, k=K, t=T, full=False) -> list[torch.Tensor]:
    """Random columns in the order that the part reads them; the last slot of group 0 is empty unless `full`."""
    g = torch.Generator().manual_seed(seed)
    if HOMES[key][1] in PAIRS:
        k, full = 2, True
    lead = (b * k,) if is_row_part(key) else (b, k)

    def uniform(*shape):
        return torch.rand(*lead, *shape, generator=g, dtype=torch.float64)

    real = torch.ones(b, k, dtype=torch.bool)
    mask = torch.rand(*lead, t, generator=g) < 0.7
    if not full and k > 1:
        real[:1, -1] = False
    if not is_row_part(key):
        mask &= real[..., None]
    relevance = torch.rand(b, k, generator=g).argsort(-1).double() / max(k - 1, 1)
    if HOMES[key][0] in ("label_rules", "margins", "pair_weights", "regularisers", "listwise"):
        relevance = relevance * real
    square = (b, k, k)
    wins = torch.rand(square, generator=g, dtype=torch.float64)
    score = 2 * uniform() - 1
    if HOMES[key][1] == "ordinal":
        relevance = (relevance * max(k - 1, 1)).round()
    made = {
        "logp": -3 * uniform(t) - 0.1, "logp_ref": -3 * uniform(t) - 0.1, "logp_old": -3 * uniform(t) - 0.1, "mask": mask,
        "collision": -2 * uniform(t), "token_kl": uniform(t), "activation_mask": uniform(t), "reward_mask": uniform(t) + 0.1,
        "kl_mask": uniform(t) + 0.1, "states_ref": uniform(t, L, D), "last_state": uniform(D), "score": score,
        "margin": score[..., :, None] - score[..., None, :] if score.ndim == 2 else None, "relevance": relevance,
        "reward": uniform(), "mismatched": uniform(), "baseline": uniform(), "real": real,
        "transported": uniform()[..., :1].expand(lead) if len(lead) > 1 else None, "position": (6 * uniform()).long() + 1,
        "wins": torch.where(wins < 0.2, math.nan, wins), "contrast": (3 * uniform()).long() - 1,
        "online": uniform() < 0.6, "from_reference": uniform() < 0.6,
        "rationale": uniform() < 0.6, "degree": (4 * uniform()).long() - 1,
        "shared_length": (t * uniform()).long(), "terms": (torch.rand(square, generator=g) < 0.6).double(),
        "labels": wins, "outputs": 2 * uniform(D) - 1, "prompt_state": uniform(D), "token_reward": 2 * uniform(t) - 1,
        "step_label": torch.where(uniform(t) < 0.5, math.nan, (uniform(t) < 0.5).double()), "embedding": 2 * uniform(6) - 1,
        "gate": uniform(3), "grade_logits": 2 * uniform(D) - 1, "tangent": uniform(2),
        "rewards": torch.where(uniform(D) < 0.3, math.nan, uniform(D)), "logp_now": -3 * uniform(t) - 0.1,
        "logp_rollout": -3 * uniform(t) - 0.1, "value": uniform(t), "value_old": uniform(t), "returns": uniform(t),
        "entropy": uniform(t), "noise": uniform(t), "coefficient": uniform(), "selected": mask & (uniform(t) < 0.4),
        "advantage": (4 * uniform(t) - 2) * mask, "log_ratio": (2 * uniform(t) - 1) * mask, "finished": uniform() < 0.7,
        "response_advantage": 2 * uniform() - 1, "reward_at": uniform(t) * mask, "length": mask.sum(-1),
        "step_reward": torch.where(uniform(t) < 0.5, math.nan, uniform(t)),
        "probe": real & (uniform() < 0.4) if len(lead) > 1 else None}
    read = columns_read(part_of(key)[1])
    return [x.to(dtype) if x.is_floating_point() and name != "terms" else x for name, x in
            ((name, made[name]) for name in read)]


def call(key, values):
    return part_of(key)[0](*values)


def names(key):
    return columns_read(part_of(key)[1])


def reads(*columns):
    return lambda key: bool(set(names(key)) & set(columns))


def slice_real(out, key, values):
    """The entries of the output that belong to slots which hold a row."""
    if "real" not in names(key) or out.ndim < 2:
        return out
    real = values[names(key).index("real")]
    if out.shape[:3] == (*real.shape, real.shape[1]) and kind_of(key) != "Tokens":
        return out[real[:, :, None] & real[:, None, :]]
    return out[real]


def kind_of(key):
    try:
        return kind(part_of(key)[1])
    except TypeError:
        return None


def before(key):
    """Parts that run before the loss, without gradient."""
    return HOMES[key][0] == "annotations" or HOMES[key][1] in CONTROLLERS


def differentiable(key):
    return [i for i, n in enumerate(names(key)) if n in CARRIES_GRADIENT]


def gradients(key, values, chosen=None):
    """Of a fixed random projection of the outputs at real slots, with respect to the columns that may carry gradient."""
    at = differentiable(key) if not before(key) else []
    values = [v.clone().requires_grad_() if i in at else v for i, v in enumerate(values)]
    out = slice_real(call(key, values), key, values)
    if not out.requires_grad:
        return {}
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    (weights * out).sum().backward()
    return {names(key)[i]: values[i].grad for i in at if values[i].grad is not None}


# ---------------------------------------------------------------------------------------------------------- the laws
@EVERY
def test_reads_documented_columns(key):
    assert names(key) and set(names(key)) <= set(COLUMNS)


@EVERY
def test_pure(key):
    values = inputs(key)
    kept = [v.clone() for v in values]
    first, second = call(key, values), call(key, values)
    assert all(torch.equal(v.nan_to_num(7.0), k.nan_to_num(7.0)) for v, k in zip(values, kept, strict=True))
    assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_kept(key, dtype):
    values = inputs(key, dtype=dtype)
    out = call(key, values)
    double = {"group_mean", "group_sum", "term_mean", "ordered", "TokenMask", "DegreeHead", "EigenvalueGate", "RewardHead",
              "Thresholds", "tied"}                                         # weights, and our own modules
    if any(v.dtype == dtype for v in values) and out.is_floating_point():
        assert out.dtype == (torch.float64 if HOMES[key][1] in double else dtype)


@every(lambda key: reads(*TOKENS)(key) and not key.startswith("masks."))
def test_half_precision_tokens_give_float32_maths(key):
    small = inputs(key, dtype=torch.bfloat16)
    out = call(key, small)
    assert out.dtype == (torch.bool if HOMES[key][0] in ("accepts", "selections") else torch.float32)
    close(out, call(key, [v.float() if v.dtype == torch.bfloat16 else v for v in small]), 1e-6)


@every(lambda key: reads("mask")(key) and reads(*TOKENS)(key))
def test_padding_does_not_matter(key):
    """Tokens outside the mask may hold inf and NaN: same value, same gradient, and none of it on padding."""
    values = inputs(key)
    outside = ~values[names(key).index("mask")]
    expected, expected_gradients = call(key, values), gradients(key, values)
    for fill in (math.nan, math.inf, -math.inf):
        junk = [v.clone() for v in values]
        for name, v in zip(names(key), junk, strict=True):
            if name in TOKENS:
                v[outside] = fill
        close(slice_real(call(key, junk), key, junk), slice_real(expected, key, values))
        for name, gradient in gradients(key, junk).items():
            close(gradient, expected_gradients[name])
            assert name not in TOKENS or not gradient[outside].any()


@every(reads("real"))
def test_empty_slots_do_not_matter(key):
    """Slots that hold no row may hold inf and NaN: same value at the others, same gradient, and none of it there."""
    values = inputs(key)
    empty = ~values[names(key).index("real")]
    expected, expected_gradients = slice_real(call(key, values), key, values), gradients(key, values)
    for fill in (math.nan, math.inf, -math.inf):
        junk = [v.clone() for v in values]
        for name, v in zip(names(key), junk, strict=True):
            if name in SLOTTED | TOKENS and v.is_floating_point():
                v[empty] = fill
        close(slice_real(call(key, junk), key, junk), expected)
        for name, gradient in gradients(key, junk).items():
            close(gradient, expected_gradients[name])
            assert not gradient[empty].any()


def permuted(x, order, size, axes):
    for axis in axes:
        if x.ndim > axis and x.shape[axis] == size:
            x = x.index_select(axis, order)
    return x


@EVERY
def test_order_of_responses_and_groups(key):
    values = inputs(key)
    expected = call(key, values)
    if is_row_part(key):
        order = torch.randperm(B * K, generator=torch.Generator().manual_seed(4))
        close(call(key, [v[order] for v in values]), expected[order])
        return
    k = values[0].shape[1]
    for size, axes in ((k, (1, 2)), (B, (0,))):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(4)).roll(1)
        moved = [permuted(v, order, size, axes) for v in values]
        torch.testing.assert_close(call(key, moved), permuted(expected, order, size, axes), rtol=1e-10, atol=1e-10,
                                   equal_nan=True)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", ["-1e4 against -1", "-1 against -1e4", "equal"])
def test_finite_at_extremes(key, extreme, dtype):
    values = inputs(key, dtype=dtype)
    for name, v in zip(names(key), values, strict=True):
        if name in ("logp", "logp_ref", "logp_old", "collision"):
            first = name == "logp" or name == "collision"
            v[:] = -1.0 if extreme == "equal" or (extreme == "-1 against -1e4") == first else -1e4
        if name in ("score", "margin"):
            v.mul_(0.0 if extreme == "equal" else 1e4 * (1 if extreme[:4] == "-1e4" else -1))
    real = slice_real(call(key, values), key, values)
    assert real.isfinite().all()
    for name, gradient in gradients(key, values).items():
        assert gradient.isfinite().all(), name


@every(lambda key: differentiable(key) and not before(key))
def test_gradient(key):
    """The analytic gradient is that of finite differences, wherever there is one."""
    at = differentiable(key)
    values = inputs(key)
    part, _ = part_of(key)
    wrt = [values[i].clone().requires_grad_() for i in at]

    def of(*x):
        full = list(values)
        for i, v in zip(at, x, strict=True):
            full[i] = v
        return part(*full)

    out = of(*wrt)
    if HOMES[key][0] in ("pair_weights", "token_weights"):
        assert not out.requires_grad, "a weight carries no gradient"
    elif HOMES[key][1] not in SURROGATE:
        assert torch.autograd.gradcheck(of, wrt)


@EVERY
@pytest.mark.parametrize("shape", [dict(k=1, full=True), dict(b=0), dict(t=0), dict(b=1, k=1, t=0, full=True)],
                         ids=["groups of one", "no group", "no token", "one empty response"])
def test_degenerate_shapes(key, shape):
    values = inputs(key, **shape)                             # groups of two stay groups of two
    out = call(key, values)
    assert slice_real(out, key, values).isfinite().all()
    assert len(out) == len(values[0])
    for gradient in gradients(key, values).values():
        assert gradient.isfinite().all()


@every(reads("mask"))
def test_empty_responses(key):
    """Rows whose mask is empty: finite, and a score of 0 for scores of sums and means."""
    values = inputs(key)
    values[names(key).index("mask")][:] = False
    assert slice_real(call(key, values), key, values).isfinite().all()
    for gradient in gradients(key, values).values():
        assert gradient.isfinite().all()
    if HOMES[key][0] == "scores" and HOMES[key][1] != "log_odds":
        assert not call(key, values).any()


@EVERY
def test_docstring(key):
    """The template: a headline, an equation, Edge, Reference, and a doctest that can be checked by hand."""
    slot, name = HOMES[key]
    doc = inspect.getdoc(getattr(importlib.import_module(f"prefopt.{slot}"), name))
    head, rest = doc.split("\n\n", 1)
    assert head.endswith(".") or head.endswith(")."), "the headline is a sentence"
    equation = rest.splitlines()[0]
    assert "=" in equation, "the second paragraph is the equation"
    assert "\nEdge" in rest and "\nReference" in rest, "Edge and Reference say what there is to say"
    assert ">>> " in rest, "a doctest"
    documented = rest.split(">>>")[0]
    for argument in hyperparameters(part_of(key)[1]) if slot != "masks" else ():
        assert any(argument in line.split("   ")[0] for line in documented.splitlines()), f"{argument} is not explained"


MODULES = ["prefopt.ops", "prefopt.parts", "prefopt.references", "prefopt.objectives", "prefopt.diagnose",
           "data_tools.columns", "data_tools.batch", *(f"prefopt.{slot}" for slot in SLOTS)]


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    failed, tried = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert not failed
    assert tried or module in ("prefopt.objectives", "data_tools.columns", "data_tools.batch")
