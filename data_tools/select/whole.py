"""Which groups of a whole data set to keep. Each rule reads the groups twice: once for a few numbers of each, once to keep
some of them, in the order in which they come."""
from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from data_tools.describe import content
from data_tools.labels import wins_of
from data_tools.records import Group
from data_tools.rules import again, draw, place, scores

__all__ = ["coverage", "easiest", "hardest", "length_balanced", "middle", "sample"]


def kept(groups: Iterable[Group], places: Iterable[int]) -> Iterator[Group]:
    """The groups at these places, in their own order."""
    wanted = set(map(int, places))
    return (group for k, group in enumerate(groups) if k in wanted)


def by_mean(groups: Iterable[Group], score: str, n: int) -> np.ndarray:
    """Places by rising mean score, equal ones in order; at least n."""
    def mean(group):
        values = scores(group, score)
        if not values:
            raise ValueError(f"{place(group)}there are no responses, so nothing says how hard it is: generate and score first")
        return math.fsum(values) / len(values)

    return enough(np.argsort(array("d", map(mean, again(groups))), kind="stable"), n)


def enough(found: np.ndarray, n: int) -> np.ndarray:
    if not 1 <= n <= len(found):
        raise ValueError(f"cannot take n={n} of {len(found)} groups")
    return found


def hardest(groups: Iterable[Group], *, n, score="reward") -> Iterator[Group]:
    """The n prompts on which the responses score lowest in the mean (BLEUBERI).

    n           5,000 of 50,000 in the paper
    score       of the model that is to be trained, against references
    Edge        equal ones in the order in which they come; passes twice
    Departs     the mean of all responses; the paper takes one of each prompt
    Reference   Chang et al., BLEUBERI, arXiv:2505.11080

    >>> from data_tools.records import Response
    >>> groups = [Group(str(r), [Response("", scores={"bleu": r})]) for r in (0.3, 0.1, 0.2)]
    >>> [g.prompt for g in hardest(groups, n=2, score="bleu")]
    ['0.1', '0.2']
    """
    return kept(groups, by_mean(groups, score, n)[:n])


def easiest(groups: Iterable[Group], *, n, score="reward") -> Iterator[Group]:
    """The n prompts on which the responses score highest in the mean.

    n           groups to keep
    Edge        of equal ones the later; passes twice
    Relations   without what `hardest` would keep of all but n

    >>> from data_tools.records import Response
    >>> groups = [Group(str(r), [Response("", scores={"bleu": r})]) for r in (0.3, 0.1, 0.2)]
    >>> [g.prompt for g in easiest(groups, n=2, score="bleu")]
    ['0.3', '0.2']
    """
    return kept(groups, by_mean(groups, score, n)[::-1][:n])


def middle(groups: Iterable[Group], *, n, score="reward") -> Iterator[Group]:
    """The n prompts whose mean scores are around the median.

    n           groups to keep
    Edge        of an odd rest one more is left out above than below; passes twice

    >>> from data_tools.records import Response
    >>> groups = [Group(str(r), [Response("", scores={"bleu": r})]) for r in (0.3, 0.1, 0.2)]
    >>> [g.prompt for g in middle(groups, n=1, score="bleu")]
    ['0.2']
    """
    found = by_mean(groups, score, n)
    start = (len(found) - n) // 2
    return kept(groups, found[start:start + n])


def sample(groups: Iterable[Group], *, n, seed=0) -> Iterator[Group]:
    """n groups at random.

    n           groups to keep
    seed        with the texts decides which: a group is in or out whatever the order of the others
    Edge        passes twice
    Relations   a smaller n takes a part of the same

    >>> groups = [Group(str(k), []) for k in range(10)]
    >>> few, more = ([g.prompt for g in sample(groups, n=n)] for n in (2, 5))
    >>> len(more), set(few) <= set(more)
    (5, True)
    """
    draws = array("d", (draw(group, seed, "sample") for group in again(groups)))
    return kept(groups, enough(np.argsort(draws, kind="stable"), n)[:n])


