"""An on-policy run: its prompts, sampler, rewards and sources put together from settings, and what it checks and measures."""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from data_tools.batch import Batch
from data_tools.collate import collate
from data_tools.encoding import Counts
from data_tools.records import Group
from prefopt import parts
from prefopt.config import Run, named
from prefopt.ops import processes, total
from prefopt.parts import bind, columns_read
from prefopt.rollout import programs, sources
from prefopt.rollout.base import noise
from prefopt.rollout.programs import Against, of_policy, plain, roles_of
from prefopt.rollout.sources import GroupSource, Rollouts
from prefopt.sharding import whole_model


# -------------------------------------------------------------------------------------------------------------- prompts
class Prompts(list):
    """Prompts of a run with what identifies them."""

    def __init__(self, groups: Sequence[Group], fingerprint: str):
        list.__init__(self, groups)
        self.fingerprint = fingerprint


def prompts(run: Run, tokenizer, *, held_out: bool = False) -> Prompts:
    """Every prompt of the run's data, checked: none is empty or too long. Responses that a file has are left aside."""
    from data_tools.validate import checked, texts
    from prefopt.folder import content, loaded
    from prefopt.rollout.transformers import prompt_ids
    d, roll = run.data, run.rollout
    source = d.eval if held_out else d.train
    sources = [source] if isinstance(source, str) else source
    groups = list(checked(loaded(run, held_out), on_bad=d.on_bad, checks=(lambda g: texts(Group(g.prompt, [])),)))
    if not groups:
        raise ValueError(f"{', '.join(sources)}: there is no prompt in it")
    longest = max(len(ids) for ids in prompt_ids([g.prompt for g in groups], tokenizer, d.encoded()))
    needed = longest + roll.max_new_tokens
    if run.train.tokens and needed > run.train.tokens:
        raise ValueError(f"{', '.join(sources)}: the longest prompt has {longest} tokens, so that a response with its prompt may "
                         f"take {needed}, more than a micro-batch: raise train.tokens to at least {needed}, lower "
                         f"rollout.max_new_tokens, or cut prompts with data.max_prompt")
    said = repr([content(s) for s in sources]) + repr((d.model_dump(), held_out))
    return Prompts(groups, blake2b(said.encode(), digest_size=8).hexdigest())


def given(run: Run) -> list[Group]:
    """Groups with responses and rewards that are mixed in."""
    from data_tools import formats
    groups = list(formats.load(run.rollout.mix.data))
    for group in groups:
        if missing := [n for n, r in enumerate(group.responses, 1) if "reward" not in r.scores]:
            raise ValueError(f"{group.meta.get('place', 'a group')}: response {missing[0]} has no scores: {{reward: ...}}, which "
                             f"rollout.mix needs")
    return groups


# --------------------------------------------------------------------------------------------------------------- source
def rollouts(run: Run, data: Prompts, engine, score: Callable, models, tokenizer, objective, accelerator) -> Rollouts:
    """The source of an on-policy run. `engine` is its sampler, `score` fills in rewards."""
    roll, rank, ranks = run.rollout, accelerator.process_index, processes()
    source: GroupSource
    filtered = again = None
    if roll.recorded:
        source = sources.Recorded(Path(roll.recorded), rank=rank, ranks=ranks)
    else:
        name, arguments = named(roll.order)
        order = parts.find(name, "prefopt.rollout.orders")
        order = order(**parts.checked(name, order, arguments)) if arguments else order
        made = program(run, objective)
        sample = partial(sampled, run, engine, models, accelerator, made)
        if isinstance(made, Against):
            again = partial(met_again, run, engine, models, accelerator, made, score)
        portions = partial(together, engine, roll.k) if apart(score) and made is programs.single else sources.whole
        source = sources.OnPolicy(data, sample, score, seed=run.train.seed, order=order, portions=portions)
        if getattr(objective, "keep", None) is not None:
            filtered = source
            source = sources.Filter(source, partial(kept, objective, encoder(run, tokenizer)), rounds=roll.refill)
        if roll.mix:
            source = sources.Mix(source, given(run), share=roll.mix.share, seed=run.train.seed)
        if roll.replay:
            source = sources.Replay(source, size=roll.replay.size, share=roll.replay.share, seed=run.train.seed)
        if roll.dump:
            source = sources.Dump(source, Path(run.out) / "rollouts", every=roll.dump, rank=rank, ranks=ranks)
    return Rollouts(source, encoder(run, tokenizer), run.train.groups_per_step, prompts=len(data), epochs=run.train.epochs,
                    rank=rank, ranks=ranks, labels=objective.whole_groups, filtered=filtered, again=again)


