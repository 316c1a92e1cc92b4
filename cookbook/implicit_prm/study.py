"""Rewards of steps from outcome labels alone: does an implicit process reward model point to the first wrong step?

    python -m cookbook.implicit_prm.study [--toy]
"""
from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cookbook import tiny
from cookbook.implicit_prm import chains, swaps
from data_tools.encoding import Encoding
from data_tools.formats import load as read
from data_tools.records import Group, Response
from rewards import implicit
from rewards.base import Row, rows_of
from rewards.density_ratio import likelihood
from rewards.trained import load

STEPS, CANDIDATES, RIGHT = 5, 8, 0.25
BETA, LR = 0.3, 5e-4
ARMS = {"CE": ("implicit_ce", {"beta": BETA}), "DPO": ("implicit_dpo", {"beta": BETA}), "KTO": ("implicit_kto", {"beta": BETA}),
        "NCA": ("implicit_nca", {"beta": BETA}), "step labels": ("process", {})}
MISTAKES = Path(__file__).parents[2].parent / "shared" / "data" / "bigbench_mistake"
READ = 40                                                     # traces whose wording the synthetic stories were made after
ARITHMETIC, TRACKING = (MISTAKES / f"{task}.jsonl.gz" for task in ("multistep_arithmetic", "tracking_shuffled_objects"))


# ---------------------------------------------------------------------------------------------------------------- steps
def ends_of(row: Row, words) -> list[int]:
    """Where the steps of a response end in tokens: `meta["steps"]`, one line each."""
    ends = np.cumsum([len(step) + 1 for step in row.response.meta["steps"]])
    spans = words(row.text, return_offsets_mapping=True)["offset_mapping"]
    return implicit.step_ends(row.text, implicit.offsets(ends.tolist()), spans)


def summed(tokens: Sequence[Sequence[float]], rows: Sequence[Row], words) -> list[torch.Tensor]:
    """The reward of every step: the sum over its tokens."""
    return [implicit.step_rewards(torch.tensor(values), ends_of(row, words)) for row, values in zip(rows, tokens, strict=True)]


def step_values(reward, rows: Sequence[Row]) -> list[torch.Tensor]:
    """A number for every step: the implicit reward of its tokens, or the probability that a process model gives its end."""
    words, tokens = reward.models.tokenizer, [values for _, values in reward.tokens_of(rows)]
    if reward.objective.outputs:
        return [torch.tensor(values)[torch.tensor(ends_of(row, words)) - 1] for row, values in zip(rows, tokens, strict=True)]
    return summed(tokens, rows, words)


def hits(steps: Sequence[torch.Tensor], wrong: Sequence[int]) -> list[float]:
    """1 where the lowest value is that of the first wrong step.

    >>> hits([torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.0, 1.0])], [1, 1])
    [1.0, 0.0]
    """
    return [float(int(values.argmin()) == k) for values, k in zip(steps, wrong, strict=True)]


# -------------------------------------------------------------------------------------------------------------- training
def bare(groups: Sequence[Group]) -> list[Group]:
    """The groups with nothing but texts and outcomes."""
    return [Group(g.prompt, [Response(r.text) for r in g.responses], relevance=g.relevance) for g in groups]


def trained(out: Path, start: Path, arm: str, data: str, settings: dict):
    recipe, departures = ARMS[arm]
    tiny.run(out, start, recipe, departures, {"train": data}, {"epochs": 1000, **settings})
    return load(str(out))


