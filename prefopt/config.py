"""A run: recipe, departures from it, models, data, settings. Checked before any model is loaded."""
from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_tools.columns import nearest
from data_tools.encoding import Encoding
from prefopt import parts
from prefopt.recipes.checks import below_half, number, positive


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(Settings):
    """A causal language model: a folder or a hub id, and how to load it."""
    name: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    attention: str | None = None
    trust_remote_code: bool = False
    quantize: Literal[4, 8] | None = None
    lora: dict | None = None                                  # arguments of peft.LoraConfig, for instance {r: 16}
    gradient_checkpointing: bool = False
    dropout: bool = False                                     # off, so that policy = reference at the start

    @field_validator("lora")
    @classmethod
    def _adapters(cls, value: dict | None) -> dict | None:
        if value is not None:
            from peft import LoraConfig
            parts.checked("lora", LoraConfig, value)
            if not value:
                raise ValueError("no setting of the adapters is given: give their rank, {r: 16}, or leave lora out")
        return value


class Data(Settings):
    """Preference data: files, globs or hub ids, and how they are read and cut."""
    train: str | list[str] = Field(min_length=1)
    eval: str | list[str] | None = None
    format: str | None = None                                 # detected from the keys when left out
    split: str | None = None
    eval_split: str | None = None
    streaming: bool = False
    limit: int | None = Field(None, ge=1)
    eval_limit: int | None = Field(None, ge=1)
    columns: dict[str, str] | None = None                     # {key of the format: column of the file}
    on_bad: Literal["error", "skip"] = "error"
    max_prompt: int | None = Field(None, ge=1)
    max_response: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=1)
    encoding: dict = {}                                       # further fields of data_tools.collate.Encoding
    flip: float = Field(0.0, ge=0, lt=0.5)                    # share of labels flipped on purpose, for studies
    cache: str = "runs/cache"
    cache_reference: bool = False                             # reference log-probabilities once, on disk: no reference
                                                              # is kept in memory, and kl/ref is not measured
    cache_start: bool = False                                 # those of the policy that the run starts from, as logp_old:
                                                              # where it is the one that sampled the responses

    @model_validator(mode="after")
    def _limits(self):
        self.encoded()
        return self

    def encoded(self) -> Encoding:
        """How the text becomes tokens."""
        limits = {k: getattr(self, k) for k in ("max_prompt", "max_response", "max_length")}
        if again := sorted(limits.keys() & self.encoding.keys()):
            raise ValueError(f"{again[0]} is a setting of data itself, not of data.encoding")
        return Encoding(**limits, **parts.checked("encoding", Encoding, self.encoding))


class Modules(Settings):
    """Optimiser settings of what is not the policy: learned parts (token masks, heads), the critic. lr is the run's if left
    out."""
    lr: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.01, ge=0)


class Online(Settings):
    """Responses sampled from the current policy at every step, for recipes that read `online` rows."""
    k: int = Field(2, ge=1)
    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, gt=0)


class Replayed(Settings):
    """A share of every step comes from the newest groups that were trained on before."""
    size: int = Field(256, ge=1)                              # groups kept
    share: float = Field(0.25, gt=0, lt=1)


class Mixed(Settings):
    """A share of every step comes from groups with given responses and scores: {reward: ...}."""
    data: str | list[str] = Field(min_length=1)
    share: float = Field(0.25, gt=0, lt=1)


