"""SparsePO on a language in which one token of ten carries the preference: do the learned masks find it?

    python -m cookbook.sparsepo_masks.study [--toy]
"""
from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cookbook import tiny
from data_tools.batch import Batch
from data_tools.collate import Encoding, collate
from data_tools.records import Group, Response
from prefopt.checkpoints import read_parts
from prefopt.config import assemble
from prefopt.forward import fill, forward
from prefopt.models import Models

LENGTH, FILLERS, OPINIONS = 10, 16, 4                         # words of a response; opinions that may follow a cue
CUES = {"says": 0.25, "shouts": 1.0}                          # how much the opinion that follows counts
FIRST = FILLERS + len(CUES)                                   # number of the first opinion
WORDS = [*(f"f{i}" for i in range(FILLERS)), *CUES, *(f"{cue[:-1]}{i}" for cue in CUES for i in range(OPINIONS))]
SPARSE = 0.05                                                 # a mask below this counts as off
MASK_LR = 5e-3                                                # of the masks; the policy's is 1e-3
MAIN = 0.01                                                   # the L1 weight of the claims


def arms(weights: list[float]) -> dict[str, tuple[str, dict]]:
    """Name -> recipe and departures. Both masks of a recipe get the same L1 weight."""
    def l1(x: float) -> dict:
        return {"l1_reward": x, "l1_kl": x}

    return {"DPO": ("dpo", {"beta": 0.8}), **{f"L1 {x:g}": ("sparsepo", l1(x)) for x in weights},
            f"two masks, L1 {MAIN:g}": ("sparsepo_independent", l1(MAIN))}


# ------------------------------------------------------------------------------------------------------------- language
class Language:
    """Ten words: filler from a random chain and, at a random place, one cue followed by one opinion.

    Each cue has opinions of its own. The value of a response is that of its opinion: between -2 and 2 after `shouts`,
    between -1/2 and 1/2 after `says`.
    """

    def __init__(self, seed: int):
        self.draw = np.random.default_rng(seed)
        self.chain = self.draw.dirichlet(np.ones(FILLERS), size=FILLERS).cumsum(1)
        self.tokenizer = tiny.tokenizer([*WORDS, "?"])

    def responses(self, n: int) -> np.ndarray:
        """(n, 10) numbers of words."""
        place, cue, opinion = (self.draw.integers(high, size=n) for high in (LENGTH - 1, len(CUES), OPINIONS))
        word, out = self.draw.integers(FILLERS, size=n), []
        for t in range(LENGTH):
            word = (self.draw.random((n, 1)) > self.chain[word]).sum(1).clip(max=FILLERS - 1)
            out.append(np.where(t == place, FILLERS + cue, np.where(t == place + 1, FIRST + OPINIONS * cue + opinion, word)))
        return np.stack(out, 1)

    def value(self, responses: np.ndarray) -> np.ndarray:
        return np.outer(list(CUES.values()), np.linspace(-2, 2, OPINIONS)).flatten()[responses.max(1) - FIRST]

    def text(self, response: np.ndarray) -> str:
        return " ".join(WORDS[i] for i in response)

    def pairs(self, n: int, *, noise: bool) -> list[Group]:
        """Pairs of different values with Bradley-Terry labels or, without noise, with the better response preferred."""
        one, other = self.responses(n), self.responses(n)
        gap = self.value(one) - self.value(other)
        first = self.draw.random(n) < 1 / (1 + np.exp(-gap)) if noise else gap > 0
        return [Group("?", [Response(" " + self.text(a)), Response(" " + self.text(b))], [1.0, 0.0] if f else [0.0, 1.0])
                for a, b, f, g in zip(one, other, first, gap, strict=True) if g]

    def batch(self, responses: np.ndarray) -> Batch:
        return collate([Group("?", [Response(" " + self.text(r)) for r in responses])], self.tokenizer,
                       Encoding(add_eos=False))


