"""Two processes train as one: same metrics, same weights, one writer.

Launch as `torchrun --nproc_per_node 2 -m prefopt train run.yaml`, with or without GPUs; `accelerate launch --cpu` starts
one process, whatever its --num_processes says. The tests start the processes themselves, with the variables of torchrun.
"""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from loop_cases import ROLLOUT, go, lines, lists, outcome, pairs, plan, together, workplace
from safetensors.torch import load_file
from tiny_models import Float64

from prefopt import folder
from prefopt.train import train

# 16 groups, 5 to a step: shares of 3 and 2 groups, and a last step with one group for two processes
RAGGED = {"train.groups_per_step": 5, "train.tokens": 120, "train.epochs": 1}
DOUBLE = {**RAGGED, "policy.dtype": "float64"}
CASES = {
    "dpo": ("lists", "dpo", DOUBLE), "kto": ("lists", "kto", DOUBLE), "bco": ("lists", "bco", DOUBLE),
    "sparsepo": ("lists", "sparsepo", {**DOUBLE, "set.l1_reward": 0.01}), "aot": ("pairs", "aot", DOUBLE),
    "lora": ("lists", "tr_dpo", {**DOUBLE, "set.every": 2, "policy.lora": {"r": 2}}),
    "single": ("lists", "dpo", {**RAGGED, "train.optimizer": {"SGD": {"momentum": 0.9}}, "train.lr": 0.02}),
}
NOISE = ("sparsepo", {"set.dropout": 0.3, **RAGGED}), ("hypo", {"train.online.max_new_tokens": 3, **RAGGED})


class Crash(BaseException):
    pass


def trained(home: Path, case: str, out: str) -> None:
    """Train a case; one in float64 with float64 throughout, so that rounding cannot hide a mistake."""
    data, recipe, settings = CASES[case]
    if settings.get("policy.dtype") != "float64":
        go(home / data, recipe, out, **settings)
        return
    torch.set_default_dtype(torch.float64)                    # of learned masks
    try:
        with Float64():                                       # of norms in the model
            go(home / data, recipe, out, **settings)
    finally:
        torch.set_default_dtype(torch.float32)


def work(rank: int, home: Path) -> dict:
    """All that two processes have to do, in one start: every case, cached references, noise with a crash, an early stop."""
    import torch.distributed as dist

    from data_tools import prepare
    written, encode = [], prepare.encode

    def spy(event, arguments):
        if event == "open" and arguments[1] not in ("r", "rb", None) and str(arguments[0]).startswith(str(home)):
            written.append(str(arguments[0]))

    def counted(*arguments, **settings):
        written.append("encoded")
        return encode(*arguments, **settings)

    sys.addaudithook(spy)
    prepare.encode = counted
    for case in CASES:
        trained(home, case, f"two-{case}")
    go(home / "lists", "dpo", "two-cached", **RAGGED, **{"data.cache_reference": True})
    stopped = go(home / "pairs", "dpo", "two-early", **{"train.lr": 0.3, "train.clip": None, "train.patience": 1,
                                                        "train.eval_every": 1, "train.epochs": 9}).stopped
    for recipe, settings in NOISE:
        go(home / "pairs", recipe, f"two-{recipe}", **settings)
        timing = folder.timing

        def crash(accelerator, out, step, *rest):
            if step == 3:
                raise Crash
        folder.timing = crash
        try:
            go(home / "pairs", recipe, f"two-{recipe}-again", **settings)
        except Crash:
            folder.timing = timing
        go(home / "pairs", recipe, f"two-{recipe}-again", resume=True, **settings)
    everybody = [None, None]
    dist.all_gather_object(everybody, (written, dist.get_backend(), stopped))
    return {"main": everybody[0], "other": everybody[1]}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("distributed")
    workplace(home / "lists", train=16, records=lists)
    workplace(home / "pairs", train=16, records=pairs)
    return home


@pytest.fixture(scope="module")
def two(home) -> dict:
    return together(2, work, home)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(home, two, case):
    trained(home, case, f"one-{case}")
    place, tolerance = home / CASES[case][0], 1e-10
    if case == "single":                                      # float32: differences of sums of about 20
        tolerance = 4e-6
    one, both = (lines(place / f"{n}-{case}") for n in ("one", "two"))
    assert len(one) == len(both) == 4 + 2 and [set(x) for x in one] == [set(x) for x in both]
    for a, b in zip(one, both, strict=True):
        assert b == pytest.approx(a, rel=tolerance, abs=tolerance)
    weights = [{k: v for path in sorted((place / f"{n}-{case}" / "model").glob("*.safetensors"))
                for k, v in load_file(path).items()} for n in ("one", "two")]
    torch.testing.assert_close(weights[1], weights[0], rtol=100 * tolerance, atol=tolerance)
    assert len(weights[0]) > 4 and one[0]["loss"] != one[-2]["loss"]