class Rollout(Settings):
    """Responses sampled from the current policy and their rewards: the source of an on-policy run. `data` holds prompts.

    Batch numbers: train.groups_per_step prompts a step, k responses a prompt, samples_per_update responses an optimiser
    step.
    """
    rewards: str | dict | list[str | dict] = []               # names with arguments and weights
    k: int = Field(8, ge=1)
    samples_per_update: int | None = Field(None, ge=1)        # all of the step when left out: strictly on-policy
    epochs: int = Field(1, ge=1)                              # how often a rollout is gone through
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, gt=0)                     # of sampling, and of the log-probabilities that train
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    stop: list[str] = []                                      # strings that end a response
    sampler: str | dict = "transformers"                      # or vllm, vllm_server
    batch: int = Field(64, ge=1)                              # responses that the transformers sampler makes together
    program: str | dict | None = None                         # how responses come about: turns, opponents, module:name
    against: Literal["opponents", "others", "everyone"] | None = None          # whom a comparison's rewards count wins against;
                                                              # opponents where the program has some, else the other responses
    payoff: Literal["mean_win", "mean_score"] = "mean_win"    # mean probability of winning, or mean log-odds
    order: str | dict = "shuffled"                            # of the prompts: a curriculum
    refill: int = Field(4, ge=1)                              # rounds of sampling where a recipe drops groups
    replay: Replayed | None = None
    mix: Mixed | None = None
    unscored: Literal["raise", "mark"] = "raise"              # a response that no reward can be given: stop, or leave it out
    timeout: float | None = Field(None, gt=0)                 # seconds for one response's reward
    recorded: str | None = None                               # a folder of rollouts to train from, without sampling
    dump: int = Field(1, ge=0)                                # steps between rollouts written to out/rollouts; 0 for none
    eval_k: int = Field(1, ge=1)                              # responses per held-out prompt


class Iterate(Settings):
    """Rounds of sampling from the policy, scoring (both as `rollout` says), selecting and training on what was selected."""
    rounds: int = Field(3, ge=1)
    prompts: int | None = Field(None, ge=1)                   # of a round, the next ones; all when left out
    select: str | dict = "best_worst"                         # what of a group is trained on: a rule of data_tools.select
    labels: Literal["hard", "soft"] = "hard"                  # who has the higher reward, or wins as probabilities
    reference: Literal["previous", "first"] = "previous"      # the policy that sampled, or the first one
    momentum: float = Field(0.0, ge=0, lt=1)                  # of the solutions (APO): the next policy goes on by so much
    accumulate: bool = False                                  # train on the rounds before as well


class Train(Settings):
    """The loop. One batch number: groups per optimiser step; micro-batches are a budget of tokens."""
    epochs: float = Field(1.0, gt=0)                          # may be part of one
    steps: int | None = Field(None, ge=1)                     # overrides epochs
    groups_per_step: int = Field(64, ge=1)
    tokens: int | None = Field(None, ge=1)                    # of one micro-batch, what a group shares counted once; by default
                                                              # 16,384 on a GPU, 2,048 on a CPU (1,024 for a reward model),
                                                              # and never less than a group
    packing: bool = True                                      # rows in one sequence without padding, prompts computed once per
                                                              # group, where the model allows it
    lr: float = Field(1e-6, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.1, ge=0)                          # share of the steps below 1, else steps
    optimizer: str | dict = "AdamW"
    weight_decay: float = Field(0.0, ge=0)
    clip: float | None = Field(1.0, gt=0)
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = Field(0, ge=0)
    shuffle: bool = True
    modules: Modules = Modules()
    critic: Modules = Modules()
    online: Online = Online()
    log_every: int = Field(1, ge=1)
    eval_every: int | None = Field(None, ge=1)                # with data.eval there is one evaluation at the end, always
    save_every: int | None = Field(None, ge=1)
    keep: int = Field(2, ge=1)                                # checkpoints kept
    metric: str | None = None                                 # watched by early stopping, which keeps the best model:
                                                              # eval/loss, or eval/reward of an on-policy run
    patience: int | None = Field(None, ge=1)                  # evaluations without improvement
    device: Literal["cpu"] | None = None                      # the GPU where there is one, unless this says cpu
    shard: bool = False                                       # layers, their gradients and optimiser state divided over the
                                                              # processes; see docs/distributed.md


