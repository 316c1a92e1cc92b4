"""Which methods are which: a table of identities (equal in value and gradient), then hand values, limits and optima."""
import math
from functools import partial

import pytest
import torch
from columns_for_tests import close, columns_for, f64, gradient_of, outcome, ready, step, value_of

from data_tools import Batch
from prefopt import label_rules, margins, masks, pair_weights, pairwise, pointwise, recipes, scores
from prefopt.objectives import PreferenceObjective
from prefopt.parts import Pairs
from prefopt.reductions import group_mean, group_sum, term_mean


def linear(margin) -> Pairs:
    """The margin itself."""
    return margin


def nothing(score) -> Pairs:
    """1 for every pair."""
    return 0 * margins.difference(score) + 1


MARGIN = PreferenceObjective(score=partial(scores.log_ratio, beta=0.3), ranking=linear)          # beta h
ONE = MARGIN.with_slots(ranking=nothing)


def result(side, columns):
    """Value and gradients of a side of an identity: an objective, or a function of the columns."""
    return side(columns) if callable(side) else outcome(ready(side), columns)


def plus(left, weight, right):
    """left + weight * right, values and gradients."""
    def side(columns):
        (a, g), (b, h) = result(left, columns), result(right, columns)
        return a + weight * b, {k: g[k] + weight * h[k] for k in g}
    return side


def times(weight, side):
    return plus(side, weight - 1, side)


def on(change, side):
    """The side on changed columns."""
    return lambda columns: result(side, {**columns, **change(columns)})


def uniform_policy(columns):
    return {"collision": columns["logp"]}


def no_reference(columns):
    return {"logp_ref": torch.zeros_like(columns["logp_ref"])}


def one_token(columns):
    first = torch.zeros_like(columns["mask"])
    first[:, 0] = True
    return {"mask": first}


def even(columns):
    return {"mask": torch.ones_like(columns["mask"])}


def cut_to_shortest(columns):
    """The first l trainable tokens of every response, l the length of the group's shortest."""
    length, index = columns["mask"].sum(1), Batch(columns).index
    shortest = torch.stack([length[index == b].min() for b in index])
    return {"mask": columns["mask"] & (columns["mask"].cumsum(1) <= shortest[:, None])}


def agreeing_rewards(columns):
    return {"reward": columns["relevance"]}


def ranked_reference(columns):
    """A reference that ranks every pair as labelled."""
    return {"logp_ref": columns["logp_ref"] - 30 * (1 - columns["relevance"])[:, None], **even(columns)}


def hard(columns):
    return {"relevance": (columns["relevance"] > 0.5).to(columns["relevance"].dtype)}


def levels(columns):
    return {"relevance": columns["relevance"] - 2}            # a pair 1/0 becomes the levels 1 and 2


def first_pair(columns):
    rows = (columns["group"] == columns["group"][0]).nonzero().squeeze(1)
    keep = torch.isin(torch.arange(len(columns["group"])), rows)
    return {"relevance": columns["relevance"].masked_fill(~keep, math.nan)}


def alone(objective):
    """The objective on one pair of the columns; the gradient of the others is 0."""
    def side(columns):
        rows = (columns["group"] == columns["group"][0]).nonzero().squeeze(1)
        value, gradients = outcome(objective, {k: v[rows] for k, v in columns.items()})
        return value, {k: torch.zeros_like(columns[k]).index_put((rows,), g) for k, g in gradients.items()}
    return side


def full_masks(kl_mask):
    return recipes.tdpo(beta=0.3).with_slots(providers={"reward_mask": masks.full_mask, "kl_mask": kl_mask})


def swapped(objective, flip):
    """(1 - flip) * the loss + flip * the loss with every label reversed."""
    def side(columns):
        (a, g), (b, h) = outcome(objective, columns), outcome(objective, {**columns, "relevance": -columns["relevance"]})
        return (1 - flip) * a + flip * b, {k: (1 - flip) * g[k] + flip * h[k] for k in g}
    return side


def link(ranking):
    return MARGIN.with_slots(ranking=ranking)


