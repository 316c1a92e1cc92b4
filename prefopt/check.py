"""What can be known about a run before its weights are loaded: settings, data, model folder, memory, disk, steps."""
from __future__ import annotations

import heapq
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data_tools.batch import Batch
from data_tools.collate import Counts, EncodedGroup, EncodedRow, encode, pad, pad_token
from data_tools.columns import nearest
from data_tools.describe import content
from data_tools.encoding import segments
from data_tools.fields import PLACE
from data_tools.records import Group
from prefopt import checkpoints, folder, memory, recipes, setup
from prefopt.config import Run
from prefopt.diagnose import EVALUATION_METRICS, combined
from prefopt.doctor import OPTIONAL
from prefopt.explain import UNBOUNDED, asks, departures_of, document
from prefopt.findings import Finding, attempt, error, exists, ok, sentence, warning
from prefopt.forward import suited
from prefopt.layout import PRICE, bucketed, packed, padded, shared
from prefopt.models import head_of
from prefopt.parts import kind
from prefopt.rehearsal import Rehearsal, rehearse

LOOK = 256                                                    # groups of the data that are tried out
Findings = Iterator[Finding]


def check(run: Run, *, records: int | None = None) -> Findings:
    """Findings about a run, one after the other. `records` limits how many groups of each data set are read."""
    yield from attempt("recipe", recipe, run)
    yield from attempt("packages", packages, run)
    yield from attempt("device", device, run)
    if run.rollout:
        yield from on_policy(run)
        return
    train = yield from attempt("data.train", data, run, False, records)
    held_out = (yield from attempt("data.eval", data, run, True, records)) if run.data.eval else None
    rehearsal = yield from attempt("fit", fit, run)
    if train and held_out:
        yield from overlap(train, held_out)
    tokenizer = yield from attempt("tokenizer", tokens_of, run)
    batch = (yield from attempt("encoding", encoding, run, tokenizer, train)) if tokenizer and train else None
    config = yield from attempt("policy", model, run, tokenizer, batch)
    if config:
        yield from attempt("memory", room, run, config, batch)
    if train:
        yield from attempt("steps", steps, run, train)
    if rehearsal:
        yield from attempt("metrics", metrics, run, rehearsal)
    yield from attempt("out", out, run)


def on_policy(run: Run) -> Findings:
    """The same for a run on its own samples: prompts in the place of data, and their rewards."""
    from prefopt import check_rollout
    tokenizer = yield from attempt("tokenizer", tokens_of, run)
    found = (yield from attempt("data.train", check_rollout.prompts, run, tokenizer)) if tokenizer else None
    if found:
        yield from attempt("rewards", check_rollout.rewards, run, found[0])
    yield from attempt("rollout", check_rollout.numbers, run)
    config = yield from attempt("policy", model, run, tokenizer, None)
    if config and found:
        longest, t = found[1] + run.rollout.max_new_tokens, run.train
        whole = longest * t.groups_per_step * run.rollout.k
        limit = vars(config.get_text_config()).get("max_position_embeddings")
        if limit and longest > limit:
            yield error("policy", f"a prompt of {found[1]} tokens with rollout.max_new_tokens={run.rollout.max_new_tokens} is "
                                  f"longer than the model was made for ({limit})")
        yield from attempt("memory", room, run, config, None, min(whole, max(longest, budget(run))))
        yield ok("steps", f"{t.steps or max(1, round(-(-len(found[0]) // t.groups_per_step) * t.epochs)):,} steps of "
                          f"{t.groups_per_step} prompts, learning rate {t.lr:g}, {t.schedule}")
    yield from attempt("metrics", check_rollout.metrics, run)
    yield from attempt("out", out, run)


# ------------------------------------------------------------------------------------------------------------ settings
def recipe(run: Run) -> Findings:
    yield ok("recipe", f"{run.recipe}: {document(recipes.find(run.recipe)).summary}")
    for slot, (here, plain) in departures_of(run.recipe, run.set).items():
        yield ok("recipe", f"departs from {run.recipe}: {slot} is {here}, the recipe has {plain}")
    if not run.objective().bounded:
        yield warning("recipe", UNBOUNDED)


def packages(run: Run) -> Findings:
    quantised = run.policy.quantize or run.reference and run.reference.quantize
    wanted = [*run.log, *(["bitsandbytes"] if quantised else [])]
    for package in wanted:
        need, install = OPTIONAL[package]
        if find_spec(package) is None:
            yield error("packages", f"{need} needs the package {package}, which is not installed: {install}")
        else:
            yield ok("packages", f"{package} is installed")


