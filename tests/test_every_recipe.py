"""Laws of every recipe, on columns: what must not matter does not, and what must happen happens."""
import inspect
import math

import pytest
import torch
import torch.multiprocessing
from columns_for_tests import (
    LISTS,
    OFF_POLICY,
    ON_POLICY,
    POLICY,
    SETTINGS,
    TOKEN_COLUMNS,
    close,
    columns_for,
    objective_for,
    outcome,
    ready,
    take,
)
from two_processes import SHARES, work

from data_tools import Batch
from prefopt import recipes

EVERY = pytest.mark.parametrize("name", recipes.__all__)
LABEL = {n: "reward" if n in ON_POLICY else "relevance" for n in recipes.__all__}
REFERENCE = [n for n in OFF_POLICY if "logp_ref" in objective_for(n).reads()]


# ------------------------------------------------------------------------------------------- what must not matter
@EVERY
def test_order_of_rows_and_groups(name):
    columns = columns_for(name)
    value, gradients = outcome(objective_for(name), columns)
    g = torch.Generator().manual_seed(1)
    order = torch.randperm(len(columns["group"]), generator=g)
    moved = take(columns, order)
    new_ids = {int(i): j for i, j in zip(columns["group"].unique(), torch.randperm(99, generator=g) - 50, strict=False)}
    moved["group"] = torch.tensor([int(new_ids[int(i)]) for i in moved["group"]])
    value_moved, gradients_moved = outcome(objective_for(name), moved)
    close(value_moved, value)
    for key, gradient in gradients.items():
        close(gradients_moved[key], gradient[order] if key in POLICY else gradient)


@EVERY
@pytest.mark.parametrize("left, right", [(0, 3), (2, 1)])
def test_padding(name, left, right):
    """More padding, on either side, holding inf and NaN."""
    columns = columns_for(name)
    tokens = columns["mask"].shape[1]
    holes = ~columns["mask"]
    junk = dict(zip(TOKEN_COLUMNS, [math.nan, math.inf, -math.inf] * 9, strict=False))

    def pad(key, x):
        if key not in (*TOKEN_COLUMNS, "mask"):
            return x
        fill = junk.get(key, False)
        x = x.clone()
        x[holes] = fill
        sides = [torch.full((len(x), n, *x.shape[2:]), fill, dtype=x.dtype) for n in (left, right)]
        return torch.cat([sides[0], x, sides[1]], 1)

    value, gradients = outcome(objective_for(name), columns)
    value_padded, padded = outcome(objective_for(name), {k: pad(k, v) for k, v in columns.items()})
    close(value_padded, value)
    for key, gradient in gradients.items():
        if key in TOKEN_COLUMNS:
            assert not padded[key][:, :left].any() and not padded[key][:, left + tokens:].any()
            padded[key] = padded[key][:, left:left + tokens]
        close(padded[key], gradient)


@EVERY
def test_micro_batches(name):
    """Any split of an annotated step into micro-batches adds up to the whole step."""
    columns = columns_for(name)
    value, gradients = outcome(objective_for(name), columns)
    groups = Batch(columns).groups
    objective = objective_for(name)
    size = columns["mask"].sum(1)
    size = torch.bincount(Batch(columns).index, size.double()) if objective.whole_groups else size
    splits = {"1+rest": lambda b: b.split([1, groups - 1]), "2+2+rest": lambda b: b.split([2, 2, groups - 4]),
              "by tokens": lambda b: b.microbatches(int(size.max()), objective.whole_groups)}
    for split in splits.values():
        value_split, gradients_split = outcome(objective_for(name), columns, split)
        close(value_split, value)
        for key, gradient in gradients.items():
            close(gradients_split[key], gradient)


def test_two_processes(tmp_path):
    """Groups split unevenly over two processes: gradients add up to those of one process, for every recipe."""
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    for name in recipes.__all__:
        value, gradients = outcome(objective_for(name), columns_for(name))
        for i, sizes in enumerate(SHARES):
            for key, gradient in {"value": value, **gradients}.items():
                same = torch.allclose(found[name, i][key], gradient, rtol=1e-12, atol=1e-12)
                assert same, f"{name}: {key} of {sizes} groups on two processes differs from one process"


