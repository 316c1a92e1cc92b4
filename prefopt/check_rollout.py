"""What can be known about an on-policy run before its weights are loaded: prompts, rewards, batch numbers, metrics."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from data_tools.columns import nearest
from data_tools.records import Group, Response
from prefopt import online
from prefopt.config import Run
from prefopt.diagnose import POLICY_METRICS, policy_metrics
from prefopt.explain import rewards_of, rollout_of
from prefopt.findings import Finding, error, ok, warning
from prefopt.parts import hyperparameters
from prefopt.rollout.base import prompt_ids

LOOK = 4                                                      # prompts whose rewards are tried out
Findings = Iterator[Finding]


def prompts(run: Run, tokenizer) -> Findings:
    """Prompts of training and evaluation, with the lengths that training will meet."""
    found = online.prompts(run, tokenizer)
    lengths = [len(ids) for ids in prompt_ids([g.prompt for g in found], tokenizer, run.data.encoded())]
    yield ok("data.train", f"{len(found):,} prompts of {min(lengths)} to {max(lengths)} tokens, "
                           f"{sum(lengths) / len(lengths):.0f} on average")
    if run.data.eval:
        held_out = online.prompts(run, tokenizer, held_out=True)
        known = {repr(g.prompt) for g in found}
        shared = sum(repr(g.prompt) in known for g in held_out)
        yield ok("data.eval", f"{len(held_out):,} prompts")
        if shared:
            yield warning("data.eval", f"{shared:,} of {len(held_out):,} held-out prompts are also in the training data: "
                                       f"held-out numbers will look too good")
    return found, max(lengths)


def rewards(run: Run, found: online.Prompts) -> Findings:
    """The rewards are there and can score a response to the first prompts, an empty one."""
    if run.rollout.recorded:
        yield ok("rewards", f"as recorded in {run.rollout.recorded}")
        return
    own = run.model_copy(update={"rollout": run.rollout.model_copy(update={"unscored": "mark"})})
    score = online.scorer(own)
    empty = Response("", tokens=[], meta={"finished": True, "stopped": "eos"})
    trains = (True, True, False) if score.compares else (True,)                        # beside another, against an opponent
    groups = [Group(g.prompt, [replace(empty, meta=dict(empty.meta), scores={}, train=t) for t in trains], meta=dict(g.meta))
              for g in found[:LOOK]]
    for group in score(groups):
        for name, why in group.responses[0].meta.get("unscored", {}).items():
            level = error if run.rollout.unscored == "raise" else warning
            where = group.meta.get("place", "the first prompts")
            yield level("rewards", f"{name} cannot score an empty response to {where}: {why}")
            return
    yield ok("rewards", f"{rewards_of(run)}; tried on an empty response")


def numbers(run: Run) -> Findings:
    """The batch numbers, resolved."""
    yield ok("rollout", rollout_of(run))
    updates, objective = online.update_count(run), run.objective()
    if updates > 1 and not objective.whole_groups and "logp_old" not in objective.reads():
        yield warning("rollout", f"{run.recipe} has no importance ratio, and a rollout is trained on by {updates} updates: only "
                                 f"the first of them is on-policy. Leave rollout.samples_per_update and rollout.epochs out, "
                                 f"or choose a recipe with a ratio, such as grpo")
    if run.rollout.replay and not objective.whole_groups and objective.correction is None:
        yield warning("rollout", "replayed responses are those of older policies, and the recipe does not weigh them: set "
                                 "set.correction=truncated")


def metrics(run: Run) -> Findings:
    """Are the metrics that `expect` and `train.metric` name ones that this run measures?"""
    objective, roll = run.objective(), run.rollout
    sampled = {"reward", "reward/std", "length", "truncated", "unscored", "groups/contrast", "pass@1", f"pass@{roll.k}"}
    parts = {f"reward/{name}" for name in (online.components(run) if not roll.recorded else ())}
    own = {"loss", "grad_norm", *sampled, *parts}
    if not objective.whole_groups:
        own |= {*POLICY_METRICS, *policy_metrics(hyperparameters(objective.surrogate)), "ratio/effective"} - {"ratio/square"}
        own |= {"loss/surrogate", *(f"loss/{key}" for key in objective.penalties)}
    judged = (sampled | parts) - {f"pass@{roll.k}"} | {f"pass@{roll.eval_k}"}
    known = own | ({f"eval/{m}" for m in judged} if run.data.eval else set())
    named = {"train.metric": run.train.metric} if run.train.patience and run.train.metric else {}
    for setting, metric in {**named, **{f"expect.{m}": m for m in run.expect}}.items():
        if metric not in known and objective.whole_groups is False:
            yield error("metrics", f"{setting}: {metric!r} is not measured by this run{nearest(metric, known)}")