class Run(Settings):
    recipe: str
    set: dict = {}
    policy: Model
    reference: Model | None = None
    critic: Model | None = None                               # the policy's body with a new head, where a recipe reads values
    tokenizer: str | None = None
    data: Data
    rollout: Rollout | None = None
    iterate: Iterate | None = None
    train: Train = Train()
    update: str | dict = "plain"
    log: list[Literal["tensorboard", "wandb", "trackio"]] = []
    expect: dict[str, str] = {}
    out: str = "runs/run"

    @model_validator(mode="before")
    @classmethod
    def _model(cls, raw):
        """A reward model is written as `model`, which is the same setting."""
        if isinstance(raw, dict) and "model" in raw:
            if "policy" in raw:
                raise ValueError("policy and model are the same setting: give one of them")
            return {("policy" if k == "model" else k): v for k, v in raw.items()}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, raw):
        """How the responses of games come about, unless it is said: it is part of the method."""
        from prefopt.recipes.games import ITERATIONS, ROLLOUTS, UPDATES
        if not (isinstance(raw, dict) and isinstance(raw.get("rollout"), dict)):
            return raw
        recipe, again = raw.get("recipe"), raw.get("iterate") is not None
        usual = {} if again or raw["rollout"].get("recorded") else {"update": UPDATES.get(recipe, "plain")}
        rounds = {"iterate": {**ITERATIONS.get(recipe, {}), **raw["iterate"]}} if isinstance(raw.get("iterate"), dict) else {}
        return {**usual, **raw, "rollout": {**ROLLOUTS.get(recipe, {}), **raw["rollout"]}, **rounds}

    @field_validator("policy", "reference", "critic", mode="before")
    @classmethod
    def _short(cls, value):
        return {"name": value} if isinstance(value, str) else value

    @field_validator("expect")
    @classmethod
    def _comparison(cls, value: dict) -> dict:
        for metric, condition in value.items():
            met(condition, 0.0, metric)
        return value

    @model_validator(mode="after")
    def _fits(self):
        objective, cached = self.objective(), self.data.cache_reference
        if self.train.patience and not (self.data.eval and self.train.eval_every):
            raise ValueError("train.patience stops early on a held-out metric: set data.eval and train.eval_every")
        if self.train.eval_every and not self.data.eval:
            raise ValueError("train.eval_every evaluates on held-out data: set data.eval")
        if blind := [metric for metric in self.expect if metric.startswith("eval/") and not self.data.eval]:
            raise ValueError(f"expect.{blind[0]} is measured on held-out data: set data.eval")
        if cached and objective.reference.moves:
            raise ValueError(f"recipe {self.recipe!r} moves its reference, so its log-probabilities cannot be cached: "
                             f"set data.cache_reference to false")
        if cached and "online" in objective.reads():
            raise ValueError(f"recipe {self.recipe!r} scores responses sampled during training, which no cache can hold: "
                             f"set data.cache_reference to false")
        if "mismatched" in objective.reads() and self.train.groups_per_step < 2:
            raise ValueError(f"recipe {self.recipe!r} compares each prompt with a response of another prompt of the step: "
                             f"set train.groups_per_step to at least 2")
        sampled(self, objective)
        sharded(self, objective)
        looks_ahead(self)
        iterated(self, objective)
        aspects = len(self.data.encoded().aspects)
        if "rewards" in objective.reads() and aspects != objective.outputs:
            raise ValueError(f"recipe {self.recipe!r} learns {objective.outputs} aspects, and data.encoding.aspects names "
                             f"{aspects or 'none'}: name the scores that are the labels, data.encoding: {{aspects: [helpfulness, "
                             f"...]}}, and give their number as set.aspects")
        for name in sorted(objective.reads()):
            _documented(name)
        self.update_rule(), self.make_optimizer()
        return self

    def objective(self):
        """The recipe with the departures of `set` applied."""
        return assemble(self.recipe, self.set)

    def make_optimizer(self):
        """What makes the optimiser from parameter groups: a class of torch.optim (or module:name) and its arguments."""
        name, arguments = named(self.train.optimizer)
        found = parts.find(name, "torch.optim")
        if not (":" in name or inspect.isclass(found) and hasattr(found, "step")):
            raise ValueError(f"train.optimizer: {name!r} is no optimiser; for instance AdamW, SGD, Adafactor")
        for other in ("params", "lr", "weight_decay"):
            if other in arguments:
                raise ValueError(f"train.optimizer: {other} is not set here, but by "
                                 f"{'the policy' if other == 'params' else f'train.{other}'}")
        if found in (parts.find("AdamW", "torch.optim"), parts.find("Adam", "torch.optim")) and not self.train.shard:
            arguments = {"fused": True, **arguments}          # one kernel a step; whole and divided tensors do not mix in it
        return partial(found, lr=self.train.lr, **parts.checked(name, found, arguments))

    def update_rule(self):
        return parts.from_spec(self.update, "prefopt.update")

    def program(self):
        """How responses come about."""
        from prefopt.rollout import programs
        return programs.named(self.rollout.program or "single")

    def against(self) -> str:
        """Whom rewards of a comparison count wins against."""
        from prefopt.rollout.programs import Against
        return self.rollout.against or ("opponents" if isinstance(self.program(), Against) else "others")