def encoder(run: Run, tokenizer) -> Callable[[list[Group]], Batch]:
    """Sampled groups as a batch. None may be lost on the way."""
    def encode(groups: list[Group]) -> Batch:
        counts = Counts()
        batch = collate(groups, tokenizer, run.data.encoded(), counts=counts)
        if counts.kept < counts.read:
            raise ValueError(f"sampled groups were dropped: {counts}")
        reward = batch["reward"] if "reward" in batch else torch.full((batch.N,), torch.nan)
        return batch.with_columns(reward=reward)
    return encode


def scorer(run: Run):
    """What fills in `scores` and their sum `scores["reward"]`, and is closed at the end. The package of rewards is found by
    name, as any part is. Raises ValueError where a run that samples names none."""
    roll = run.rollout
    if not roll.rewards and samples(run):
        raise ValueError("rollout.rewards: missing: name what scores a response, for instance [final_answer]; `prefopt reward "
                         "list` shows all")
    found = parts.find("rewards.online:Scorer", "")(roll.rewards, unscored=roll.unscored, timeout=roll.timeout,
                                                    against=run.against(), payoff=roll.payoff)
    if found.compares and run.data.eval and named(roll.sampler)[0] in ("vllm", "vllm_server"):
        found.close()
        raise ValueError("rewards that compare are evaluated as win rates against the reference, and vLLM holds the policy "
                         "alone: leave data.eval out, or set rollout.sampler: transformers")
    return found


def compares(score: Callable | None) -> bool:
    """Whether rewards are wins against other responses. A function of one's own grades."""
    return getattr(score, "compares", False)


def apart(score: Callable | None) -> bool:
    """Whether groups may be scored apart from each other, beside the sampler: not by a function of one's own, which may look at
    all of them, or ask the policy."""
    return getattr(score, "apart", False)


def together(engine, k: int, groups: list[Group]) -> list[list[int]]:
    """The numbers of the prompts that the sampler answers at the same time: batches of the embedded one, else all."""
    from prefopt.rollout.transformers import Sampler
    return engine.portions([g.prompt for g in groups], k) if type(engine) is Sampler else sources.whole(groups)


def roles(run: Run, score: Callable | None = None) -> set[str]:
    """Who is sampled from beside the policy: in training, and to be compared with in an evaluation."""
    if run.rollout is None:
        return set()
    judged = {"reference"} if run.data.eval and compares(score) else set()
    return judged if run.rollout.recorded else judged | roles_of(run.program())


def components(run: Run) -> list[str]:
    """Names of the rewards that are summed."""
    return list(parts.find("rewards.online:named_rewards", "")(run.rollout.rewards))


def sampler(run: Run, models, tokenizer, average=None):
    """The run's sampler: the policy itself, with the reference and the averaged policy beside it, or an engine."""
    roll = run.rollout
    name, arguments = named(roll.sampler)
    if name == "transformers":
        from prefopt.rollout.transformers import Sampler
        others = {"reference": models.reference, "average": average}
        return Sampler(models.policy, tokenizer, batch=roll.batch, encoding=run.data.encoded(), **arguments,
                       others={role: model for role, model in others.items() if model is not None})
    if name in ("vllm", "vllm_server"):
        from prefopt.rollout import vllm
        make = vllm.VLLMSampler if name == "vllm" else vllm.VLLMServer
        arguments = arguments if name == "vllm_server" else {"model": run.policy.name, "dtype": run.policy.dtype, **arguments}
        return make(tokenizer=tokenizer, encoding=run.data.encoded(), **arguments)
    return parts.find(name, "")(models=models, tokenizer=tokenizer, run=run, **arguments)


