"""Rounds of an iterative method: sample, score, select, train, and again from the policy that came of it.

Everything that a stage makes is a file of the run folder, written whole or not at all, and no stage is done again whose files
are there: a run that was killed anywhere goes on to the same bytes.

    rollouts/step-00000001.jsonl        what the policy of round 1 said, scored
    iterations/1/sampled, scored        the same in pieces, as they were made
    iterations/1/data.jsonl             what was selected from it
    iterations/1/run                    training on that: an ordinary run folder
    iterations/1/model                  the next policy, where momentum makes another one than run/model
    metrics.jsonl                       a line for each round
    model                               the last policy
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from inspect import signature
from pathlib import Path

import torch

from data_tools import select
from data_tools.columns import nearest
from data_tools.records import Group
from prefopt import checkpoints, folder, online, parts, setup
from prefopt.config import Model, Run, make, named
from prefopt.models import load_policy
from prefopt.rollout.orders import Ordered
from prefopt.rollout.sources import measured
from prefopt.train import Result, train, unmet

__all__ = ["everything", "iterate", "rule"]

PIECE = 64                                                    # prompts that are sampled, and scored, at once
Rule = Callable[[Group], list[Group]]


# ------------------------------------------------------------------------------------------------------------- selection
def everything(group: Group) -> list[Group]:
    """All responses, if there are two."""
    return [group] if len(group.responses) > 1 else []


def rule(spec: str | Mapping) -> Rule:
    """A rule of selection from YAML, 'name' or {name: {argument: value}}: `everything`, a rule for one group of
    `data_tools.select`, or 'module:name'."""
    name, arguments = named(spec)
    rules = {n: getattr(select, n) for n in select.__all__}
    known = {"everything": everything, **{n: f for n, f in rules.items() if "group" in signature(f).parameters}}
    found = parts.find(name, "") if ":" in name else known.get(name)
    if found is None:
        raise ValueError(f"iterate.select: there is no rule {name!r}{nearest(name, known)}; rules: {', '.join(known)}, or "
                         f"'module:name'")
    allowed = [p.name for p in signature(found).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if wrong := [k for k in arguments if k not in allowed]:
        raise ValueError(f"iterate.select: {name} has no argument {wrong[0]!r}{nearest(wrong[0], allowed)}; arguments: "
                         f"{', '.join(allowed) or 'none'}")
    return partial(found, **arguments)


def selected(run: Run, groups: Sequence[Group]) -> list[Group]:
    """What is trained on: of the responses of the policy those that the rule takes, with their rewards as labels, or with who
    beats whom where labels are soft."""
    chosen, found = rule(run.iterate.select), []
    for group in groups:
        labels = labelled(group, soft=run.iterate.labels == "soft")
        found += [softened(one, labels) for one in chosen(labels)]
    return found


def softened(group: Group, whole: Group) -> Group:
    """A group that was selected from `whole`, with its wins."""
    if whole.wins is None:
        return group
    place = {id(r): i for i, r in enumerate(whole.responses)}
    at = [place[id(r)] for r in group.responses]
    return replace(group, wins=[[whole.wins[i][j] for j in at] for i in at], relevance=None)


def labelled(group: Group, *, soft: bool) -> Group:
    """The scored responses of the policy, labelled by reward, or by wins where they are wanted and known."""
    kept = [i for i, r in enumerate(group.responses) if r.train and "reward" in r.scores]
    wins = [[group.wins[i][j] for j in kept] for i in kept] if soft and group.wins is not None else None
    return replace(group, responses=[replace(group.responses[i], logp=None) for i in kept], wins=wins,
                   relevance=[group.responses[i].scores["reward"] for i in kept], meta=deepcopy(group.meta))


# ---------------------------------------------------------------------------------------------------------------- rounds
def iterate(run: Run, *, resume: bool = False, show: bool = True, score: Callable | None = None) -> Result:
    """Every round of `run.iterate`; with `resume` those stages whose files are not there yet. `score` as in `train`."""
    out = Path(run.out)
    if (out / "run.yaml").exists() and not resume:
        raise ValueError(f"{out} holds a run already: go on with it (--resume), or choose another folder (out=...)")
    accelerator, objective = setup.accelerator(run), run.objective()
    if accelerator.num_processes > 1 and named(run.rollout.sampler)[0] != "transformers":
        raise ValueError(f"with several processes the first one samples the rounds of iterate, by itself: set rollout.sampler to "
                         f"transformers, found {run.rollout.sampler!r}")
    tokenizer = setup.tokenizer(run, objective)
    data, held_out = folder.datasets(run, tokenizer)
    if (out / "run.yaml").exists():
        folder.same(run, data, held_out)
    scorer = online.scorer(run) if score is None else None
    score, rounds, lines = score or scorer, run.iterate.rounds, []
    if accelerator.is_main_process:
        folder.begin(run, objective, data, held_out, tokenizer, rounds, 0)
    accelerator.wait_for_everyone()
    for t in range(1, rounds + 1):
        here = out / "iterations" / str(t)
        with accelerator.main_process_first():
            groups = scored(run, t, data, score, accelerator, tokenizer)
            chosen = kept(here / "data.jsonl", lambda groups=groups: selected(run, groups))
        if not chosen:
            raise ValueError(f"round {t}: nothing is selected from {len(groups)} groups by {run.iterate.select!r}: their rewards "
                             f"are equal or within the margin. Look at them (prefopt rollouts {out}), and lower the margin or "
                             f"raise rollout.k")
        seconds = training(run, t)
        if not (here / "run/model").exists():
            ended = train(seconds, resume=True, show=show)
            if ended.stopped == "interrupted":
                return replace(ended, out=out, steps=t - 1)
        with accelerator.main_process_first():
            extrapolated(run, t, objective, tokenizer)
        line = {"step": t, **measured(groups), "selected": len(chosen), **last_metrics(here / "run"),
                **judged(run, t, held_out, score, scorer, accelerator, tokenizer)}
        lines.append(line)
        if accelerator.is_main_process:
            folder.replace(out / "metrics.jsonl", "".join(json.dumps(one) + "\n" for one in lines))
    if accelerator.is_main_process:
        with checkpoints.whole(out / "model") as temporary:
            shutil.copytree(policy(run, rounds + 1).name, temporary, dirs_exist_ok=True)
    if scorer is not None:
        scorer.close()
    accelerator.wait_for_everyone()
    last = {k: v for k, v in lines[-1].items() if k != "step"}
    return Result(last, rounds, out, tuple(unmet(run.expect, last)))


def policy(run: Run, t: int) -> Model:
    """The policy that round t starts from."""
    if t == 1:
        return run.policy
    made = Path(run.out) / "iterations" / str(t - 1) / ("model" if run.iterate.momentum else "run/model")
    return run.policy.model_copy(update={"name": str(made), "revision": None, "lora": None})


def training(run: Run, t: int) -> Run:
    """The run of round t: the recipe on what was selected, from the policy that said it."""
    here, it = Path(run.out) / "iterations", run.iterate
    rounds = range(1 if it.accumulate else t, t + 1)
    raw = json.loads(run.model_dump_json(exclude={"rollout", "iterate", "expect", "log"}))
    first = run.reference or run.policy.model_copy(update={"lora": None})
    reads = {k: v for k, v in raw["data"].items() if k in ("max_prompt", "max_response", "max_length", "encoding", "cache",
                                                           "cache_reference")}
    raw["data"] = {**reads, "train": [str(here / str(r) / "data.jsonl") for r in rounds],
                   "cache_start": "logp_old" in run.objective().reads_forward()}
    raw["train"] = {**raw["train"], "eval_every": None, "patience": None}
    raw["reference"] = first.model_dump() if it.reference == "first" and (t > 1 or run.reference) else None
    tokenizer = raw["tokenizer"] or run.policy.name
    return make({**raw, "tokenizer": tokenizer, "policy": policy(run, t).model_dump(), "out": str(here / str(t) / "run")})


# ---------------------------------------------------------------------------------------------------------------- stages
def kept(path: Path, made: Callable[[], Sequence[Group]]) -> list[Group]:
    """The groups of a file, which is made, whole or not at all, if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        folder.replace(path, "".join(json.dumps(g.to_json()) + "\n" for g in made()))
    with path.open(encoding="utf-8") as file:
        return [Group.from_json(json.loads(line)) for line in file]


