"""The policy objective: rewards of sampled responses become advantages, and advantages a surrogate that is maximised.

Two phases without gradient and one with it. `estimate` sees all groups that were sampled together and writes advantages;
`annotate` sees one optimiser step and writes reduction weights; `loss` sees a micro-batch, which may be single rows.
"""
from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from data_tools.batch import Batch
from prefopt import credits, diagnose, ratios, token_rewards
from prefopt.objectives import Grouped, Loss, weighted
from prefopt.ops import upcast
from prefopt.parts import Columns, Part, Stateful, bind, columns_read, finite, hyperparameters, name, needs
from prefopt.reductions import term_mean
from prefopt.references import Frozen

OLD = {"entropy": "entropy_old"}                              # what parts before the loss see in its place
MADE = {"real", "probe", "length", "terms", "noise"}          # columns that the objective itself makes for its parts


@dataclass(frozen=True)
class Penalty:
    """A cost that is subtracted: weight * sum(unit * part), where `unit` counts the same tokens as the surrogate's.

    `reduce` is the objective's unless one is given.
    """
    part: Part
    weight: float = 1.0
    reduce: Part | None = None


@dataclass(frozen=True)
class PolicyObjective:
    """shaping -> keep -> advantage -> credit -> normalise, then ratio -> surrogate -> weight -> penalties -> reduce.

    loss = -sum(unit * weight * correction * surrogate) + sum over penalties of weight * sum(unit * part)

    The parts before `ratio` see groups (B, K, ...) of the whole rollout without gradient, where `real` marks the rows that
    take part: they are there, train, and their reward is known. `ratio`, `surrogate`, `weight` and penalties see rows
    (N, T) with gradient. `accept`, `selections` and `correction` run once per optimiser step, without gradient, and see
    groups: what `accept` turns down is in no term, `selections` write columns that read the whole step, `correction` is a
    weight for the gap between sampler and trainer.

    `keep` sees rewards before `shaping`. A group that it drops does not train, like a probe row; a source may refill it. A
    row whose reward is unknown (NaN) enters neither statistics nor loss. `annotations` write columns of the rollout, in
    order, before the advantage (a penalty's coefficient) or from its parts (what a critic should learn).
    """
    surrogate: Part
    advantage: Part
    credit: Part = credits.broadcast
    shaping: Mapping[str, Part] = field(default_factory=dict)
    keep: Part | None = None
    reward_at: Part = token_rewards.at_end
    normalise: Part | None = None
    ratio: Part = ratios.token
    accept: Part | None = None
    correction: Part | None = None
    weight: Part | None = None
    penalties: Mapping[str, Penalty] = field(default_factory=dict)
    reduce: Part = term_mean
    annotations: Mapping[str, Part] = field(default_factory=dict)
    selections: Mapping[str, Part] = field(default_factory=dict)
    reference: object = Frozen()

    whole_groups = False                                      # a micro-batch may hold single rows
    outputs = 0
    bounded = True
    home = {"shaping": ("prefopt.shaping",), "keep": ("prefopt.keeps",),
            "advantage": ("prefopt.advantages", "prefopt.divergences"), "credit": ("prefopt.credits",),
            "normalise": ("prefopt.normalisers",), "ratio": ("prefopt.ratios",),
            "surrogate": ("prefopt.surrogates",), "weight": ("prefopt.token_weights",),
            "penalties": ("prefopt.penalties", "prefopt.critics"), "reduce": ("prefopt.reductions",),
            "reward_at": ("prefopt.token_rewards",), "accept": ("prefopt.accepts",), "correction": ("prefopt.corrections",),
            "annotations": ("prefopt.penalties", "prefopt.credits"), "selections": ("prefopt.selections",),
            "reference": ("prefopt.references",)}

    def __post_init__(self):
        for part in (*self.rollout_parts(), *self.step_parts(), *self.loss_parts()):
            columns_read(part)

    def with_slots(self, **slots) -> PolicyObjective:
        return replace(self, **slots)

    # ------------------------------------------------------------------------------------------ what it reads
    def rollout_parts(self) -> list[Part]:
        own = [self.keep, self.advantage, self.reward_at, self.credit, self.normalise]
        return [p for p in (*self.shaping.values(), *self.annotations.values(), *own) if p is not None]

    def step_parts(self) -> list[Part]:
        own = [self.accept, self.correction, *self.selections.values(), self.reduce]
        return [p for p in (*own, *(p.reduce for p in self.penalties.values())) if p is not None]

    def loss_parts(self) -> list[Part]:
        own = [self.surrogate, self.weight, *(p.part for p in self.penalties.values())]
        return [p for p in own if p is not None]

    def made(self) -> dict[str, Part]:
        """Columns that parts of this objective make for other parts."""
        return {"log_ratio": self.ratio, "response_advantage": self.advantage, "reward_at": self.reward_at,
                "advantage": self.credit, **self.annotations, **self.selections}

    def reads(self) -> set[str]:
        """Columns that must be in the batch before `estimate` and `annotate`, or made by the forward pass before `loss`."""
        return self.reads_before() | self.reads_forward()

    def reads_before(self) -> set[str]:
        parts = [self.credit, *(p for p in (self.keep, self.normalise) if p), *self.shaping.values(),
                 *self.annotations.values(), *self.step_parts()]
        return {"reward", "mask", "group"} | {OLD.get(c, c) for c in self._outside(parts)}

    def reads_forward(self) -> set[str]:
        frozen = {"response_advantage", "reward_at", "advantage", *self.annotations, *self.selections}
        return needs(self.loss_parts(), {"log_ratio": self.ratio}) - frozen

    def _outside(self, parts: list[Part]) -> set[str]:
        return needs(parts, self.made()) - MADE

    def least_responses(self) -> int:
        """How many responses per prompt make an advantage: 2 where a group of one has nothing to be compared with."""
        one, hyper = torch.ones(2, 1), hyperparameters(self.advantage)
        reward = torch.tensor([[hyper.get("low", 0.0)], [hyper.get("high", 1.0)]])      # two prompts, of which one went well
        known = {"reward": reward, "real": one.bool(), "length": one, "mask": one[..., None],
                 **dict.fromkeys(("logp_old", "logp_ref", "logp_rollout"), -one[..., None])}
        if not set(columns_read(self.advantage)) <= set(known) or "response_advantage" not in needs([self.credit], {}):
            return 1
        return 2 if bool((bind(self.advantage, known).abs() < 1e-6).all()) else 1

    def modules(self) -> list[nn.Module]:
        return []

    def states(self) -> dict[str, object]:
        """Parts with memory, by the column they make."""
        return {c: p for c, p in self.annotations.items() if isinstance(p, Stateful)}

    # ------------------------------------------------------------------------------------------ the three phases
    @torch.no_grad()
    def estimate(self, batch: Batch) -> Batch:
        """Advantages of a whole rollout, over all its groups and processes. A batch that has them is left alone, and has what
        `annotations` make too.
        """
        if "advantage" in batch:
            return batch
        if "probe" in columns_read(self.advantage):
            check_probes(batch)
        exact = upcast(next((batch[c] for c in ("logp_old", "logp") if c in batch), batch["reward"])).dtype
        known: dict[str, Tensor] = {}
        groups = self.groups(batch, known)                    # nothing is made of rewards before they have their shape
        finite("reward", groups["reward"])
        out: dict[str, Tensor] = {}
        if self.keep is not None:
            kept = bind(self.keep, groups).bool()
            known["real"] = groups["real"] & kept[:, None]
            out["train"] = self._train(batch) & batch.rows(kept)
        for part in self.shaping.values():
            known["reward"] = finite(name(part), bind(part, groups))
        groups = self.groups(batch, known, {"reward_at": self.reward_at, "response_advantage": self.advantage,
                                             "advantage": self.credit})
        for column, part in self.annotations.items():
            if column not in batch:
                known[column] = finite(f"{name(part)} ({column})", bind(part, groups))
                out[column] = batch.rows(known[column]).to(exact)
        advantage = finite(name(self.credit), groups["advantage"])
        if self.normalise is not None:
            advantage = finite(name(self.normalise), bind(self.normalise, ChainMap({"advantage": advantage}, groups)))
        out["advantage"] = batch.rows(torch.where(groups["real"][..., None], advantage, 0.0)).to(exact)
        return batch.with_columns(**out)

    @torch.no_grad()
    def annotate(self, batch: Batch) -> Batch:
        """Reduction weights of one optimiser step and columns that see all of it. Estimates advantages if none are there.

        Every process calls it once per step, also when it has no row of its own.
        """
        batch = self.estimate(batch)
        if "logp_now" not in batch and "logp" in batch:
            batch = batch.with_columns(logp_now=batch["logp"].detach())
        known: dict[str, Tensor] = {}
        groups = self.groups(batch, known, {"noise": uniform_noise})
        counted = groups["mask"].bool() & groups["real"][..., None]
        out = {"token_unit@all": batch.rows(term_mean(counted.double()))}
        if self.accept is not None:
            counted = counted & bind(self.accept, groups).bool()
        known["terms"] = counted.double()
        share = batch["weight"].double()[:, None] if "weight" in batch else 1.0
        out["token_unit"] = batch.rows(bind(self.reduce, groups)) * share
        for key, penalty in self.penalties.items():
            if penalty.reduce is not None:
                out[f"token_unit@{key}"] = batch.rows(bind(penalty.reduce, groups)) * share
        for column, part in self.selections.items():
            out[column] = batch.rows(bind(part, groups))
        if self.correction is not None:                       # given responses, of whose sampler nothing is known, weigh 1
            weight = torch.where(groups["logp_rollout"].isnan(), counted.to(groups["logp_rollout"].dtype),
                                 bind(self.correction, groups))
            out["correction"] = batch.rows(finite(name(self.correction), weight))
        return batch.with_columns(**out)

    def loss(self, batch: Batch) -> Loss:
        """Weighted sum over the micro-batch. `annotate` must have run on the whole step."""
        if "token_unit" not in batch:
            raise KeyError("the batch has no column 'token_unit': call objective.annotate(batch) on the whole step first")
        rows = Columns(batch, {"log_ratio": self.ratio})
        value = bind(self.surrogate, rows)
        for factor in (self.weight and bind(self.weight, rows), batch.get("correction")):
            value = value if factor is None else value * factor.detach()
        total = -token_sum(batch["token_unit"], value, self.surrogate)
        metrics = {"loss/surrogate": total.detach()}
        for key, penalty in self.penalties.items():
            unit = batch[f"token_unit@{key}" if penalty.reduce is not None else "token_unit"]
            extra = penalty.weight * token_sum(unit, bind(penalty.part, rows), penalty.part)
            metrics[f"loss/{key}"] = extra.detach()
            total = total + extra
        return Loss(total, lambda: {**metrics, **self.measure(batch, diagnose.policy_metrics(hyperparameters(self.surrogate)))})

    @torch.no_grad()
    def measure(self, batch: Batch, metrics: Mapping[str, Part]) -> dict[str, Tensor]:
        """Diagnostics as means over the tokens of the step: weighted sums, so that micro-batches add."""
        rows = Columns(batch, {"log_ratio": self.ratio})
        return {key: token_sum(batch["token_unit@all"], bind(part, rows).double(), part) for key, part in metrics.items()
                if needs([part], {"log_ratio": self.ratio}) <= set(batch)}

    # ------------------------------------------------------------------------------------------ views
    @staticmethod
    def _train(batch: Batch) -> Tensor:
        return batch["train"].bool() if "train" in batch else torch.ones(batch.N, dtype=torch.bool, device=batch.index.device)

    def groups(self, batch: Batch, known: dict[str, Tensor] | None = None, made: Mapping[str, Part] = MappingProxyType({})
               ) -> Columns:
        """The batch as parts see it before the ratio; `known` goes before it and may be filled later, `made` is made on
        demand."""
        known = {} if known is None else known
        rows = {**batch, **{now: batch[old] for now, old in OLD.items() if old in batch}}
        if "reward" in rows:
            rows["reward"] = rows["reward"].double()          # small, and means and spreads want the digits
        return Columns(ChainMap(known, Grouped(rows, batch, "reward")), {"length": tokens_of, **made})


