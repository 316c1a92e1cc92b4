"""Models divided over two processes train as whole ones: same metrics, same weights, half of the layers on each process."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from loop_cases import ROLLOUT, go, lines, lists, outcome, pairs, plan, together, workplace
from safetensors.torch import load_file
from tiny_models import Float64
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from prefopt import folder, sharding
from prefopt.models import load_policy
from prefopt.rollout.transformers import Sampler
from prefopt.rollout.vllm import first_process

ROOT = Path(__file__).parents[1]
# 16 groups, 5 to a step: shares of 3 and 2 groups with unequal numbers of micro-batches, and a last step of one group
RAGGED = {"train.groups_per_step": 5, "train.tokens": 60, "train.epochs": 1, "policy.dtype": "float64"}
PROMPTS = {"train.groups_per_step": 5, "train.tokens": 40, "policy.dtype": "float64", "train.steps": 3, "data.eval": None,
           "train.eval_every": None}
RECORDED = {**PROMPTS, "rollout": {**ROLLOUT, "recorded": "rollouts"}}
CASES = {
    "dpo": ("llama", "dpo", RAGGED),
    "grpo": ("llama", "grpo", {**RECORDED, "set.beta": 0.1}),
    "ppo": ("qwen2", "ppo_adaptive", {**RECORDED, "rollout": {**RECORDED["rollout"], "epochs": 2}, "train.critic.lr": 0.02}),
}
MORE = {
    "tied": ("qwen2", "tr_dpo", {**RAGGED, "set.every": 2}),
    "kto": ("qwen2", "kto", RAGGED),
    "reward_model": ("llama", "bradley_terry", RAGGED),
    "served": ("llama", "grpo", {**PROMPTS, "rollout": ROLLOUT, "data.eval": "train.jsonl", "train.eval_every": 2}),
}
SHARD = {"train.shard": True}
WHOLE = {                                                     # compared with two processes that hold whole models
    "bf16": ("llama", "dpo", {**RAGGED, "policy.dtype": "float32", "train.precision": "bf16", "train.lr": 0.02,
                              "policy.gradient_checkpointing": True, "train.optimizer": {"SGD": {"momentum": 0.9}}}),
    # 5 groups in 5 updates on processes of 3 and 2: some updates have a group on one process alone
    "updates": ("qwen2", "ppo", {**RECORDED, "rollout": {**RECORDED["rollout"], "samples_per_update": 3, "epochs": 2}}),
    "egpo": ("llama", "dpo", {**RAGGED, "update": "extragradient"}),
    "sparsepo": ("llama", "sparsepo", {**RAGGED, "set.l1_reward": 0.01}),
    "mapo": ("llama", "mapo", RAGGED),
}


class Crash(BaseException):
    pass


class Served(Sampler):
    """Stands for a server: the first process samples for all, from the whole model that it was handed."""

    def __init__(self, models, tokenizer, run):
        self.settings, self.tokenizer, self.encoding, self.version = (tokenizer, run), tokenizer, run.data.encoded(), None

    def sync(self, model, version=None):
        def hold():
            tokenizer, run = self.settings
            self.whole = Sampler(model, tokenizer, batch=run.rollout.batch, encoding=self.encoding)
            self.whole.sync(model, version)
            return version
        self.version = first_process(hold)

    def continued(self, asks, choice):
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, list(asks))
        found = iter(first_process(lambda: self.whole.continued([a for some in everyone for a in some], choice)))
        return [[next(found) for _ in some] for some in everyone][dist.get_rank()]


def trained(home: Path, case: str, out: str, **more):
    """Train a case in float64 throughout; of prompts, with the rollouts of the recorded run beside it."""
    model, recipe, settings = {**CASES, **MORE, **WHOLE}[case]
    settings = {**settings, **more}
    roll = settings.get("rollout")
    if roll and "recorded" in roll:
        settings["rollout"] = {**roll, "recorded": str(home / model / "recorded" / "rollouts")}
    if settings.get("data.eval"):
        settings["data.eval"] = str(home / model / settings["data.eval"])
    if settings["policy.dtype"] != "float64":
        return go(home / model, recipe, out, **settings)
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            return go(home / model, recipe, out, **settings)
    finally:
        torch.set_default_dtype(torch.float32)


def recorded(place: Path) -> None:
    """Rollouts of one process, and the same ones as two processes would have written them."""
    go(place, "grpo", "recorded", **{**PROMPTS, "rollout": ROLLOUT})
    for path in (place / "recorded" / "rollouts").glob("step-*.jsonl"):
        groups = path.read_text().splitlines(keepends=True)
        for rank, share in enumerate(np.array_split(groups, 2)):
            path.with_name(f"{path.stem}-{rank}of2.jsonl").write_text("".join(share))


def work(rank: int, home: Path) -> dict:
    """What two processes do by default, in one start."""
    import prefopt.train
    held, make = {}, prefopt.train.optimization

    def spy(run, models, *rest):
        optimizer, scheduler = make(run, models, *rest)
        held[Path(run.out).name] = models, optimizer
        return optimizer, scheduler

    prefopt.train.optimization = spy
    for case in CASES:
        trained(home, case, f"two-{case}", **SHARD)
    models, optimizer = held["two-ppo"]
    assert models.policy_model().divided
    counts = {name: count(getattr(models, name).parameters()) for name in ("policy", "reference", "critic")}
    counts["optimiser"] = count(v for s in optimizer.state.values() for v in s.values() if v.ndim)
    interrupted(home, "ppo")
    policy = load_policy(str(home / "qwen2" / "model"))
    ids = torch.arange(1, 9)[None]
    before = policy(input_ids=ids).logits
    sharding.shard(policy, "cpu")
    copy = sharding.whole_model(policy)
    everybody = [None, None]
    dist.all_gather_object(everybody, counts)
    if rank:
        assert copy is None and sharding.whole_state(policy) == {}
    else:
        torch.testing.assert_close(copy(input_ids=ids).logits, before, rtol=0, atol=0)
        assert copy.state_dict().keys() == policy.state_dict().keys()
    return {"counts": everybody}


def interrupted(home: Path, case: str) -> None:
    """A run that crashes and goes on with two processes, and one that will go on with one."""
    timing = folder.timing

    def crash(accelerator, out, step, *rest):
        if step == 3:
            raise Crash

    for out in ("again", "alone"):
        folder.timing = crash
        with pytest.raises(Crash):
            trained(home, case, f"{out}-{case}", **SHARD)
        folder.timing = timing
    trained(home, case, f"again-{case}", **SHARD, resume=True)


def more_work(rank: int, home: Path) -> None:
    """The rest, which takes longer."""
    for case in MORE:
        sampler = {"rollout": {**ROLLOUT, "sampler": "test_sharding:Served"}} if case == "served" else {}
        trained(home, case, f"two-{case}", **SHARD, **sampler)
    interrupted(home, "tied")
    for case in WHOLE:
        for out, more in (("divided", SHARD), ("whole", {})):
            trained(home, case, f"{out}-{case}", **more)


def count(tensors) -> tuple[int, int]:
    """Elements here of divided tensors, and of whole ones."""
    tensors = list(tensors)
    return (sum(t.to_local().numel() for t in tensors if isinstance(t, DTensor)),
            sum(t.numel() for t in tensors if not isinstance(t, DTensor)))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("sharding")
    for name, records in (("llama", lists), ("qwen2", pairs)):
        recorded(workplace(home / name, train=16, records=records, name=name))
    return home


@pytest.fixture(scope="module")
def two(home) -> dict:
    return together(2, work, home)


@pytest.fixture(scope="module")
def more(home) -> None:
    together(2, more_work, home)


def weights(folder: Path) -> dict:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def same(place: Path, one: str, two: str, tolerance: float = 1e-10) -> None:
    a, b = lines(place / one), lines(place / two)
    assert len(a) == len(b) > 2 and [set(x) for x in a] == [set(x) for x in b]
    for x, y in zip(a, b, strict=True):
        assert y == pytest.approx(x, rel=tolerance, abs=tolerance)
    found = [weights(place / out / "model") for out in (one, two)]
    assert len(found[0]) > 4
    torch.testing.assert_close(found[1], found[0], rtol=100 * tolerance, atol=tolerance)


def divided_is_whole(home: Path, case: str) -> None:
    place = home / {**CASES, **MORE}[case][0]
    trained(home, case, f"one-{case}")
    same(place, f"one-{case}", f"two-{case}")
    start, end = weights(place / "model"), weights(place / f"two-{case}" / "model")
    assert any((start[k] != end[k].float()).any() for k in start if "layers.0" in k)


@pytest.mark.parametrize("case", CASES)
def test_divided_is_whole(home, two, case):
    divided_is_whole(home, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_more_recipes(home, more, case):
    divided_is_whole(home, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE)
def test_divided_is_whole_on_two_processes(home, more, case):
    same(home / WHOLE[case][0], f"whole-{case}", f"divided-{case}", 1e-10 if case != "bf16" else 1e-5)


def test_each_process_holds_half(home, two):
    """Of every layer and of what the optimiser keeps of it."""
    layers = sum(v.numel() for k, v in weights(home / "qwen2" / "model").items() if ".layers." in k)
    for counts in two["counts"]:
        for name, (divided, _) in counts.items():
            assert divided == layers * (4 if name == "optimiser" else 1) / 2, name             # two moments, policy and critic


def resumed(home: Path, case: str) -> None:
    """With two processes bit for bit; with one, which holds the whole model, the same."""
    place = home / {**CASES, **MORE}[case][0]
    assert outcome(place / f"again-{case}") == outcome(place / f"two-{case}")
    trained(home, case, f"alone-{case}", resume=True)
    same(place, f"two-{case}", f"alone-{case}")


def test_resumed(home, two):
    resumed(home, "ppo")


@pytest.mark.slow
def test_resumed_with_a_moving_reference(home, more):
    resumed(home, "tied")


@pytest.mark.parametrize("case", ["dpo", "ppo"])
def test_a_saved_model_is_an_ordinary_one(home, two, case):
    place = home / CASES[case][0]
    model = AutoModelForCausalLM.from_pretrained(place / f"two-{case}" / "model", dtype=torch.float64)
    found = weights(place / f"two-{case}" / "model")
    assert ("lm_head.weight" in found) == (case == "dpo") and set(found) == set(weights(place / "model"))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, found.get(key, found["model.embed_tokens.weight"]), rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------- settings and launches
@pytest.mark.parametrize("recipe, settings, message", [
    ("dpo", {"policy.lora": {"r": 2}}, "adapters or quantised weights: .* leave policy.lora"),
    ("dpo", {"train.precision": "fp16"}, "loss scaling"),
    ("dpo", {"train.optimizer": "Adafactor"}, "whole matrices"),
    ("hypo", {}, "samples from the policy itself"),
    ("grpo", {"rollout": ROLLOUT}, "start a server .* recorded rollouts .* train.shard=false"),
    ("grpo", {"rollout": {**ROLLOUT, "recorded": "x"}}, "without data.eval"),
    ("dpo", {}, "there is one: launch several"),
])
def test_what_cannot_be_divided(home, recipe, settings, message):
    with pytest.raises(ValueError, match=message):
        go(home / "llama", recipe, "refused", **settings, **SHARD)
    assert not (home / "llama" / "refused").exists()


def test_a_model_without_layers(home):
    policy = load_policy(str(home / "llama" / "model"))
    policy.model.layers = policy.model.layers[:1]
    with pytest.raises(ValueError, match="no list of its 2 layers"):
        sharding.layers(policy)


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_wrappers_of_accelerate_are_refused(home, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match="whose settings prefopt does not read.*set train.shard=true"):
        go(home / "llama", "dpo", "refused")


def launched(home: Path, *commands: list[str]) -> None:
    """Run launchers side by side, on this machine, without a GPU."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = [subprocess.Popen([sys.executable, "-m", *command], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
               for command in commands]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(said)