def looks_ahead(run: Run) -> None:
    """An error where the update rule needs opponents of the policy one step ahead, and the run has none to draw."""
    from prefopt.rollout.programs import Against
    roll = run.rollout
    if named(run.update)[0] != "look_ahead":
        return
    if roll is None or roll.recorded or not isinstance(run.program(), Against):
        raise ValueError("update: look_ahead takes its second gradient against opponents of the policy one step ahead, and this "
                         "run samples none: set rollout.program: against_policy, or take extragradient, which takes it "
                         "on the same samples")
    if roll.mix or roll.replay or roll.epochs > 1 or roll.samples_per_update not in (None, run.train.groups_per_step * roll.k):
        raise ValueError("update: look_ahead draws the opponents of all groups anew for every gradient: leave rollout.mix, "
                         "replay, epochs and samples_per_update out, so that a step is one update on fresh samples")


def sampled(run: Run, objective) -> None:
    """An error where a run on its own samples cannot work: what a recipe asks for and what the settings say do not fit."""
    roll, name = run.rollout, run.recipe
    policy = not objective.whole_groups
    if roll is None:
        if policy:
            raise ValueError(f"recipe {name!r} learns from the rewards of responses sampled in training: give a block rollout, "
                             f"for instance rollout: {{k: 8, rewards: [final_answer]}}, and prompts as data.train")
        return
    sampler, known = named(roll.sampler)[0], ("transformers", "vllm", "vllm_server")
    if sampler not in known and ":" not in sampler:
        raise ValueError(f"rollout.sampler: there is no sampler {sampler!r}{nearest(sampler, known)}; samplers: "
                         f"{', '.join(known)}, or 'module:name'")
    parts.find(named(roll.order)[0], "prefopt.rollout.orders")
    playable(run)
    if run.iterate is None and {"mismatched", "online"} & objective.reads():
        raise ValueError(f"recipe {name!r} needs other rows than the sampled ones, which rollout does not make: leave rollout "
                         f"out, or take dpo or another recipe of pairs or lists")
    least = objective.least_responses() if policy else 2
    if roll.k < least:
        raise ValueError(f"recipe {name!r} compares the responses of a prompt with each other: set rollout.k to at least "
                         f"{least}, found {roll.k}")
    whole = run.train.groups_per_step * roll.k
    if roll.samples_per_update is not None and (roll.samples_per_update % roll.k or roll.samples_per_update > whole):
        raise ValueError(f"rollout.samples_per_update is a multiple of rollout.k ({roll.k}), as groups are not torn apart, and "
                         f"at most train.groups_per_step * rollout.k = {whole}, found {roll.samples_per_update}")
    if (roll.top_p < 1 or roll.top_k) and policy and "logp_rollout" not in objective.reads():
        raise ValueError("rollout.top_p and top_k sample from another distribution than the one that is trained, so that ratios "
                         "and gradients are off: leave them at 1 and 0, or correct for it with set.correction: exact")
    for setting, part in (*(("limit", p) for p in objective.shaping.values()), ("length", objective.reduce)) if policy else ():
        own, longest = parts.hyperparameters(part).get(setting), roll.max_new_tokens
        if own not in (None, longest):
            raise ValueError(f"set.{setting} of recipe {name!r} is {own}, and responses may have "
                             f"rollout.max_new_tokens={longest}: set set.{setting}={longest}")
    if run.data.cache_reference:
        raise ValueError("no cache can hold log-probabilities of responses sampled in training: set data.cache_reference to "
                         "false")


