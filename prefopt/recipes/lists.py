"""Recipes for lists: K responses to one prompt with graded labels. LiPO: sum over a list's pairs, mean over lists."""
from __future__ import annotations

from functools import partial

from prefopt import label_rules, listwise, pair_weights, pairwise, pointwise, scores
from prefopt.objectives import PreferenceObjective
from prefopt.recipes.checks import positive
from prefopt.reductions import group_sum


def lipo(*, beta=0.05):
    """LiPO with the pairwise logistic loss over all pairs of a list.

    L = sum over psi_i > psi_j of softplus(-(s_i - s_j)),   s = beta rho

    beta        0.05 with K = 8. Labels psi in [0, 1]: `relevance`, or (1/K) sum_j P(i beats j) of `wins`
    Relations   K = 2 is `dpo`
    At policy = reference: log 2 times the pairs of a list
    Reference   Liu et al., LiPO, arXiv:2402.01878
    """
    positive(beta=beta)
    return PreferenceObjective(score=partial(scores.log_ratio, beta=beta), ranking=pairwise.logistic,
                               labels=label_rules.ordered, reduce=group_sum)


def lipo_hinge(*, beta=0.05):
    """LiPO with the pairwise hinge loss.

    L = sum over psi_i > psi_j of max(0, 1 - (s_i - s_j))

    Relations   K = 2 is `hinge`
    At policy = reference: the pairs of a list
    Reference   Liu et al., arXiv:2402.01878
    """
    return lipo(beta=beta).with_slots(ranking=pairwise.hinge)


def lipo_lambda(*, beta=0.05):
    """LiPO-lambda: pairs weighted by the change of DCG that swapping them would make.

    L = sum over psi_i > psi_j of D_ij softplus(-(s_i - s_j)),   D_ij = |2^psi_i - 2^psi_j| |1/D(t_i) - 1/D(t_j)|

    D(t) = log2(1 + t), t the rank by current score. Detached, recomputed every step.

    Edge        equal scores (policy = reference) rank in the order of rows, as in RAX
    At policy = reference: log 2 times the sum of D over the pairs of a list
    Reference   Liu et al., arXiv:2402.01878; gains and discounts as in RAX
    """
    return lipo(beta=beta).with_slots(pair_weight=pair_weights.lambda_ndcg)


def lipo_list_mle(*, beta=0.05):
    """LiPO with ListMLE (Plackett-Luce).

    L = -sum_k [ s_k - log sum over items ranked at or below k of exp s_j ]

    Relations   K = 2 is `dpo`
    Departs     tied items are not compared with each other: no random order
    At policy = reference: log K! without ties
    Reference   Liu et al., arXiv:2402.01878; Xia et al. 2008
    """
    return lipo(beta=beta).with_slots(ranking=listwise.list_mle)


def lipo_softmax(*, beta=0.05):
    """LiPO with the softmax cross-entropy.

    L = -sum_i (psi_i / sum psi) log softmax(s)_i

    Relations   K = 2 with labels 1/0 is `dpo`
    Departs     labels are divided by their sum, as in the paper; later versions of RAX leave them as they are
    At policy = reference: log K
    Reference   Liu et al., arXiv:2402.01878
    """
    return lipo(beta=beta).with_slots(ranking=listwise.softmax)


def list_net(*, beta=0.05):
    """ListNet on log-ratios.

    L = -sum_i softmax(psi)_i log softmax(s)_i

    At policy = reference: log K
    Reference   Cao et al. 2007
    """
    return lipo(beta=beta).with_slots(ranking=listwise.list_net)


def lipo_point_mse(*, beta=0.05):
    """LiPO's pointwise regression.

    L = sum_i (psi_i - s_i)^2

    At policy = reference: sum of psi^2
    Reference   Liu et al., arXiv:2402.01878
    """
    return lipo(beta=beta).with_slots(ranking=pointwise.squared_error)


def lipo_point_sigmoid(*, beta=0.05):
    """LiPO's pointwise sigmoid cross-entropy.

    L = -sum_i [ psi_i log sigmoid(s_i) + (1 - psi_i) log sigmoid(-s_i) ]

    At policy = reference: K log 2
    Reference   Liu et al., arXiv:2402.01878
    """
    return lipo(beta=beta).with_slots(ranking=pointwise.cross_entropy)