def check_probes(batch: Batch) -> None:
    """An error where a prompt was sampled without the response that its advantages read. One without a reward will do."""
    probe = ~batch["train"].bool() if "train" in batch else torch.zeros_like(batch["group"], dtype=torch.bool)
    without = batch.groups - len(torch.unique(batch.index[probe]))
    if without:
        raise ValueError(f"{without} of {batch.groups} groups have no probe row, from which the advantage takes its baseline: "
                         f"sample a greedy response beside the others (prefopt.rollout.programs.with_greedy), with train "
                         f"False")


def tokens_of(mask):
    """Tokens of each response that train."""
    return mask.bool().sum(-1)


def uniform_noise(mask):
    """A uniform number for each token, from torch's generator, which a run seeds once per step."""
    return torch.rand(mask.shape, device=mask.device)


def token_sum(unit: Tensor, value: Tensor, part: Part) -> Tensor:
    """sum(unit * value) over tokens (N, T); tokens of weight 0 do not enter, whatever they hold."""
    if unit.shape != value.shape:
        raise ValueError(f"part {name(part)!r} returned {tuple(value.shape)} where rows of tokens {tuple(unit.shape)} are "
                         f"expected")
    return weighted(unit, value, part)


__all__ = ["Penalty", "PolicyObjective"]