def iterated(run: Run, objective) -> None:
    """An error where rounds of sampling and training cannot work."""
    if run.iterate is None:
        return
    from prefopt.iterate import rule, training
    if run.rollout is None or run.rollout.recorded:
        raise ValueError("iterate samples responses and scores them: give a block rollout, for instance rollout: {k: 8, rewards: "
                         "[final_answer]}, and prompts as data.train")
    if not objective.whole_groups or objective.outputs:
        raise ValueError(f"iterate trains policies on data, and recipe {run.recipe!r} "
                         f"{'trains a reward model' if objective.outputs else 'samples in training'}: take dpo, inpo, dno, sppo "
                         f"or another preference recipe, or leave iterate out")
    if objective.reference.moves:
        raise ValueError(f"the rounds of iterate move the reference, and recipe {run.recipe!r} moves it as well: take a recipe "
                         f"whose reference stays, such as dpo, with iterate.reference and iterate.momentum")
    if run.iterate.momentum and (run.policy.lora or run.policy.quantize):
        raise ValueError("iterate.momentum extrapolates weights, and those of adapters are factors of what they add: set it to "
                         "0, or train the weights themselves (leave policy.lora and policy.quantize out)")
    rule(run.iterate.select), training(run, 1)


def playable(run: Run) -> None:
    """An error where the run's program lets others speak than the policy, and its sampler holds the policy alone."""
    from prefopt.rollout.programs import roles_of
    roll, roles = run.rollout, roles_of(run.program())
    if roles and named(roll.sampler)[0] in ("vllm", "vllm_server") and not roll.recorded:
        raise ValueError(f"rollout.program: {named(roll.program)[0]} lets the {' and '.join(sorted(roles))} speak, and vLLM "
                         f"holds the policy alone: set rollout.sampler: transformers, or let the policy speak alone with "
                         f"rollout.program: against_policy or single")


def sharded(run: Run, objective) -> None:
    """An error where `train.shard` cannot work: every forward gathers weights from all processes, so each must run as many."""
    if not run.train.shard:
        return
    for name, model in (("policy", run.policy), ("reference", run.reference), ("critic", run.critic)):
        if model and (model.lora or model.quantize):
            raise ValueError(f"train.shard divides weights that train as they are, and {name} has adapters or quantised "
                             f"weights: set train.shard=false, or leave {name}.lora and {name}.quantize out")
    optimizer = named(run.train.optimizer)[0]
    if optimizer in ("Adafactor", "LBFGS", "Muon", "SparseAdam"):
        raise ValueError(f"train.optimizer={optimizer} looks at whole matrices, of which train.shard leaves each process some "
                         f"rows: take one that treats every weight by itself, such as AdamW or SGD, or set train.shard=false")
    if run.train.precision == "fp16":
        raise ValueError("train.shard does not go with the loss scaling of train.precision=fp16: set it to bf16 or no")
    if "online" in objective.reads():
        raise ValueError(f"recipe {run.recipe!r} samples from the policy itself in every step, and responses end at different "
                         f"lengths on different processes, so that train.shard would wait for ever: set train.shard=false, or "
                         f"train on rollouts of a server (rollout.sampler: vllm_server)")
    roll = run.rollout
    if roll and (not roll.recorded or run.data.eval) and named(roll.sampler)[0] in ("transformers", "vllm"):
        raise ValueError(f"rollout.sampler={named(roll.sampler)[0]} samples from a model that each process holds whole, and "
                         f"train.shard divides it: start a server (python -m prefopt.rollout.serve) and set rollout.sampler to "
                         f"vllm_server, or train on recorded rollouts (rollout.recorded, without data.eval), or set "
                         f"train.shard=false")