@EVERY
def test_types_of_labels(name):
    """mask bool, int or float; relevance float32, float64 or (where labels are whole numbers) int; rewards float32."""
    columns = columns_for(name)
    if name in ON_POLICY:
        columns["reward"] = (columns["reward"] * 8).round() / 8
    elif columns["relevance"].remainder(1).nansum() > 0:        # graded labels: as whole numbers, in the same order
        columns["relevance"] = (columns["relevance"] * (8 if name in LISTS else 24)).round()
    expected = outcome(objective_for(name), columns)
    variants = [{"mask": columns["mask"].long()}, {"mask": columns["mask"].float()}, {"mask": columns["mask"].double()},
                {LABEL[name]: columns[LABEL[name]].float()}, {"group": columns["group"].int()}]
    if not columns[LABEL[name]].isnan().any():
        variants.append({"relevance": columns["relevance"].long()})
    for change in variants:
        value, gradients = outcome(objective_for(name), {**columns, **change})
        assert value.dtype == torch.float64
        close(value, expected[0])
        close(gradients["logp"], expected[1]["logp"])


@EVERY
def test_half_precision_columns_give_float32_maths(name):
    columns = columns_for(name)
    small = {k: v.bfloat16() if v.dtype == torch.float64 and k != LABEL[name] else v for k, v in columns.items()}
    large = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in small.items()}
    value, value_large = (outcome(objective_for(name), c)[0] for c in (small, large))
    assert value.dtype == value_large.dtype
    torch.testing.assert_close(value, value_large, rtol=1e-6, atol=1e-7)


@EVERY
def test_the_batch_is_left_alone(name):
    columns = columns_for(name)
    batch = Batch({k: v.clone() for k, v in columns.items()})
    objective = objective_for(name)
    annotated = objective.annotate(batch)
    first, second = objective.loss(annotated), objective.loss(annotated)
    assert set(batch) == set(columns) and set(annotated) > set(batch)
    assert all(torch.equal(batch[k].nan_to_num(), v.nan_to_num()) for k, v in columns.items())
    assert torch.equal(first.value, second.value)
    assert not any(v.requires_grad for v in first.metrics.values())


# ------------------------------------------------------------------------------------------- what must happen
def pairs_of(columns):
    """(b, w, l) of every labelled pair, and how many pairs each group has."""
    index, relevance = Batch(columns).index, columns["relevance"]
    n = len(index)
    pairs = [(int(index[w]), w, j) for w in range(n) for j in range(n)
             if index[w] == index[j] and relevance[w] > relevance[j]]
    return pairs, torch.bincount(torch.tensor([b for b, _, _ in pairs]), minlength=int(index.max()) + 1)


def over_pairs(columns, each):
    """Mean over a group's pairs, then over groups that have any."""
    pairs, count = pairs_of(columns)
    return sum(each(w, j) / int(count[b]) for b, w, j in pairs) / int((count > 0).sum())


def over_lists(columns, each):
    index = Batch(columns).index
    lists = [each(columns["relevance"][index == b]) for b in range(int(index.max()) + 1)]
    return sum(lists) / len(lists)


def sums(columns, key="logp_ref"):
    return (columns[key] * columns["mask"]).sum(1)


def nll(columns, per_token=False):
    """-log-likelihood of the best response (of the best ones, where they tie), mean over groups."""
    index, lp, y = Batch(columns).index, sums(columns), columns["relevance"]
    if per_token:
        lp = lp / columns["mask"].sum(1).clamp(min=1)
    groups = [index == b for b in range(int(index.max()) + 1)]
    return -sum(lp[g & (y == y[g].max())].mean() for g in groups) / len(groups)


def l1_norms(columns):
    """The L1 norm of `TokenMask` of `objective_for` over the compared responses, for both masks, mean over groups."""
    masks = [m(columns["states_ref"], columns["mask"]).sum() for m in objective_for("sparsepo_independent").modules()]
    return [float(m.detach()) / Batch(columns).groups for m in masks]


def gain_at_ties(columns):
    """Sum of LiPO-lambda's weights where all scores are equal: a row's rank is its place in the group."""
    batch, total = Batch(columns), 0.0
    for _, w, j in pairs_of(columns)[0]:
        gains = 2 ** columns["relevance"][w] - 2 ** columns["relevance"][j]
        total += float(gains * abs(1 / math.log2(2 + batch.slot[w]) - 1 / math.log2(2 + batch.slot[j])))
    return total / batch.groups