def corrected(ranking, flip=0.2):
    return link(ranking).with_slots(labels=partial(label_rules.unflip, flip=flip))


DPO, SQUARED = recipes.dpo(beta=0.3), partial(pairwise.squared, goal=0.7)
PAIRS, LISTS = "aot", "dpo"                                   # recipes whose columns are pairs, or lists of any size
IDENTITIES = [                                                # (what it says, left, right, recipe whose columns are taken)
    ("ipo_summed is the squared link", recipes.ipo_summed(tau=0.3),
     PreferenceObjective(score=partial(scores.log_ratio, beta=1.0), ranking=partial(pairwise.squared, goal=1 / 0.6)), LISTS),
    ("ipo is ipo_summed for single tokens", on(one_token, recipes.ipo(tau=0.3)), on(one_token, recipes.ipo_summed(tau=0.3)),
     LISTS),
    ("ipo is copg with rewards of 1/2 and -1/2, beta 2 tau", times(0.6 ** 2, recipes.ipo_summed(tau=0.3)),
     PreferenceObjective(score=partial(scores.log_ratio, beta=0.6), ranking=partial(pairwise.squared, goal=1.0)), LISTS),
    ("cDPO is DPO + eps beta h", recipes.dpo(beta=0.3, label_smoothing=0.2), plus(DPO, 0.2, MARGIN), LISTS),
    ("rdpo is DPO - eps/(1 - 2 eps) beta h", recipes.rdpo(beta=0.3, flip=0.2), plus(DPO, -0.2 / 0.6, MARGIN), LISTS),
    ("rdpo without flips is dpo", recipes.rdpo(beta=0.3, flip=0.0), DPO, LISTS),
    ("flips average to the clean logistic loss", swapped(recipes.rdpo(beta=0.3, flip=0.2), 0.2), DPO, LISTS),
    ("flips average to the clean hinge loss", swapped(corrected(pairwise.hinge), 0.2), link(pairwise.hinge), LISTS),
    ("flips average to the clean squared loss", swapped(corrected(SQUARED), 0.2), link(SQUARED), LISTS),
    ("flips average to cDPO from dpo", swapped(DPO, 0.2), recipes.dpo(beta=0.3, label_smoothing=0.2), LISTS),
    ("lipo of pairs is dpo", recipes.lipo(beta=0.3), DPO, PAIRS),
    ("lipo_list_mle of pairs is dpo", recipes.lipo_list_mle(beta=0.3), DPO, PAIRS),
    ("lipo_softmax of pairs 1/0 is dpo", recipes.lipo_softmax(beta=0.3), DPO, PAIRS),
    ("lipo_hinge of pairs is hinge", recipes.lipo_hinge(beta=0.3), recipes.hinge(beta=0.3), PAIRS),
    ("a constant pair weight is no weight", recipes.lipo(beta=0.3).with_slots(pair_weight=nothing), recipes.lipo(beta=0.3),
     LISTS),
    ("labels 1/0 weigh 1 by their gap", on(hard, DPO.with_slots(pair_weight=pair_weights.gap)), on(hard, DPO), LISTS),
    ("rso is dpo", recipes.rso(gamma=0.3), DPO, LISTS),
    ("rso_hinge_norm is hinge", recipes.rso_hinge_norm(gamma=0.3), recipes.hinge(beta=0.3), LISTS),
    ("rso_hinge_norm without reference is rso_hinge", on(no_reference, recipes.rso_hinge_norm(gamma=0.3)),
     recipes.rso_hinge(gamma=0.3), LISTS),
    ("slic without sft is rso_hinge up to scale", recipes.slic(delta=1 / 0.3, sft=0.0),
     times(1 / 0.3, recipes.rso_hinge(gamma=0.3)), LISTS),
    ("sparsepo with mu = 1, md = 0 is dpo", full_masks(masks.no_mask), DPO, LISTS),
    ("sparsepo with both masks full is tdpo", full_masks(masks.full_mask), recipes.tdpo(beta=0.3), LISTS),
    ("mapo with full activations is tdpo", on(lambda c: {"activation_mask": torch.ones_like(c["activation_mask"])},
                                              recipes.mapo(beta=0.3)), recipes.tdpo(beta=0.3), LISTS),
    ("dpo_alpha at 0 is dpo_forward_kl", recipes.dpo_alpha(beta=0.3, alpha=0.0), recipes.dpo_forward_kl(beta=0.3), LISTS),
    ("dpo_alpha at 1 is dpo", recipes.dpo_alpha(beta=0.3, alpha=1.0), DPO, LISTS),
    ("dpo_gamma at 1 is dpo", recipes.dpo_gamma(beta=0.3, gamma=1.0), DPO, LISTS),
    ("dpo_gamma at 0 is dpo without reference", recipes.dpo_gamma(beta=0.3, gamma=0.0), on(no_reference, DPO), LISTS),
    ("cpl_kl without bias is dpo", recipes.cpl_kl(alpha=0.3, bias=1.0), DPO, LISTS),
    ("cpl without bias is dpo without reference", recipes.cpl(alpha=0.3, bias=1.0), on(no_reference, DPO), LISTS),
    ("ld_dpo at 1 is dpo", recipes.ld_dpo(beta=0.3, alpha=1.0), DPO, LISTS),
    ("ld_dpo at equal lengths is dpo", on(even, recipes.ld_dpo(beta=0.3)), on(even, DPO), LISTS),
    ("ld_dpo at 0 is dpo on the shared tokens", recipes.ld_dpo(beta=0.3, alpha=0.0), on(cut_to_shortest, DPO), LISTS),
    ("simpo without target at equal length T is reference-free dpo with beta/T",
     on(even, recipes.simpo(beta=1.8, gamma_beta_ratio=0.0)),
     on(lambda c: {**even(c), **no_reference(c)}, recipes.dpo(beta=0.3)), LISTS),
    ("dpo_norm is dpo for single tokens", on(one_token, recipes.dpo_norm(beta=0.3)), on(one_token, DPO), LISTS),
    ("hypo without kl is dpo", recipes.hypo(beta=0.3, kl=0.0), DPO, "hypo"),
    ("hypo at policy = reference is dpo", on(lambda c: {"logp_ref": c["logp"]}, recipes.hypo(beta=0.3, kl=0.5)),
     on(lambda c: {"logp_ref": c["logp"]}, DPO), "hypo"),
    ("hypo_optimistic is dpo where the reference ranks right", on(ranked_reference, recipes.hypo_optimistic(beta=0.3)),
     on(ranked_reference, DPO), PAIRS),
    ("rationale at 0 is dpo", recipes.rationale(beta=0.3, gamma=0.0), DPO, "rationale"),
    ("rationale_released at 0 is dpo + log 2 per rationale", recipes.rationale_released(beta=0.3, gamma=0.0),
     plus(DPO, 3 / 4 * math.log(2), ONE), "rationale"),
    ("mapl without its terms is dpo on the base pairs", recipes.mapl(beta=0.3, intra=0.0, inter=0.0),
     on(lambda c: {"relevance": c["relevance"].masked_fill(c["level"] != 0, math.nan)}, DPO), "mapl"),
    ("spo_degree at 0 is dpo", recipes.spo_degree(beta=0.3, gamma=0.0), DPO, "spo_degree"),
    ("rpo at 0 is dpo", recipes.rpo(beta=0.3, eta=0.0), DPO, LISTS),
    ("rpo_mean at 0 is dpo", recipes.rpo_mean(beta=0.3, alpha=0.0), DPO, LISTS),
    ("rpo is rpo_mean for single tokens, alpha = eta beta", on(one_token, recipes.rpo(beta=0.3, eta=0.4)),
     on(one_token, recipes.rpo_mean(beta=0.3, alpha=0.12)), LISTS),
    ("smpo at tau -> 0 with agreeing rewards is dpo", on(agreeing_rewards, recipes.smpo(beta=0.15, tau=1e-4, scale=2.0)),
     DPO, LISTS),
    ("wpo of a uniform policy is dpo", on(uniform_policy, recipes.wpo(beta=0.3)), DPO, LISTS),
    ("tr_dpo is dpo", recipes.tr_dpo(beta=0.3), DPO, LISTS),
    ("trpa of two levels, factor 1, no kl is dpo on averages", on(levels, recipes.trpa(beta=0.3, factor=1.0, kappa=0.0)),
     recipes.dpo_norm(beta=0.3), PAIRS),
    ("the trust region vanishes at the old policy", on(levels, recipes.trpa(beta=0.3, kappa=0.5)),
     on(levels, recipes.trpa(beta=0.3, kappa=0.0)), LISTS),
    ("aot of one pair is dpo", alone(recipes.aot(beta=0.3)), alone(DPO), PAIRS),
    ("aot_unpaired of one pair is dpo", alone(recipes.aot_unpaired(beta=0.3)), alone(DPO), PAIRS),
    ("aot of one labelled pair among others is dpo", on(first_pair, recipes.aot(beta=0.3)), on(first_pair, DPO), PAIRS),
    ("kto with reference point 0 is half of apo_zero",
     times(2.0, on(lambda c: {"mismatched": torch.zeros_like(c["mismatched"])}, recipes.kto(beta=0.3))),
     recipes.apo_zero(beta=0.3), PAIRS),
    ("kto's reference point is never negative",
     times(2.0, on(lambda c: {"mismatched": -c["mismatched"]}, recipes.kto(beta=0.3))), recipes.apo_zero(beta=0.3), PAIRS),
    ("bco_pair is twice bco without its shift", times(0.5, recipes.bco_pair(beta=0.3)),
     PreferenceObjective(score=partial(scores.log_ratio, beta=0.3), reduce=term_mean, ranking=pointwise.bco,
                         annotations={"baseline": lambda real: torch.zeros(len(real), dtype=torch.float64)}), PAIRS),
    ("in_context of pairs, the better one in position 1, is half of dpo on averages", recipes.irpo_ranking(beta=0.3),
     times(0.5, recipes.dpo_norm(beta=0.3)), PAIRS),
    ("group sum and term mean agree for pairs", DPO.with_slots(reduce=group_sum), DPO.with_slots(reduce=term_mean), PAIRS),
    ("group mean and term mean agree for pairs", DPO.with_slots(reduce=group_mean), DPO.with_slots(reduce=term_mean), PAIRS),
]