def synthetic(folder: Path, arms: Sequence[str], warm_up: int, steps: int, tests: int, seed: int) -> dict:
    """Every arm on as many chains: single ones for CE and the process model, pairs of one prompt for the others."""
    draw, words = np.random.default_rng(seed), chains.tokenizer
    start = folder / f"chains-{seed}"
    model = tiny.language_model(len(words), seed=seed)
    tiny.warm_up(model, chains.sentences(draw, min(4000, 64 * warm_up), STEPS), words, steps=warm_up, lr=5e-3, seed=seed)
    model.save_pretrained(start)
    words.save_pretrained(start)
    pairs = [chains.group(draw, STEPS, [True, False]) for _ in range(32 * steps)]
    single = [chains.group(draw, STEPS, [bool(n % 2)]) for n in range(64 * steps)]
    files = {"pairs": tiny.write(folder / f"pairs-{seed}.jsonl", bare(pairs)),
             "single": tiny.write(folder / f"single-{seed}.jsonl", bare(single)),
             "steps": tiny.write(folder / f"steps-{seed}.jsonl", single)}
    wrong = rows_of([chains.group(draw, STEPS, [False]) for _ in range(tests)])
    where = [row.response.meta["wrong"] for row in wrong]
    choices = [chains.group(draw, STEPS, (draw.random(CANDIDATES) < RIGHT).tolist()) for _ in range(tests // 2)]
    own = likelihood(str(start), encoding=Encoding(add_eos=False))
    found = {"language model's own": {"located": float(np.mean(hits(summed(own(wrong), wrong, words), where)))},
             "any": {"right": float(np.mean([r for g in choices for r in g.relevance])),
                     "one right among them": float(np.mean([max(g.relevance) for g in choices]))}}
    for arm in arms:
        data, size = {"CE": ("single", 64), "step labels": ("steps", 64)}.get(arm, ("pairs", 32))
        reward = trained(folder / f"{arm}-{seed}", start, arm, files[data],
                         {"lr": LR, "steps": steps, "groups_per_step": size, "seed": seed})
        values = iter(step_values(reward, rows_of(choices)))
        candidates = [[next(values) for _ in g.responses] for g in choices]
        found[arm] = {"located": float(np.mean(hits(step_values(reward, wrong), where)))}
        for name, rule in (("min", implicit.lowest), ("sum", implicit.total)):
            chosen = [implicit.best_of_n([float(rule(values)) for values in rows]) for rows in candidates]
            found[arm][f"best of {CANDIDATES} by {name}"] = float(np.mean(
                [g.relevance[n] for g, n in zip(choices, chosen, strict=True)]))
    return found


# ------------------------------------------------------------------------------------------------------- BIG-Bench-Mistake
def symbols(texts: Sequence[str], punctuation: str = "isolated"):
    """A tokenizer of words, digits and signs, with those of the texts as its vocabulary; "removed" punctuation is not read."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    cut = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(punctuation),
                                   pre_tokenizers.Digits(individual_digits=True)])
    seen = sorted({piece for text in texts for piece, _ in cut.pre_tokenize_str(text)})
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *seen])}, unk_token="<unk>"))
    backend.pre_tokenizer = cut
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def traces(folder: Path, warm_up: int, steps: int, seed: int) -> dict:
    """Half of the traces train on whether their answers are right, the other half's mistakes are looked for; and again the
    other way round. For every trace with a mistake: found or not, by arm."""
    groups = list(read(str(ARITHMETIC)))
    for g in groups:
        g.relevance = [g.responses[0].scores["correct"]]      # the outcome; the place of the mistake is for the test
    order = np.random.default_rng(seed).permutation(len(groups))
    found: dict = {name: {} for name in ("CE", "language model's own", "commonest step")}
    for half in (0, 1):
        seen = [groups[n] for n in order[half::2]]
        held = [n for n in order[1 - half::2] if groups[n].meta["mistake_index"] is not None]
        texts = [f"{g.prompt} {g.responses[0].text}" for g in seen]
        words, start = symbols(texts), folder / f"traces-{seed}-{half}"
        model = tiny.language_model(len(words), seed=seed)
        model.config.max_position_embeddings = 1024
        tiny.warm_up(model, texts, lambda t, words=words: words(t, padding=True, truncation=True, max_length=320),
                     steps=warm_up, batch=8, lr=5e-3, seed=seed)
        model.save_pretrained(start)
        words.save_pretrained(start)
        data = tiny.write(folder / f"traces-{seed}-{half}.jsonl", bare(seen))
        reward = trained(folder / f"traces-ce-{seed}-{half}", start, "CE", data,
                         {"lr": LR, "steps": steps, "groups_per_step": 20, "seed": seed})
        own = likelihood(str(start), encoding=Encoding(add_eos=False))
        rows, where = rows_of([groups[n] for n in held]), [groups[n].meta["mistake_index"] for n in held]
        common = int(np.bincount([g.meta["mistake_index"] for g in seen if g.meta["mistake_index"] is not None]).argmax())
        guesses = {"CE": hits(step_values(reward, rows), where), "commonest step": [float(k == common) for k in where],
                     "language model's own": hits(summed(own(rows), rows, words), where)}
        for name, values in guesses.items():
            found[name].update({int(n): v for n, v in zip(held, values, strict=True)})
    chance = {int(n): 1 / len(groups[n].responses[0].meta["steps"]) for n in found["CE"]}
    return {**found, "chance": chance}


def teach(model, groups: Sequence[Group], words, *, steps: int, lr: float, seed: int, batch: int = 32) -> None:
    """Next-token training on responses, those of like length together."""
    rows = sorted(([*words(g.prompt)["input_ids"], -1, *words(g.responses[0].text)["input_ids"]] for g in groups), key=len)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    draw = np.random.default_rng(seed)
    for first in draw.integers(len(rows) - 4 * batch, size=steps).tolist():
        some = [rows[first + k] for k in draw.choice(4 * batch, batch, replace=False).tolist()]
        ids = torch.zeros(batch, max(map(len, some)) - 1, dtype=torch.long)
        goal = torch.full_like(ids, -100)
        for n, row in enumerate(some):
            start = row.index(-1)
            ids[n, :len(row) - 1] = torch.tensor(row[:start] + row[start + 1:])
            goal[n, start:len(row) - 1] = torch.tensor(row[start + 1:])
        optimizer.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), goal[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def tracked(folder: Path, warm_up: Sequence[int], steps: int, seed: int) -> dict:
    """Everything is learnt from synthetic stories; every real trace with a mistake is a test. As `traces`, and the share
    of first slips found in new synthetic stories."""
    draw, start = np.random.default_rng(seed), folder / f"swaps-{seed}"
    words = symbols([f"{g.prompt} {g.responses[0].text}" for g in swaps.careless(draw, 3000, 0.5)], "removed")
    model = tiny.language_model(len(words), layers=3, seed=seed)
    model.config.max_position_embeddings = 512
    for count, slip, five, lr in zip(warm_up, (0.0, 0.0, 0.5), (0.0, 0.4, 0.3), (3e-3, 3e-3, 2e-3), strict=True):
        teach(model, swaps.careless(draw, min(32 * count, 40000), slip, five), words, steps=count, lr=lr, seed=seed)
    model.save_pretrained(start)
    words.save_pretrained(start)
    data = tiny.write(folder / f"swaps-{seed}.jsonl", bare(swaps.outcomes(draw, 32 * steps)))
    reward = trained(folder / f"swaps-ce-{seed}", start, "CE", data,
                     {"lr": 2e-3, "steps": steps, "groups_per_step": 32, "seed": seed})
    own = likelihood(str(start), encoding=Encoding(add_eos=False))

    def guesses(groups, where):
        rows = rows_of(groups)
        return {"CE": hits(step_values(reward, rows), where), "language model's own": hits(summed(own(rows), rows, words), where)}

    made = [g for g in swaps.outcomes(draw, 800) if g.responses[0].meta["wrong"] is not None]
    found = {"synthetic": {arm: float(np.mean(values)) for arm, values in
                           guesses(made, [g.responses[0].meta["wrong"] for g in made]).items()}}
    if TRACKING.exists():
        held = [(n, g) for n, g in enumerate(read(str(TRACKING))) if g.meta["mistake_index"] is not None]
        groups = [swaps.retold(g) for _, g in held]
        lines, where = [g.responses[0].meta["steps"] for g in groups], [g.meta["mistake_index"] for g in groups]
        common = int(np.bincount(where).argmax())             # of the test itself: more than a rival could know
        longest = [max(range(len(some)), key=lambda k, some=some: len(some[k])) for some in lines]
        found["arms"] = {**guesses(groups, where), "commonest step": [float(k == common) for k in where],
                         "longest step": [float(k == n) for k, n in zip(where, longest, strict=True)],
                         "chance": [1 / len(some) for some in lines]}
        found["traces"] = {"number": [n for n, _ in held], "people": [5 if "Eve" in g.prompt else 3 for _, g in held]}
    return found


# --------------------------------------------------------------------------------------------------------------- claims
def study(folder: Path, settings: dict, seed: int) -> tuple[dict, dict, dict]:
    made = synthetic(folder, settings["arms"], settings["warm_up"], settings["steps"], settings["tests"], seed)
    arithmetic = traces(folder, *settings["traces"], seed) if settings["traces"] and ARITHMETIC.exists() else {}
    return made, arithmetic, tracked(folder, *settings["tracked"], seed) if settings["tracked"] else {}


def by_trace(real: list[dict]) -> dict[str, tuple[float, float]]:
    """Share of mistakes found (mean over traces of the mean over seeds) with its 95 % interval over traces."""
    names = [*real[0], "CE minus chance"] if real else []
    each = [{**table, "CE minus chance": {n: v - table["chance"][n] for n, v in table["CE"].items()}} for table in real]
    return {name: tiny.interval([np.mean([table[name][n] for table in each]) for n in each[0][name]]) for name in names}


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval of values (seeds, traces): seeds are drawn anew, and traces, the same for all seeds.

    >>> bootstrap(np.full((3, 4), 2.0))
    (2.0, 2.0, 2.0)
    """
    draw, (seeds, n) = np.random.default_rng(0), values.shape
    means = [values[draw.integers(seeds, size=seeds)].mean(0)[draw.integers(n, size=n)].mean() for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def by_mistake(real: list[dict]) -> dict[str, dict]:
    """For some traces of the tracking task: the share of mistakes found by each arm, and what CE finds more than others."""
    arms = {name: np.array([table["arms"][name] for table in real], float) for name in real[0]["arms"]}
    number, people = (np.array(real[0]["traces"][what]) for what in ("number", "people"))
    arms.update({f"CE minus {name}": arms["CE"] - values for name, values in arms.items() if name != "CE"})
    parts = {"all": people > 0, "three people": people == 3, "five people": people == 5, f"from the {READ + 1}st": number >= READ}
    return {part: {"n": int(some.sum()), **{name: bootstrap(values[:, some]) for name, values in arms.items()}}
            for part, some in parts.items()}


def claims(tables: list[dict], tracking: dict) -> dict[str, bool]:
    """What holds. The step labels' arm and real arithmetic are measured and make no claim: neither beat chance. Nor does
    tracking where its traces are not here."""
    def all_of(arm, what, least):
        return all(t[arm][what] > least(t) if callable(least) else t[arm][what] >= least for t in tables)

    out = {"CE on outcomes of single responses points to the first wrong step in at least 80 % of chains, all seeds "
           "(chance 20 %)": all_of("CE", "located", 0.8)}
    for arm in [a for a in tables[0] if a in ARMS and a != "step labels"]:
        out[f"{arm}: above chance, and the best of {CANDIDATES} by min and by sum is right more often than any, all seeds"] = \
            all_of(arm, "located", 1 / STEPS) and all(all_of(arm, f"best of {CANDIDATES} by {how}", lambda t: t["any"]["right"])
                                                      for how in ("min", "sum"))
    if tracking:
        out["BIG-Bench-Mistake, tracking: CE on outcomes of synthetic stories is above chance, by its 95 % interval"] = \
            tracking["all"]["CE minus chance"][1] > 0
    return out


def report(tables: list[dict], real: dict, told: list[dict], tracking: dict) -> None:
    print(f"\nchains of {STEPS} steps, {len(tables)} seeds")
    for name in tables[0]:
        print(f"{name:>22}", *(f"{m}: {tiny.shown([t[name][m] for t in tables], 3):16}" for m in tables[0][name]))
    print("\nBIG-Bench-Mistake, multistep arithmetic" + ("" if real else ": not here"))
    for name, (mean, half) in real.items():
        print(f"{name:>22} {mean:.3f} +- {half:.3f}")
    for name in told[0] if told else []:
        print(f"synthetic stories, {name}: {tiny.shown([t[name] for t in told], 3)}")
    for part, found in tracking.items():
        print(f"\nBIG-Bench-Mistake, tracking, {part}: {found['n']} traces")
        for name, (mean, low, high) in list(found.items())[1:]:
            print(f"{name:>30} {mean:.3f} [{low:.3f}, {high:.3f}]")
    print()


def figure(path: Path, tables: list[dict], real: dict, tracking: dict) -> None:
    plt = tiny.pyplot()
    page, (left, right, last) = plt.subplots(1, 3, figsize=(13, 3.4), width_ratios=[1.4, 1, 1.2])
    bars = [name for name in tables[0] if "located" in tables[0][name]]
    colours = {"CE": tiny.RED, "step labels": tiny.GREEN, "language model's own": tiny.GREY}
    left.bar(range(len(bars)), [np.mean([t[name]["located"] for t in tables]) for name in bars],
             color=[colours.get(name, tiny.BLUE) for name in bars])
    for n, name in enumerate(bars):
        left.scatter([n] * len(tables), [t[name]["located"] for t in tables], color="black", s=8, zorder=3)
    left.axhline(1 / STEPS, color="black", lw=0.8, ls=":", label="chance")
    left.set_xticks(range(len(bars)), [name.replace(" ", "\n", 1) for name in bars])
    left.set(ylabel="first wrong step found", ylim=(0, 1.05), title=f"Chains of {STEPS} sums")
    left.legend(loc="upper left")
    found = {name: (mean, mean - half, mean + half) for name, (mean, half) in real.items()}
    for axes, table, title in ((right, found, "arithmetic"), (last, tracking.get("all", {}), "tracking")):
        shown = [name for name in ("CE", "language model's own", "commonest step", "longest step", "chance") if name in table]
        mean, low, high = np.array([table[name] for name in shown]).reshape(-1, 3).T
        axes.bar(range(len(shown)), mean, yerr=[mean - low, high - mean], capsize=3,
                 color=[colours.get(name, tiny.ORANGE) for name in shown])
        axes.set_xticks(range(len(shown)), [name.replace(" ", "\n") for name in shown])
        axes.set(title=f"BIG-Bench-Mistake, {title}" + ("" if shown else ": not here"), ylim=(0, 1.05))
    page.tight_layout()
    page.savefig(path)


def main() -> int:
    options = tiny.options("implicit_prm", __doc__)
    settings = {"seeds": 1, "arms": ["CE"], "warm_up": 350, "steps": 100, "tests": 200, "traces": None, "tracked": None} \
        if options.toy else {"seeds": 3, "arms": list(ARMS), "warm_up": 350, "steps": 100, "tests": 400, "traces": [100, 30],
                             "tracked": [[1400, 500, 300], 250]}
    with tempfile.TemporaryDirectory() as folder:
        tables, arithmetic, swapping = map(list, zip(*tiny.over_seeds(partial(study, Path(folder), settings), settings["seeds"]),
                                                     strict=True))
    real, told = by_trace(arithmetic) if any(arithmetic) else {}, [table["synthetic"] for table in swapping if table]
    tracking = by_mistake(swapping) if all("arms" in table for table in swapping) else {}
    report(tables, real, told, tracking)
    figure(options.out / "figure.png", tables, real, tracking)
    return tiny.conclude(options.out, {"settings": settings, "chains": tables, "BIG-Bench-Mistake": real, "stories": told,
                                       "BIG-Bench-Mistake, tracking": tracking}, claims(tables, tracking))


if __name__ == "__main__":
    raise SystemExit(main())
