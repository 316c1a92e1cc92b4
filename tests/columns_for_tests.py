"""Random ragged batches with every column that a recipe reads, and what the tests of the maths do with them."""
import inspect
from functools import partial

import torch

from data_tools import Batch
from prefopt import recipes

NAN = float("nan")

# hyperparameters away from their defaults, so that every term of a recipe is in play, and not exact in float32
SETTINGS = {name: dict(beta=0.3) for name in recipes.__all__
            if "beta" in inspect.signature(getattr(recipes, name)).parameters}
for _name, _more in {
    "anyloss": dict(amplification=5.3, beta=1.3), "aot": dict(label_smoothing=0.1),
    "aot_unpaired": dict(label_smoothing=0.2), "bradley_terry": dict(label_smoothing=0.1, target=0.3, centring=0.2),
    "bt_ties": dict(nu=0.7), "dice": dict(alpha=0.7, smooth=0.3), "gaussian": dict(entropy=0.3, least=0.7),
    "general_preference": dict(dim=4, tau=0.3), "gpm_gated": dict(tau=0.3), "love": dict(desirable=1.3, undesirable=0.8),
    "implicit_kto": dict(desirable=1.3, undesirable=0.8), "multi_objective": dict(aspects=3),
    "multi_preference": dict(aspects=3), "ordinal": dict(levels=4, tie=0.3), "cpl": dict(alpha=0.3, bias=0.7, bc=0.3),
    "cpl_kl": dict(alpha=0.3, bias=0.6, bc=0.2), "spo_degree": dict(gamma=0.4), "discopop": dict(tau=0.7),
    "dpo": dict(label_smoothing=0.1), "dpo_alpha": dict(alpha=0.3), "dpo_gamma": dict(gamma=1.4),
    "exo": dict(label_smoothing=0.07), "hypo": dict(kl=0.3), "ipo": dict(tau=0.3), "ipo_summed": dict(tau=0.3),
    "kto": dict(desirable=1.3, undesirable=0.8), "ld_dpo": dict(alpha=0.3), "mapl": dict(intra=0.6, inter=0.7),
    "orpo": dict(weight=0.3), "rationale": dict(gamma=0.07), "rationale_released": dict(gamma=0.07), "rdpo": dict(flip=0.2),
    "rpo": dict(eta=0.4), "rpo_mean": dict(alpha=0.7), "rso": dict(gamma=0.3), "rso_hinge": dict(gamma=0.3),
    "rso_hinge_norm": dict(gamma=0.3), "simpo": dict(gamma_beta_ratio=0.7, label_smoothing=0.1, sft=0.4),
    "slic": dict(delta=2.3, sft=0.3), "smpo": dict(tau=0.7, scale=2.3), "sparsepo": dict(l1_reward=0.02, l1_kl=0.01),
    "sparsepo_independent": dict(l1_reward=0.02, l1_kl=0.01), "trpa": dict(factor=2.3, kappa=0.3),
    "tool_augmented": dict(alpha=0.7, beta=0.3, omega=1.3), "wpo": dict(label_smoothing=0.1),
    "bnpo": dict(low=0.15, high=0.25, floor=1.4, most=2.0), "cispo": dict(low=0.3, high=0.25),
    "kl_cov": dict(share=0.2, coef=0.7),
    "clip_cov": dict(low=0.15, high=0.25, share=0.1, least=0.01, most=0.9), "gmpo": dict(low=0.2, high=0.3),
    "dapo": dict(low=0.15, high=0.25, limit=6, buffer=4, floor=1.4), "dr_grpo": dict(low=0.15, high=0.25, length=7),
    "gpg": dict(norm=0.7), "grpo": dict(low=0.15, high=0.25, eps=0.01), "pass_at_k": dict(low=0.15, high=0.25),
    "gspo": dict(low=0.05, high=0.07), "ppo": dict(low=0.15, high=0.25, gamma=0.9, lam=0.8, value_weight=0.3),
    "ppo_adaptive": dict(start=0.3, target=0.5, gamma=0.9, lam=0.8), "reinforce_plus_plus": dict(low=0.15, gamma=0.9),
    "rejection": dict(threshold=0.6), "rloo": dict(low=0.4, high=0.6), "sapo": dict(tau_positive=1.3, tau_negative=1.7),
}.items():
    SETTINGS[_name] = {**SETTINGS.get(_name, {}), **_more}
LISTS = {"bt_list", "irpo_ranking", "lipo", "lipo_hinge", "lipo_lambda", "lipo_list_mle", "lipo_point_mse", "lipo_point_sigmoid",
         "lipo_softmax", "list_net"}
UNPAIRED = {"anyloss", "bco", "dice", "implicit_ce", "implicit_kto", "kto", "love", "outcome"}
PAIRS_ONLY = {"aot", "aot_unpaired", "apo_zero", "bco_pair", "implicit_nca", "nca", "sppo_hard"}
ON_POLICY = [name for name in recipes.__all__ if not getattr(recipes, name)().whole_groups]
OFF_POLICY = [name for name in recipes.__all__ if name not in ON_POLICY]
# these carry the gradient of a model
POLICY = ("logp", "token_kl", "last_state", "outputs", "token_reward", "prompt_state", "value", "entropy")
TOKEN_COLUMNS = ("logp", "logp_ref", "logp_old", "collision", "token_kl", "activation_mask", "states_ref", "token_reward",
                 "step_label", "segment", "logp_rollout", "logp_now", "value", "value_old", "entropy", "entropy_old",
                 "step_reward", "noise")


