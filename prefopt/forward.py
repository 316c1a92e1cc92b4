"""From a Batch to columns: which model runs on which tokens, and what is kept of its output.

No vocabulary projection that is not needed: log-probabilities and other reducers come from the hidden states of response
positions through a chunked head (`prefopt.head`), so that no (tokens, vocabulary) tensor outlives its chunk, prompts are
never projected, and padding is never projected. How rows are laid out for a model is `prefopt.layout`'s matter; parts never
see it.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data_tools.batch import Batch
from prefopt.head import ONE, TWO, reducers
from prefopt.layout import on_host, padded, shared
from prefopt.models import Models, Trunk
from prefopt.ops import upcast
from prefopt.sharding import evened

FROZEN = {"logp_ref", "logp_old", "logp_now", "entropy_old", "outputs_old", "value_old", "activation_mask",
          "mismatched"}                                                   # made once per step, by `fill`
GRADED = {"outputs", "token_reward"}                                      # of a reward model's head
CRITIC = {"value", "value_old"}                                           # these load a critic
GRADIENT = {*ONE, *TWO, *GRADED, "value", "states_ref", "last_state", "prompt_state"}    # per micro-batch, by `forward`
REFERENCE = {"logp_ref", "activation_mask", "mismatched", "token_kl", "states_ref"}      # these load a reference


# ------------------------------------------------------------------------------------------------------- layouts
@dataclass(frozen=True)
class Positions:
    """Which tokens are scored: row and column in (N, T), and the token there. The state one place before predicts it."""
    row: Tensor
    column: Tensor
    token: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Positions:
        """Of all masked tokens, from what the batch has on the CPU."""
        device, batch = batch["mask"].device, on_host(batch)
        mask = batch["mask"].bool()
        row, column = mask.nonzero(as_tuple=True)
        first = batch["attend"].int().argmax(1)[row] if "attend" in batch else torch.zeros_like(row)
        if bool((column <= first).any()):
            raise ValueError("a response starts at the first token of its row, and nothing predicts that token: give "
                             "the row a prompt, or a tokenizer with a BOS token")
        found = row, column, batch["tokens"][row, column]
        return cls(*(x.to(device, non_blocking=True) for x in found))


def first_read(batch: Mapping[str, Tensor], reads: Iterable[str]) -> Tensor:
    """(N) the first token of each row whose state the columns are made from; the length of a row without any."""
    batch, reads = on_host(batch), set(reads)
    attend, mask = batch["attend"].int(), batch["mask"].bool()
    length = attend.sum(1)
    answer = torch.where(mask.any(1), mask.int().argmax(1) - attend.argmax(1), length + 1)
    found = [length]
    if reads - {"outputs", "last_state", "prompt_state", "token_reward"}:
        found.append(answer - 1)
    if "token_reward" in reads:
        found.append(answer)
    if reads & {"outputs", "last_state"}:
        found.append(length - 1)
    if "prompt_state" in reads:
        found.append(batch["prompt_length"] - 1)
    return torch.stack(found).amin(0).clamp(min=0)


def states(trunk: Trunk, batch: Mapping[str, Tensor], at: Positions, *, layers: bool = False) -> Tensor:
    """Hidden states that predict the tokens `at`: (M, D), or (M, L, D) of layers 1..L."""
    layout = trunk.layout(batch, first_read(batch, ["logp"]))
    place = layout.place(at.row, at.column - 1)
    if layers:
        return torch.stack([h[place] for h in trunk.layers(layout)], 1)
    return trunk(layout)[place]


def scatter(values: Tensor, at: Positions, shape: tuple[int, int]) -> Tensor:
    """(M, ...) at the positions of a zero (N, T, ...)."""
    return values.new_zeros(*shape, *values.shape[1:]).index_put((at.row, at.column), values)


# ------------------------------------------------------------------------------------------------------- the two passes
def forward(models: Models, batch: Batch, reads: Iterable[str], *, chunk: int | None = None) -> Batch:
    """Columns with gradient that `reads` names, for one micro-batch.

    `logp_old` that `reads` names and the batch lacks is `logp` itself: the step takes one update, so that nothing has
    changed since.
    """
    same = "logp_old" in reads and "logp_old" not in batch
    reads = set(reads) & GRADIENT
    at, shape = Positions.of(batch), tuple(batch["mask"].shape)
    out: dict[str, Tensor] = {}
    hidden_ref = None
    if "value" in reads:
        out["value"] = values(models.critic_model(), batch, at)
    if reads & {"token_kl", "states_ref"}:
        with torch.no_grad(), models.reference_model() as reference:
            hidden_ref = states(reference, batch, at, layers="states_ref" in reads)
        if "states_ref" in reads:
            out["states_ref"] = scatter(upcast(hidden_ref), at, shape)
            hidden_ref = hidden_ref[:, -1] if "token_kl" in reads else None
    names = [n for n in (*ONE, *TWO) if n in reads]
    if not names and not reads & {*GRADED, "last_state", "prompt_state"}:
        return batch.with_columns(**out)
    trunk = models.policy_model()
    layout = trunk.layout(batch, first_read(batch, reads - {"value", "states_ref"}))
    row = torch.arange(batch.N, device=at.row.device)
    first, length = batch["attend"].int().argmax(1), batch["attend"].bool().sum(1)
    last = layout.place(row, first + length.clamp(min=1) - 1)
    if "outputs" in reads:
        outputs, every = trunk.grade(layout, last)
        out["outputs"] = upcast(outputs)
    else:
        every = trunk(layout)
    if names:
        found = reducers(trunk, every[layout.place(at.row, at.column - 1)], at.token, names, hidden_ref=hidden_ref,
                         head_ref=models.reference_head, chunk=chunk)
        out.update({n: scatter(v, at, shape) for n, v in found.items()})
        if same and "logp" in out:
            out["logp_old"] = out["logp"].detach()
    if "token_reward" in reads:
        states_at = every[layout.place(at.row, at.column)]
        out["token_reward"] = scatter(upcast(trunk.head(states_at)).squeeze(-1), at, shape)
    if "last_state" in reads:
        out["last_state"] = upcast(every[last])
    if "prompt_state" in reads:
        out["prompt_state"] = upcast(every[layout.place(row, first + batch["prompt_length"].clamp(min=1) - 1)])
    return batch.with_columns(**out)


@torch.no_grad()
def fill(models: Models, batch: Batch, reads: Iterable[str], *, tokens: int | None = None, other: Batch | None = None,
         chunk: int | None = None, whole_groups: bool = True) -> Batch:
    """Frozen columns that `reads` names and the batch lacks, for a whole step, micro-batch by micro-batch.

    `other` holds, for each group of the batch, a group of another prompt whose responses make KTO's mismatched rows.
    """
    wanted = [c for c in sorted(set(reads) & FROZEN) if c not in batch]
    out: dict[str, Tensor] = {}
    for column in wanted:
        if column == "mismatched":
            out[column] = mismatched(models, batch, other, tokens=tokens, chunk=chunk)
            continue
        parts = pieces(models, batch, tokens, whole_groups)
        out[column] = joined(batch, [(rows, one_frozen(models, part, column, chunk)) for (rows, part), _ in parts])
    return batch.with_columns(**out)


def pieces(models: Models, batch: Batch, tokens: int | None,
           whole_groups: bool = True) -> Iterator[tuple[tuple[Tensor, Batch], bool]]:
    """Micro-batches of up to `tokens` tokens that the policy computes, with the numbers of their rows, and whether they count.

    Without `tokens` they suit the device, and a larger group is one of its own. Where models are sharded, the last one comes
    again on processes that have fewer than others, and does not count.
    """
    trunk = models.policy_model()
    common = shared(batch, trunk.price) if trunk.packs(batch) else None
    budget = tokens or suited(batch.index.device.type, trunk.language)
    found = batch.pieces(budget, whole_groups, common, tokens is not None)
    return evened(found, models.sharded, batch.index.device)


def suited(device: str, language: bool) -> int:
    """Tokens of a micro-batch: as many as keep a GPU busy, and as few as keep a CPU's memory small at the same speed, which
    without the gradient of a head is half as many."""
    return 16384 if device != "cpu" else 2048 if language else 1024


def one_frozen(models: Models, batch: Batch, column: str, chunk: int | None) -> Tensor:
    if column == "activation_mask":
        from prefopt.activations import activation_mask
        with models.reference_model() as reference:
            return activation_mask(reference, batch)
    if column == "value_old":
        return values(models.critic_model(), batch, Positions.of(batch))
    if column in ("logp_old", "logp_now", "entropy_old"):
        return of_tokens(models.policy_model(), batch, chunk, reducer=column.split("_")[0])
    if column == "outputs_old":
        return forward(models, batch, {"outputs"})["outputs"]
    with models.reference_model() as reference:
        return token_logp(reference, batch, chunk)


def token_logp(trunk: Trunk, batch: Mapping[str, Tensor], chunk: int | None = None) -> Tensor:
    """Log-probability of every masked token under one model, (N, T), zeros elsewhere."""
    return of_tokens(trunk, batch, chunk, reducer="logp")


def of_tokens(trunk: Trunk, batch: Mapping[str, Tensor], chunk: int | None = None, *, reducer: str) -> Tensor:
    """A reducer at every masked token under one model, (N, T), zeros elsewhere."""
    at = Positions.of(batch)
    hidden = states(trunk, batch, at)
    return scatter(reducers(trunk, hidden, at.token, [reducer], chunk=chunk)[reducer], at, tuple(batch["mask"].shape))


def values(critic: Trunk, batch: Mapping[str, Tensor], at: Positions) -> Tensor:
    """The critic's value of the state before each masked token, (N, T), zeros elsewhere."""
    return scatter(upcast(critic.head(states(critic, batch, at))).squeeze(-1), at, tuple(batch["mask"].shape))


