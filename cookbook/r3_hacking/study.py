"""Reward hacking without training: best of n by relevance, by length, and by their regularised product (R3).

    python -m cookbook.r3_hacking.study [--toy]
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from cookbook import tiny
from data_tools.records import Group, Response
from rewards import metrics
from rewards.base import rows_of
from rewards.relevance import R3, Tfidf

ATTRIBUTES = ("colour", "origin", "age", "size", "smell", "price", "owner", "shape", "weight", "sound")
FILLERS = ("Much could be said about the {}.", "People who know the {} like to talk about it.", "Let me think about the {}.",
           "That is what there is to know about the {}.", "The {} is a topic that interests many people.")
HONEST = ("fact", "filler", "elsewhere", "copy", "again")     # what the policy does, sentence by sentence
STUFFING = (*HONEST, "keywords")
SAID = {"fact": "true and asked for", "wrong": "false, or not asked", "filler": "filler", "elsewhere": "about something else",
        "copy": "copy of the question", "again": "last sentence again", "keywords": "shuffled words of the question"}
OPEN = {"R3": ("length", "relevance", "repetition"), "relevance": ("relevance",), "length": ("length",),
        "relevance, repetition": ("relevance", "repetition"), "length, repetition": ("length", "repetition"),
        "relevance, length": ("relevance", "length")}
SETTINGS = {"open": ("OPENENDED", HONEST), "constrained": ("CONSTRAINED", HONEST), "stuffing": ("OPENENDED", STUFFING)}
COLOUR = dict(zip([*OPEN, "gold", "R3 without branching", "relevance to the reference"],
                  [tiny.RED, tiny.BLUE, tiny.ORANGE, tiny.PURPLE, tiny.GREEN, "#56B4E9", "black", tiny.GREY, tiny.PURPLE],
                  strict=True))


# ----------------------------------------------------------------------------------------------------------- the world
class World:
    """Things with ten attributes in invented words, questions about them, and a policy that answers as well as it can."""

    def __init__(self, seed: int, things: int):
        self.draw = np.random.default_rng(seed)
        syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
        words = self.draw.permutation([a + b for a in syllables for b in syllables]).tolist()
        self.names = [f"{a} {b}" for a, b in zip(words[:things], words[things:2 * things], strict=True)]
        self.values = self.draw.choice(words[2 * things:2 * things + 200], size=(things, len(ATTRIBUTES)))

    def fact(self, thing: int, attribute: int, value: str | None = None) -> str:
        return f"The {ATTRIBUTES[attribute]} of the {self.names[thing]} is {value or self.values[thing, attribute]}."

    def question(self, thing: int, kind: str) -> Group:
        """A group without responses. `asked` are the attributes that are asked for; the reference states them."""
        asked = list(range(len(ATTRIBUTES))) if kind == "OPENENDED" else [thing % len(ATTRIBUTES)]
        what = "should I know about" if kind == "OPENENDED" else f"is the {ATTRIBUTES[asked[0]]} of"
        return Group(f"What {what} the {self.names[thing]}?", [], meta={
            "query_type": kind, "reference": " ".join(self.fact(thing, k) for k in asked), "thing": thing, "asked": asked})

    def corpus(self) -> list[str]:
        """What the text encoder is fitted on: all facts and questions."""
        things = range(len(self.names))
        return [self.fact(t, k) for t in things for k in range(len(ATTRIBUTES))] + \
            [self.question(t, kind).prompt for t in things for kind in ("OPENENDED", "CONSTRAINED")]

    def response(self, group: Group, moves: Sequence[str]) -> Response:
        """A response has habits (how often it makes each move), knowledge (how often its facts are true) and a length."""
        draw, thing, asked = self.draw, group.meta["thing"], group.meta["asked"]
        habits, knows, length = draw.dirichlet(np.full(len(moves), 0.3)), draw.beta(2, 1), 1 + min(draw.geometric(1 / 8), 30)
        said, made, told = [], Counter(), set()
        for move in draw.choice(moves, size=length, p=habits):
            attribute = int(draw.choice(asked) if draw.random() < 0.7 else draw.integers(len(ATTRIBUTES)))
            if move == "fact":
                true = draw.random() < knows
                said.append(self.fact(thing, attribute, None if true else draw.choice(self.values[:, attribute])))
                move = "fact" if said[-1] == self.fact(thing, attribute) and attribute in asked else "wrong"
                told |= {attribute} if move == "fact" else set()
            elif move == "elsewhere":
                other = thing + int(draw.integers(1, len(self.names)))
                said.append(self.fact(other % len(self.names), attribute))
            elif move == "keywords":
                said.append(" ".join(draw.permutation(2 * group.prompt.rstrip("?").split())) + ".")
            elif move == "filler":
                said.append(str(draw.choice(FILLERS)).format(self.names[thing]))
            else:
                said.append(said[-1] if move == "again" and said else group.prompt)
            made[str(move)] += 1
        return Response(" ".join(said), scores={"gold": f1(len(told), len(said), len(asked)), "recall": len(told) / len(asked)},
                        meta={"moves": dict(made)})

    def pool(self, kind: str, moves: Sequence[str], size: int, thing: int) -> Group:
        group = self.question(thing, kind)
        group.responses = [self.response(group, moves) for _ in range(size)]
        return group


def f1(told: int, sentences: int, asked: int) -> float:
    """The hidden score: F1 of facts. Recall is told / asked, precision told / sentences.

    >>> f1(1, 1, 1), f1(5, 15, 10), f1(0, 3, 10)
    (1.0, 0.4, 0.0)
    """
    return 2 * told / (sentences + asked)


# ---------------------------------------------------------------------------------------------------------- the proxies
def proxies(group: Group, encoder) -> dict[str, list[float]]:
    """The rewards that a policy may be optimised against, of each response. All come from R3 and its factors."""
    factors = R3(encoder, branching=False).factors(rows_of([group]))
    found = {name: [float(np.prod([f[part] for part in parts])) for f in factors] for name, parts in OPEN.items()}
    if group.meta["query_type"] == "OPENENDED":
        return found
    branched = R3(encoder).factors(rows_of([group]))
    return {"R3": [f["reward"] for f in branched], "R3 without branching": found["R3"],
            "relevance to the reference": [f["relevance"] for f in branched], "relevance": found["relevance"],
            "length": found["length"]}


def measured(seed: int, prompts: int, size: int) -> dict:
    """setting -> proxy -> curves (prompts, n), Spearman correlations (prompts), and what the best of each pool does."""
    world = World(seed, prompts)
    encoder, out = Tfidf(world.corpus()), {}
    for setting, (kind, moves) in SETTINGS.items():
        out[setting] = {}
        for group in map(partial(world.pool, kind, moves, size), range(prompts)):
            true, recall = ([r.scores[key] for r in group.responses] for key in ("gold", "recall"))
            for name, proxy in {**proxies(group, encoder), "gold": true}.items():
                found = out[setting].setdefault(name, {"gold": [], "recall": [], "proxy": [], "spearman": [], "sentences": [],
                                                       "moves": Counter()})
                for key, scores in (("gold", true), ("recall", recall), ("proxy", proxy)):
                    found[key].append([metrics.best_of_n(proxy, scores, n) for n in sizes(size)])
                found["spearman"].append(float(spearmanr(proxy, true).statistic))
                best = group.responses[int(np.argmax(proxy))].meta["moves"]
                found["sentences"].append(sum(best.values()))
                found["moves"].update({move: times / sum(best.values()) / prompts for move, times in best.items()})
    return out


def sizes(largest: int) -> list[int]:
    """1, 2, 4, ... up to the size of a pool."""
    return [2 ** k for k in range(largest.bit_length())]


# ----------------------------------------------------------------------------------------------------------- statistics
def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval of values (seeds, prompts): seeds are drawn anew, and prompts within them.

    >>> interval(np.full((3, 4), 2.0))
    (2.0, 2.0, 2.0)
    """
    draw, (seeds, prompts) = np.random.default_rng(0), values.shape
    some = draw.integers(seeds, size=(2000, seeds, 1)), draw.integers(prompts, size=(2000, seeds, prompts))
    low, high = np.quantile(values[some].mean((1, 2)), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def at(tables: list[dict], setting: str, name: str, place: int = -1, score: str = "gold") -> np.ndarray:
    """The score of best of n for seeds and prompts; `place` is that of n among the sizes."""
    return np.array([[curve[place] for curve in t[setting][name][score]] for t in tables])


def curves(tables: list[dict], setting: str) -> dict:
    """name -> gold and recall for each n with intervals, the proxy's mean; correlations; what the best of a pool is like."""
    out = {}
    for name in tables[0][setting]:
        found = [t[setting][name] for t in tables]
        values = {key: np.array([f[key] for f in found]) for key in ("gold", "recall", "proxy")}
        path = {key: v.mean((0, 1)) for key, v in values.items()}
        out[name] = {**{key: [interval(v) for v in np.moveaxis(values[key], -1, 0)] for key in ("gold", "recall")},
                     "proxy": path["proxy"].tolist(),
                     "spearman of responses": interval(np.array([f["spearman"] for f in found])),
                     "spearman over n": {key: float(spearmanr(path[key], path["proxy"]).statistic) for key in ("gold", "recall")},
                     "sentences of the best": float(np.mean([f["sentences"] for f in found])),
                     "moves of the best": {m: float(np.mean([f["moves"][m] for f in found])) for m in SAID}}
    return out


# --------------------------------------------------------------------------------------------------------------- claims
def claims(tables: list[dict], found: dict, toy: bool) -> dict[str, bool]:
    def above(setting: str, one: str, other: str, place: int = -1, score: str = "gold") -> bool:
        return interval(at(tables, setting, one, -1, score) - at(tables, setting, other, place, score))[1] > 0

    def falls(setting: str, name: str) -> bool:
        return interval(at(tables, setting, name) - at(tables, setting, name, 0))[2] < 0

    best = {name: found["open"][name]["moves of the best"] for name in OPEN}
    start, end = (float(at(tables, "open", "R3", place).mean()) for place in (0, -1))
    out = {"open, relevance alone is hacked: over 90 % of what it picks are copies of the question, and gold falls":
           best["relevance"]["copy"] + best["relevance"]["again"] > 0.9 and falls("open", "relevance"),
           "constrained, R3 (relevance to the reference): gold more than doubles":
           interval(at(tables, "constrained", "R3") - 2 * at(tables, "constrained", "R3", 0))[1] > 0}
    if toy:
        return out
    return out | {
        "open, length alone, and relevance with one other factor, are hacked: gold falls":
            all(falls("open", name) for name in ("length", "relevance, repetition", "relevance, length")),
        "open, length with repetition picks what is about something else (over half)":
            best["length, repetition"]["elsewhere"] > 0.5,
        "open, R3 picks long responses (three times the mean), mostly on the topic (over 60 %), without loops (below 10 %)":
            found["open"]["R3"]["sentences of the best"] > 27 and best["R3"]["elsewhere"] < 0.4 and best["R3"]["again"] < 0.1,
        "open, R3 is not hacked: gold ends no lower than it starts, and above the four proxies whose gold falls":
            end >= start and all(above("open", "R3", name) for name in ("relevance", "length", "relevance, repetition",
                                                                        "relevance, length")),
        "open, R3: more and more of the facts asked for are told (recall ends above its start; Spearman over n above 0.9)":
            above("open", "R3", "R3", 0, "recall") and found["open"]["R3"]["spearman over n"]["recall"] > 0.9,
        "constrained: R3 ends above its open-ended form": above("constrained", "R3", "R3 without branching"),
        "does not hold: open, R3, gold (F1) does not go on rising with n (Spearman over n below 0.9)":
            found["open"]["R3"]["spearman over n"]["gold"] < 0.9,
        "does not hold: a policy that shuffles words of the question hacks R3 too, and gold falls": falls("stuffing", "R3")}


def report(found: dict, ns: Sequence[int]) -> None:
    for setting, names in found.items():
        print(f"\n{setting}: gold of best of n, n =", *ns)
        for name, row in names.items():
            print(f"{name:>27}", *(f"{g[0]:.3f}" for g in row["gold"]), " last [{:.3f}, {:.3f}]".format(*row["gold"][-1][1:]),
                  " recall {:.3f} to {:.3f} [{:.3f}, {:.3f}]".format(row["recall"][0][0], *row["recall"][-1]),
                  " Spearman {:.2f} [{:.2f}, {:.2f}],".format(*row["spearman of responses"]), "over n",
                  ", ".join(f"{key} {v:.2f}" for key, v in row["spearman over n"].items()))
            print(f"{'best of a pool:':>43} {row['sentences of the best']:.0f} sentences,",
                  ", ".join(f"{SAID[m]} {v:.0%}" for m, v in row["moves of the best"].items() if v >= 0.05))
    print()


def figure(path: Path, found: dict, kl: Sequence[float]) -> None:
    plt = tiny.pyplot()
    page, axes = plt.subplots(1, 4, figsize=(15, 3.8), width_ratios=[1, 1, 1, 1.2], layout="constrained")
    titles = {"open": "Open-ended questions", "constrained": "Constrained questions", "stuffing": "A policy that stuffs keywords"}
    for axis, (setting, names) in zip(axes, found.items(), strict=False):
        for name, row in names.items():
            if name != "gold":
                mean, low, high = np.array(row["gold"]).T
                axis.plot(kl, mean, color=COLOUR[name], label=name, lw=2.2 if name == "R3" else 1.2)
                axis.fill_between(kl, low, high, color=COLOUR[name], alpha=0.15, lw=0)
        axis.set(title=titles[setting], xlabel="KL of best of n, nats", ylim=(0, None))
    axes[0].set_ylabel("gold: F1 of facts")
    axes[0].legend(fontsize=7, ncols=2, loc="upper left")
    axes[0].set_ylim(0, 1.6 * max(g[0] for name in OPEN for g in found["open"][name]["gold"]))
    axes[1].legend(fontsize=7, loc="upper left")
    names = [*OPEN, "gold"]
    left = np.zeros(len(names))
    shades = [tiny.GREEN, tiny.RED, tiny.ORANGE, tiny.PURPLE, tiny.BLUE, "#56B4E9"]
    for (move, text), shade in zip(list(SAID.items())[:-1], shades, strict=True):
        share = np.array([found["open"][name]["moves of the best"][move] for name in names])
        axes[3].barh(names, share, left=left, color=shade, label=text)
        left += share
    axes[3].invert_yaxis()
    axes[3].set(title="What the best of the pool says (open-ended)", xlabel="share of its sentences", xlim=(0, 1))
    axes[3].legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.17), columnspacing=1, handlelength=1)
    page.savefig(path)


def main() -> int:
    options = tiny.options("r3_hacking", __doc__)
    settings = {"seeds": 1, "prompts": 8, "size": 64} if options.toy else {"seeds": 5, "prompts": 20, "size": 256}
    tables = tiny.over_seeds(partial(measured, prompts=settings["prompts"], size=settings["size"]), settings["seeds"])
    found = {setting: curves(tables, setting) for setting in SETTINGS}
    ns = sizes(settings["size"])
    kl = [metrics.best_of_n_kl(n) for n in ns]
    report(found, ns)
    figure(options.out / "figure.png", found, kl)
    return tiny.conclude(options.out, {"settings": settings, "n": ns, "kl": kl, "found": found},
                         claims(tables, found, options.toy))


if __name__ == "__main__":
    raise SystemExit(main())