# ---------------------------------------------------------------------------------------------------------------- runs
def study(folder: Path, warm_up: int, steps: int, weights: list[float], seed: int) -> tuple[dict, dict]:
    """Every arm trained on the same pairs; name -> measurements, and the masks on a few responses for the figure."""
    world, reference = Language(seed), folder / f"reference-{seed}"
    model = tiny.language_model(len(world.tokenizer), width=32, seed=seed)
    tiny.warm_up(model, ["? " + world.text(r) for r in world.responses(4000)], world.tokenizer, steps=warm_up, seed=seed)
    model.save_pretrained(reference)
    world.tokenizer.save_pretrained(reference)
    data = {"train": tiny.write(folder / f"pairs-{seed}.jsonl", world.pairs(40 * steps, noise=True)),
            "eval": tiny.write(folder / f"held-out-{seed}.jsonl", world.pairs(500, noise=False)), "cache_reference": True}
    settings = {"lr": 1e-3, "groups_per_step": 32, "steps": steps, "seed": seed, "eval_every": steps,
                "modules": {"lr": MASK_LR}}
    responses, found, strips = world.responses(300), {}, {}
    for name, (recipe, departures) in arms(weights).items():
        out = folder / f"run-{seed}-{name}"
        result = tiny.run(out, reference, recipe, departures, data, settings)
        models, batch = tiny.trained(out, reference), world.batch(responses)
        seen = masks(recipe, departures, models, batch, out / "model")
        found[name] = {"accuracy": result.metrics["eval/accuracy"],
                       **moved(models, batch, responses), **{k: contrast(m, responses) for k, m in seen.items()}}
        strips[name] = seen.get("reward_mask")
    activation = fill(models, batch, {"activation_mask"})["activation_mask"][:, 1:].numpy()
    found["MaPO, not trained"] = {"reward_mask": contrast(activation, responses)}
    strips["MaPO"] = activation
    loud = (responses == FILLERS + 1).any(1)
    rows = [*np.flatnonzero(~loud)[:2], *np.flatnonzero(loud)[:2]]
    return found, {"texts": [world.text(r).split() for r in responses[rows]],
                   "masks": {name: mask[rows] for name, mask in strips.items() if mask is not None}}


@torch.no_grad()
def masks(recipe: str, departures: dict, models: Models, batch: Batch, folder: Path) -> dict[str, np.ndarray]:
    """The masks (n, 10) that training saved beside the model, on the responses of a batch; none for DPO."""
    objective = assemble(recipe, departures)
    if not objective.modules():
        return {}
    trunk = models.policy_model()
    for module in objective.modules():
        module.setup(layers=trunk.layer_count, width=trunk.width)
    read_parts(folder, objective)
    batch = forward(models, batch, {"states_ref"})
    return {name: part(batch["states_ref"], batch["mask"])[:, 1:].numpy()
            for name, part in objective.providers.items() if part in objective.modules()}


@torch.no_grad()
def moved(models: Models, batch: Batch, responses: np.ndarray) -> dict[str, float]:
    """Mean KL(reference || policy) at the opinions and at all other tokens, in nats."""
    kl = forward(models, batch, {"token_kl"})["token_kl"][:, 1:].numpy()
    opinion = responses >= FIRST
    return {"kl_opinions": float(kl[opinion].mean()), "kl_others": float(kl[~opinion].mean())}


def contrast(mask: np.ndarray, responses: np.ndarray) -> dict[str, float]:
    """Mean mask at opinions after each cue and elsewhere, and the share of tokens whose mask is off.

    >>> contrast(np.array([[0.0, 0.0, 2.0]]), np.array([[0, FILLERS + 1, FIRST]]))
    {'says': 0.0, 'shouts': 2.0, 'opinions': 2.0, 'others': 0.0, 'off': 0.6666666666666666}
    """
    opinion = responses >= FIRST
    after = {cue: np.pad(responses == FILLERS + i, ((0, 0), (1, 0)))[:, :-1] for i, cue in enumerate(CUES)}
    return {**{cue: float(mask[here].mean()) if here.any() else 0.0 for cue, here in after.items()},
            "opinions": float(mask[opinion].mean()), "others": float(mask[~opinion].mean()),
            "off": float((mask < SPARSE).mean())}


# --------------------------------------------------------------------------------------------------------------- claims
def claims(tables: list[dict]) -> dict[str, bool]:
    def concentrated(name: str) -> bool:
        masks = [t[name]["reward_mask"] for t in tables]
        return all(m["opinions"] > SPARSE and m["opinions"] >= 3 * m["others"] for m in masks)

    def mean(name: str, *keys: str) -> float:
        values = [t[name] for t in tables]
        for key in keys:
            values = [v[key] for v in values]
        return float(np.mean(values))

    two, one = f"two masks, L1 {MAIN:g}", f"L1 {MAIN:g}"
    out = {f"{name}: the mask is at least 3 times as large on opinions as elsewhere, every seed": concentrated(name)
           for name in (one, two)}
    out |= {f"{name}: held-out accuracy is DPO's, within 0.02": mean(name, "accuracy") > mean("DPO", "accuracy") - 0.02
            for name in (one, two)}
    out[f"{one}: at least 80 % of the mask is off"] = mean(one, "reward_mask", "off") >= 0.8
    if "L1 0.03" in tables[0]:
        for name in (one, "L1 0.03"):
            out[f"{name}: the mask after the faint cue is below 2/3 of that after the loud one"] = \
                mean(name, "reward_mask", "says") < 2 / 3 * mean(name, "reward_mask", "shouts")
        out[f"L1 0.1: the faint cue is given up (mask below {SPARSE}), the loud one kept, accuracy below that of L1 0.01"] = \
            mean("L1 0.1", "reward_mask", "says") < SPARSE < mean("L1 0.1", "reward_mask", "shouts") \
            and mean("L1 0.1", "accuracy") < mean(one, "accuracy") - 0.02
    return out