def columns(labels: list[list[dict]], *, tokens: int = 6, seed: int = 0, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Columns of the groups whose rows have these labels; rows and group ids in random order, one response empty."""
    g = torch.Generator().manual_seed(seed)
    flat = [(b, row) for b, group in enumerate(labels) for row in group]
    flat = [flat[i] for i in torch.randperm(len(flat), generator=g)]
    n, ids = len(flat), torch.randperm(10 * len(labels), generator=g) - 5 * len(labels)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64).to(dtype)

    def label(name, default, dtype):
        return torch.tensor([row.get(name, default) for _, row in flat], dtype=dtype)

    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (n, 1), generator=g)
    mask &= torch.rand(n, tokens, generator=g) < 0.8           # holes, as tool output has
    mask[:, 0] = True
    mask[next((i for i, (_, row) in enumerate(flat) if row.get("relevance") == 0.0), 0)] = False
    return {
        "logp": -3 * uniform(n, tokens) - 0.05, "logp_ref": -3 * uniform(n, tokens) - 0.05,
        "logp_old": -3 * uniform(n, tokens) - 0.05, "mask": mask, "group": ids[torch.tensor([b for b, _ in flat])],
        "collision": -2 * uniform(n, tokens), "token_kl": uniform(n, tokens), "activation_mask": uniform(n, tokens),
        "states_ref": uniform(n, tokens, 2, 3), "last_state": uniform(n, 3), "mismatched": 2 * uniform(n),
        "reward": uniform(n), "relevance": label("relevance", NAN, dtype), "level": label("level", 0, torch.long),
        "contrast": label("contrast", 0, torch.long), "position": label("position", 1, torch.long),
        "rationale": label("rationale", False, torch.bool), "online": label("online", False, torch.bool),
        "from_reference": label("from_reference", False, torch.bool),
        "degree": label("degree", -1, torch.long), "side": label("side", -1, torch.long),
        "outputs": 4 * uniform(n, 4) - 2, "token_reward": 4 * uniform(n, tokens) - 2, "prompt_state": uniform(n, 3),
        "segment": (4 * uniform(n, tokens)).floor(),
        "step_label": torch.where(uniform(n, tokens) < 0.4, NAN, (uniform(n, tokens) < 0.5).to(dtype)),
        "rewards": torch.where(uniform(n, 4) < 0.3, NAN, uniform(n, 4))}


def pair(**extra) -> list[dict]:
    return [{"relevance": 1.0, **extra}, {"relevance": 0.0, **extra}]


def ranked(k: int) -> list[dict]:
    """Distinct labels in [0, 1], at the positions of a list."""
    return [{"relevance": (k - i - 0.5) / k, "position": i + 1} for i in range(k)]


def labels(name: str) -> list[list[dict]]:
    """Groups that bring every term of the recipe into play."""
    if name in UNPAIRED:
        return [[{"relevance": float(b % 3 > 0)}] for b in range(5)] + [pair()]
    if name in PAIRS_ONLY:
        return [pair() for _ in range(5)]
    if name in LISTS:
        return [ranked(k) for k in (3, 2, 4, 1, 2)]
    if name == "trpa":
        return [[{"relevance": -float(level)} for level in group] for group in ((1, 2, 2, 4), (1, 3), (2, 2), (3, 1, 1))]
    if name == "ordinal":
        return [[{"relevance": float(grade)} for grade in group] for group in ((0, 2), (3,), (1, 1, 0), (2, 3), (1,))]
    if name == "hypo":
        return [pair() + [{"online": True}] * k for k in (2, 0, 3, 1)]
    if name == "xpo":
        return [pair(), *([{"relevance": y, "from_reference": y == best} for y in (1.0, 0.0)] for best in (1.0, 0.0, 1.0))]
    if name in ("rationale", "rationale_released"):
        return [pair() + [{"rationale": True}] * k for k in (1, 0, 1, 1)]
    if name == "spo_degree":
        variants = [{"degree": d, "side": s} for s in (0, 1) for d in range(3)]
        return [pair() + variants, pair() + variants[1:4], pair()]
    if name == "mapl":
        four = [{"contrast": c, "level": 2} for c in (1, -1, -1, 1)]
        return [pair(), pair(level=1), four, pair() + pair(level=1), four]
    ties = [{"relevance": y} for y in (1.0, 1.0, 1.0, 0.0)]
    return [pair(), ranked(3), pair(), ranked(4), [{"relevance": 1.0}], ties]


# rewards of groups of sampled responses: ragged, all equal, of one, with unknown ones, without any; and of their probes
REWARDS = [[0.1, 0.8, 0.8, 0.3], [0.6, 0.2], [0.5, 0.5, 0.5], [0.9], [0.7, NAN, 0.4, 1.0, 0.0], [NAN, NAN], [1.0, 0.3, 0.9]]
PROBES = [[0.4], [NAN], [0.7], [0.1], [0.35], [0.6], [0.2, 0.5]]


def rollouts(*, rewards=REWARDS, probes=PROBES, tokens: int = 6, seed: int = 0, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Columns of sampled groups, off policy: the trainer, the rollout and the sampler all disagree."""
    made = [[{"reward": r} for r in group] + [{"reward": r, "train": False} for r in beside]
            for group, beside in zip(rewards, probes, strict=True)]
    g = torch.Generator().manual_seed(seed + 1)
    flat = [(b, row) for b, group in enumerate(made) for row in group]
    flat = [flat[i] for i in torch.randperm(len(flat), generator=g)]
    n, ids = len(flat), torch.randperm(10 * len(made), generator=g) - 5 * len(made)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64).to(dtype)

    mask = torch.arange(tokens) < torch.randint(2, tokens + 1, (n, 1), generator=g)
    mask &= torch.rand(n, tokens, generator=g) < 0.8           # holes, as tool output has
    mask[:, 1] = True
    mask[next(i for i, (b, _) in enumerate(flat) if b == min(4, len(made) - 1))] = False
    logp_old = -3 * uniform(n, tokens) - 0.6
    return {
        "logp": logp_old + uniform(n, tokens) - 0.5, "logp_old": logp_old, "logp_ref": logp_old + uniform(n, tokens) - 0.5,
        "logp_rollout": logp_old + uniform(n, tokens) / 5 - 0.1, "logp_now": logp_old + uniform(n, tokens) / 2 - 0.25,
        "mask": mask, "group": ids[torch.tensor([b for b, _ in flat])], "finished": uniform(n) < 0.7,
        "reward": torch.tensor([row["reward"] for _, row in flat], dtype=dtype),
        "train": torch.tensor([row.get("train", True) for _, row in flat]),
        "value": uniform(n, tokens), "value_old": uniform(n, tokens), "entropy": uniform(n, tokens),
        "entropy_old": uniform(n, tokens), "noise": uniform(n, tokens),
        "step_reward": torch.where(uniform(n, tokens) < 0.5, NAN, uniform(n, tokens))}