def pieces(run: Run, t: int, data: Sequence[Group]) -> Iterator[list[Group]]:
    """The prompts of round t: the next ones in the order of the run, each with its place in the stream as its key."""
    count = run.iterate.prompts or len(data)
    name, arguments = named(run.rollout.order)
    order = parts.find(name, "prefopt.rollout.orders")
    prompts = Ordered(data, order(**parts.checked(name, order, arguments)) if arguments else order, run.train.seed)
    places = range((t - 1) * count, t * count)
    for start in range(0, count, PIECE):
        yield [Group(prompts[place].prompt, [], meta={**prompts[place].meta, "key": place})
               for place in places[start:start + PIECE]]


def scored(run: Run, t: int, data: Sequence[Group], score: Callable, accelerator, tokenizer) -> list[Group]:
    """What the policy of round t says to its prompts, and what that is worth."""
    here, found = Path(run.out) / "iterations" / str(t), []
    engine = cache(partial(speaking, run, t, accelerator, tokenizer, online.roles(run)))          # loaded if anything is missing

    def sample(prompts: list[Group]) -> list[Group]:
        return online.sampled(run, *engine(), accelerator, run.program(), prompts, [g.meta["key"] for g in prompts], t)

    for n, prompts in enumerate(pieces(run, t, data)):
        said = kept(here / "sampled" / f"{n:05d}.jsonl", lambda prompts=prompts: sample(prompts))
        found += kept(here / "scored" / f"{n:05d}.jsonl", lambda said=said: score(said))
    if engine.cache_info().currsize:
        engine()[0].close()
    return kept(Path(run.out) / "rollouts" / f"step-{t:08d}.jsonl", lambda: found)