def device(run: Run) -> Findings:
    if torch.cuda.is_available() and run.train.device != "cpu":
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        yield ok("device", f"{len(names)} CUDA device(s): {', '.join(dict.fromkeys(names))}")
        return
    yield ok("device", f"CPU with {torch.get_num_threads()} threads")
    if run.policy.quantize:
        yield error("device", "policy.quantize needs a CUDA device, and there is none: leave it out")
    if run.train.precision == "fp16" or run.policy.dtype == "float16":
        yield warning("device", "half precision (fp16) is slow on a CPU, and parts of it may be missing: use float32 "
                                "or bfloat16")


# ---------------------------------------------------------------------------------------------------------------- data
@dataclass
class Seen:
    """What one pass over a data set leaves: how many groups, the first and the longest ones, hashes of the prompts."""
    groups: int = 0
    complete: bool = True
    first: list[Group] = field(default_factory=list)
    longest: list[tuple[int, int, Group]] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)

    def add(self, group: Group) -> None:
        self.groups += 1
        self.prompts.append(hash(repr(group.prompt)))
        if len(self.first) < LOOK // 4:
            self.first.append(group)
            return
        characters = len(content(group.prompt)) + max(len(content(r.text)) for r in group.responses)
        push = heapq.heappush if len(self.longest) < LOOK // 16 else heapq.heappushpop
        push(self.longest, (characters, -self.groups, group))


def data(run: Run, held_out: bool, records: int | None) -> Findings:
    """One pass through everything that training would read, with the checks that training makes."""
    topic, limit, names = ("data.eval", "eval_limit", run.data.eval) if held_out else \
        ("data.train", "limit", run.data.train)
    least = min((n for n in (records, vars(run.data)[limit]) if n is not None), default=None)
    gentle = run.data.model_copy(update={"on_bad": "skip", "flip": 0.0, limit: least})
    found, seen = folder.groups(run.model_copy(update={"data": gentle}), held_out), Seen()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for group in found:
            seen.add(group)
    report, names = found.report, names if isinstance(names, str) else ", ".join(names)
    seen.complete = records is None or report.groups < records
    if report.counts:
        kinds = "; ".join(f"{kind} ({count:,}), the first: {report.examples[kind][0]}"
                          for kind, count in report.counts.most_common())
        share = f"{names}: {report.skipped:,} of {report.groups:,} records"
        if run.data.on_bad == "skip" and seen.groups:
            yield warning(topic, f"{share} will be skipped. {kinds}")
        else:
            mend = ". Mend them, or leave them out with data.on_bad=skip" if seen.groups else ""
            yield error(topic, f"{share} are not good. {kinds}{mend}")
    elif seen.groups == 0:
        yield error(topic, f"{names}: no records")
    else:
        yield ok(topic, f"{names}: {'' if seen.complete else 'the first '}{seen.groups:,} groups are good")
    return seen if seen.groups else None


def overlap(train: Seen, held_out: Seen) -> Findings:
    known = set(train.prompts)
    shared = sum(prompt in known for prompt in held_out.prompts)
    if shared:
        yield warning("data.eval", f"{shared:,} of {held_out.groups:,} held-out prompts are also in the training data: "
                                   f"held-out numbers will look too good")


# ------------------------------------------------------------------------------------- does the recipe learn from it?
def fit(run: Run) -> Findings:
    """Try the recipe out on the first groups with made-up log-probabilities."""
    from data_tools import formats, validate
    d, objective = run.data, run.objective()
    reader = formats.load(d.train, format=d.format, streaming=d.streaming, columns=d.columns, split=d.split,
                          on_error=lambda error: None)
    good = (g for g in reader if g.responses and not any(list(examine(g)) for examine in validate.CHECKS))
    groups = list(islice(good, LOOK))
    if not groups:
        return None
    wanted = folder.columns(objective.reads())
    batch = labels_only(groups, wanted)
    for column, how in asks(objective).items():
        if column not in batch or batch[column].is_floating_point() and batch[column].isnan().any():
            yield error("fit", f"{run.recipe} reads the column {column!r}, which "
                               f"{'some' if column in batch else 'all'} responses lack: {how}")
    if any(column not in batch for column in wanted):
        return None
    rehearsal = tried(objective, batch)
    if isinstance(rehearsal, str) or not rehearsal.learns.any():
        why = rehearsal if isinstance(rehearsal, str) else f"{run.recipe} learns nothing from this data"
        fits = ", ".join(fitting(batch)) or "none"
        yield error("fit", f"{why}. {shape(groups)}. Recipes that fit: {fits}")
        return None
    yield from balance(run, batch, rehearsal, groups)
    return rehearsal