def columns_for(name: str, *, seed: int = 0, dtype=torch.float64) -> dict[str, torch.Tensor]:
    if name in ON_POLICY:
        return rollouts(seed=seed, dtype=dtype)
    made = columns(labels(name), seed=seed, dtype=dtype)
    if name not in ("inpo", "trpa"):                          # elsewhere the policy before the step is `logp` itself
        del made["logp_old"]
    width = getattr(recipes, name)(**SETTINGS.get(name, {})).outputs
    return {**made, "outputs": made["outputs"][:, :width]} if width else made


def objective_for(name: str, **settings):
    """The recipe with `SETTINGS`, its modules set up alike in every call."""
    return ready(getattr(recipes, name)(**{**SETTINGS.get(name, {}), **settings}))


def ready(objective):
    torch.manual_seed(0)
    for module in objective.modules():
        module.setup(layers=2, width=3)
        module.double()
    return objective


def leaves(columns: dict) -> dict[str, torch.Tensor]:
    return {k: columns[k].clone().requires_grad_() for k in POLICY if k in columns}


def outcome(objective, columns: dict, split=None, width=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and its gradients with respect to the policy's columns and the modules' parameters."""
    wrt = leaves(columns)
    parameters = {f"{i}.{k}": p for i, m in enumerate(objective.modules()) for k, p in m.named_parameters()}
    batch = objective.annotate(Batch({**columns, **wrt}, width))
    values = [objective.loss(micro).value for micro in (split(batch) if split else [batch])]
    for value in values:
        value.backward()
    wrt.update(parameters)
    zeros = {k: torch.zeros_like(v) if v.grad is None else v.grad.clone() for k, v in wrt.items()}
    for p in parameters.values():
        p.grad = None
    return sum(v.detach() for v in values), zeros


def take(columns: dict, rows: torch.Tensor) -> dict:
    return {k: v[rows] for k, v in columns.items()}


def close(left, right, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------ by hand
f64 = partial(torch.tensor, dtype=torch.float64)


def step(logp, logp_ref=None, relevance=(1.0, 0.0), **more):
    """One group of one-token responses."""
    logp = f64(logp)[:, None].requires_grad_()
    n = len(logp)
    logp_ref = torch.zeros(n, 1, dtype=torch.float64) if logp_ref is None else f64(logp_ref)[:, None]
    return Batch({"logp": logp, "logp_ref": logp_ref, "mask": torch.ones(n, 1).bool(), "group": torch.zeros(n).long(),
                  "relevance": f64(relevance), **more})


def value_of(objective, batch):
    return objective.loss(objective.annotate(batch)).value


def gradient_of(objective, batch):
    return torch.autograd.grad(value_of(objective, batch), batch["logp"])[0].squeeze(1)