@pytest.mark.parametrize("left, right, columns", [pytest.param(*row[1:], id=row[0]) for row in IDENTITIES])
def test_identity(left, right, columns):
    columns = columns_for(columns)
    (value, gradients), (expected, expected_gradients) = result(left, columns), result(right, columns)
    close(value, expected, 1e-12)
    for key in gradients.keys() & expected_gradients.keys():
        close(gradients[key], expected_gradients[key], 1e-12)
    assert expected_gradients["logp"].any(), "an identity of zeros says nothing"


# ------------------------------------------------------------------------------------------------------ hand values
HAND = {                                                      # beta h = 1 where not said otherwise
    "dpo": (recipes.dpo(beta=0.5), step([2.0, 0.0]), 0.313262),
    "cdpo": (recipes.dpo(beta=0.5, label_smoothing=0.1), step([2.0, 0.0]), 0.413262),
    "rdpo": (recipes.rdpo(beta=0.5, flip=0.1), step([2.0, 0.0]), 0.188262),
    "ipo, h = 2, tau = 1/2": (recipes.ipo(tau=0.5), step([2.0, 0.0]), 1.0),
    "ipo, h = 2, tau = 1/4": (recipes.ipo_summed(tau=0.25), step([2.0, 0.0]), 0.0),
    "hinge, beta h = 1/4": (recipes.hinge(beta=0.5), step([0.5, 0.0]), 0.75),
    "hinge, identical pair": (recipes.hinge(beta=0.5), step([-1.0, -1.0]), 1.0),
    "hinge, beyond 1": (recipes.hinge(beta=0.5), step([2.5, 0.0]), 0.0),
    "lipo_lambda, s = (1, 0)": (recipes.lipo_lambda(beta=0.5), step([2.0, 0.0]), 0.115616),
    "rpo": (recipes.rpo(beta=0.1, eta=0.5), step([-10.0, -20.0]), 0.313262 + 0.5),
    "simpo, alp -1 and -2": (recipes.simpo(beta=2.0, gamma_beta_ratio=0.5), step([-1.0, -2.0]), 0.313262),
    "orpo, p = 1/2 and 1/4, the odds term": (recipes.orpo(weight=1.0).with_slots(regularisers={}),
                                             step([math.log(0.5), math.log(0.25)]), 0.287682),
    "orpo, equal": (recipes.orpo(weight=1.0).with_slots(regularisers={}), step([-1.0, -1.0]), 0.693147),
    "in_context, equal scores": (recipes.irpo_ranking(), step([0.0] * 3, relevance=(2.0, 1.0, 0.0),
                                 position=torch.arange(3) + 1), 0.693147 * (3 + 1 / math.log2(3)) / 3),
    "list_mle, three equal scores": (recipes.lipo_list_mle(), step([0.0] * 3, relevance=(1.0, 0.5, 0.0)), math.log(6)),
    "threshold of ranking, c = log 5": (recipes.dpo(beta=0.1), step([0.0, 0.0], [0.0, -math.log(5)][::-1]), 0.615910),
}