def in_context_weight(y, position):
    return (2 ** y - 1) / torch.log2(1 + position)


def over_unordered(columns, each):
    """Mean over pairs of a group's rows, whatever their labels, then over groups that have any."""
    index = Batch(columns).index
    found = [[each(i, j) for i in range(len(index)) for j in range(i) if index[i] == index[j] == b]
             for b in range(int(index.max()) + 1)]
    found = [sum(x) / len(x) for x in found if x]
    return sum(found) / len(found)


def over_rows(columns, each, counted=None):
    """Mean over a group's rows that count, then over groups that have any."""
    index = Batch(columns).index
    some = torch.ones(len(index), dtype=torch.bool) if counted is None else counted
    found = [[float(each(i)) for i in range(len(index)) if index[i] == b and some[i]] for b in range(int(index.max()) + 1)]
    found = [sum(x) / len(x) for x in found if x]
    return sum(found) / len(found)


LOG2 = math.log(2)
# the text of a docstring's line "At policy = reference: ..." -> its value, from the columns and the settings s
CONSTANTS = {
    "log 2": lambda c, s: LOG2,
    "2 log 2": lambda c, s: 2 * LOG2,
    "1": lambda c, s: 1.0,
    "1 / (4 tau^2)": lambda c, s: 1 / (4 * s["tau"] ** 2),
    "1 / (2 beta^2)": lambda c, s: 1 / (2 * s["beta"] ** 2),
    "(1 + log 2) / 2": lambda c, s: (1 + LOG2) / 2,
    "log(1/2) - log((1 - eps) eps) / 2":
        lambda c, s: math.log(0.5) - math.log((1 - s["label_smoothing"]) * s["label_smoothing"]) / 2,
    "log(1 + exp(beta (gamma - 1) (lr_w - lr_l)))": lambda c, s: over_pairs(
        c, lambda w, j: math.log1p(math.exp(s["beta"] * (s["gamma"] - 1) * (sums(c)[w] - sums(c)[j])))),
    "log(1 + exp(beta max(0, lr_l - lr_w)))": lambda c, s: over_pairs(
        c, lambda w, j: math.log1p(math.exp(s["beta"] * max(0, sums(c)[j] - sums(c)[w])))),
    "log 2 - eta beta lp_w": lambda c, s: LOG2 + s["eta"] * s["beta"] * nll(c),
    "log 2 - alpha lp_w / |y_w|": lambda c, s: LOG2 + s["alpha"] * nll(c, per_token=True),
    "log 2 plus the bc term": lambda c, s: LOG2 - s["bc"] * sums(c).sum() / c["mask"].sum(),
    "log 2 times the mean of u_w u_l": lambda c, s: LOG2 * over_pairs(c, lambda w, j: math.exp(
        sum(((c["logp"] - c["collision"]) * c["mask"]).sum(1)[i] / max(1, int(c["mask"][i].sum())) for i in (w, j)))),
    "mean of lambda / 2": lambda c, s: sum(s["desirable" if y > 0.5 else "undesirable"] for y in c["relevance"])
    / len(c["relevance"]) / 2,
    "log 2 times the pairs of a list": lambda c, s: LOG2 * len(pairs_of(c)[0]) / Batch(c).groups,
    "the pairs of a list": lambda c, s: len(pairs_of(c)[0]) / Batch(c).groups,
    "log 2 times the sum of D over the pairs of a list": lambda c, s: LOG2 * gain_at_ties(c),
    "log K! without ties": lambda c, s: over_lists(c, lambda y: math.lgamma(len(y) + 1)),
    "log K": lambda c, s: over_lists(c, lambda y: math.log(len(y))),
    "the variance of the rewards, times k": lambda c, s: over_lists(c, lambda y: float(len(y) * y.var() if len(y) > 1 else 0)),
    "sum of psi^2": lambda c, s: over_lists(c, lambda y: float((y ** 2).sum())),
    "K log 2": lambda c, s: over_lists(c, lambda y: len(y) * LOG2),
    "log 2 times the mean of (2^y_i - 1)/log2(1 + p_i)": lambda c, s: LOG2 * sum(
        float(in_context_weight(c["relevance"], c["position"])[Batch(c).index == b].mean())
        for b in range(Batch(c).groups) if (Batch(c).index == b).sum() > 1) / Batch(c).groups,
    "log 2 (1 + intra + inter)": lambda c, s: LOG2 * (1 + s["intra"] + s["inter"]),
    "log 2 plus the L1 term": lambda c, s: LOG2 + (s["l1_reward"] + s["l1_kl"]) / 2 * l1_norms(c)[0],
    "log 2 plus the L1 terms":
        lambda c, s: LOG2 + s["l1_reward"] * l1_norms(c)[0] + s["l1_kl"] * l1_norms(c)[1],
    "log 2 - gamma lp_z": lambda c, s: LOG2 - s["gamma"] * float(sums(c)[c["rationale"]].sum()) / Batch(c).groups,
    "log 2 - log sigmoid(gamma lp_z)": lambda c, s: LOG2 + float(
        torch.log1p(torch.exp(-s["gamma"] * sums(c)[c["rationale"]])).sum()) / Batch(c).groups,
    "1 / (4 beta^2)": lambda c, s: 1 / (4 * s["beta"] ** 2),
    "the mean over pairs of ((q_1 - q_2) / beta)^2": lambda c, s: over_unordered(
        c, lambda i, j: float((c["reward"][i] - c["reward"][j]) / s["beta"]) ** 2),
    "the mean of ((q - 1/2) / beta)^2": lambda c, s: over_rows(c, lambda i: ((c["reward"][i] - 0.5) / s["beta"]) ** 2),
    "the mean of (s / beta)^2": lambda c, s: over_rows(
        c, lambda i: (c["reward"][i] / s["beta"]).clamp(-s["limit"], s["limit"]) ** 2),
    "the mean over pairs of (s_12 / beta)^2": lambda c, s: s["limit"] ** 2,       # hard labels: the log-odds are infinite
    "log 2 + alpha lp_ref": lambda c, s: LOG2 + s["alpha"] * over_rows(c, lambda i: sums(c)[i], c["from_reference"]),
    "log 2 + 2 gamma log M": lambda c, s: LOG2 + 2 * s["gamma"] * math.log(s["degrees"]),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_constant_at_policy_equal_to_reference(name):
    lines = [x.strip() for x in getattr(recipes, name).__doc__.splitlines() if "At policy = " in x]
    assert len(lines) == 1, f"the docstring of {name} must say its value 'At policy = reference: ...'"
    constant = CONSTANTS[lines[0].split(": ", 1)[1]]
    columns = columns_for(name)
    columns["logp"] = columns["logp_ref"]
    columns.update({k: columns["logp_ref"] for k in ("logp_old",) if k in columns})
    columns["token_kl"] = torch.zeros_like(columns["token_kl"])
    columns["mismatched"] = torch.zeros_like(columns["mismatched"])
    settings = {k: p.default for k, p in inspect.signature(getattr(recipes, name)).parameters.items()}
    value, _ = outcome(objective_for(name), columns)
    close(float(value), float(constant(columns, {**settings, **SETTINGS.get(name, {})})), 1e-9)


@EVERY
@pytest.mark.parametrize("worst", ["chosen", "rejected", "all"])
def test_finite_at_extremes(name, worst):
    """log-probabilities of -1e4 per token, in float32, on the better, the worse, or all responses; a moderate reference."""
    columns = columns_for(name, dtype=torch.float32)
    label = columns[LABEL[name]].nan_to_num()
    rows = {"chosen": label > label.median(), "rejected": label <= label.median(),
            "all": torch.ones_like(columns["group"], dtype=torch.bool)}[worst]
    columns["logp"][rows] = -1e4
    value, gradients = outcome(objective_for(name), columns)
    assert value.isfinite(), value
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("name", [n for n in recipes.__all__ if objective_for(n).modules()])
def test_modules_learn(name):
    _, gradients = outcome(objective_for(name), columns_for(name))
    for key, gradient in gradients.items():
        if key not in POLICY:
            assert gradient.abs().sum() > 0, f"{key} gets no gradient"


ARMS = 10
# at its default tau DiscoPOP first lowers the margin (test_identities: its slope at margin 0 is positive)
LEARNS = {"discopop": dict(tau=1.0)}


def bandit(name, theta, reward):
    """All pairs of ten arms, or lists of four, labelled by the reward; the policy is softmax(theta), one token long."""
    g = torch.Generator().manual_seed(0)
    if name in LISTS or name == "trpa":
        arms = torch.cat([torch.randperm(ARMS, generator=g)[:4] for _ in range(30)])
        size = 4
    else:
        arms = torch.combinations(torch.arange(ARMS)).flatten()
        size = 2
    groups = arms.view(-1, size)
    rank = (reward[groups][:, :, None] > reward[groups][:, None, :]).sum(-1)
    relevance = (rank - 4 if name == "trpa" else rank / (size - 1)).double().flatten()
    logp = theta.log_softmax(0)
    n, one = len(arms), torch.ones(len(arms), 1, dtype=torch.float64)
    kl = -(logp - math.log(1 / ARMS)).mean()                  # KL(uniform reference || policy)
    return {"logp": logp[arms][:, None], "logp_ref": math.log(1 / ARMS) * one, "mask": one.bool(), "token_kl": kl * one,
            "group": torch.arange(n) // size, "relevance": relevance, "reward": reward[arms], "activation_mask": one,
            "collision": (2 * logp).logsumexp(0) * one, "mismatched": torch.zeros(n).double(),
            "position": torch.arange(n) % size + 1, "states_ref": torch.ones(n, 1, 2, 3).double(),
            "last_state": theta[arms][:, None] * torch.tensor([1.0, 0.0, 0.0]), "segment": 0 * one,
            "rationale": torch.zeros(n).bool(), "online": torch.zeros(n).bool(), "from_reference": torch.arange(n) % size == 0,
            "level": torch.zeros(n).long(), "contrast": torch.zeros(n).long(), "degree": -torch.ones(n).long(),
            "side": -torch.ones(n).long(), "token_reward": theta[arms][:, None], "step_label": relevance[:, None],
            "outputs": torch.stack([theta[arms], one[:, 0]] * 2, 1), "rewards": reward[arms][:, None].expand(n, 4),
            "prompt_state": torch.zeros(n, 3).double()}


def sampled_bandit(name, theta, reward, draw: int):
    """Groups of four arms that the policy itself draws, with the greedy arm as a probe."""
    g = torch.Generator().manual_seed(draw)
    logp = theta.log_softmax(0)
    arms = torch.multinomial(logp.detach().exp().expand(100, -1), 4, replacement=True, generator=g)
    arms = torch.cat([arms, theta.detach().argmax().expand(100, 1)], 1).flatten()
    n, lp = len(arms), logp[arms][:, None]
    old, one = lp.detach(), torch.ones(n, 1, dtype=torch.float64)
    paid = reward.sigmoid()[arms]
    return {"logp": lp, "logp_old": old, "logp_rollout": old, "logp_ref": math.log(1 / ARMS) * one, "mask": one.bool(),
            "group": torch.arange(n) // 5, "train": torch.arange(n) % 5 < 4, "reward": paid, "step_reward": paid[:, None],
            "value": 0 * one, "value_old": 0 * one, "finished": one[:, 0].bool()}


@EVERY
def test_a_bandit_improves(name):
    """Plain gradient descent on pairs from a reward, or on samples, raises the expected reward of a tabular policy."""
    reward = torch.randn(ARMS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    theta = torch.zeros(ARMS, dtype=torch.float64, requires_grad=True)
    objective, rate = ready(getattr(recipes, name)(**LEARNS.get(name, {}))), None
    expected = [float(reward.mean())]
    for step in range(8):
        columns = sampled_bandit(name, theta, reward, step) if name in ON_POLICY else bandit(name, theta, reward)
        objective.loss(objective.annotate(Batch(columns))).value.backward()
        with torch.no_grad():
            rate = rate or 0.1 / float(theta.grad.abs().max())            # the first step moves one logit by 0.1
            theta -= rate * theta.grad
        theta.grad = None
        expected.append(float(theta.detach().softmax(0) @ reward))
    assert expected[1] > expected[0], expected
    assert expected[-1] > expected[0] + 0.02, expected


# ------------------------------------------------------------------------------------------- arguments and docstrings
ARGUMENTS = [(n, a) for n in recipes.__all__ for a in inspect.signature(getattr(recipes, n)).parameters]
REJECTED = {                                                  # besides text, which every argument rejects
    "beta": [0.0, -0.1, math.nan, True], "tau": [0.0, -1.0], "label_smoothing": [0.5, -0.1], "flip": [0.5, 0.7, -0.1],
    "bias": [0.0, 1.5], "delta": [0.0], "scale": [0.0], "factor": [0.0], "weight": [-0.1], "bc": [-0.1], "sft": [-0.1],
    "eta": [-0.1], "kl": [-0.1], "kappa": [-0.1], "intra": [-1.0], "inter": [-1.0], "desirable": [-1.0],
    "undesirable": [-1.0],
    "l1_reward": [-0.1], "l1_kl": [-0.1], "dropout": [1.5], "every": [0], "degrees": [0], "target": [-0.1],
    "centring": [-0.1], "nu": [0.0], "levels": [1, 2.0], "tie": [-0.1], "entropy": [-0.1], "least": [0.0], "dim": [0, 3, 2.0],
    "aspects": [0, True], "omega": [-0.1], "pair": [-0.1], "amplification": [0.0], "smooth": [0.0]}
POSITIVE, NOT_NEGATIVE = [0.0, -0.1, math.nan, True], [-0.1, math.nan, True]
REJECTED_ON_POLICY = {
    **dict.fromkeys(("floor", "norm", "tau_positive", "tau_negative", "value_clip", "horizon"), POSITIVE),
    **dict.fromkeys(("low", "high", "beta", "eps", "coef", "start", "value_weight"), NOT_NEGATIVE),
    **dict.fromkeys(("gamma", "lam"), [-0.1, 1.1, math.nan, True]), **dict.fromkeys(("threshold", "most"), [math.nan, True]),
    "length": [0, 2.5]}
OWN = {("exo", "label_smoothing"): [0.0], ("ld_dpo", "alpha"): [-0.1, 1.1], ("tr_dpo", "alpha"): [0.0, 1.1],
       ("dice", "alpha"): [-0.1], ("love", "desirable"): [0.0], ("love", "undesirable"): [0.0],
       ("cpl", "alpha"): [0.0], ("cpl_kl", "alpha"): [0.0], ("rpo_mean", "alpha"): [-1.0], ("rso", "gamma"): [0.0],
       ("rso_hinge", "gamma"): [0.0], ("rso_hinge_norm", "gamma"): [0.0], ("rationale", "gamma"): [-1.0],
       ("rationale_released", "gamma"): [-1.0], ("spo_degree", "gamma"): [-1.0],
       ("tool_augmented", "alpha"): [-0.1], ("tool_augmented", "beta"): [-0.1], ("dapo", "limit"): [1, 2.5],
       ("dapo", "buffer"): [0, -3], ("bnpo", "least"): [1.0, 2.0], ("clip_cov", "least"): [5.0, 6.0],
       ("kl_cov", "share"): [-0.1], ("clip_cov", "share"): [-0.1], ("ppo_adaptive", "target"): [0.0], ("fdpg", "beta"): [0.0]}
OWN |= {(n, a): REJECTED_ON_POLICY[a] for n in ON_POLICY for a in inspect.signature(getattr(recipes, n)).parameters
        if a in REJECTED_ON_POLICY and (n, a) not in OWN}


@pytest.mark.parametrize("name, argument", ARGUMENTS)
def test_arguments_are_checked(name, argument):
    shared = name not in ON_POLICY and (name, argument) != ("tool_augmented", "beta")                     # a weight there
    for value in ["1e-1", *(REJECTED.get(argument, []) if shared else []), *OWN.get((name, argument), [])]:
        with pytest.raises(ValueError, match=f"^{argument} must be"):
            getattr(recipes, name)(**{argument: value})


@EVERY
def test_docstring(name):
    doc = inspect.getdoc(getattr(recipes, name))
    head, equation = doc.split("\n\n")[:2]
    assert head.strip().endswith((".", ")")) and "\n\n" not in head
    assert "=" in equation or "<-" in equation, "the second paragraph is the equation"
    assert "Reference   " in doc


def test_every_recipe_is_found():
    assert recipes.__all__ == sorted(recipes.__all__)
    assert all(recipes.find(n) is getattr(recipes, n) for n in recipes.__all__)
    with pytest.raises(ValueError, match="did you mean 'ipo_summed'"):
        recipes.find("ipo_sumed")
