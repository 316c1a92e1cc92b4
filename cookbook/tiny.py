"""What the studies share: tiny language models made in memory, runs of prefopt.train, statistics, the command line."""
from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data_tools.collate import Encoding, collate
from data_tools.records import Group, Response
from prefopt import config
from prefopt.forward import token_logp
from prefopt.models import Models, load_policy, load_tokenizer
from prefopt.rollout.transformers import continuations
from prefopt.train import Result, train


# ------------------------------------------------------------------------------------------------------------- models
def tokenizer(words: Sequence[str]):
    """One token per word, words separated by spaces, `<pad>` and `<eos>` besides."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def language_model(vocabulary: int, *, width: int = 64, layers: int = 2, seed: int = 0):
    """An untrained causal language model (Llama's architecture)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None))


def warm_up(model, texts: Sequence[str], words, *, steps: int, batch: int = 64, lr: float = 1e-2, seed: int = 0) -> float:
    """Next-token training on whole texts of equal length; the mean loss of the last ten steps."""
    ids = torch.tensor(words(list(texts))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    draw, losses = np.random.default_rng(seed), []
    for _ in range(steps):
        rows = ids[draw.integers(len(ids), size=batch)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses[-10:]))


# ----------------------------------------------------------------------------------------------------------- language
class Language:
    """Responses of six words from a random chain, after one prompt.

    The true reward of a response is the sum of the values of its words, with mean 0 and variance 1 over the language.
    """
    length = 6

    def __init__(self, seed: int, words: int = 12):
        self.draw, self.size = np.random.default_rng(seed), words
        self.chain = self.draw.dirichlet(np.ones(words), size=words).cumsum(1)
        self.tokenizer = tokenizer([*(f"w{i}" for i in range(words)), "?"])
        value, sample = self.draw.normal(size=words), self.responses(4000)
        total = value[sample].sum(1)
        self.value = (value - total.mean() / self.length) / total.std()

    def responses(self, *shape: int) -> np.ndarray:
        """(*shape, 6) numbers of words."""
        word, out = self.draw.integers(self.size, size=shape), []
        for _ in range(self.length):
            word = (self.draw.random((*shape, 1)) > self.chain[word]).sum(-1).clip(max=self.size - 1)
            out.append(word)
        return np.stack(out, -1)

    def lists(self, n: int, k: int) -> np.ndarray:
        """(n, k, 6): lists of k different responses."""
        drawn = self.responses(2 * n, k)
        different = [len(set(map(tuple, rows))) == k for rows in drawn.tolist()]
        if sum(different) < n:
            raise ValueError(f"{2 * n - sum(different)} of {2 * n} lists of {k} hold a response twice: use more words")
        return drawn[different][:n]

    def reward(self, responses: np.ndarray) -> np.ndarray:
        return self.value[responses].sum(-1)

    def group(self, responses: np.ndarray, relevance: Sequence[float] | None = None) -> Group:
        texts = [" ".join(f"w{i}" for i in row) for row in responses.tolist()]
        return Group("?", [Response(" " + text) for text in texts], relevance=relevance and list(relevance))

    def reference(self, folder: Path, seed: int, warm_up_steps: int) -> Path:
        """A model that speaks the language, saved."""
        model = language_model(len(self.tokenizer), width=32, seed=seed)
        texts = ["?" + r.text for r in self.group(self.responses(4000)).responses]
        warm_up(model, texts, self.tokenizer, steps=warm_up_steps, seed=seed)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def sampled(self, models: Models, n: int) -> tuple[np.ndarray, float]:
        """Samples of the policy, those left out that hold anything but words; and the share of those left in."""
        prompt = torch.tensor(self.tokenizer("?")["input_ids"])
        rows, = continuations(models.policy, [prompt], n=n, max_new_tokens=self.length, pad=0, eos=None)
        rows = torch.stack(rows).numpy() - 2                  # after <pad> and <eos>
        words = ((rows >= 0) & (rows < self.size)).all(1)
        return rows[words], float(words.mean())


# --------------------------------------------------------------------------------------------------------------- runs
def write(path: Path, groups: Iterable[Group]) -> str:
    path.write_text("".join(json.dumps(group.to_json()) + "\n" for group in groups), encoding="utf-8")
    return str(path)


def run(out: Path, policy: Path, recipe: str, departures: dict, data: dict, settings: dict) -> Result:
    """prefopt.train on the CPU, the reference's log-probabilities cached beside `out` for all runs on the same data."""
    return train(config.make({
        "recipe": recipe, "set": departures, "policy": str(policy), "out": str(out),
        "data": {"cache": str(out.parent / "cache"), "encoding": {"add_eos": False}, **data},
        "train": {"device": "cpu", "tokens": None, "log_every": 10, "warmup": 0.05, **settings}}), show=False)


def trained(out: Path, reference: Path) -> Models:
    """The model that a run ended with, and its reference."""
    policy, frozen = (load_policy(str(folder)).requires_grad_(False).eval() for folder in (out / "model", reference))
    return Models(policy, frozen, load_tokenizer(str(reference)))


@torch.no_grad()
def log_ratios(models: Models, groups: Iterable[Group]) -> np.ndarray:
    """log pi(y | x) - log pi_ref(y | x) of every response, in order."""
    batch = collate(groups, models.tokenizer, Encoding(add_eos=False))
    with models.reference_model() as reference:
        return (token_logp(models.policy_model(), batch) - token_logp(reference, batch)).sum(-1).numpy()


def over_seeds(study: Callable[[int], object], seeds: int) -> list:
    """[study(0), study(1), ...], in two processes where there are two seeds or more, one thread each."""
    torch.set_num_threads(1)
    if seeds == 1:
        return [study(0)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(study, range(seeds)))


# --------------------------------------------------------------------------------------------------------- statistics
def slope(y: Sequence[float], x: Sequence[float]) -> float:
    """Least-squares slope of y on x, with an intercept.

    >>> slope([1, 3, 5], [0, 1, 2])
    2.0
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval of the mean (Student's t); infinite for one value.

    >>> mean, half = interval([1.0, 2.0, 3.0])                      # 4.303 * 1 / sqrt(3)
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    from scipy.stats import t
    values = np.asarray(values, float)
    n = len(values)
    half = t.ppf(0.975, n - 1) * values.std(ddof=1) / n ** 0.5 if n > 1 else float("inf")
    return float(values.mean()), float(half)


def shown(values: Sequence[float], digits: int = 2) -> str:
    """'mean +- half width' of `interval`."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" +- {half:.{digits}f}" if np.isfinite(half) else "")


# ------------------------------------------------------------------------------------------------------- command line
def options(name: str, doc: str) -> argparse.Namespace:
    """--toy and --out. The full study writes its results beside itself, the toy one under runs/."""
    parser = argparse.ArgumentParser(prog=f"python -m cookbook.{name}.study", description=doc.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="seconds instead of minutes, fewer claims")
    parser.add_argument("--out", type=Path, help="folder of results.json and figure.png")
    found = parser.parse_args()
    found.out = found.out or (Path("runs") / f"{name}-toy" if found.toy else Path(__file__).parent / name)
    found.out.mkdir(parents=True, exist_ok=True)
    return found


def conclude(out: Path, results: dict, claims: Mapping[str, bool]) -> int:
    """Write results.json, print every claim with its verdict; the exit code is 0 when all hold, else 1."""
    claims = {claim: bool(held) for claim, held in claims.items()}
    results = {"claims": claims, **results, "cpu_seconds": round(sum(os.times()[:4]))}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for claim, held in claims.items():
        print(f"{'holds ' if held else 'FAILS '} {claim}")
    print(f"{results['cpu_seconds']} CPU seconds; results.json and figure.png are in {out}")
    return 0 if all(claims.values()) else 1


def pyplot():
    """matplotlib without a display, in the style of all figures here."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "figure.dpi": 130,
                         "savefig.bbox": "tight"})
    return plt


BLUE, ORANGE, GREEN, RED, GREY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777", "#9467BD"