def assemble(recipe: str, departures: dict):
    """An objective from a recipe's name and what is set: arguments of the recipe, or slots of the objective.

    >>> assemble("dpo", {"beta": 0.5, "ranking": "hinge"}).ranking.__name__
    'hinge'
    """
    from prefopt import recipes
    make = recipes.find(recipe)
    arguments, home = inspect.signature(make).parameters, make().home
    allowed = [*arguments, *home]
    for key, value in departures.items():
        if key not in allowed:
            raise ValueError(f"recipe {recipe!r} has no argument or slot {key!r}{nearest(key, allowed)}; arguments: "
                             f"{', '.join(arguments) or 'none'}; slots: {', '.join(home)}")
        if key in arguments:
            _typed(f"recipe {recipe!r}", key, value, arguments[key].default)
    objective = make(**{k: v for k, v in departures.items() if k in arguments})
    slots = {k: v for k, v in departures.items() if k not in arguments}
    if not slots:
        return objective
    filled = {slot: _filled(objective, slot, spec) for slot, spec in slots.items()}
    if filled.get("labels") and parts.hyperparameters(filled["labels"]).get("flip"):
        filled["bounded"] = False                             # the correction has negative weights
    try:
        return objective.with_slots(**filled)
    except TypeError as error:                                # a part of one's own that does not say what it returns
        raise ValueError(str(error)) from None


def _filled(objective, slot: str, spec):
    """What a slot holds once `spec` is put into it. Slots of several parts keep those that `spec` does not name."""
    there, empty = getattr(objective, slot), type(objective).__dataclass_fields__[slot].default
    if isinstance(there, Mapping):
        return {**there, **_several(slot, spec, objective.home[slot])}
    if spec is None and empty is not None:
        raise ValueError(f"set.{slot} cannot be empty: leave it out, or name a part of {' or '.join(objective.home[slot])}")
    return None if spec is None else _part(slot, spec, home_of(slot, spec, objective.home[slot]))


RANGES = {"beta": positive, "tau": positive, "flip": below_half, "label_smoothing": below_half}


def _part(slot: str, spec, home: str):
    """A part from its spec, with arguments of the right type and in range."""
    name, arguments = named(spec)
    found = parts.find(name, home)
    if not callable(found):
        raise ValueError(f"set.{slot}: {name!r} is no part, it cannot be called")
    defaults = inspect.signature(found).parameters
    for key, value in parts.checked(name, found, arguments).items():
        _typed(f"part {name!r}", key, value, defaults[key].default)
        RANGES.get(key, lambda **_: None)(**{key: value})
    made = parts.from_spec(spec, home)
    return made() if isinstance(made, type) else made


def named(spec) -> tuple[str, dict]:
    """'name' or {name: {argument: value}}, taken apart."""
    if isinstance(spec, dict) and len(spec) == 1:
        (spec, arguments), = spec.items()
        if arguments is not None and not isinstance(arguments, dict):
            raise ValueError(f"arguments have names: {{{spec}: {{argument: value}}}}, found {{{spec}: {arguments!r}}}")
        return spec, arguments or {}
    if not isinstance(spec, str):
        raise ValueError(f"write 'name' or {{name: {{argument: value}}}}, found {spec!r}")
    return spec, {}


def _typed(owner: str, key: str, value, default) -> None:
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = ": write it without quotes, and 1e-3 as 1.0e-3" if isinstance(value, str) and parts.is_number(value) else ""
        raise ValueError(f"argument {key!r} of {owner} must be a number, found {value!r}{hint}")
    if isinstance(default, int) and value != int(value):
        raise ValueError(f"argument {key!r} of {owner} must be a whole number, found {value!r}")


def _documented(name: str) -> None:
    """An error where a part reads a column that nobody knows: in a part of one's own, a misspelt parameter."""
    from data_tools.columns import COLUMNS
    if name not in COLUMNS:
        raise ValueError(f"a part reads the column {name!r}, which is not known{nearest(name, COLUMNS)}: columns are in "
                         f"data_tools.columns, where `document` adds your own")


def home_of(slot: str, spec, homes: Sequence[str]) -> str:
    """Which of a slot's modules has the part that `spec` names."""
    name, _ = named(spec)
    known = {n: home for home in homes for n in import_module(home).__all__}
    if name not in known and ":" not in name:
        raise ValueError(f"no {slot} {name!r}{nearest(name, known)}; {slot}: {', '.join(known)}")
    return known.get(name, homes[0])


