"""Judge rewards in one protocol: models over test sets, with baselines, intervals, slices, and what they get wrong.

    report = bench({"mine": model, "judge": judge}, {"llmbar": load("llmbar.jsonl")}, train=load("train.jsonl"))
    write(report, "out")                                      # out/bench.json and out/bench.html

Scores and comparisons go one way: (K, K) margins for each group (`rewards.metrics`). Where one number for each response is
needed (lists, best of n), a comparison has the mean of P(i preferred to j) over the other responses.
"""
from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import vstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from data_tools.columns import nearest
from data_tools.labels import pairs as preferred_pairs
from data_tools.labels import wins_of
from data_tools.records import Group
from rewards import metrics, page
from rewards.base import Comparison, Reward, Row, ScoringError, as_reward, final_text, rows_of, user_text, values_of
from rewards.rewardbench import DOMAINS, SUBSETS, v1, v2

__all__ = ["TfidfLogistic", "Verdicts", "baselines", "bench", "characters", "draw", "tfidf_logistic", "verdicts", "write"]

Model = Reward | Comparison | Callable | str
SHOWN = 4000                                                  # characters of a text in the report


# ----------------------------------------------------------------------------------------------------------- baselines
def characters(text) -> int:
    """The number of characters: the longer response is the better."""
    return len(text)


def draw(prompt, text, *, seed=0) -> float:
    """A number in [0, 1) from the seed and the texts alone."""
    return int.from_bytes(blake2b(json.dumps([seed, prompt, text]).encode(), digest_size=6).digest()) / 2 ** 48


@dataclass(frozen=True)
class TfidfLogistic:
    """s = w^T tfidf(response): the words that the preferred responses have and the others do not."""
    vectorizer: TfidfVectorizer
    weights: np.ndarray
    pairs: int
    name: str = "tfidf_logistic"

    def settings(self) -> dict:
        return {"pairs": self.pairs, "words": len(self.weights)}

    def __call__(self, rows: Sequence[Row]) -> list[float]:
        return (self.vectorizer.transform([row.text for row in rows]) @ self.weights).tolist()


def tfidf_logistic(groups: Iterable[Group], *, regularisation: float = 0.1) -> TfidfLogistic:
    """Bradley-Terry on differences of TF-IDF features (words and word pairs, sub-linear, in two responses at least), without
    intercept; `regularisation` is scikit-learn's C."""
    pairs = [(final_text(group.responses[i].text), final_text(group.responses[j].text))
             for group in groups for i, j in preferred_pairs(wins_of(group))]
    if len(pairs) < 2:
        raise ValueError(f"the TF-IDF baseline needs at least two preferred pairs to train on, found {len(pairs)}: give labelled "
                         f"groups of two or more responses as `train`, or none")
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2)).fit([t for pair in pairs for t in pair])
    good, bad = (vectorizer.transform(side) for side in zip(*pairs, strict=True))
    half = len(pairs) // 2                                    # both classes must occur: turn half of the pairs round
    features, labels = vstack([(good - bad)[:half], (bad - good)[half:]]), [1] * half + [0] * (len(pairs) - half)
    fitted = LogisticRegression(C=regularisation, fit_intercept=False, max_iter=1000).fit(features, labels)
    return TfidfLogistic(vectorizer, fitted.coef_[0], len(pairs))


def baselines(train: Iterable[Group] | None = None, *, seed: int = 0) -> dict[str, Model]:
    """What every model is measured against."""
    found = {"baseline: longer": characters, "baseline: random": partial(draw, seed=seed)}
    return found if train is None else {**found, "baseline: TF-IDF": tfidf_logistic(train)}


# ------------------------------------------------------------------------------------------------------------- scoring
class Order(NamedTuple):
    """The order in which a comparison saw the responses, and what it said in that and in the reverse order."""
    orders: list[list[int]]                                   # response seen first, second, ...
    wins: list[np.ndarray]                                    # (K, K) P(i preferred to j)
    reverse: list[np.ndarray] | None