def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def stub(folder: Path, name: str, does: str) -> None:
    """A command of this name that does something else."""
    (folder / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
    (folder / name).chmod(0o755)


def scripted(folder: Path, *command: str, **environment: str) -> list[str]:
    """What the stub of torchrun was called with, by a script of the cookbook."""
    stub(folder, "torchrun", f'echo "$CUDA_VISIBLE_DEVICES $@" > {folder}/called')
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(["bash", *command], env={**os.environ, **environment, "PATH": path}, cwd=ROOT, timeout=60,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "called").read_text().split()


def test_the_script_with_a_server_beside(tmp_path):
    """It waits for the server, trains on the other devices, and ends the server."""
    number = port()
    (tmp_path / "health").write_text("")
    serve = f'echo "$CUDA_VISIBLE_DEVICES $@" > {tmp_path}/served; exec {sys.executable} -m http.server {number} -d {tmp_path}'
    stub(tmp_path, "python", serve)
    called = scripted(tmp_path, "cookbook/distributed/vllm_beside.sh", "model", "run.yaml", "train.lr=1", PORT=number,
                      LOG=str(tmp_path / "log"))
    assert " ".join(called) == "0,1,2,3,4,5 --nproc_per_node 6 -m prefopt train run.yaml train.lr=1"
    assert (tmp_path / "served").read_text() == f"6,7 -m prefopt.rollout.serve model --port {number} --tensor-parallel-size 2\n"
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(number)), timeout=5):
        pass