def coverage(groups: Iterable[Group], *, n, seed=0) -> Iterator[Group]:
    """n prompts that leave none far away: greedy k-centre over TF-IDF of the prompts.

    c_1 at random,   c_{k+1} = argmax_x min_{j <= k} |x - c_j|,   x the TF-IDF vector of length 1

    n           groups to keep
    seed        with the texts decides the first
    Edge        copies of a prompt come last; prompts without a word are copies of each other; passes twice
    Relations   no prompt is more than twice as far from a chosen one as with the best n
    Departs     words are hashed to 2^18 places; the vectors are held, about 12 bytes a word
    Reference   Gonzalez 1985

    >>> [g.prompt for g in coverage([Group(t, []) for t in ("red fox", "red fox", "blue sky")], n=2)][-1]
    'blue sky'
    """
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    draws = array("d", (draw(group, seed, "coverage") for group in again(groups)))
    enough(draws, n)
    counts = HashingVectorizer(n_features=2 ** 18, alternate_sign=False, norm=None).transform(content(g.prompt) for g in groups)
    x = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    return kept(groups, centres(x, n, int(np.argmin(draws))))


def centres(x, n: int, first: int) -> list[int]:
    """Rows of a sparse matrix by greedy k-centre."""
    squares = np.asarray(x.multiply(x).sum(1)).ravel()
    chosen, distance = [], np.full(len(squares), np.inf)
    while len(chosen) < n:
        k = int(np.argmax(distance)) if chosen else first
        chosen.append(k)
        distance = np.minimum(distance, np.maximum(squares + squares[k] - 2 * (x @ x[k].toarray().ravel()), 0))
        distance[k] = -1                                      # not again
    return chosen


def length_balanced(groups: Iterable[Group], *, width=0.25, seed=0) -> Iterator[Group]:
    """Pairs of which the longer response is preferred as often as the shorter, at every ratio of lengths.

    |log(length of preferred / length of the other)| in steps of `width`; in each, as many longer as shorter ones are kept

    width       0.25: within a step lengths differ by a factor of 1.28
    seed        with the texts decides which of the more frequent kind go
    Edge        ties and equally long responses stay; a group that is no labelled pair is an error; passes twice
    Relations   no rule that reads the two lengths' ratio in steps of `width` is right more often than half the time

    >>> from data_tools.records import Response
    >>> pairs = [Group(str(k), [Response("long"), Response("a")], [1.0, 0.0]) for k in range(3)]
    >>> pairs.append(Group("3", [Response("long"), Response("b")], [0.0, 1.0]))
    >>> sum(g.relevance == [1.0, 0.0] for g in length_balanced(pairs))
    1
    """
    if not width > 0:
        raise ValueError(f"width should be positive, found {width}")
    steps, draws = array("q"), array("d")
    for group in again(groups):
        steps.append(length_step(group, width))
        draws.append(draw(group, seed, "length_balanced"))
    step, order = np.array(steps), np.argsort(draws, kind="stable")
    places = [np.flatnonzero(step == 0)]
    for size in np.unique(abs(step[step != 0])):
        sides = [order[step[order] == s] for s in (size, -size)]
        places += [side[:min(map(len, sides))] for side in sides]
    return kept(groups, np.concatenate(places))


def length_step(group: Group, width: float) -> int:
    """Which step of log length ratio a pair is in, counted from 1; negative if the shorter is preferred, 0 without either."""
    wins = wins_of(group)
    if len(wins) != 2 or wins[0][1] is None:
        raise ValueError(f"{place(group)}length_balanced takes labelled pairs, and this is a group of {len(wins)}"
                         f"{' without a label' if len(wins) == 2 else ''}: make pairs first, with best_worst or all_pairs")
    a, b = (len(content(r.text)) for r in group.responses)
    if wins[0][1] == 0.5 or a == b:
        return 0
    step = 1 + math.floor(abs(math.log(max(a, 1) / max(b, 1))) / width)
    return step if (a > b) == (wins[0][1] > 0.5) else -step