@pytest.mark.parametrize("name", HAND)
def test_hand_value(name):
    objective, batch, expected = HAND[name]
    assert float(value_of(objective, batch).detach()) == pytest.approx(expected, abs=6e-7)


def test_gradients_by_hand():
    sigma = lambda z: 1 / (1 + math.exp(-z))
    close(gradient_of(recipes.ipo_summed(tau=0.25), step([3.0, 0.0])), f64([2.0, -2.0]))       # 2 (h - 2)
    close(gradient_of(recipes.hinge(beta=0.5), step([2.0, 0.0])), f64([0.0, 0.0]))                       # at beta h = 1
    weight = 0.1 * sigma(-1)
    close(gradient_of(recipes.rpo(beta=0.1, eta=0.5), step([0.0, -10.0])), f64([-weight - 0.05, weight]))
    at_zero = {recipes.dpo_forward_kl: 1.0, recipes.dpo_alpha: 1.0, recipes.dpo: 1.0, recipes.dpo_js: 0.5}       # g'(0)
    for recipe, slope in at_zero.items():
        close(gradient_of(recipe(beta=0.4), step([-1.0, -2.0], [-1.0, -2.0])), slope * f64([-0.2, 0.2]))
    score = lambda rho: 0.3 * (math.log(2) + math.log(sigma(rho)))                # js: factor sigma(-rho) on top of DPO's
    outer = 0.3 * sigma(-(score(1.5) - score(0.5)))
    close(gradient_of(recipes.dpo_js(beta=0.3), step([1.5, 0.5])), outer * f64([-sigma(-1.5), sigma(-0.5)]))


