"""A GRPO step side by side with TRL: one prompt, 8 responses of 64 tokens, sampling included; one process per job.

    python cookbook/benchmarks/grpo.py --repeats 3 --json grpo.json
    python cookbook/benchmarks/grpo.py --beta 0.04               with a reference and a KL term

Nothing is downloaded: a Qwen2-type model of 20.4 M parameters with random weights and a vocabulary of 32,000, a tokenizer and
prompts made from the Python sources of installed packages (see prepare.py). Both sides train the same model with the same
optimiser and reward in float32 on one thread; TRL with its transformers generation, prefopt through `prefopt.train`. The sides
take turns, so that a slow spell of the machine hits both; the ratio is the median over rounds of CPU seconds per step.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import prepare

PACKAGES = ("trl", "transformers", "torch", "accelerate")


def assets(folder: Path, prompt: int, count: int) -> None:
    """A model with its tokenizer, and prompts of `prompt` tokens."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    prepare.make_assets(folder, folder / "spans.jsonl", count, prompt, 8)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=prepare.VOCABULARY, hidden_size=320, intermediate_size=896, num_hidden_layers=8, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with open(folder / "spans.jsonl") as lines, open(folder / "prompts.jsonl", "w") as out:
        for line in lines:
            out.write(json.dumps({"prompt": json.loads(line)["prompt"]}) + "\n")


def worth(tokens: list[int]) -> float:
    """The reward: different tokens, and a little more, so that no two responses are alike."""
    return len(set(tokens)) + 0.01 * sum(tokens) / prepare.VOCABULARY


class Steps:
    """CPU and wall seconds between marks; the first one is left out."""

    def __init__(self):
        self.marks: list[tuple[float, float]] = []

    def mark(self, *_, **__) -> None:
        self.marks.append((time.process_time(), time.perf_counter()))

    def each(self) -> dict[str, float]:
        cpu, wall = zip(*self.marks[1:], strict=True)
        return {name: statistics.median(b - a for a, b in pairwise(x)) for name, x in (("cpu_s", cpu), ("wall_s", wall))}


def trl(folder: Path, o: argparse.Namespace, scratch: str) -> Steps:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    steps = Steps()
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    arguments = GRPOConfig(
        output_dir=scratch, per_device_train_batch_size=o.group, num_generations=o.group, max_steps=o.steps + 2,
        max_completion_length=o.response, learning_rate=1e-5, bf16=False, use_cpu=True, gradient_checkpointing=False,
        report_to=[], logging_steps=1000, save_strategy="no", disable_tqdm=True, seed=0, beta=o.beta, loss_type="grpo",
        generation_kwargs={"min_new_tokens": o.response}, lr_scheduler_type="constant", optim="adamw_torch")

    class Callback(TrainerCallback):
        def on_step_end(self, *_, **__):
            steps.mark()

    GRPOTrainer(model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), args=arguments,
                reward_funcs=lambda completion_ids, **_: [worth(ids) for ids in completion_ids],
                train_dataset=Dataset.from_dict({"prompt": prompts}), callbacks=[Callback()],
                processing_class=AutoTokenizer.from_pretrained(folder / "model")).train()
    return steps


def prefopt(folder: Path, o: argparse.Namespace, scratch: str) -> Steps:
    from prefopt import folder as run_folder
    from prefopt.config import make
    from prefopt.train import train
    steps, timing = Steps(), run_folder.timing

    def score(groups):
        for response in (r for g in groups for r in g.responses):
            response.scores["reward"] = worth(response.tokens)
        return groups

    run_folder.timing = lambda *a: (timing(*a), steps.mark())
    train(make({
        "recipe": "grpo", "set": {"beta": o.beta}, "policy": str(folder / "model"),
        "data": {"train": str(folder / "prompts.jsonl")},
        "rollout": {"k": o.group, "max_new_tokens": o.response, "dump": 0},
        "train": {"steps": o.steps + 2, "groups_per_step": 1, "lr": 1e-5, "schedule": "constant", "warmup": 0, "device": "cpu",
                  "log_every": 1000},
        "out": scratch}), show=False, score=score)
    return steps


SIDES = {"trl": trl, "prefopt": prefopt}


def job(o: argparse.Namespace) -> None:
    """One side, in this process; prints a line of JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        steps = SIDES[o.job](o.assets, o, scratch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT", json.dumps({"side": o.job, **steps.each(), "peak_rss_mb": peak}))


def run(side: str, o: argparse.Namespace) -> dict:
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
           "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    settings = [f"--{k}={getattr(o, k)}" for k in ("prompt", "response", "group", "steps", "beta")]
    done = subprocess.run([sys.executable, __file__, "--job", side, "--assets", str(o.assets), *settings], env=env,
                          capture_output=True, text=True)
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"the job {side} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[0])


def compare(o: argparse.Namespace) -> dict:
    rounds = []
    for n in range(o.repeats):
        order = list(SIDES) if n % 2 == 0 else list(SIDES)[::-1]
        rounds.append({side: run(side, o) for side in order})
        spent = ", ".join(f"{side} {rounds[-1][side]['cpu_s']:.2f}" for side in SIDES)
        print(f"round {n + 1}, CPU s a step: {spent}", flush=True)
    speed = [one["trl"]["cpu_s"] / one["prefopt"]["cpu_s"] for one in rounds]
    memory = [one["prefopt"]["peak_rss_mb"] / one["trl"]["peak_rss_mb"] for one in rounds]
    return {"prompt": o.prompt, "response": o.response, "group": o.group, "beta": o.beta, "steps": o.steps, "threads": 1,
            "processor": prepare.processor(), "python": platform.python_version(), "versions": {p: version(p) for p in PACKAGES},
            "rounds": rounds, "speed": statistics.median(speed), "speeds": speed, "memory": statistics.median(memory)}


def table(found: dict) -> str:
    def median(side: str, name: str) -> float:
        return statistics.median(one[side][name] for one in found["rounds"])

    return "\n".join([
        "| side     | CPU s a step | wall s | peak RSS, MB |", "|---|---|---|---|",
        *(f"| {side:8} | {median(side, 'cpu_s'):.2f} | {median(side, 'wall_s'):.2f} | {median(side, 'peak_rss_mb'):.0f} |"
          for side in SIDES),
        f"throughput {found['speed']:.2f} times TRL's (rounds: {', '.join(f'{s:.2f}' for s in found['speeds'])}), peak memory "
        f"{found['memory']:.0%} of TRL's; 1 prompt of {found['prompt']} tokens x {found['group']} x {found['response']}, "
        f"beta {found['beta']:g}, float32, 1 thread, {found['processor']}",
        ", ".join(f"{name} {v}" for name, v in found["versions"].items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default, text in (("prompt", 256, "tokens of a prompt"), ("response", 64, "tokens of a response"),
                                ("group", 8, "responses"), ("steps", 5, "steps that are timed"), ("repeats", 3, "rounds")):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the KL to a reference")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--job", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--assets", type=Path, help="keep model and prompts in this folder, or use those there")
    o = parser.parse_args()
    if o.job:
        return job(o)
    with tempfile.TemporaryDirectory() as folder:
        o.assets = o.assets or Path(folder)
        if not (o.assets / "prompts.jsonl").exists():
            assets(o.assets, o.prompt, 2 * (o.steps + 2))
        found = compare(o)
    print(table(found))
    if o.json:
        o.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