def _several(slot: str, spec, homes: Sequence[str]) -> dict:
    """[{best_nll: {weight: 0.1}}, ...] -> terms by name, or {column: part} for slots whose parts write columns."""
    from prefopt.objectives import Term
    from prefopt.policy import Penalty
    if slot in ("annotations", "providers", "selections"):
        return {column: _part(slot, one, home_of(slot, one, homes)) for column, one in (spec or {}).items()}
    out = {}
    for item in spec if isinstance(spec, list) else [spec]:
        name, arguments = named(item)
        if name in out:
            raise ValueError(f"set.{slot} has {name!r} twice")
        weight = arguments.get("weight", 1.0)
        number(**{f"weight of {name}": weight})
        weighed = slot in ("regularisers", "penalties")
        rest = {k: v for k, v in arguments.items() if not (weighed and k == "weight")}
        part = _part(slot, {name: rest}, home_of(slot, item, homes))
        out[name] = (Term if slot == "regularisers" else Penalty)(part, weight) if weighed else part
    return out


def met(condition: str, value: float, metric: str = "") -> bool:
    """Whether value meets a condition such as '>= 0.55'."""
    found = re.fullmatch(r"\s*(>=|<=|>|<)\s*(\S+)\s*", condition)
    if not found or not parts.is_number(found[2]):
        raise ValueError(f"expect.{metric}: {condition!r} is not a condition such as '>= 0.55'")
    compare = {">=": float.__ge__, "<=": float.__le__, ">": float.__gt__, "<": float.__lt__}[found[1]]
    return compare(float(value), float(found[2]))


class Loader(yaml.SafeLoader):
    """YAML as of 1.2, where 1e-6 is a number; PyYAML's own rules are of 1.1, and read it as text."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
                             list("-+0123456789"))


def load(path: str | Path, overrides: list[str] = ()) -> Run:
    """A run from a YAML file and overrides a.b=c, or a ValueError that lists every problem."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no run file {str(path)!r}: give a YAML file, for instance cookbook/quickstart/dpo.yaml")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a run file holds keys (recipe, policy, data, ...), found {type(raw).__name__}")
    return make(override(raw, overrides), str(path))


def override(raw: dict, items: list[str] = ()) -> dict:
    """The settings with each a.b=c put in its place; values are YAML.

    >>> override({"set": {"beta": 0.1}, "policy": "gpt2"}, ["set.beta=0.5", "policy.dtype=bfloat16"])
    {'set': {'beta': 0.5}, 'policy': {'name': 'gpt2', 'dtype': 'bfloat16'}}
    """
    for item in items:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise ValueError(f"override {item!r} is not of the form a.b=c")
        place = raw
        *parents, last = key.split(".")
        for parent in parents:
            if isinstance(place.get(parent), str) and parent in ("policy", "model", "reference"):
                place[parent] = {"name": place[parent]}
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"override {item!r}: {parent!r} is {place!r}, not a block of settings")
        try:
            place[last] = yaml.load(value, Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"override {item!r}: {value!r} is not valid YAML: {' '.join(str(error).split())}") from None
    return raw


def make(raw: dict, where: str = "run") -> Run:
    """A run from a dict of settings, or a ValueError that lists every problem with the nearest valid name."""
    try:
        return Run(**raw)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(k) for k in problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(f"{key}: no such setting{nearest(problem['loc'][-1], _known(problem['loc'][:-1]))}; "
                             f"settings here: {', '.join(_known(problem['loc'][:-1]))}")
            elif problem["type"] == "missing":
                lines.append(f"{key}: missing")
            elif problem["type"] == "value_error":
                lines.append(f"{key + ': ' if key else ''}{problem['ctx']['error']}")
            else:
                allowed = re.findall("'([^']*)'", problem["ctx"]["expected"]) if problem["type"] == "literal_error" else []
                hint = nearest(str(problem["input"]), allowed)
                lines.append(f"{key}: {problem['msg']}, found {problem['input']!r}{hint}")
        raise ValueError(f"{where}: " + "; ".join(lines)) from None


def _known(path) -> list[str]:
    """The settings of the block at `path`."""
    home = Run
    for key in path:
        kind = home.model_fields[key].annotation if key in home.model_fields else None
        home = next((k for k in (kind, *get_args(kind)) if inspect.isclass(k) and issubclass(k, Settings)), None)
        if home is None:
            return []
    return list(home.model_fields)