class Verdicts(NamedTuple):
    """What a model says about some groups; NaN where it says nothing, and why."""
    scores: list[np.ndarray]                                  # (K) of each group
    margins: list[np.ndarray]                                 # (K, K) of each group
    order: Order | None                                       # of a comparison
    reasons: list[str]                                        # one for each response or group without a score


def verdicts(model: Model, groups: Sequence[Group], *, swap: bool = True, seed: int = 0) -> Verdicts:
    """Score the groups with a reward, a comparison, or by the key of scores they have; what fails is marked, not made up.

    A comparison sees the responses of a group without labels and in an order drawn from their texts, because many files have
    the preferred response first; with `swap` it is asked again in the reverse order, for its position bias.
    """
    if hasattr(model, "compare"):
        orders = [drawn_order(group, seed) for group in groups]
        wins, reasons = asked(model, groups, orders)
        other = asked(model, groups, [order[::-1] for order in orders])[0] if swap else None
        return Verdicts([means(w) for w in wins], [metrics.margins_of_wins(w) for w in wins], Order(orders, wins, other), reasons)
    if isinstance(model, str):
        values = [r.scores.get(model) for g in groups for r in g.responses]
        names = {name for g in groups for r in g.responses for name in r.scores}
        if groups and model not in names:
            raise ValueError(f"no response has the score {model!r}{nearest(model, names)}; scores: "
                             f"{', '.join(sorted(names)) or 'none'}. Score the groups first, or give a reward instead of a name")
        values = [ScoringError(f"the stored score {model!r} is {v}") if v is None or not math.isfinite(v) else v for v in values]
    else:
        values = values_of(as_reward(model), rows_of(groups), "mark")
    numbers = iter([math.nan if isinstance(v, ScoringError) else v for v in values])
    scores = [np.array([next(numbers) for _ in g.responses], dtype=float) for g in groups]
    return Verdicts(scores, [metrics.margins_of_scores(s) for s in scores], None,
                    [str(v) for v in values if isinstance(v, ScoringError)])


def drawn_order(group: Group, seed: int) -> list[int]:
    """An order of the responses that depends on the seed and the texts alone, and not on the random baseline."""
    keys = [draw(user_text(group.prompt), final_text(r.text), seed=f"order {seed}") for r in group.responses]
    return sorted(range(len(keys)), key=keys.__getitem__)


def asked(model: Comparison, groups: Sequence[Group], orders: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], list[str]]:
    """`compared` on the responses in another order and without labels; the matrices are in the groups' own order."""
    matrices, reasons = compared(model, [replace(g, responses=[g.responses[k] for k in order], relevance=None, wins=None)
                                         for g, order in zip(groups, orders, strict=True)])
    back = [np.argsort(order) for order in orders]
    return [m[np.ix_(b, b)] for m, b in zip(matrices, back, strict=True)], reasons


def means(wins: np.ndarray) -> np.ndarray:
    """(K) mean of P(i preferred to j) over the other responses."""
    others = ~np.eye(len(wins), dtype=bool)
    return np.array([row[mask].mean() if mask.any() else math.nan for row, mask in zip(wins, others, strict=True)])


def compared(model: Comparison, groups: Sequence[Group]) -> tuple[list[np.ndarray], list[str]]:
    """P(i preferred to j) of each group; all NaN where the comparison fails, with the reason."""
    try:
        found = list(model.compare(groups))
    except Exception as error:
        if len(groups) > 1:
            each = [compared(model, [group]) for group in groups]
            return [m for matrices, _ in each for m in matrices], [r for _, reasons in each for r in reasons]
        found = [ScoringError(f"{type(error).__name__}: {error}") for _ in groups]
    if len(found) != len(groups):
        raise ScoringError(f"comparison {model.name!r} returned {len(found)} matrices for {len(groups)} groups")
    matrices, reasons = [], []
    for group, wins in zip(groups, found, strict=True):
        reason = str(wins) if isinstance(wins, ScoringError) else fault(wins, len(group.responses))
        matrices.append(np.full((len(group.responses),) * 2, math.nan) if reason else np.array(wins, dtype=float))
        reasons += [f"{group.meta.get('place', '')}: {reason}".lstrip(": ")] if reason else []
    return matrices, reasons