def test_the_script_tells_of_a_server_that_ends(tmp_path):
    stub(tmp_path, "python", "exit 3")
    with pytest.raises(AssertionError, match="the server ended"):
        scripted(tmp_path, "cookbook/distributed/vllm_beside.sh", "model", "run.yaml", PORT=port(), LOG=str(tmp_path / "log"))


def test_the_script_of_slurm(tmp_path):
    stub(tmp_path, "scontrol", "echo node7; echo node8")
    stub(tmp_path, "srun", 'exec "$@"')
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "12", "CUDA_VISIBLE_DEVICES": "all"}
    called = scripted(tmp_path, "cookbook/distributed/slurm.sh", "run.yaml", **slurm)
    assert " ".join(called) == ("all --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint node7:29500 --rdzv_id 12 "
                                "-m prefopt train run.yaml --resume")


def test_memory_of_a_share():
    """Of 8 processes: layers an eighth, embedding and head whole."""
    from transformers import LlamaConfig

    from prefopt import memory
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2)
    run = plan(Path("x"), "dpo", "y")
    shared = run.model_copy(update={"train": run.train.model_copy(update={"shard": True})})
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WORLD_SIZE", "8")
        a, b = (memory.estimate(r, config, tokens=100) for r in (run, shared))
    whole = 2 * 32 * 16 * 4
    for key, factor in (("weights", 1), ("gradients", 1), ("reference", 1), ("optimiser", 2)):
        assert b[key] == pytest.approx(factor * whole + (a[key] - factor * whole) / 8, rel=1e-9)
    assert b["layers gathered, this one and the next"] == (a["weights"] - whole) / 2 and b["activations"] == a["activations"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torchrun", "accelerate", "one node"])
def test_launchers(home, way):
    """Two nodes, each with a process of its own; the files of the cookbook, but for numbers and addresses."""
    out = way.replace(" ", "-")
    settings = {**RAGGED, "policy.dtype": "float32", "train.optimizer": {"SGD": {"momentum": 0.9}}, "train.lr": 0.02,
                "train.device": None}
    run = plan(home / "llama", "dpo", out, **settings, **SHARD)
    (home / f"{out}.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    train = ["-m", "prefopt", "train", str(home / f"{out}.yaml"), "--quiet"]
    files, at = ROOT / "cookbook" / "distributed", ["--main_process_ip", "127.0.0.1", "--main_process_port", port()]
    if way == "torchrun":
        meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{at[-1]}", "--rdzv_id", "sharding"]
        launched(home, *[["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *meet, *train]] * 2)
    elif way == "accelerate":
        launched(home, *(["accelerate.commands.launch", "--config_file", str(files / "two_nodes.yaml"), "--num_processes", "2",
                          "--machine_rank", str(rank), *at, *train] for rank in range(2)))
    else:
        launched(home, ["accelerate.commands.launch", "--config_file", str(files / "one_node.yaml"), "--num_processes", "2",
                        *at[2:], *train])
    assert json.loads((Path(run.out) / "versions.json").read_text())["processes"] == 2
    go(home / "llama", "dpo", f"{out}-one", **settings)
    same(home / "llama", f"{out}-one", out, 1e-5)


def test_a_divided_run_is_evaluated_by_one_process(home, two):
    from prefopt import evaluation
    place = home / "llama"
    run = evaluation.plan(str(place / "two-dpo"), data=str(place / "eval.jsonl"), overrides=["policy.dtype=float64"])
    assert not run.train.shard
    assert evaluation.evaluate(run)["loss"] == pytest.approx(lines(place / "two-dpo")[-1]["eval/loss"], rel=1e-4)
