"""Rules that label and select: pure functions whose keyword-only parameters are settings.

    rule(group, ...)    one group -> a list of groups; [] removes it
    rule(groups, ...)   all groups -> an iterator of groups; those that pass twice need groups that can be read again

A score that is missing or no finite number is an error, unless `scored` came first. Chance depends on a seed and the texts: not
on the order of groups or responses, nor on other groups.
"""
from data_tools.difficulty import by_glicko, by_irt, by_irt_2pl
from data_tools.select.committees import multiwinner
from data_tools.select.filters import at_least, between, distinct, pass_rate, scored, spread
from data_tools.select.grades import degree, graded, majority, ranking, ties, votes
from data_tools.select.pairs import (
    adjacent,
    all_pairs,
    best_mean,
    best_random,
    best_worst,
    differential_information,
    on_policy_margin,
    random_pair,
    thresholds,
)
from data_tools.select.sampling import filtration, first_round, rejection, tournament
from data_tools.select.whole import coverage, easiest, hardest, length_balanced, middle, sample

__all__ = ["adjacent", "all_pairs", "at_least", "best_mean", "best_random", "best_worst", "between", "by_glicko", "by_irt",
           "by_irt_2pl", "coverage", "degree", "differential_information", "distinct", "easiest", "filtration", "first_round",
           "graded", "hardest", "length_balanced", "majority", "middle", "multiwinner", "on_policy_margin", "pass_rate",
           "random_pair", "ranking", "rejection", "sample", "scored", "spread", "thresholds", "ties", "tournament", "votes"]
