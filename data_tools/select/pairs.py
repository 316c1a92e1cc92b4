"""Pairs from scored groups. Each pair says in its meta which rule made it, its margin, and the ranks of both (1 is best).

No rule pairs equal scores or equal texts; a group without a pair is removed.
"""
from __future__ import annotations

from data_tools import labels
from data_tools.records import Group
from data_tools.rules import note, paired, scores, shuffled, widest
from data_tools.select.sampling import accept

__all__ = ["adjacent", "all_pairs", "best_mean", "best_random", "best_worst", "differential_information", "on_policy_margin",
           "random_pair", "thresholds"]


def best_worst(group: Group, *, score="reward", margin=0.0) -> list[Group]:
    """The best response over the worst.

    (argmax r, argmin r) if max r - min r >= margin

    margin      of log-odds: a pair surer than c has the margin log(c / (1 - c)); 0 (equal scores are still no pair)
    Edge        the first of equally good, the first of equally bad ones
    Relations   two responses: all rules of pairs agree
    Departs     -
    Reference   Pace et al., West-of-N, arXiv:2401.12086

    >>> from data_tools.records import Response
    >>> three = Group("?", [Response("a", scores={"r": 2.0}), Response("b", scores={"r": 5.0}), Response("c", scores={"r": 1.0})])
    >>> [([r.text for r in g.responses], g.meta) for g in best_worst(three, score="r")]
    [(['b', 'c'], {'rule': 'best_worst', 'margin': 4.0, 'ranks': [1, 3]})]
    """
    values = scores(group, score)
    return paired(group, labels.best_worst(values, margin=margin), values, "best_worst")


def best_random(group: Group, *, score="reward", margin=0.0, seed=0) -> list[Group]:
    """The best response over a random one of those that are worse.

    y_w = argmax r,   y_l ~ Uniform{y: r(y_w) - r(y) >= margin, r(y) < r(y_w)}

    margin      0 (equal scores are still no pair)
    seed        with the texts decides which, whatever their order
    Edge        the first of equally good ones is the best
    Relations   less length bias and less of the reward model's error than `best_worst`
    Departs     -
    Reference   -

    >>> from data_tools.records import Response
    >>> three = Group("?", [Response(str(r), scores={"r": r}) for r in (3.0, 2.0, 0.0)])
    >>> [r.text for r in best_random(three, score="r", margin=2.0)[0].responses]              # 2.0 is too close
    ['3.0', '0.0']
    """
    values = scores(group, score)
    order, _ = shuffled(group, seed, "best_random")
    best = max(range(len(values)), key=values.__getitem__, default=None)
    worse = [(i, j) for i, j in labels.apart(values, margin=margin) if i == best]
    return paired(group, sorted(worse, key=lambda pair: order.index(pair[1]))[:1], values, "best_random")


def random_pair(group: Group, *, score="reward", seed=0) -> list[Group]:
    """Two responses by chance, the better one first.

    {y, y'} ~ Uniform over all sets of two;   (y, y') if r(y) > r(y')

    seed        with the texts decides which, whatever their order
    Edge        equal scores are no pair
    Relations   what online DPO and Nash-MD compare; `all_pairs` has every one of them
    Departs     -
    Reference   -

    >>> from data_tools.records import Response
    >>> two = Group("?", [Response("a", scores={"r": 1.0}), Response("b", scores={"r": 2.0})])
    >>> [r.text for r in random_pair(two, score="r")[0].responses]
    ['b', 'a']
    """
    values = scores(group, score)
    drawn = {*shuffled(group, seed, "random_pair")[0][:2]}
    return paired(group, [pair for pair in labels.apart(values) if {*pair} == drawn], values, "random_pair")


def best_mean(group: Group, *, score="reward", margin=0.0) -> list[Group]:
    """The best response over the one whose score is nearest to the group's mean, of those that are worse.

    margin      0 (equal scores are still no pair)
    Edge        the worse of two equally near ones, then the first
    Relations   what the policy does on average is pushed down, not what it hardly ever does

    >>> from data_tools.records import Response
    >>> four = Group("?", [Response(str(r), scores={"r": r}) for r in (9.0, 0.0, 1.0, 2.0)])  # their mean is 3
    >>> [r.text for r in best_mean(four, score="r")[0].responses]
    ['9.0', '2.0']
    """
    values = scores(group, score)
    best = max(range(len(values)), key=values.__getitem__, default=None)
    worse = [(i, j) for i, j in labels.apart(values, margin=margin) if i == best]
    near = sorted(worse, key=lambda pair: (abs(values[pair[1]] - sum(values) / len(values)), values[pair[1]]))
    return paired(group, near[:1], values, "best_mean")


def all_pairs(group: Group, *, score="reward", margin=0.0, most=None, each=None) -> list[Group]:
    """Every pair whose scores are at least `margin` apart, the widest first.

    {(i, j): r_i - r_j >= margin, r_i > r_j}

    margin      0 (equal scores are still no pair)
    most        pairs of a group, the widest; None is all
    each        in how many pairs a response may be; None is any number
    Edge        equally wide pairs in the order of the responses
    Relations   n different scores make n (n - 1) / 2 pairs; most=1 is `best_worst`
    Departs     -
    Reference   -

    >>> from data_tools.records import Response
    >>> three = Group("?", [Response(str(r), scores={"r": r}) for r in (3.0, 2.5, 0.0)])
    >>> [[r.text for r in g.responses] for g in all_pairs(three, score="r", margin=1.0)]
    [['3.0', '0.0'], ['2.5', '0.0']]
    """
    values = scores(group, score)
    return paired(group, widest(labels.apart(values, margin=margin), values, most=most, each=each), values, "all_pairs")