def fault(wins, size: int) -> str:
    """What is wrong with a matrix of P(i preferred to j), or nothing."""
    try:
        wins = np.array(wins, dtype=float)
    except (TypeError, ValueError):
        return "returned something that is no matrix of numbers"
    if wins.shape != (size, size):
        return f"returned a matrix of shape {wins.shape} for {size} responses"
    if ((wins < 0) | (wins > 1)).any():
        return "returned a probability outside 0 to 1"
    off = np.nanmax(np.abs(wins + wins.T - 1), initial=0.0, where=~np.eye(size, dtype=bool) & ~np.isnan(wins + wins.T))
    return f"P(i preferred to j) + P(j preferred to i) is off 1 by {off:.2g}" if off > 1e-6 else ""


# --------------------------------------------------------------------------------------------------------------- bench
def bench(models: Mapping[str, Model], sets: Mapping[str, Iterable[Group]], *, train: Iterable[Group] | None = None,
          slices: Sequence[str] = (), gold: str | None = None, paraphrase: str | None = None, swap: bool = True,
          errors: int = 20, seed: int = 0) -> dict:
    """Every model and every baseline on every set; a report of plain JSON for `write`.

    models      {name: Reward, Comparison, function of a row, or the key of scores that the responses already have}
    sets        {name: labelled groups}
    train       groups that the TF-IDF baseline learns from; without them there is no such baseline
    slices      keys of the groups' meta; accuracy is also given for each of their values
    gold        the score of the responses that is the true reward for best of n; None: the labels
    paraphrase  a key of the groups' meta; groups with the same value are the same question in other words, and have their
                responses in the same order
    swap        ask comparisons a second time with the responses in reverse, for position bias (twice the cost)
    errors      how many wrong pairs of each model are shown
    seed        of the random baseline, the order in which comparisons see responses, and the bootstrap
    """
    sets = {title: list(groups) for title, groups in sets.items()}
    everything = [g for groups in sets.values() for g in groups]
    check_keys("slices", slices, {key for g in everything for key in g.meta})
    check_keys("paraphrase", [paraphrase] if paraphrase else [], {key for g in everything for key in g.meta})
    check_keys("gold", [gold] if gold else [], {key for g in everything for r in g.responses for key in r.scores})
    named = {**baselines(train, seed=seed), **models}
    report = {"models": {name: facts(model) for name, model in named.items()}, "sets": {}, "overall": {}, "agreement": {},
              "settings": {"slices": list(slices), "gold": gold, "paraphrase": paraphrase, "swap": swap, "seed": seed}}
    margins, samples = defaultdict(list), defaultdict(list)
    for n, (title, groups) in enumerate(sets.items()):
        pairs = metrics.labelled_pairs(groups)
        decided = pairs.label > 0.5
        if not decided.any():
            raise ValueError(f"the set {title!r} has {len(groups)} groups and no pair with a preferred response: a set needs "
                             f"`relevance` or `wins` (see `prefopt data validate`)")
        found = {name: verdicts(model, groups, swap=swap, seed=seed) for name, model in named.items()}
        margin = {name: metrics.pair_margins(pairs, v.margins) for name, v in found.items()}
        texts = describe_pairs(groups, pairs)
        report["sets"][title] = {
            "groups": len(groups), "responses": sum(len(g.responses) for g in groups), "pairs": len(decided),
            "tied_labels": int((~decided).sum()),
            "agreement": metrics.agreement({name: m[decided] for name, m in margin.items()}),
            "models": {name: {
                **judged(groups, pairs, found[name], margin[name], texts, slices, gold, paraphrase, seed),
                "errors": shown(groups, pairs, found, margin, name, errors)} for name in named}}
        for name, m in margin.items():
            known = decided & ~np.isnan(m)
            margins[name].append(m[decided])
            if known.any():
                samples[name].append((float((m[known] > 0).mean()),
                                      metrics.resampled(m[known] > 0, pairs.group[known], seed=seed + n)))
    report["agreement"] = metrics.agreement({name: np.concatenate(m) for name, m in margins.items()}) if sets else {}
    for name, each in samples.items():
        report["overall"][name] = {"sets": len(each), "accuracy": float(np.mean([share for share, _ in each])),
                                   "interval": metrics.interval(np.mean([draws for _, draws in each], axis=0))}
    return plain(report)


