"""Recipes: published methods as short compositions of parts. Each function returns an objective."""
from __future__ import annotations

from collections.abc import Callable

from data_tools.columns import nearest
from prefopt.recipes.beyond import (
    hypo,
    hypo_optimistic,
    irpo_ranking,
    mapl,
    mapo,
    rationale,
    rationale_released,
    sparsepo,
    sparsepo_independent,
    spo_degree,
    tdpo,
    trpa,
)
from prefopt.recipes.lists import (
    lipo,
    lipo_hinge,
    lipo_lambda,
    lipo_list_mle,
    lipo_point_mse,
    lipo_point_sigmoid,
    lipo_softmax,
    list_net,
)
from prefopt.recipes.on_policy import (
    best_of_n,
    bnpo,
    cispo,
    clip_cov,
    copg,
    dapo,
    dr_grpo,
    fdpg,
    gmpo,
    gpg,
    grpo,
    grpo_process,
    gspo,
    kl_cov,
    online_dpo,
    opo,
    pass_at_k,
    ppo,
    ppo_adaptive,
    reinforce,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rejection,
    remax,
    rloo,
    sapo,
)
from prefopt.recipes.pairs import (
    aot,
    apo_down,
    cpl,
    cpl_kl,
    discopop,
    dpo,
    dpo_alpha,
    dpo_forward_kl,
    dpo_gamma,
    dpo_js,
    dpo_norm,
    exo,
    hinge,
    ipo,
    ipo_summed,
    ld_dpo,
    orpo,
    rdpo,
    rpo,
    rpo_mean,
    rso,
    rso_hinge,
    rso_hinge_norm,
    simpo,
    slic,
    smpo,
    tr_dpo,
    wpo,
)
from prefopt.recipes.reward_models import (
    anyloss,
    bradley_terry,
    bt_list,
    bt_ties,
    dice,
    gaussian,
    general_preference,
    gpm_gated,
    implicit_ce,
    implicit_dpo,
    implicit_kto,
    implicit_nca,
    love,
    multi_objective,
    multi_preference,
    ordinal,
    outcome,
    process,
    tool_augmented,
    tool_augmented_released,
)
from prefopt.recipes.unpaired import aot_unpaired, apo_zero, bco, bco_pair, kto, nca, sppo_hard

__all__ = ["anyloss", "aot", "aot_unpaired", "apo_down", "apo_zero", "bco", "bco_pair", "best_of_n", "bnpo", "bradley_terry",
           "bt_list", "bt_ties", "cispo", "clip_cov", "copg", "cpl", "cpl_kl", "dapo", "dice", "discopop", "dpo", "dpo_alpha",
           "dpo_forward_kl", "dpo_gamma", "dpo_js", "dpo_norm", "dr_grpo", "exo", "fdpg", "gaussian", "general_preference",
           "gmpo", "gpg", "gpm_gated", "grpo", "grpo_process", "gspo", "hinge", "hypo", "hypo_optimistic", "implicit_ce",
           "implicit_dpo", "implicit_kto", "implicit_nca", "ipo", "ipo_summed", "irpo_ranking", "kl_cov", "kto", "ld_dpo",
           "lipo", "lipo_hinge", "lipo_lambda", "lipo_list_mle", "lipo_point_mse", "lipo_point_sigmoid", "lipo_softmax",
           "list_net", "love", "mapl", "mapo", "multi_objective", "multi_preference", "nca", "online_dpo", "opo", "ordinal",
           "orpo", "outcome", "pass_at_k", "ppo", "ppo_adaptive", "process", "rationale", "rationale_released", "rdpo",
           "reinforce", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "rejection", "remax", "rloo", "rpo", "rpo_mean",
           "rso", "rso_hinge", "rso_hinge_norm", "sapo", "simpo", "slic", "smpo", "sparsepo", "sparsepo_independent",
           "spo_degree", "sppo_hard", "tdpo", "tool_augmented", "tool_augmented_released", "tr_dpo", "trpa", "wpo"]


def find(name: str) -> Callable:
    """The recipe of that name, or an error with the nearest one."""
    if name not in __all__:
        raise ValueError(f"unknown recipe {name!r}{nearest(name, __all__)}; recipes: {', '.join(__all__)}")
    return globals()[name]