def labels_only(groups: Sequence[Group], wanted: Iterable[str]) -> Batch:
    """The groups' labels and the columns that records bring, two tokens for every response: no tokenizer needed."""
    def row(response) -> EncodedRow:
        known = {**response.meta, **{k: v for k, v in response.scores.items() if k == "reward"}}
        columns = {c: known[c] for c in wanted if c in known}
        marks = [np.nan if mark is None else mark for _, mark in segments(response)]
        if marks:                                             # two tokens stand for all
            columns |= {c: np.array([marks[0], marks[-1]]) for c in ("step_label", "segment") if c in wanted}
        return EncodedRow(np.array([1, 1]), train=bool(response.train), columns=columns)

    def numbers(values):
        return None if values is None else np.array(values, np.float32)

    return pad([EncodedGroup(np.array([1]), [row(r) for r in g.responses], numbers(g.relevance), numbers(g.wins),
                             g.weight) for g in groups])


def tried(objective, batch: Batch) -> Rehearsal | str:
    try:
        return rehearse(objective, batch)
    except (ValueError, KeyError) as problem:
        return sentence(problem)


def fitting(batch: Batch) -> list[str]:
    """Recipes, as published, that learn from every group of the batch."""
    objectives = {name: recipes.find(name)() for name in recipes.__all__}
    found = {name: tried(o, batch) for name, o in objectives.items() if set(folder.columns(o.reads())) <= set(batch)}
    return [name for name, r in found.items() if not isinstance(r, str) and bool(r.learns.all())]


def shape(groups: Sequence[Group]) -> str:
    sizes = sorted({len(g.responses) for g in groups})
    count = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    labelled = sum(g.wins is not None or any(r is not None for r in g.relevance or []) for g in groups)
    return f"The first {len(groups)} groups have {count} response(s) each and {labelled} of them are labelled"


def balance(run: Run, batch: Batch, rehearsal: Rehearsal, groups: Sequence[Group]) -> Findings:
    idle = (~rehearsal.learns).nonzero().flatten().tolist()
    if idle:
        yield warning("fit", f"{len(idle)} of the first {len(groups)} groups teach {run.recipe} nothing (ties, or too "
                             f"few labelled responses); the first one is {groups[idle[0]].meta.get(PLACE)}")
    else:
        yield ok("fit", f"{run.recipe} learns from each of the first {len(groups)} groups")
    if kind(run.objective().ranking) == "Rows" and "relevance" in batch:
        known = batch["relevance"][~batch["relevance"].isnan()]
        good = float((known > 0.5).double().mean())
        if good in (0.0, 1.0):
            side, where = ("desirable", "above") if good else ("undesirable", "not above")
            yield warning("fit", f"all responses count as {side} (relevance {where} 1/2): a loss on single responses "
                                 f"needs both kinds")


# ---------------------------------------------------------------------------------------------------- tokens and model
def tokens_of(run: Run) -> Findings:
    name = run.tokenizer or run.policy.name
    exists("tokenizer" if run.tokenizer else "policy.name", name)
    tokenizer = setup.tokenizer(run, run.objective())
    template = "with a" if tokenizer.chat_template else "without a"
    yield ok("tokenizer", f"{name}: {len(tokenizer):,} tokens, {template} chat template")
    return tokenizer


def encoding(run: Run, tokenizer, seen: Seen) -> Findings:
    """Encode the first and the longest groups as training would."""
    groups, counts = [*seen.first, *(group for _, _, group in seen.longest)], Counts()
    encoded = encode(groups, tokenizer, run.data.encoded(), counts=counts)
    for what, (count, place) in counts.notes.items():
        yield warning("encoding", f"{what}: {count} times in {len(groups)} groups, the first is {place}")
    if not encoded:
        raise ValueError("no group is left after encoding: raise data.max_prompt, data.max_response or data.max_length")
    batch = pad(encoded, pad_id=pad_token(tokenizer))
    lengths = [group.length for group in encoded]
    which = "the first and the longest" if seen.groups > len(groups) else "all"
    yield ok("encoding", f"{np.mean(lengths):.0f} tokens per group on average and at most {max(lengths)}, rows of up "
                         f"to {int(batch['attend'].sum(1).max())} tokens, in {which} {len(groups)} groups")
    return batch


