"""Trained reward models as rewards: any folder that `prefopt train` wrote for a reward recipe, or a sequence classifier.

What a score is comes from the recipe the model was trained as (prefopt.json beside the weights): the objective's own score
or margin, computed by the same forward pass as in training.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_tools.batch import Batch
from data_tools.collate import Counts, EncodedGroup, encode, pad, pad_token
from data_tools.columns import nearest
from data_tools.encoding import Encoding
from data_tools.fields import PLACE
from data_tools.records import Group, Response
from prefopt.checkpoints import read_parts
from prefopt.config import assemble
from prefopt.findings import exists
from prefopt.folder import content
from prefopt.forward import fill, forward, frozen_models
from prefopt.models import Models, check_head, head_of, load_policy, load_tokenizer, prepare_padding
from prefopt.parts import hyperparameters, needs, to_spec
from prefopt.parts import name as part_name
from prefopt.scores import output
from rewards.base import Row, ScoringError
from rewards.cached import by_length
from rewards.implicit import token_rewards

__all__ = ["Trained", "TrainedComparison", "TrainedReward", "features", "load"]


def encoded(groups: Sequence[Group], tokenizer, encoding: Encoding) -> tuple[dict[int, EncodedGroup], Counts]:
    """Encoded groups by their number; those that cannot be encoded are missing, and the counts say why."""
    counts = Counts()
    numbered = [replace(g, meta={**g.meta, PLACE: str(n)}, relevance=None, wins=None,
                        responses=[as_text(r) for r in g.responses]) for n, g in enumerate(groups)]
    return {int(e.place): e for e in encode(numbered, tokenizer, encoding, counts=counts)}, counts


@dataclass(frozen=True)
class Reader:
    """A model that reads responses. `tokens` is the budget of a batch, padding included."""
    name: str
    folder: Path
    models: Models
    encoding: Encoding
    tokens: int = 16384

    def settings(self) -> dict:
        return {"weights": self.fingerprint, "encoding": repr(self.encoding)}

    @cached_property
    def fingerprint(self) -> str:
        return weights(str(self.folder))

    @property
    def device(self) -> torch.device:
        return next(self.models.policy.parameters()).device

    def encoded(self, groups: Sequence[Group]) -> tuple[dict[int, EncodedGroup], Counts]:
        return encoded(groups, self.models.tokenizer, self.encoding)

    def batches(self, encoded: dict[int, EncodedGroup]) -> Iterator[tuple[list[int], Batch]]:
        """Groups of like length together, so that hardly anything is padding; the longest come first."""
        numbers = list(encoded)
        widths = [max(len(g.prompt if r.prompt is None else r.prompt) + len(r.tokens) for r in g.rows) for g in encoded.values()]
        rows = max((len(g.rows) for g in encoded.values()), default=1)
        for some in by_length(widths, self.tokens // rows):
            chosen = [numbers[k] for k in some]
            yield chosen, self.padded(chosen, encoded)

    def padded(self, numbers: list[int], encoded: dict[int, EncodedGroup]) -> Batch:
        return pad([encoded[n] for n in numbers], pad_id=pad_token(self.models.tokenizer)).to(self.device)


@dataclass(frozen=True)
class Trained(Reader):
    """A model with the objective it was trained for, and the name of its reference where it has one."""
    objective: object = None
    reference: str = ""

    def settings(self) -> dict:
        return {**super().settings(), "score": to_spec(self.objective.score), "margin": to_spec(self.objective.margin),
                "reference": weights(self.reference) if self.reference else ""}

    @torch.no_grad()
    def seen(self, batch: Batch, reads: set[str]) -> Batch:
        """The batch with the columns of models that `reads` names."""
        return forward(self.models, fill(self.models, batch, reads), reads)

    def part(self, batch: Batch, name: str) -> Tensor:
        """A column that the objective makes: score (N) or margin (B, K, K)."""
        made = self.objective.made()
        rows, groups = self.objective.columns(self.seen(batch, needs([made[name]], made)), made)
        return (rows if name == "score" else groups)[name]


class TrainedReward(Trained):
    """Grades responses one by one (a `Reward`)."""

    def reads(self) -> list[str]:
        """The fields that decide a score, for caches."""
        return ["messages", "text", "tools", "steps", "segments"]

    @property
    def by_step(self) -> bool:
        """Whether it is a process reward model."""
        return "token_reward" in self.objective.reads()

    def __call__(self, rows: Sequence[Row]) -> list[float | ScoringError]:
        """The objective's score of each row; an error in the place of a row that cannot be encoded."""
        encoded, counts = self.encoded([single(row, by_step=self.by_step) for row in rows])
        lost = ScoringError("the response cannot be scored: " + "; ".join(counts.notes))
        out: list[float | ScoringError] = [lost] * len(rows)
        for numbers, batch in self.batches(encoded):
            values = self.part(batch, "score").tolist()
            ended = batch["step_label"].isfinite().any(-1).tolist() if self.by_step else [True] * len(values)
            for n, value, known in zip(numbers, values, ended, strict=True):
                out[n] = value if known else ScoringError("no step of the response ends in what the model reads of it")
        return out

    def tokens_of(self, rows: Sequence[Row]) -> list[tuple[list[str], list[float]]]:
        """For each row its response tokens as text and a reward for each.

        beta log (pi / ref) of each token of an implicit reward, whose sum is the score; sigmoid of the head's output after
        each token of a process reward model. Other reward models only grade whole responses: ValueError.
        """
        part = self.objective.score
        if not self.by_step and part_name(part) != "log_ratio":
            raise ValueError(f"{self.name} grades whole responses: rewards of tokens need an implicit reward model (recipes "
                             f"implicit_*, dpo and its relatives) or a process reward model (recipe process)")
        encoded, counts = self.encoded([single(row, by_step=self.by_step) for row in rows])
        if len(encoded) < len(rows):
            raise ScoringError(f"{len(rows) - len(encoded)} responses cannot be scored: {counts}")
        out: list = [None] * len(rows)
        for numbers, batch in self.batches(encoded):
            if self.by_step:
                values = self.seen(batch, {"token_reward"})["token_reward"].sigmoid()
            else:
                seen = self.seen(batch, {"logp", "logp_ref"})
                values = token_rewards(seen["logp"], seen["logp_ref"], seen["mask"], beta=hyperparameters(part)["beta"])
            for i, n in enumerate(numbers):
                inside = batch["mask"][i].bool()
                words = [self.models.tokenizer.decode([t]) for t in batch["tokens"][i][inside].tolist()]
                out[n] = (words, values[i][inside].tolist())
        return out

    def states(self, rows: Sequence[Row]) -> np.ndarray:
        """(N, D) what the last layer of the head reads of each row: the score is its weight times this."""
        if not self.objective.outputs or self.by_step:
            raise ValueError(f"{self.name} has no head that grades whole responses: train one with a recipe such as "
                             f"bradley_terry")
        encoded, counts = self.encoded([single(row) for row in rows])
        if len(encoded) < len(rows):
            raise ScoringError(f"{len(rows) - len(encoded)} of {len(rows)} responses cannot be read: {counts}")
        *_, last = (m for m in self.models.policy_model().output.modules() if isinstance(m, torch.nn.Linear))
        out = np.empty((len(rows), last.in_features))
        for numbers, batch in self.batches(encoded):
            read: list[Tensor] = []
            hook = last.register_forward_pre_hook(lambda _, given, read=read: read.append(given[0]))
            self.seen(batch, {"outputs"})
            hook.remove()
            out[numbers] = read[-1].double().cpu()
        return out