def joined(batch: Batch, made: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Row columns of micro-batches, each with the numbers of its rows, put back in their place."""
    first = made[0][1]
    out = first.new_zeros(batch.N, *first.shape[1:])
    for rows, value in made:
        out[rows] = value
    return out


def mismatched(models: Models, batch: Batch, other: Batch | None, *, tokens: int | None, chunk: int | None) -> Tensor:
    """Summed log-ratio of each row's prompt with a response of the group in the same place of `other`, (N).

    NaN for all rows where there is no other group: a step of one prompt has nothing to mismatch. Every row is scored by
    itself; one that is longer than the budget of `tokens` is a micro-batch of its own.
    """
    if other is None:
        return torch.full((batch.N,), torch.nan, device=batch["tokens"].device)
    view = mismatched_rows(batch, other)
    if tokens is not None:
        tokens = max(tokens, int(view["attend"].sum(1).max()))
    policy = joined(view, [(rows, token_logp(models.policy_model(), m, chunk)) for (rows, m), _ in pieces(models, view, tokens)])
    with models.reference_model() as reference:
        ref = joined(view, [(rows, token_logp(reference, m, chunk)) for (rows, m), _ in pieces(models, view, tokens)])
    return (policy - ref).sum(1)


def mismatched_rows(batch: Batch, other: Batch) -> Batch:
    """Rows with the prompt of `batch` and a response of `other`: slot k takes slot k modulo the size of that group.

    Each is a group of its own.
    """
    size = torch.bincount(other.index, minlength=other.groups)
    lookup = torch.zeros(other.groups, other.width, dtype=torch.long, device=other.index.device)
    lookup[other.index, other.slot] = torch.arange(other.N, device=other.index.device)
    source = lookup[batch.index, batch.slot % size[batch.index]]
    prompts, answers = padded(batch).tokens, padded(other).tokens
    masks = other["mask"].bool()
    rows, row_masks = [], []
    other_offset, other_length = other["attend"].int().argmax(1), other["attend"].bool().sum(1)
    for n in range(batch.N):
        m, p = int(source[n]), int(batch["prompt_length"][n])
        q, length, start = int(other["prompt_length"][m]), int(other_length[m]), int(other_offset[m])
        rows.append(torch.cat([prompts[n, :p], answers[m, q:length]]))
        row_masks.append(torch.cat([torch.zeros(p, dtype=torch.bool, device=masks.device),
                                    masks[m, start + q:start + length]]))
    pad = torch.nn.utils.rnn.pad_sequence
    attend = pad([torch.ones(len(r), dtype=torch.bool, device=r.device) for r in rows], batch_first=True)
    return Batch({"tokens": pad(rows, batch_first=True), "attend": attend, "mask": pad(row_masks, batch_first=True),
                  "group": torch.arange(batch.N, device=masks.device)})


def frozen_models(reads: Iterable[str]) -> set[str]:
    """Which frozen models a recipe loads: {'reference'} or nothing. Derived from the columns it reads."""
    return {"reference"} if set(reads) & REFERENCE else set()


def needs_critic(reads: Iterable[str]) -> bool:
    """Whether a recipe loads a critic."""
    return bool(set(reads) & CRITIC)


__all__ = ["fill", "forward", "frozen_models", "needs_critic", "pieces", "states", "token_logp"]