def adjacent(group: Group, *, score="reward", margin=0.0) -> list[Group]:
    """Neighbours in the ranking: pairs that are hard to tell apart.

    margin      neighbours closer than this are left out; 0
    Edge        of equal scores the first stands for all
    Relations   n different scores make n - 1 pairs, whose margins add up to that of `best_worst`

    >>> from data_tools.records import Response
    >>> three = Group("?", [Response(str(r), scores={"r": r}) for r in (0.0, 3.0, 2.5)])
    >>> [[r.text for r in g.responses] for g in adjacent(three, score="r")]
    [['3.0', '2.5'], ['2.5', '0.0']]
    """
    values = scores(group, score)
    ranked = sorted({value: values.index(value) for value in values}.items(), reverse=True)
    chosen = [(i, j) for (a, i), (b, j) in zip(ranked, ranked[1:], strict=False) if a - b >= margin]
    return paired(group, chosen, values, "adjacent")


def thresholds(group: Group, *, good, bad, score="reward", most=None, each=None) -> list[Group]:
    """Every good response over every bad one.

    {(i, j): r_i >= good, r_j <= bad}

    good, bad   good > bad
    most        pairs of a group, the widest; None is all
    each        in how many pairs a response may be; None is any number
    Relations   a verifier of 0 and 1: any thresholds in between

    >>> from data_tools.records import Response
    >>> three = Group("?", [Response(str(r), scores={"r": r}) for r in (3.0, 2.5, 0.0)])
    >>> [[r.text for r in g.responses] for g in thresholds(three, score="r", good=3, bad=1)]
    [['3.0', '0.0']]
    """
    if not good > bad:
        raise ValueError(f"good should be higher than bad, found good={good} and bad={bad}")
    values = scores(group, score)
    chosen = [(i, j) for i, j in labels.apart(values) if values[i] >= good and values[j] <= bad]
    return paired(group, widest(chosen, values, most=most, each=each), values, "thresholds")


def on_policy_margin(group: Group, *, policy, score="reward", margin=1.0, most=None, source="generator") -> list[Group]:
    """Pairs of the policy's own responses, and of them with a teacher's, that are a margin apart (DNO).

    {(i, j): r_i - r_j >= margin, r_i > r_j, i or j is the policy's}

    policy      what a response's meta says under `source` if the policy wrote it
    margin      1 of the 6 points of the paper's scale
    most        pairs of a prompt, the widest; None is all
    source      "generator"
    Edge        two responses of teachers are never compared
    Relations   every response the policy's: `all_pairs`
    Departs     -
    Reference   Rosset et al., Direct Nash Optimization, arXiv:2404.03715, DNO-Prct (reconstructed)

    >>> from data_tools.records import Response
    >>> written = [("me", 5.0), ("teacher", 6.0), ("teacher", 2.0)]
    >>> three = Group("?", [Response(str(r), scores={"r": r}, meta={"generator": who}) for who, r in written])
    >>> [[r.text for r in g.responses] for g in on_policy_margin(three, policy="me", score="r")]       # not 6 over 2
    [['5.0', '2.0'], ['6.0', '5.0']]
    """
    values = scores(group, score)
    own = [note(group, r, source) == policy for r in group.responses]
    chosen = [(i, j) for i, j in labels.apart(values, margin=margin) if own[i] or own[j]]
    return paired(group, widest(chosen, values, most=most, each=None), values, "on_policy_margin")


def differential_information(group: Group, *, log_ratio, beta=0.1, seed=0) -> list[Group]:
    """A random response of the reference over one that the wanted policy would have written less (DID).

    y_w ~ pi_ref,   P(y_l = y) ∝ (pi_ref(y) / pi*(y))^beta over the others

    log_ratio   the score that holds log pi*(y) - log pi_ref(y), or a reward / KL weight, up to a constant
    beta        of the DPO that follows; 0.1
    seed        with the texts decides which, whatever their order
    Edge        the responses are samples of the reference; two draws of equal text make no pair
    Relations   then the optimum of DPO is pi*, although the preferred response is no better than the reference; beta -> 0 is a
                pair of two random responses
    Departs     the rejected response is drawn from the group's others by the rejection sampler of `rejection`, which is exact
                as the group grows
    Reference   Differential Information Distribution, arXiv:2505.23761

    >>> from data_tools.records import Response
    >>> group = Group("?", [Response(str(r), scores={"r": r}) for r in (0.0, -900.0, 900.0)])
    >>> sorted({g.responses[1].text for s in range(20) for g in differential_information(group, log_ratio="r", beta=9.0, seed=s)})
    ['-900.0', '0.0']
    """
    if not beta > 0:
        raise ValueError(f"beta should be positive, found {beta}")
    values = scores(group, log_ratio)
    order, random = shuffled(group, seed, "differential_information")
    drawn, _ = accept([-values[i] for i in order[1:]], n=1, beta=1 / beta, uniform=random.random)
    return paired(group, [(order[0], order[1 + k]) for k in drawn], values, "differential_information")
