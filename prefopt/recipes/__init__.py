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

__all__ = ["anyloss", "aot", "aot_unpaired", "apo_down", "apo_zero", "bco", "bco_pair", "bradley_terry", "bt_list", "bt_ties",
           "cpl", "cpl_kl", "dice", "discopop", "dpo", "dpo_alpha", "dpo_forward_kl", "dpo_gamma", "dpo_js", "dpo_norm", "exo",
           "gaussian", "general_preference", "gpm_gated", "hinge", "hypo", "hypo_optimistic", "implicit_ce", "implicit_dpo",
           "implicit_kto", "implicit_nca", "ipo", "ipo_summed", "irpo_ranking", "kto", "ld_dpo", "lipo", "lipo_hinge",
           "lipo_lambda", "lipo_list_mle", "lipo_point_mse", "lipo_point_sigmoid", "lipo_softmax", "list_net", "love", "mapl",
           "mapo", "multi_objective", "multi_preference", "nca", "ordinal", "orpo", "outcome", "process", "rationale",
           "rationale_released", "rdpo", "rpo", "rpo_mean", "rso", "rso_hinge", "rso_hinge_norm", "simpo", "slic", "smpo",
           "sparsepo", "sparsepo_independent", "spo_degree", "sppo_hard", "tdpo", "tool_augmented", "tool_augmented_released",
           "tr_dpo", "trpa", "wpo"]


def find(name: str) -> Callable:
    """The recipe of that name, or an error with the nearest one."""
    if name not in __all__:
        raise ValueError(f"unknown recipe {name!r}{nearest(name, __all__)}; recipes: {', '.join(__all__)}")
    return globals()[name]
