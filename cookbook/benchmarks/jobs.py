"""The jobs: the same work by TRL and by prefopt, or by prefopt with and without packed rows.

TRL runs with its defaults, one thread, the optimiser and precision of the other side, and writes nothing. prefopt runs through
`prefopt.train`, as a run file would, with metrics at every step.
"""
from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from unittest.mock import patch

from bench import Clock, Job, Sizes, at, model, on_gpu, peak_mb, records, tokenizer

DTYPE = {True: "bfloat16", False: "float32"}                  # on a GPU, on a CPU


def worth(tokens: list[int]) -> float:
    """The reward: different tokens, and a little more, so that no two responses are alike."""
    return len(set(tokens)) + 0.01 * sum(tokens) / 32_000


# ----------------------------------------------------------------------------------------------------------------- ours
def ours(sizes: Sizes, assets: Path, own: Path, clock: Clock, *, recipe: str, packing: bool = True, cached: bool = False,
         online: bool = False) -> dict:
    """Also tells how many tokens the last step computed, and how many padded rows would have had."""
    from prefopt import folder
    from prefopt.config import make
    from prefopt.train import train
    timing = folder.timing

    def timed(*arguments, **named):
        timing(*arguments, **named)
        clock.step()

    def score(groups):
        for response in (r for g in groups for r in g.responses):
            response.scores["reward"] = worth(response.tokens)
        clock.scored()
        return groups

    run = make({
        "recipe": recipe, "policy": {"name": model(assets, sizes), "dtype": DTYPE[on_gpu()]},
        "data": {"train": str(records(assets, sizes, sizes.groups * (sizes.steps + 1))), "cache": str(own / "cache"),
                 "cache_reference": cached},
        "train": {"steps": sizes.steps + 1, "groups_per_step": sizes.groups, "lr": 1e-5, "schedule": "constant", "warmup": 0,
                  "packing": packing, "device": None if on_gpu() else "cpu"},
        "rollout": {"k": sizes.rows, "max_new_tokens": sizes.response, "dump": 0} if online else None,
        "out": str(own / "run")})
    with patch.object(folder, "timing", timed):
        train(run, show=False, score=score if online else None)
    last = json.loads((own / "run" / "timing.jsonl").read_text().splitlines()[-1])
    weights = Path(model(assets, sizes), "model.safetensors").stat().st_size / (2 if on_gpu() else 1) / 2**20
    return {"computed": last["computed"], "padded": last["padded"], "weights_mb": weights}


def prepare_ours(sizes: Sizes, assets: Path, own: Path, clock: Clock, *, chat: bool) -> dict:
    from data_tools.prepare import prepare
    from data_tools.records import Group, Response
    rows, known = texts(sizes, assets, chat), load_tokenizer(assets, sizes)
    groups = (Group(r["prompt"], [Response(r["chosen"]), Response(r["rejected"])], [1.0, 0.0]) for r in rows)
    clock.start("prepare")
    prepared = prepare(groups, known, own / "prepared")
    clock.stop("prepare")
    return digest((g.prompt, *(row.tokens for row in g.rows)) for g in map(prepared.__getitem__, range(len(prepared))))


# ---------------------------------------------------------------------------------------------------------------- TRL's
def settings(sizes: Sizes, own: Path) -> dict:
    return dict(output_dir=str(own), max_steps=sizes.steps + 1, learning_rate=1e-5, lr_scheduler_type="constant", seed=0,
                optim="adamw_torch", bf16=on_gpu(), use_cpu=not on_gpu(), gradient_checkpointing=False, report_to=[],
                logging_steps=1000, save_strategy="no", disable_tqdm=True)


def loaded(sizes: Sizes, assets: Path, auto: str = "AutoModelForCausalLM", **more):
    import transformers
    return getattr(transformers, auto).from_pretrained(model(assets, sizes), dtype=DTYPE[on_gpu()], **more)


def load_tokenizer(assets: Path, sizes: Sizes):
    """From its own folder: beside a model AutoTokenizer replaces it by the class of the model's type, and ids differ."""
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(tokenizer(assets, sizes))


def callback(clock: Clock):
    from transformers import TrainerCallback
    return type("Timed", (TrainerCallback,), {"on_step_end": lambda *_, **__: clock.step()})()


def pairs(sizes: Sizes, assets: Path):
    from datasets import Dataset
    lines = records(assets, sizes, sizes.groups * (sizes.steps + 1)).read_text(encoding="utf-8").splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])


def trl_dpo(sizes: Sizes, assets: Path, own: Path, clock: Clock, *, cached: bool = False) -> None:
    from trl import DPOConfig, DPOTrainer
    arguments = DPOConfig(**settings(sizes, own), per_device_train_batch_size=sizes.groups, max_length=None,
                          precompute_ref_log_probs=cached)
    DPOTrainer(model=loaded(sizes, assets), args=arguments, train_dataset=pairs(sizes, assets), callbacks=[callback(clock)],
               processing_class=load_tokenizer(assets, sizes)).train()