def test_discopop_is_not_monotone():
    """From the reference its margin first falls: slope 0.784 at 0, a minimum at rho = -2.3714, a maximum at 1.44."""
    slope = lambda h: float(gradient_of(recipes.discopop(beta=0.05, tau=0.05), step([h, 0.0]))[0]) / 0.05
    assert slope(0.0) == pytest.approx(5 * (1 - math.log(2)) - 0.75, rel=1e-12)
    assert slope(-2.375) < 0 < slope(-2.368) and slope(1.43) > 0 > slope(1.45)
    wide = value_of(recipes.discopop(beta=0.5, tau=1e9), step([2.0, 0.0])).detach()
    close(wide, f64((math.log1p(math.exp(-1)) + math.exp(-1)) / 2), 1e-8)


# ------------------------------------------------------------------------------------------------------ limits, optima
@pytest.mark.parametrize("recipe, stationary", [
    (recipes.dpo(beta=0.5, label_smoothing=0.2), math.log(4) / 0.5),
    (recipes.exo(beta=0.5, label_smoothing=0.2), math.log(4) / 0.5),
    (recipes.ipo_summed(tau=0.25), 2.0)], ids=["cdpo at logit(1 - eps)", "exo at logit(1 - eps)", "ipo at 1/(2 tau)"])