def samples(run: Run) -> bool:
    """Whether a run needs a sampler: to train, or to be evaluated."""
    return not run.rollout.recorded or run.data.eval is not None


def sync(engine, models, version: int) -> None:
    """The engine holds the policy as it is now, which has taken `version` steps. All processes call it, once per version.

    Of a sharded policy the first process hands over a whole copy, and the others None.
    """
    from prefopt.rollout.vllm import first_process
    if not models.sharded:
        engine.sync(models.policy, version)
    elif first_process(lambda: engine.version != version):
        engine.sync(whole_model(models.policy), version)


def sampled(run: Run, engine, models, accelerator, program: Callable, groups: list[Group], keys: list[int],
            version: int) -> list[Group]:
    """The groups with k responses each, sampled by the policy of this version, which the engine holds."""
    roll = run.rollout
    with accelerator.autocast():
        made = program(engine, [g.prompt for g in groups], n=roll.k, seed=run.train.seed, keys=keys, version=version,
                       **sampling_settings(roll))
    for old, new in zip(groups, made, strict=True):
        rows = [r for r in new.responses if r.train]
        if len(rows) != roll.k:
            raise ValueError(f"the sampler returned {len(rows)} responses to a prompt where {roll.k} were asked for "
                             f"({old.meta.get('place', 'prompt')})")
        new.meta = {**new.meta, **old.meta}
    return made


AHEAD = 2 ** 40                                               # versions of the policy one step ahead


def met_again(run: Run, engine, models, accelerator, program: Against, score: Callable, groups: list[Group],
              version: int) -> list[Group]:
    """The groups with opponents drawn from the policy as it is now, under noise and a version of their own, and scored."""
    sync(engine, models, AHEAD + version)
    keys = [noise(g.meta["key"], "ahead") for g in groups]
    with accelerator.autocast():
        made = program.met(engine, groups, keys=keys, seed=run.train.seed, version=AHEAD + version,
                           **sampling_settings(run.rollout))
    return score(made)


def sampling_settings(roll) -> dict:
    return {"max_new_tokens": roll.max_new_tokens, "temperature": roll.temperature, "top_p": roll.top_p, "top_k": roll.top_k,
            "stop": tuple(roll.stop)}


def program(run: Run, objective) -> Callable:
    """How responses come about: as the run says, with a greedy one beside them where the objective reads a probe."""
    probes = not objective.whole_groups and "probe" in columns_read(objective.advantage)
    return programs.with_greedy(run.program()) if probes else run.program()


def kept(objective, encode: Callable[[list[Group]], Batch], groups: list[Group]) -> list[bool]:
    """Which groups the recipe's `keep` keeps."""
    batch = encode(groups)
    return bind(objective.keep, objective.groups(batch)).bool().tolist()