def report(tables: list[dict]) -> None:
    print(f"\n{len(tables)} seeds")
    for name, row in tables[0].items():
        print(f"{name:>20}", *(f"{m}: {tiny.shown([t[name][m] for t in tables], 3):16}"
                               for m, v in row.items() if not isinstance(v, dict)))
        for mask in (m for m, v in row.items() if isinstance(v, dict)):
            print(f"{mask:>32}", *(f"{k}: {tiny.shown([t[name][mask][k] for t in tables], 3):16}" for k in row[mask]))
    print()


def figure(path: Path, tables: list[dict], strips: dict, weights: list[float]) -> None:
    plt = tiny.pyplot()
    page = plt.figure(figsize=(12, 5.2))
    grid = page.add_gridspec(1, 2, width_ratios=[1.5, 1], wspace=0.17)
    shown = ["MaPO", *(f"L1 {x:g}" for x in weights)]
    rows = grid[0].subgridspec(len(shown), 1, hspace=0.5)
    for k, name in enumerate(shown):
        strip_of(page.add_subplot(rows[k]), strips["texts"], strips["masks"][name],
                 "MaPO, fixed mask from activations" if name == "MaPO" else f"learned mask, {name}")
    names, place = [f"L1 {x:g}" for x in weights], np.arange(len(weights))
    sides = grid[1].subgridspec(2, 1, hspace=0.38)
    top, bottom = (page.add_subplot(side) for side in sides)
    for axes, label, colour, value in (
            (top, "opinion after `shouts`", tiny.RED, lambda row: row["reward_mask"]["shouts"]),
            (top, "opinion after `says`", tiny.ORANGE, lambda row: row["reward_mask"]["says"]),
            (top, "all other tokens", tiny.GREY, lambda row: row["reward_mask"]["others"]),
            (bottom, "held-out accuracy", tiny.BLUE, lambda row: row["accuracy"]),
            (bottom, f"share of tokens with mask < {SPARSE}", tiny.GREEN, lambda row: row["reward_mask"]["off"])):
        values = np.array([[value(t[n]) for n in names] for t in tables])
        axes.plot(place, values.T, ".", color=colour, alpha=0.4, ms=6)
        axes.plot(place, values.mean(0), marker="o", ms=5, color=colour, label=label)
    bottom.axhline(np.mean([t["DPO"]["accuracy"] for t in tables]), color=tiny.BLUE, ls=":", label="accuracy of DPO")
    for axes in (top, bottom):
        axes.set_xticks(place, [f"{x:g}" for x in weights])
        axes.legend(loc="best", fontsize=8)
    top.set(title=f"Mean mask, {len(tables)} seeds")
    bottom.set(xlabel="L1 weight", title="Sparsity and accuracy", ylim=(0.49, 1.02))
    page.savefig(path)


def strip_of(axes, texts: list[list[str]], mask: np.ndarray, title: str) -> None:
    """A heat strip: one row per response, words in their cells, white where the mask is 0."""
    axes.imshow(mask / max(mask.max(), 1e-9), cmap="Reds", vmin=0, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(mask):
        word = texts[y][x]
        axes.text(x, y, word, ha="center", va="center", fontsize=6.5, weight="normal" if word.startswith("f") else "bold",
                  color="white" if value > 0.6 * mask.max() > 0 else "black")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.set_title(f"{title}: darkest {mask.max():.2g}", fontsize=8, pad=3, loc="left")


def main() -> int:
    options = tiny.options("sparsepo_masks", __doc__)
    settings = {"seeds": 1, "warm_up": 150, "steps": 50, "weights": [0.0, MAIN]} if options.toy else \
        {"seeds": 3, "warm_up": 300, "steps": 125, "weights": [0.0, MAIN, 0.03, 0.1]}
    with tempfile.TemporaryDirectory() as folder:
        one = partial(study, Path(folder), settings["warm_up"], settings["steps"], settings["weights"])
        found = tiny.over_seeds(one, settings["seeds"])
    tables, strips = [table for table, _ in found], found[0][1]
    report(tables)
    figure(options.out / "figure.png", tables, strips, settings["weights"])
    return tiny.conclude(options.out, {"settings": settings, "arms": tables}, claims(tables))


if __name__ == "__main__":
    raise SystemExit(main())