def test_stationary_margin(recipe, stationary):
    slopes = [float(gradient_of(recipe, step([stationary + d, 0.0]))[0]) for d in (-0.01, 0.0, 0.01)]
    assert slopes[0] < 0 < slopes[2] and abs(slopes[1]) < 1e-12


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_ipo_soft_label(p):
    """A soft label p moves the minimiser to (2p - 1)/(2 tau); a tie pulls the margin to 0."""
    wins = f64([[[math.nan, p], [1 - p, math.nan]]])
    h = (2 * p - 1) / (2 * 0.25)
    batch = lambda shift: step([h + shift, 0.0], wins=wins)
    close(gradient_of(recipes.ipo_summed(tau=0.25), batch(0.0)), f64([0.0, 0.0]), 1e-12)
    close(gradient_of(recipes.ipo_summed(tau=0.25), batch(0.5)), f64([1.0, -1.0]), 1e-12)


def test_sparsepo_with_masks_of_ones_own():
    """Masks in the batch stand in for the learned ones: beta [(U_w - U_l) - (D_l - D_w)], and both L1 norms in full."""
    mu, md = f64([[0.5], [2.0]]), f64([[1.0], [3.0]])
    batch = step([-1.0, -2.0], [-2.0, -4.0], token_kl=f64([[0.3], [0.1]]), reward_mask=mu, kl_mask=md)
    margin = 0.8 * ((0.5 * 1 - 2.0 * 2) - (3.0 * 0.1 - 1.0 * 0.3))
    expected = math.log1p(math.exp(-margin)) + 0.1 * 2.5 + 0.2 * 4.0
    found = value_of(recipes.sparsepo_independent(l1_reward=0.1, l1_kl=0.2), batch)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-12)
    common = value_of(recipes.sparsepo(l1_reward=0.1, l1_kl=0.2), step(
        [-1.0, -2.0], [-2.0, -4.0], token_kl=f64([[0.0], [0.0]]), reward_mask=mu))
    margin = 0.8 * (0.5 * 1 - 2.0 * 2)
    assert float(common.detach()) == pytest.approx(math.log1p(math.exp(-margin)) + 0.3 / 2 * 2.5, rel=1e-12)


def test_small_beta_gives_log_2():
    for recipe in (recipes.dpo, recipes.dpo_js, recipes.tdpo, recipes.ld_dpo, recipes.aot):
        assert float(outcome(recipe(beta=1e-9), columns_for(PAIRS))[0]) == pytest.approx(math.log(2), abs=1e-7)


def test_alpha_divergence_is_continuous_at_1():
    columns = columns_for(LISTS)
    for alpha in (1 - 1e-5, 1 + 1e-5):
        close(outcome(recipes.dpo_alpha(alpha=alpha), columns)[0], outcome(recipes.dpo(), columns)[0], 1e-4)


def test_rdpo_is_unbounded_and_says_so():
    values = [float(value_of(recipes.rdpo(beta=1.0, flip=0.2), step([h, 0.0])).detach()) for h in (1e2, 1e3, 1e4)]
    assert values == pytest.approx([-100 / 3, -1000 / 3, -10000 / 3], rel=1e-9)
    assert not recipes.rdpo().bounded and recipes.rdpo(flip=0.0).bounded and recipes.dpo().bounded


