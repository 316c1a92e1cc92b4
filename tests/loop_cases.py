"""Complete small runs on disk for the tests of the loop, in this process and in others that may be killed."""
from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import traceback
import warnings
from pathlib import Path

import tiny_models

from prefopt.config import Run, make, override

# what resuming has to put back besides weights: optimiser, schedule, moved reference, masks, noise, shift, adapters, ...
ROLLOUT = {"k": 3, "rewards": ["loop_cases:ones"], "max_new_tokens": 5, "batch": 7}
CASES = {
    "grpo": ("grpo", {"rollout": ROLLOUT, "set.beta": 0.1}),
    "ppo": ("ppo_adaptive", {"rollout": {**ROLLOUT, "samples_per_update": 9, "epochs": 2}, "set.horizon": 20,
                             "train.critic.lr": 0.02}),
    "replay": ("dapo", {"rollout": {**ROLLOUT, "refill": 2, "replay": {"size": 8, "share": 0.3}, "samples_per_update": 9},
                        "set.limit": 5, "set.correction": "truncated"}),
    "online_dpo": ("online_dpo", {"rollout": ROLLOUT}),
    "momentum": ("apo_accel", {"set.alpha": 0.5, "set.every": 2}),
    "dpo": ("dpo", {}),
    "tr_dpo": ("tr_dpo", {"set.alpha": 0.5, "set.every": 2}),
    "sparsepo": ("sparsepo", {"set.dropout": 0.3, "set.l1_reward": 0.01, "train.modules.lr": 0.01}),
    "bco": ("bco", {}),
    "hypo": ("hypo", {"set.kl": 0.5, "train.online.max_new_tokens": 4}),
    "lora": ("dpo", {"policy.lora": {"r": 2, "lora_dropout": 0.2}}),
    "bfloat16": ("simpo", {"policy.dtype": "bfloat16", "train.optimizer": {"SGD": {"momentum": 0.9}}, "train.lr": 0.1}),
    "early": ("dpo", {"train.lr": 0.3, "train.patience": 2, "train.eval_every": 1, "train.clip": None,
                      "train.epochs": 8}),
}


def ones(text: str) -> float:
    """A reward: how many words are w1, w2 or w3, and a little for every other word."""
    return sum(1.0 if word in ("w1", "w2", "w3") else 0.1 for word in text.split())


def words(n: int, rng: random.Random) -> str:
    return " ".join(f"w{rng.randrange(50)}" for _ in range(n))


def pairs(n: int, seed: int = 0) -> list[dict]:
    """Preference pairs; chosen responses end with w1 and rejected ones with w2, so that there is something to learn."""
    rng = random.Random(seed)
    return [{"prompt": words(rng.randint(2, 4), rng) + " ", "chosen": words(rng.randint(1, 5), rng) + " w1",
             "rejected": words(rng.randint(1, 5), rng) + " w2"} for _ in range(n)]


def lists(n: int, seed: int = 0) -> list[dict]:
    """Groups of two to four graded responses."""
    rng = random.Random(seed)
    made = [(words(rng.randint(2, 4), rng) + " ", rng.randint(2, 4)) for _ in range(n)]
    return [{"prompt": p, "responses": [{"text": words(rng.randint(1, 5), rng) + f" w{i}"} for i in range(k)],
             "relevance": [float(i == 0) for i in range(k)]} for p, k in made]


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def workplace(folder: Path, *, train: int = 18, held_out: int = 6, records=pairs, name: str = "llama", **changes) -> Path:
    """A folder with a model, its tokenizer, and data."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_models.saved(folder / "model", name, **changes)
    write(folder / "train.jsonl", records(train))
    write(folder / "eval.jsonl", records(held_out, seed=1))
    return folder


def plan(folder: Path, recipe: str, out: str, **settings) -> Run:
    """A run of six steps with settings by their dotted names; `out` is a name inside the folder."""
    data = {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "cache": str(folder / "cache")}
    raw = {"recipe": recipe, "policy": {"name": str(folder / "model")}, "out": str(folder / out), "data": data,
           "train": {"epochs": 2, "groups_per_step": 6, "lr": 0.01, "warmup": 1, "tokens": 80, "eval_every": 3,
                     "save_every": 2, "device": "cpu"}}
    return make(override(raw, [f"{k}={json.dumps(v)}" for k, v in settings.items()]))


def go(folder: Path, recipe: str, out: str, *, resume: bool = False, score=None, **settings):
    from prefopt.train import train
    return train(plan(folder, recipe, out, **settings), resume=resume, show=False, score=score)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def outcome(out: Path) -> dict[str, bytes]:
    """What must not depend on interruptions: weights and metrics, byte for byte."""
    kept = [out / "metrics.jsonl", *(p for home in ("model", "best") for p in sorted((out / home).glob("*.safetensors")))]
    return {str(p.relative_to(out)): p.read_bytes() for p in kept}


# ---------------------------------------------------------------------------------------------------------- processes
def processes():
    """Real processes that start fast: forked from a server that has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "accelerate"])
    return context


def quiet() -> None:
    import torch
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")                        # noqa: SIM115


class Killer:
    """Counts the changes to files in a folder that this process is about to make, and dies as by kill -9 before number
    `at`, or before the first whose path contains `at`."""

    def __init__(self, folder: Path, at: int | str | None):
        self.folder, self.at, self.count = str(folder), at, 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            return
        if event == "open" and arguments[1] in ("r", "rb", None) and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        path = str(arguments[0])
        if path.startswith(self.folder):
            self.count += 1
            if self.count == self.at or isinstance(self.at, str) and self.at in path:
                os.kill(os.getpid(), signal.SIGKILL)


def killed_run(run: Run, resume: bool, at: int | str | None, tell) -> None:
    """Train in this process and die before file change number `at`; else tell how many there were."""
    quiet()
    killer = Killer(Path(run.out), at)
    sys.addaudithook(killer)
    from prefopt.train import train
    train(run, resume=resume, show=False)
    tell.send(killer.count)


def rank_of(ranks: int, rank: int, port: int, call, arguments: tuple, tell) -> None:
    """Call with these arguments as one of several processes that torchrun would have started."""
    quiet()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    try:
        found = call(rank, *arguments)
    except BaseException:
        tell.send((False, f"process {rank}: {traceback.format_exc()}"))
        raise
    if rank == 0:
        tell.send((True, found))


def together(ranks: int, call, *arguments):
    """What rank 0 returns from call(rank, *arguments), run by `ranks` processes at once."""
    context = processes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here, there = context.Pipe(duplex=False)
    started = [context.Process(target=rank_of, args=(ranks, rank, port, call, arguments, there)) for rank in range(ranks)]
    for process in started:
        process.start()
    there.close()
    fine = False
    try:
        fine, found = here.recv()
        assert fine, found
        return found
    finally:
        for process in started:
            process.join(60 if fine else 0)
            process.kill()