class TrainedComparison(Trained):
    """Compares responses (a `Comparison`): P(i preferred to j) = sigmoid(margin_ij). Every response is read once."""

    def compare(self, groups: Sequence[Group]) -> list[list[list[float | None]]]:
        encoded, counts = self.encoded(groups)
        if len(encoded) < len(groups):
            raise ScoringError(f"{len(groups) - len(encoded)} of {len(groups)} groups cannot be compared: {counts}")
        out: list = [None] * len(groups)
        for numbers, batch in self.batches(encoded):
            for n, table in zip(numbers, self.part(batch, "margin").sigmoid().tolist(), strict=True):
                size = len(groups[n].responses)
                out[n] = [row[:size] for row in table[:size]]
        return out


def single(row: Row, *, by_step: bool = False) -> Group:
    """The row as a group of its own, without labels. A process reward model has to know where steps end: the row says it
    (`meta["steps"]`), or its lines are steps."""
    response = row.response
    kept = {k: v for k, v in response.meta.items() if k in ("steps", "segments")}
    if by_step:
        if not isinstance(response.text, str):
            raise ScoringError("a process reward model grades the steps of a text, and the response is a conversation")
        steps = kept.get("steps") or lines(response.text)
        kept = {"steps": steps, "step_labels": [0.0] * len(steps)}
    return Group(row.group.prompt, [Response(response.text, prompt=response.prompt, meta=kept)],
                 meta={k: v for k, v in row.group.meta.items() if k == "tools"})