def test_simpo_does_not_see_length():
    """Every token of one response twice: SimPO's loss stays, DPO's changes."""
    columns = columns_for(PAIRS)
    twice = {k: torch.cat([v, v], 1) if k in ("logp", "logp_ref", "mask") else v for k, v in columns.items()
             if k in ("logp", "logp_ref", "mask", "group", "relevance")}
    half = twice["relevance"] > 0.5
    twice["mask"] = torch.where(half[:, None], twice["mask"], torch.cat([columns["mask"], 0 * columns["mask"]], 1))
    close(outcome(recipes.simpo(), twice)[0], outcome(recipes.simpo(), columns)[0], 1e-12)
    assert (outcome(recipes.dpo(), twice)[0] - outcome(recipes.dpo(), columns)[0]).abs() > 1e-3


def test_simpo_leaves_pairs_with_an_empty_response_out():
    columns = columns_for(PAIRS)
    empty = columns["group"][~columns["mask"].any(1)]
    kept = ~torch.isin(columns["group"], empty)
    assert 0 < kept.sum() < len(kept)
    close(outcome(recipes.simpo(), columns)[0], outcome(recipes.simpo(), {k: v[kept] for k, v in columns.items()})[0], 1e-12)


@pytest.mark.parametrize("bias, moves", [(1.0, 0.0), (0.5, 1.0)])
def test_cpl_bias_stops_the_drift(bias, moves):
    """A common shift c of both log-probabilities raises CPL's margin by (1 - bias) c."""
    margin = lambda c: float(margins.biased(torch.tensor([[3.0 + c, 1.0 + c]]), bias=bias)[0, 0, 1])
    assert margin(2.0) - margin(0.0) == pytest.approx(moves, abs=1e-12)


def test_smpo_weight():
    """2 p - 1 = tanh of half the reward difference; equal rewards give log 2 and no gradient."""
    rewards = torch.tensor([1.2, 0.5], dtype=torch.float64)
    value = value_of(recipes.smpo(beta=0.5, tau=0.7), step([2.0, 0.0], reward=rewards))
    assert float(value.detach()) == pytest.approx(math.log1p(math.exp(-math.tanh(0.5))), rel=1e-12)
    tie = step([2.0, 0.0], reward=torch.ones(2, dtype=torch.float64))
    assert float(value_of(recipes.smpo(), tie).detach()) == pytest.approx(math.log(2))
    assert not gradient_of(recipes.smpo(), tie).any()


def test_kto_symmetry_and_bound():
    columns = columns_for("kto")
    rho = torch.linspace(-60, 60, 241, dtype=torch.float64)[None].requires_grad_()
    desirable, undesirable = (pointwise.kto(rho, torch.full_like(rho, y), torch.full_like(rho, 1.0)) for y in (1.0, 0.0))
    close(desirable, pointwise.kto(2 - rho, torch.zeros_like(rho), torch.full_like(rho, 1.0)), 1e-12)    # s - z0 -> z0 - s
    slope, = torch.autograd.grad(undesirable.sum(), rho)
    assert slope.max() == 0.25 and float(pointwise.kto(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1))) == 0.5
    gradient = outcome(recipes.kto(beta=0.3), columns)[1]["logp"]
    assert gradient.abs().max() <= 0.3 / 4 / len(columns["group"]) + 1e-12


def test_hypo_estimates_the_gradient_of_the_kl():
    """Exact expectation over all pairs of samples from a three-armed policy: the gradient of KL(pi || ref)."""
    theta = torch.tensor([0.3, -0.7, 0.9], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logp = theta.log_softmax(0)
    kl, = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), theta, retain_graph=True)
    for k in (1, 2):                                          # without a baseline, and leave one out
        estimate = torch.zeros(3, dtype=torch.float64)
        for arms in torch.cartesian_prod(*[torch.arange(3)] * k).view(-1, k):
            batch = Batch({"logp": logp[arms][:, None], "logp_ref": ref[arms][:, None], "mask": torch.ones(k, 1).bool(),
                           "group": torch.zeros(k).long(), "relevance": torch.full((k,), math.nan),
                           "online": torch.ones(k).bool()})
            estimate += logp[arms].sum().exp().detach() * torch.autograd.grad(
                value_of(recipes.hypo(kl=1.0), batch), theta, retain_graph=True)[0]
        close(estimate, kl, 1e-12)