def trl_reward(sizes: Sizes, assets: Path, own: Path, clock: Clock) -> None:
    from trl import RewardConfig, RewardTrainer
    arguments = RewardConfig(**settings(sizes, own), per_device_train_batch_size=sizes.groups, max_length=None)
    RewardTrainer(model=loaded(sizes, assets, "AutoModelForSequenceClassification", num_labels=1), args=arguments,
                  train_dataset=pairs(sizes, assets), callbacks=[callback(clock)],
                  processing_class=load_tokenizer(assets, sizes)).train()


def trl_grpo(sizes: Sizes, assets: Path, own: Path, clock: Clock) -> None:
    from trl import GRPOConfig, GRPOTrainer

    def reward(completion_ids, **_):
        scores = [worth(ids) for ids in completion_ids]
        clock.scored()
        return scores

    arguments = GRPOConfig(**settings(sizes, own), per_device_train_batch_size=sizes.groups * sizes.rows, beta=0.0,
                           num_generations=sizes.rows, max_completion_length=sizes.response, loss_type="grpo",
                           generation_kwargs={"min_new_tokens": sizes.response})
    GRPOTrainer(model=loaded(sizes, assets), reward_funcs=reward, args=arguments,
                train_dataset=pairs(sizes, assets).select_columns("prompt"), callbacks=[callback(clock)],
                processing_class=load_tokenizer(assets, sizes)).train()


def prepare_trl(sizes: Sizes, assets: Path, own: Path, clock: Clock, *, chat: bool) -> dict:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    rows, known = texts(sizes, assets, chat), load_tokenizer(assets, sizes)
    arguments = DPOConfig(output_dir=str(own), bf16=False, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = DPOTrainer.__new__(DPOTrainer)                  # preparation needs no model
    trainer._tokenizer = known
    clock.start("prepare")
    data = Dataset.from_dict({name: [r[name] for r in rows] for name in ("prompt", "chosen", "rejected")})
    data = trainer._prepare_dataset(data, known, arguments, "train")
    clock.stop("prepare")
    return digest((row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in data)


# ---------------------------------------------------------------------------------------------------------- preparation
def texts(sizes: Sizes, assets: Path, chat: bool) -> list[dict]:
    with open(records(assets, sizes, sizes.groups), encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if not chat:
        return rows
    return [{name: [{"role": "user" if name == "prompt" else "assistant", "content": text}] for name, text in row.items()}
            for row in rows]


def digest(examples) -> dict:
    """Of the ids of all examples, and the peak of memory before they are read again."""
    import hashlib

    import numpy as np
    found, peak = hashlib.sha256(), peak_mb()
    for ids in examples:
        for part in ids:
            found.update(np.asarray(part, np.int32).tobytes() + b"|")
    return {"ids": found.hexdigest(), "peak_mb": peak}


# ------------------------------------------------------------------------------------------------------------- the jobs
def against_plain(**settings) -> dict:
    return {"plain": partial(ours, packing=False, **settings), "prefopt": partial(ours, **settings)}


DPO = {"trl": trl_dpo, "prefopt": partial(ours, recipe="dpo")}
CACHED = {"trl": partial(trl_dpo, cached=True), "prefopt": partial(ours, recipe="dpo", cached=True)}
REWARD = {"trl": trl_reward, "prefopt": partial(ours, recipe="bradley_terry")}
GRPO = {"trl": trl_grpo, "prefopt": partial(ours, recipe="grpo", online=True)}
LISTS = {"plain": partial(ours, recipe="lipo_lambda", packing=False), "prefopt": partial(ours, recipe="lipo_lambda")}
SHORT = {"plain": partial(ours, recipe="grpo", online=True, packing=False), "prefopt": GRPO["prefopt"]}
PREPARE = {"trl": partial(prepare_trl, chat=False), "prefopt": partial(prepare_ours, chat=False)}
CHATS = {"trl": partial(prepare_trl, chat=True), "prefopt": partial(prepare_ours, chat=True)}
JOBS = {
    "dpo": Job(DPO, Sizes(groups=4), {"step": (3.3, 0.35)}),
    "dpo_cached": Job(CACHED, Sizes(groups=4), {"step": (3.3, None)}),
    "reward": Job(REWARD, Sizes(groups=4), {"step": (1.5, 0.6)}),
    "grpo": Job(GRPO, Sizes(rows=8, prompt=256, response=64), {"step": (2.2, None), "update": (4.5, None)}),
    "lists": Job(LISTS, Sizes(rows=8, prompt=512, response=64, steps=5), {"step": (3.4, None)}),
    "deep": Job(DPO, Sizes("deep", 4_000, groups=4), {"step": (1.5, None)}),
    "never_slower": Job(SHORT, Sizes(rows=8, prompt=64, response=256, steps=5), {"update": (1.05, None)}),
    "prepare": Job(PREPARE, Sizes(groups=20_000, steps=1), {"prepare": (3.0, None)}),
    "prepare_chat": Job(CHATS, Sizes(groups=20_000, steps=1), {"prepare": (1.0, None)}),
}


def tiny(job: Job) -> Job:
    """The job at a size that takes a second."""
    return at(job, shape="tiny", vocabulary=400, groups=min(job.sizes.groups, 4), prompt=16, response=8, steps=2)