def model(run: Run, tokenizer, batch: Batch | None) -> Findings:
    """The policy's configuration, if its folder is whole and fits the tokenizer."""
    name = run.policy.name
    exists("policy.name", name)
    path = Path(name)
    adapter = (path / "adapter_config.json").exists()
    if path.is_dir() and not adapter and not (path / "config.json").exists():
        raise ValueError(f"{path} holds no config.json: it is not a model folder")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise ValueError(f"{path} holds no *.safetensors weights: save the model with save_pretrained of transformers "
                         f"4.35 or later")
    if not path.is_dir():
        yield ok("policy", f"{name} comes from the hub or its cache")
    config = configuration(name, None if adapter else run.policy.revision, run.policy.trust_remote_code, adapter)
    text = config.get_text_config()
    if tokenizer and len(tokenizer) > text.vocab_size:
        beyond = batch is not None and int(batch["tokens"].max()) >= text.vocab_size
        yield (error if beyond else warning)("policy", f"the tokenizer has {len(tokenizer):,} tokens and the model "
                                                       f"{text.vocab_size:,}: they do not belong together")
    longest = vars(text).get("max_position_embeddings")
    found = 0 if batch is None else int(batch["attend"].sum(1).max())
    if longest and found > longest:
        yield warning("policy", f"rows of {found} tokens are longer than the model was made for ({longest}): set "
                                f"data.max_length={longest}")
    return config


def configuration(name: str, revision: str | None, trust_remote_code: bool, adapter: bool):
    from transformers import AutoConfig
    if adapter:
        from peft import PeftConfig
        name = PeftConfig.from_pretrained(name).base_model_name_or_path
    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def room(run: Run, config, batch: Batch | None, tokens: int | None = None) -> Findings:
    """Memory and disk against what is free; `tokens` are those of the largest micro-batch, if known."""
    head, t = head_of(run.objective()), run.train
    own = memory.size(config, dtype=run.policy.dtype, lora=run.policy.lora, head=head)
    yield ok("policy", f"{type(config).__name__.removesuffix('Config')} with {own.parameters:,} parameters, "
                       f"{own.trainable:,} of them train")
    plain, price = own.plain if t.packing else "train.packing is off", PRICE * own.width
    if batch is not None:
        yield packing(batch, plain, price)
    if tokens is None:
        tokens = budget(run) if batch is None else largest(batch, run, None if plain else shared(batch, price))
    parts = memory.estimate(run, config, tokens=tokens)
    total, free, whole = sum(parts.values()), memory.available(t.device), memory.capacity(t.device)
    text = ", ".join(f"{what} {memory.gigabytes(count)}" for what, count in parts.items())
    less = f". {smaller(run, parts, whole)}" if total > free else ""
    yield (error if total > whole else warning if total > free else ok)(
        "memory", f"about {memory.gigabytes(total)} by estimate; of {memory.gigabytes(whole)}, {memory.gigabytes(free)} are "
                  f"free. {text}, for micro-batches of {tokens:,} tokens{less}")
    saves = (t.keep + 1) * bool(t.save_every)
    need = own.weights + saves * (own.weights + parts["optimiser"])
    place = next(p for p in (Path(run.out).absolute(), *Path(run.out).absolute().parents) if p.exists())
    left = shutil.disk_usage(place).free
    yield (warning if need > left else ok)(
        "disk", f"{memory.gigabytes(need)} for the model{f' and up to {saves} checkpoints' if saves else ''}, "
                f"{memory.gigabytes(left)} are free at {place}")
    if not saves:
        yield warning("disk", "train.save_every is not set: the run saves no checkpoints, so that an interruption by "
                              "anything but Ctrl-C loses it")