def check_keys(what: str, keys: Iterable[str], known: set[str]) -> None:
    """An error for a key that nothing in any set has."""
    for key in keys:
        if key not in known:
            raise ValueError(f"{what} names {key!r}, which nothing in any set has{nearest(key, known)}; known: "
                             f"{', '.join(sorted(known)) or 'none'}")


def facts(model: Model) -> dict:
    if isinstance(model, str):
        return {"kind": "scores", "settings": {"key": model}}
    if hasattr(model, "compare"):
        return {"kind": "comparison", "settings": model.settings()}
    return {"kind": "reward", "settings": as_reward(model).settings()}


def describe_pairs(groups: Sequence[Group], pairs: metrics.Pairs) -> dict[str, np.ndarray]:
    """Lengths and style of the two responses of each pair."""
    counts = [metrics.style_counts([final_text(r.text) for r in g.responses]) for g in groups]
    first, second = (np.array([counts[n][k] for n, k in zip(pairs.group, side, strict=True)]) for side in pairs[1:3])
    return {"first": first[:, 0], "second": second[:, 0], "style": metrics.relative_difference(first, second)}


def judged(groups, pairs, found: Verdicts, margin, texts, slices, gold, paraphrase, seed) -> dict:
    """All that is said about one model on one set."""
    decided = pairs.label > 0.5
    out = {"accuracy": metrics.accuracy(margin[decided], pairs.group[decided], seed=seed),
           "slices": {key: metrics.by_slice(margin[decided], sliced(groups, pairs.group[decided], key), pairs.group[decided])
                      for key in slices if any(key in g.meta for g in groups)},
           "calibration": metrics.calibration(margin, pairs.label),
           "length": metrics.length_bias(margin, pairs.label, texts["first"], texts["second"]),
           "style": metrics.style_control(margin, pairs.label, texts["style"]),
           "unscored": {"responses": int(sum(np.isnan(s).sum() for s in found.scores)), "reasons": found.reasons[:5]}}
    longer = [(g, s) for g, s in zip(groups, found.scores, strict=True) if len(s) > 2]
    lists = [(s, grades) for g, s in longer if (grades := metrics.relevance_of(g))]
    if lists:
        out["lists"] = {**metrics.ranking(*zip(*lists, strict=True)), "ungraded": len(longer) - len(lists)}
    pools = [(s, true) for g, s in longer if (true := gold_of(g, gold))]
    if pools:
        out["best_of_n"] = {**metrics.over_optimisation(*zip(*pools, strict=True)), "ungraded": len(longer) - len(pools)}
    if found.order and any(len(m) > 2 for m in found.margins):
        out["cycles"] = metrics.cyclic_triples(found.margins)
    if found.order and found.order.reverse:
        out["position"] = position(pairs, found.order)
    if paraphrase and (linked := reworded(groups, found.margins, paraphrase)):
        out["paraphrase"] = metrics.consistency(*linked)
    if score := rewardbench(groups, pairs, found, margin):
        out["rewardbench"] = score
    return out


def sliced(groups: Sequence[Group], rows: Sequence[int], key: str) -> list[str]:
    """The value of a key of meta for each pair, as text; groups without it are a slice of their own."""
    return [str(groups[n].meta.get(key, "(none)")) for n in rows]