def as_text(response: Response) -> Response:
    """The response without the tokens of the model that sampled it: a reward model reads the text with its own tokenizer."""
    return replace(response, tokens=None, logp=None, meta={k: v for k, v in response.meta.items() if k in ("steps", "step_labels",
                                                                                                          "segments")})


def weights(name: str) -> str:
    """What stands for a model in a cache: the hash of its folder's files, or its name on the hub."""
    return content(name).rsplit(":", 1)[1] if Path(name).is_dir() else name


def lines(text: str) -> list[str]:
    r"""Lines that hold something; an empty one belongs to the line before it, so that joined by \n they are the text.

    >>> lines("a\n\nb\nc\n")
    ['a\n', 'b', 'c\n']
    """
    return re.split(r"(?<!\A)\n(?=[^\n])", text) if text else []


def load(name: str, *, aspect: str | None = None, recipe: str | None = None, set: dict | None = None,
         reference: str | None = None, dtype: str = "float32", tokens: int = 16384,
         device: str | None = None) -> TrainedReward | TrainedComparison:
    """A reward from a run folder, a model folder or a hub id.

    aspect        of a model with an output per aspect: the one to score; left out: their mean
    recipe, set   what it was trained as; left out: what prefopt.json says, else bradley_terry
    reference     of an implicit reward; left out: the model that training started from

    Raises ValueError for a folder that holds no reward model, or one whose reference is not known.
    """
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    exists("reward model", name)
    folder = Path(name) / "model" if (Path(name) / "model").is_dir() else Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
        raise ValueError(f"{name} holds no model: a reward model is the folder of a run of prefopt reward train, or one with "
                         f"config.json and weights")
    card_file = folder / "prefopt.json"
    card = json.loads(card_file.read_text(encoding="utf-8")) if card_file.exists() else {}
    recipe = recipe or card.get("recipe") or "bradley_terry"
    objective = assemble(recipe, (card.get("set") if set is None and recipe == card.get("recipe") else set) or {})
    encoding = Encoding(**flat(card.get("data", {})))
    if aspect is not None:
        if aspect not in encoding.aspects:
            raise ValueError(f"{name} has no aspect {aspect!r}{nearest(aspect, encoding.aspects)}; aspects: "
                             f"{', '.join(encoding.aspects) or 'none'}")
        objective = objective.with_slots(score=partial(output, aspect=list(encoding.aspects).index(aspect)))
    reads = objective.reads()
    if not objective.outputs and not frozen_models(reads) and "last_state" not in reads:
        raise ValueError(f"{name} was trained with {recipe!r}, which has no reward: a reward model has a head (recipes "
                         f"bradley_terry, general_preference, ...) or a reference (implicit_ce, dpo, ...)")
    check_head(str(folder), objective)
    tokenizer = load_tokenizer(str(folder))
    model = load_policy(str(folder), dtype=dtype, head=head_of(objective)).requires_grad_(False).eval()
    if objective.outputs:
        prepare_padding(tokenizer)
        prepare_padding(tokenizer, model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    other, start = None, ""
    if frozen_models(reads):
        start = reference or card.get("reference") or card.get("start")
        if not start:
            raise ValueError(f"{recipe} rewards are log-ratios to a reference: say which model training started from "
                             f"(reference)")
        other = load_policy(start, dtype=dtype).requires_grad_(False).eval().to(device)
    models = Models(model.to(device), other, tokenizer)
    for module in objective.modules():
        module.setup(layers=models.policy_model().layer_count, width=models.policy_model().width)
        module.to(device).eval()
    read_parts(folder, objective)
    kind = TrainedReward if objective.score is not None else TrainedComparison
    return kind(Path(name).name, folder, models, encoding, tokens, objective, start)


def features(name: str, **settings) -> Callable[[Sequence[tuple[Group, int]]], np.ndarray]:
    """What `data_tools.quality.influence` ranks by: the states of responses, by their number, from a trained reward model;
    `settings` are those of `load`."""
    reader = load(name, **settings)
    if not isinstance(reader, TrainedReward):
        raise ValueError(f"{name} compares responses and grades none: influence needs a model of a recipe such as bradley_terry")
    return lambda rows: reader.states([Row(group, group.responses[k]) for group, k in rows])


def flat(data: dict) -> dict:
    return {**{k: v for k, v in data.items() if k != "encoding"}, **data.get("encoding", {})}