def test_one_process_writes(home, two):
    """The other one reads what the first has prepared, and leaves no trace."""
    (main, backend, _), (other, _, _) = two["main"], two["other"]
    assert backend == "gloo" and other == []
    assert main.count("encoded") == 3 * 2                     # lists as pairs and as rows, and pairs; to train, to evaluate
    assert sum(name.endswith(".part") for name in main) == 2  # the cached reference of both


def test_cached_reference_of_two_processes(home, two):
    go(home / "lists", "dpo", "one-cached", **RAGGED, **{"data.cache_reference": True})
    one, both = lines(home / "lists" / "one-cached"), lines(home / "lists" / "two-cached")
    for line in one[0], both[0]:                              # margins that are zero up to rounding
        assert abs(line.pop("margin")) < 1e-5
    for line in *one[:2], *both[:2]:                          # and after a first small step
        assert all(line.pop(k) >= 0 for k in list(line) if k.startswith("accuracy"))
    for a, b in zip(one, both, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-4)      # AdamW in float32 magnifies what rounding leaves of zeros


def test_all_processes_stop_early(home, two):
    assert two["main"][2] == two["other"][2] != ""
    assert lines(home / "pairs" / "two-early")[-1]["step"] < 27


@pytest.mark.parametrize("recipe", [recipe for recipe, _ in NOISE])
def test_noise_of_every_process_is_resumed(home, two, recipe):
    assert outcome(home / "pairs" / f"two-{recipe}-again") == outcome(home / "pairs" / f"two-{recipe}")


def test_processes_that_form_no_group(home, monkeypatch):
    """A device for which accelerate knows no group: two processes would each train alone, into one folder."""
    monkeypatch.setattr("accelerate.Accelerator", lambda **settings: SimpleNamespace(num_processes=1, device="mps"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched .* launch them with torchrun or accelerate launch"):
        train(plan(home / "lists", "dpo", "alone"), show=False)


# a sampled response has the same noise whichever process samples it; advantages are those of all groups
SAMPLED = {"grpo": {"set.beta": 0.1}, "reinforce_plus_plus": {}, "bnpo": {"set.most": 5.0}, "gpg": {}, "rloo": {"set.beta": 0.1},
           "ppo_adaptive": {"set.horizon": 40}, "remax": {}, "kl_cov": {"rollout": {**ROLLOUT, "epochs": 2}}}


def sample(home: Path, out: str) -> None:
    for recipe, settings in SAMPLED.items():
        with Float64():
            go(home / "pairs", recipe, f"{out}-{recipe}", **{
                "rollout": ROLLOUT, **RAGGED, "policy.dtype": "float64", "train.steps": 3, "train.eval_every": 3,
                "train.save_every": None, **settings})


def work_online(rank: int, home: Path) -> None:
    sample(home, "sampled-two")


@pytest.mark.slow
def test_two_processes_sample_and_train_as_one(home):
    together(2, work_online, home)
    sample(home, "sampled-one")
    for recipe in SAMPLED:
        places = [home / "pairs" / f"sampled-{n}-{recipe}" for n in ("one", "two")]
        for one, both in zip(*map(lines, places), strict=True):
            assert both == pytest.approx(one, rel=1e-9, abs=1e-9), recipe
        one, both = (load_file(place / "model" / "model.safetensors") for place in places)
        torch.testing.assert_close(both, one, rtol=1e-7, atol=1e-9, msg=lambda m, recipe=recipe: f"{recipe}: {m}")


@pytest.mark.slow
def test_torchrun(home, two):
    """The command line that users type, on a machine without a GPU; train.device need not be set."""
    settings = {**CASES["single"][2], "train.device": None}
    run = plan(home / "lists", "dpo", "launched", **settings)
    (home / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["torch.distributed.run", "--nproc_per_node=2", "-m", "prefopt", "train", str(home / "run.yaml"), "--quiet"]
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("launched", "two-single"):
        assert json.loads((home / "lists" / name / "versions.json").read_text())["processes"] == 2
    for a, b in zip(lines(Path(run.out)), lines(home / "lists" / "two-single"), strict=True):
        assert a == pytest.approx(b, rel=4e-6, abs=4e-6)