def smaller(run: Run, parts: dict[str, float], whole: int) -> str:
    """The settings that make a run smaller, those for the larger share first."""
    p, t = run.policy, run.train
    acts = sum(v for k, v in parts.items() if k.startswith(("activations", "logits", "hidden")))
    held = sum(parts.values()) - acts
    batch = ["lower train.tokens", *["set policy.gradient_checkpointing"] * (not p.gradient_checkpointing)]
    model = [*["set policy.lora"] * (p.lora is None), *["set policy.quantize: 4"] * (p.lora is not None and not p.quantize),
             *["set data.cache_reference"] * ("reference" in parts and not run.rollout), *["set train.shard"] * (not t.shard)]
    if held > whole:
        return f"Whatever the batch, {memory.gigabytes(held)} are for models and their training: {', or '.join(model)}"
    tips = ", or ".join(model + batch if held > acts else batch + model)
    return tips[0].upper() + tips[1:]


def packing(batch: Batch, plain: str | None, price: float) -> Finding:
    """How many tokens are computed, of those that padded rows would have."""
    if plain:
        return ok("packing", f"rows of like length are computed together, and prompts once for each: {plain}")
    share = packed(batch, price).tokens.numel() / padded(batch).rectangle
    return ok("packing", f"rows are packed, and what a group begins with is computed once: {share:.0%} of the tokens that padded "
                         f"rows have, in what was encoded here")


def largest(batch: Batch, run: Run, common: torch.Tensor | None) -> int:
    """Tokens of the largest micro-batch of a step, padding included, if all groups were like the longest one here. `common`
    counts the tokens that a row shares. An error where a group does not fit the budget."""
    lengths, strict = batch["attend"].sum(1), run.train.tokens is not None
    micro = list(batch.microbatches(budget(run), run.objective().whole_groups, common, strict))
    once = 0 if common is None else torch.where(batch.slot == 0, 0, common)
    group = int(torch.zeros(batch.groups, dtype=torch.long).index_add(0, batch.index, lengths - once).max())
    parts = lambda m: (padded(m),) if run.train.shard else bucketed(m).parts
    padding = 1 if common is not None else max(sum(p.tokens.numel() for p in parts(m)) / int(m["attend"].sum()) for m in micro)
    return round(min(group * run.train.groups_per_step, max(group, budget(run))) * padding)


def budget(run: Run) -> int:
    device = "cuda" if torch.cuda.is_available() and run.train.device != "cpu" else "cpu"
    return run.train.tokens or suited(device, not run.objective().outputs)


# ------------------------------------------------------------------------------------------------------------- the run
def steps(run: Run, seen: Seen) -> Findings:
    t = run.train
    per_epoch = -(-seen.groups // t.groups_per_step)
    total = t.steps or max(1, round(per_epoch * t.epochs))
    least = "" if seen.complete else "at least "
    yield ok("steps", f"{least}{total:,} step{'s' * (total > 1)} of {t.groups_per_step} group"
                      f"{'s' * (t.groups_per_step > 1)} ({least}{per_epoch:,} in an epoch), learning rate {t.lr:g}, "
                      f"{t.schedule}")
    if seen.complete and t.groups_per_step > seen.groups:
        yield warning("steps", f"train.groups_per_step is {t.groups_per_step} and there are {seen.groups} groups: "
                               f"every step takes all of them")


def metrics(run: Run, rehearsal: Rehearsal) -> Findings:
    """Are the metrics that `expect` and `train.metric` name ones that this run measures?"""
    own = {"loss", "grad_norm", *rehearsal.metrics, *(f"loss/{term}" for term in run.objective().regularisers)}
    judged = set(combined({**dict.fromkeys(EVALUATION_METRICS, 0.0), "ranking/policy": 0.0}))
    judged -= {"kl/ref"} if run.data.cache_reference else set()
    known = own | {f"eval/{metric}" for metric in (own | judged) - {"grad_norm"} if run.data.eval}
    named = {"train.metric": run.train.metric} if run.train.patience else {}
    for setting, metric in {**named, **{f"expect.{m}": m for m in run.expect}}.items():
        if metric not in known:
            yield error("metrics", f"{setting}: {metric!r} is not measured by this run{nearest(metric, known)}")


def out(run: Run) -> Findings:
    latest = checkpoints.latest(Path(run.out) / "checkpoints")
    if latest:
        yield warning("out", f"{run.out} holds a run with a checkpoint at {latest.name}: go on with it (prefopt train "
                             f"--resume), or choose another folder (out=...)")
    elif (Path(run.out) / "model").exists():
        yield warning("out", f"{run.out} holds a finished run, which would be written over")
    else:
        yield ok("out", f"results go to {run.out}")