# -------------------------------------------------------------------------------------------------------------- updates
def updates(batch: Batch, run: Run, step: int) -> Iterator[Batch]:
    """The optimiser steps of a rollout: whole groups, shuffled by (seed, step). Every process takes as many."""
    roll = run.rollout
    count = 1 if roll is None else update_count(run)
    if count == 1:
        yield batch
        return
    rng = np.random.default_rng((run.train.seed, step))
    for _ in range(roll.epochs):
        for chosen in np.array_split(rng.permutation(batch.groups), count // roll.epochs):
            some = chosen if len(chosen) else np.arange(1)    # fewer groups than updates: a group that counts nothing
            part = batch.select(torch.isin(batch.index, torch.from_numpy(some).to(batch.index.device)).nonzero().squeeze(1))
            yield part if len(chosen) else part.with_columns(train=torch.zeros_like(part.index, dtype=torch.bool))


def update_count(run: Run) -> int:
    """Optimiser steps of one rollout."""
    roll = run.rollout
    samples = run.train.groups_per_step * roll.k
    return roll.epochs * -(-samples // (roll.samples_per_update or samples))


def at_once(run: Run, objective) -> bool:
    """Whether a rollout is trained on by one plain update, so that the old policy is the one that the loss sees."""
    before = {"logp_old", "logp_now"} & objective.reads_before()
    return not objective.whole_groups and run.update == "plain" and update_count(run) == 1 and not before


# --------------------------------------------------------------------------------------------------------------- checks
def check_rollout(run: Run, batch: Batch, measured_now: dict[str, float], exact: bool) -> None:
    """At the first step: sampler and trainer agree on what was sampled, and rewards differ somewhere."""
    roll = run.rollout
    exact = exact and roll.top_p == 1 and not roll.top_k and not roll.recorded           # truncated samples are told otherwise
    if "logp_rollout" in batch and of_policy(run.program()):
        mask = batch["mask"].bool() & torch.isfinite(batch["logp_rollout"])
        if "train" in batch:                                  # probes need not be drawn from the policy
            mask = mask & batch["train"].bool()[:, None]
        gap = (batch["logp_old"] - batch["logp_rollout"])[mask].abs()
        largest = float(gap.max()) if len(gap) else 0.0
        if exact and largest > 1e-2:
            raise ValueError(f"sampler and trainer disagree about the log-probability of sampled tokens by up to {largest:.2g} "
                             f"at the first step: weights, temperature, tokenizer or chat template of the two differ. A "
                             f"recipe with a correction (set.correction) may train on such samples, but mend the cause first")
        if largest > 1 and roll.top_p == 1 and not roll.top_k:
            warnings.warn(f"sampler and trainer differ by up to {largest:.2g} in the log-probability of a sampled token: correct "
                          f"for it with set.correction: truncated", stacklevel=2)
    if measured_now.get("groups/contrast") == 0:
        mean = measured_now.get("reward", float("nan"))
        warnings.warn(f"at the first step all responses to each prompt have the same reward (mean {mean:.3g}): a group recipe "
                      f"learns nothing from them. Check the reward on the samples in out/rollouts", stacklevel=2)


def evaluate(run: Run, data: Prompts, engine, score: Callable, models, accelerator, step: int, *,
             prompts: int = 64) -> dict[str, float]:
    """Rewards of fresh responses to held-out prompts, of comparisons win rates against the reference; their noise is the same
    at every evaluation."""
    here = np.array_split(np.arange(len(data)), processes())[accelerator.process_index]
    own = run.model_copy(update={"rollout": run.rollout.model_copy(update={"k": run.rollout.eval_k})})
    made = plain(run.program())
    if compares(score):
        made, score = Against({"reference": 1.0}, run.rollout.eval_k, program=made), score.counting("opponents")
    sync(engine, models, step)

    def sample(places: list[int]) -> list[Group]:
        groups = [Group(data[i].prompt, [], meta=dict(data[i].meta)) for i in places]
        return sampled(own, engine, models, accelerator, made, groups, [2 ** 40 + i for i in places], step)

    portions = [here[start:start + prompts].tolist() for start in range(0, len(here), prompts)]
    found = sources.scored(portions, sample, score) if apart(score) else [g for some in portions for g in score(sample(some))]
    return {f"eval/{k}": v for k, v in sources.measured(found).items()}


def weighing(batch: Batch) -> Batch:
    """The rows of an optimiser step that count in a policy's loss or its metrics. Those see every row by itself, so that probes,
    dropped groups and responses without a reward, whose weights are all 0, need not be computed. Where no row counts, or the
    loss is of groups, all rows."""
    weights = [unit.ne(0).any(1) for name, unit in batch.items() if name.startswith("token_unit")]
    if not weights:
        return batch
    rows = torch.stack(weights).any(0).nonzero().squeeze(1)
    return batch.alone(rows) if 0 < len(rows) < batch.N else batch


def weighs(batch: Batch) -> bool:
    """Whether anything in the optimiser step counts: all its groups may have been dropped."""
    return "token_unit" not in batch or bool(total(batch["token_unit"].abs().sum()) > 0)