def gold_of(group: Group, key: str | None) -> list[float] | None:
    grades = metrics.relevance_of(group) if key is None else [r.scores.get(key) for r in group.responses]
    return None if grades is None or None in grades else grades


def reworded(groups: Sequence[Group], margins: Sequence[np.ndarray], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Margins of the same pairs under two wordings, or None where no two groups share a value of the key."""
    linked = defaultdict(list)
    for group, m in zip(groups, margins, strict=True):
        if key in group.meta:
            linked[str(group.meta[key])].append(m[np.triu_indices(len(m), 1)])
    both = [(a, b) for wordings in linked.values() for a, b in pairwise(wordings)]
    if uneven := [len(a) for a, b in both if len(a) != len(b)]:
        raise ValueError(f"groups that share a value of {key!r} should have the same responses in the same order, and "
                         f"{len(uneven)} of {len(both)} linked groups differ in their number of responses")
    return tuple(map(np.concatenate, zip(*both, strict=True))) if both else None


def rewardbench(groups: Sequence[Group], pairs: metrics.Pairs, found: Verdicts, margin: np.ndarray) -> dict | None:
    """The protocol that the subsets belong to, if they do. A comparison gets half (a quarter) where it cannot decide, and its
    mean P(i preferred to j) stands for the ratings of Ties."""
    subsets = [str(g.meta.get("subset")).lower() for g in groups]
    if set(subsets) <= {s.lower() for s in SUBSETS} and np.array_equal(pairs.group, range(len(groups))):
        return {"version": 1, **v1(subsets, margin, np.zeros(len(margin)), undecided=0.5 if found.order else 0.0)}
    if set(subsets) <= {d.lower() for d in DOMAINS} and all("num_correct" in g.meta for g in groups):
        items = [{**g.meta, "scores": s} for g, s in zip(groups, found.scores, strict=True)]
        return {"version": 2, **v2(items, unscored=0.25 if found.order else 0.0)}
    return None


def position(pairs: metrics.Pairs, order: Order) -> dict:
    """Position bias from P(the response seen first wins) in both orders."""
    first, swapped, label = [], [], []
    for n, i, j, p in zip(*pairs, strict=True):
        a, b, p = (i, j, p) if order.orders[n].index(i) < order.orders[n].index(j) else (j, i, 1 - p)
        first.append(order.wins[n][a, b])
        swapped.append(order.reverse[n][b, a])
        label.append(p)
    return metrics.position_bias(first, swapped, label)


def shown(groups, pairs, found: Mapping[str, Verdicts], margin: Mapping[str, np.ndarray], name: str, limit: int) -> list[dict]:
    """The pairs that a model gets most confidently wrong, with their texts."""
    decided = np.flatnonzero(pairs.label > 0.5)
    out = []
    for row in decided[metrics.worst(margin[name][decided])[:limit]]:
        n, i, j = (int(column[row]) for column in pairs[:3])
        group = groups[n]
        out.append({"place": group.meta.get("place", f"group {n + 1}"), "prompt": clip(user_text(group.prompt)),
                    "chosen": clip(final_text(group.responses[i].text)), "rejected": clip(final_text(group.responses[j].text)),
                    "label": pairs.label[row], "margin": margin[name][row],
                    "scores": [found[name].scores[n][i], found[name].scores[n][j]],
                    "also_wrong": [other for other, m in margin.items() if other != name and m[row] <= 0]})
    return out


def clip(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} [{len(text) - SHOWN} characters more]"


# ------------------------------------------------------------------------------------------------------------- writing
def plain(value):
    """The value as JSON: numpy's numbers as Python's, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(report: dict, out: str | Path) -> tuple[Path, Path]:
    """`out`/bench.json and `out`/bench.html."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "bench.html").write_text(page.render(report), encoding="utf-8", errors="replace")
    return out / "bench.json", out / "bench.html"