def speaking(run: Run, t: int, accelerator, tokenizer, roles: set[str]) -> tuple:
    """The sampler of round t's policy, and its models: the first policy is the reference where it speaks too."""
    first = run.reference or run.policy.model_copy(update={"lora": None})
    own = run.model_copy(update={"policy": policy(run, t), "reference": first})
    objective = run.objective()
    models = setup.load_models(own, objective, tokenizer, None, accelerator.device, objective.reads(), roles)
    setup.seed(run.train.seed, t)
    engine = online.sampler(own, models, tokenizer)
    online.sync(engine, models, t)
    return engine, models


def extrapolated(run: Run, t: int, objective, tokenizer) -> None:
    """The next policy, where it is not the solution itself: hat + momentum (hat - hat_before)."""
    here, alpha = Path(run.out) / "iterations" / str(t), run.iterate.momentum
    if not alpha or (here / "model").exists():
        return
    before = run.policy.name if t == 1 else str(here.parent / str(t - 1) / "run/model")
    solved, last = (load_policy(**run.policy.model_copy(update={"name": name}).model_dump())
                    for name in (str(here / "run/model"), before))
    with torch.no_grad():
        for p, q in zip(solved.parameters(), last.parameters(), strict=True):
            p.copy_(q.float().lerp(p.float(), 1 + alpha))
    checkpoints.save_model(solved, tokenizer, here / "model", objective, folder.card(run))


def last_metrics(out: Path) -> dict[str, float]:
    """What a run measured in its last step."""
    with (out / "metrics.jsonl").open(encoding="utf-8") as file:
        last = json.loads(list(file)[-1])
    return {k: v for k, v in last.items() if k not in ("step", "epoch", "lr")}


def judged(run: Run, t: int, held_out, score: Callable, scorer: Callable | None, accelerator, tokenizer) -> dict[str, float]:
    """What the policy that came of round t is worth on held-out prompts."""
    path = Path(run.out) / "iterations" / str(t) / "held_out.json"
    if held_out is None:
        return {}
    if not path.exists():
        engine, models = speaking(run, t + 1, accelerator, tokenizer, {"reference"} if online.compares(scorer) else set())
        found = online.evaluate(run, held_out, engine, score, models, accelerator, t + 1)
        engine.close()
        if accelerator.is_main_process:
            folder.replace(path, json.dumps(found))
        accelerator.wait_for_everyone()
    return json.loads(path.read_text(encoding="utf-8"))
