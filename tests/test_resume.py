"""A run that was stopped, in whatever way and at whatever moment, ends with the weights and metrics of one that was not."""
import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

import loop_cases
import pytest
import torch
from loop_cases import CASES, go, killed_run, lines, outcome, plan, processes, workplace

from prefopt import checkpoints, folder
from prefopt.train import train

pytestmark = pytest.mark.filterwarnings("ignore:damaged checkpoints")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return workplace(tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def uninterrupted(place):
    """What the case gives when nothing stops it; every case runs once."""
    found = {}

    def run(case: str) -> dict[str, bytes]:
        if case not in found:
            recipe, settings = CASES[case]
            go(place, recipe, f"whole-{case}", **settings)
            found[case] = outcome(place / f"whole-{case}")
        return found[case]

    return run


class Crash(BaseException):
    pass


def crash(at: int):
    """Stands for `folder.timing`, which comes after a step's metrics and before its evaluation and checkpoint."""
    def timing(accelerator, out, step, measured):
        if step == at:
            raise Crash
    return timing


# ------------------------------------------------------------------------------------------------------ stopped anywhere
MOMENTS = {"dpo": 1, "tr_dpo": 3, "sparsepo": 5, "bco": 5, "hypo": 3, "lora": 5, "bfloat16": 3, "early": 5, "grpo": 3, "ppo": 5,
           "replay": 3, "online_dpo": 3, "momentum": 5}


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted(place, uninterrupted, case, monkeypatch):
    recipe, settings = CASES[case]
    expected = uninterrupted(case)
    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(folder, "timing", crash(MOMENTS[case]))
        go(place, recipe, case, **settings)
    assert lines(place / case)[-1]["step"] == MOMENTS[case] and not (place / case / "model").exists()
    torch.manual_seed(99)                                     # whatever the state of the world
    go(place, recipe, case, resume=True, **settings)
    assert outcome(place / case) == expected
    if case == "early":
        assert {Path(name).parent.name for name in expected} == {"model", "best", ""} and len(lines(place / case)) < 48


def apart(run, resume: bool = False, at: int | str | None = None) -> int:
    """Train in a process of its own, which dies before the file change `at`; the number of changes, 0 where it died."""
    here, there = processes().Pipe(duplex=False)
    process = processes().Process(target=killed_run, args=(run, resume, at, there))
    process.start()
    process.join(300)
    assert process.exitcode == (-signal.SIGKILL if at else 0)
    return 0 if at else here.recv()


def test_kill_9(place, uninterrupted):
    """A real process, killed while it writes the second checkpoint."""
    run = plan(place, "dpo", "killed")
    apart(run, at=".step-00000004.tmp/model/tokenizer")
    assert (place / "killed" / "checkpoints" / ".step-00000004.tmp" / "model").exists()
    assert lines(place / "killed")[-1]["step"] == 4
    apart(run, resume=True)
    assert outcome(place / "killed") == uninterrupted("dpo") and not list((place / "killed" / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kill_9_anywhere(place, case):
    """Every eleventh moment of the simplest case, eight moments at random of the others."""
    recipe, settings = CASES[case]
    count = apart(plan(place, recipe, f"never-{case}", **settings))
    expected = outcome(place / f"never-{case}")
    moments = range(1, count + 1, 11) if case == "dpo" else random.Random(case).sample(range(1, count + 1), 8)
    for at in moments:
        out = f"{case}-{at}"
        run = plan(place, recipe, out, **settings)
        apart(run, at=at)
        apart(run, resume=True)
        assert outcome(place / out) == expected, f"killed before change {at} of {count}"
        shutil.rmtree(place / out)


@pytest.mark.slow
def test_kill_9_again_and_again(place):
    """Killed some moments after some steps, several times, each time resumed."""
    settings = {"train.epochs": 8, **CASES["hypo"][1]}
    apart(plan(place, "hypo", "never-timed", **settings))
    chance, kills, run, timing = random.Random(0), 0, plan(place, "hypo", "timed", **settings), place / "timed" / "timing.jsonl"
    for _ in range(40):
        before = timing.read_text().count("\n") if timing.exists() else 0
        here, there = processes().Pipe(duplex=False)
        process = processes().Process(target=killed_run, args=(run, True, None, there))
        process.start()
        steps = chance.randint(2, 8)
        while process.is_alive() and not (timing.exists() and timing.read_text().count("\n") >= before + steps):
            time.sleep(0.002)
        process.join(chance.uniform(0, 0.02))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
    assert kills and outcome(place / "timed") == outcome(place / "never-timed")


# ------------------------------------------------------------------------------------------------ checkpoints that fail
def refusing(original, error: BaseException, place: str):
    """The function, which raises `error` where an argument is a path through `place`."""
    def call(*arguments, **settings):
        if any(isinstance(a, Path) and place in str(a) for a in arguments):
            raise error
        return original(*arguments, **settings)
    return call


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("home, name, place_, error", [
    (checkpoints, "save_file", "step-00000004", FULL), (Path, "write_text", ".step-00000004", FULL),
    (checkpoints, "sync", "step-00000004.tmp/state.json", KeyboardInterrupt()), (Path, "rename", "step-00000004", FULL)])
def test_failed_checkpoint_leaves_the_last_one(place, uninterrupted, home, name, place_, error, monkeypatch):
    """The second checkpoint (step 4) does not get on the disk, or somebody presses Ctrl-C twice while it is written."""
    out, expected = f"full-{name}", uninterrupted("dpo")
    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(home, name, refusing(getattr(home, name), error, place_))
        go(place, "dpo", out)
    assert [p.name for p in (place / out / "checkpoints").iterdir()] == ["step-00000002"]
    assert checkpoints.damage(place / out / "checkpoints" / "step-00000002") is None
    go(place, "dpo", out, resume=True)
    assert outcome(place / out) == expected


def test_whole_folder_replaces_or_leaves(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "old").write_text("old")
    (tmp_path / ".best.tmp").mkdir()                          # left by a process that was killed
    (tmp_path / ".best.tmp" / "half").write_text("half")
    with pytest.raises(RuntimeError), checkpoints.whole(tmp_path / "best") as new:
        (new / "new").write_text("new")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["best"] and (tmp_path / "best" / "old").exists()
    with checkpoints.whole(tmp_path / "best") as new:
        (new / "new").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["best", "new"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


DAMAGES = {
    "no state": lambda c: (c / "state.json").unlink(), "half a state": lambda c: cut(c / "state.json"),
    "half the tensors": lambda c: cut(c / "state.safetensors"), "no tensors": lambda c: (c / "state.safetensors").unlink(),
    "half a model": lambda c: cut(c / "model" / "model.safetensors"), "no model": lambda c: shutil.rmtree(c / "model"),
    "empty": lambda c: (shutil.rmtree(c), c.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over(place, uninterrupted, tmp_path, damage):
    uninterrupted("dpo")
    shutil.copytree(place / "whole-dpo" / "checkpoints", tmp_path / "checkpoints")
    older, newest = sorted((tmp_path / "checkpoints").iterdir())
    assert checkpoints.latest(tmp_path / "checkpoints") == newest
    DAMAGES[damage](newest)
    with pytest.warns(UserWarning, match=f"passed over: {newest.name}: "):
        assert checkpoints.latest(tmp_path / "checkpoints") == older
    DAMAGES[damage](older)
    with pytest.raises(ValueError, match="no checkpoint in .* is whole .*step-00000006.*; step-00000004.*delete the folder"):
        checkpoints.latest(tmp_path / "checkpoints")


def test_resume_from_the_older_checkpoint(place, uninterrupted):
    """The newest checkpoint is damaged, and the last line of the log was cut off in the middle."""
    expected = uninterrupted("sparsepo")
    out = place / "older"
    shutil.copytree(place / "whole-sparsepo", out)
    cut(out / "checkpoints" / "step-00000006" / "state.safetensors")
    cut(out / "metrics.jsonl")
    recipe, settings = CASES["sparsepo"]
    go(place, recipe, "older", resume=True, **settings)
    assert outcome(out) == expected and checkpoints.damage(out / "checkpoints" / "step-00000006") is None


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.RMSprop,
                                       lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_optimizer_state_survives(optimizer):
    """One step, state to tensors and JSON and back, then the same second step as without."""
    def start():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
        return parameters, optimizer(parameters)

    def step(parameters, made, seed):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        made.step()

    parameters, made = start()
    step(parameters, made, 1)
    tensors, plain = checkpoints.flat_optimizer(made.state_dict())
    after, again = start()
    with torch.no_grad():
        for a, p in zip(after, parameters, strict=True):
            a.copy_(p)
    again.load_state_dict(checkpoints.full_optimizer({k: v.clone() for k, v in tensors.items()}, plain))
    step(parameters, made, 2)
    step(after, again, 2)
    assert all(torch.equal(a, p) for a, p in zip(after, parameters, strict=True))


# ---------------------------------------------------------------------------------------------------------------- Ctrl-C
def pressed(at: int, number: int, times: int = 1):
    def timing(accelerator, out, step, measured):
        for _ in range(times if step == at else 0):
            os.kill(os.getpid(), number)
            time.sleep(0)                                     # the handler runs before the next line
    return timing


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_saves(place, uninterrupted, number, monkeypatch, capsys):
    out, expected, before = f"interrupted-{number}", uninterrupted("dpo"), signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(folder, "timing", pressed(3, number))
        result = go(place, "dpo", out)
    assert "press Ctrl-C again to stop at once" in capsys.readouterr().out
    assert (result.stopped, result.steps, result.failed) == ("interrupted", 3, ()) and not (place / out / "model").exists()
    assert checkpoints.latest(place / out / "checkpoints").name == "step-00000003"
    assert lines(place / out)[-1]["step"] == 3 and "eval/loss" in lines(place / out)[-1]
    assert signal.getsignal(number) == before
    go(place, "dpo", out, resume=True)
    assert outcome(place / out) == expected


def test_ctrl_c_twice_stops_at_once(place, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(folder, "timing", pressed(3, signal.SIGINT, times=2))
        go(place, "dpo", "twice")
    assert signal.getsignal(signal.SIGINT) == before
    assert [p.name for p in (place / "twice" / "checkpoints").iterdir()] == ["step-00000002"]


def test_ctrl_c_in_the_last_step_ends_the_run(place, uninterrupted, monkeypatch):
    expected = uninterrupted("dpo")
    monkeypatch.setattr(folder, "timing", pressed(6, signal.SIGINT))
    result = go(place, "dpo", "last")
    assert result.stopped == "" and outcome(place / "last") == expected


# ------------------------------------------------------------------------------------------------------- asking to resume
def test_a_finished_run_stays_as_it_is(place, uninterrupted):
    expected = uninterrupted("dpo")
    shutil.copytree(place / "whole-dpo", place / "finished")
    with pytest.raises(ValueError, match="holds a run with a checkpoint at step-00000006: go on with it"):
        go(place, "dpo", "finished")
    shutil.rmtree(place / "finished" / "model")               # killed while it was written
    result = go(place, "dpo", "finished", resume=True, expect={"loss": "<= 100.0", "eval/loss": ">= 50.0"})
    assert outcome(place / "finished") == expected and result.steps == 6
    last = {k: v for line in lines(place / "finished")[-2:] for k, v in line.items()}
    assert result.metrics == {k: v for k, v in last.items() if k not in ("step", "epoch", "lr")}
    assert len(result.failed) == 1 and result.failed[0].startswith("eval/loss = ")


def test_an_early_stop_stays_stopped(place, uninterrupted):
    expected = uninterrupted("early")
    shutil.copytree(place / "whole-early", place / "stopped")
    shutil.rmtree(place / "stopped" / "model")
    result = go(place, CASES["early"][0], "stopped", resume=True, **CASES["early"][1])
    assert result.stopped.startswith("eval/loss has not improved for 2 evaluations")
    assert outcome(place / "stopped") == expected


def test_resume_without_a_checkpoint_starts(place, uninterrupted):
    go(place, "dpo", "fresh", resume=True)
    assert outcome(place / "fresh") == uninterrupted("dpo")


@pytest.mark.parametrize("settings, said", [
    ({"train.lr": 0.02}, "train.lr is 0.01 there and 0.02 here"),
    ({"set.beta": 0.2}, "set.beta is None there and 0.2 here"),
    ({"train.steps": 9, "train.seed": 1}, "train.steps is None there and 9 here; train.seed is 0 there and 1 here"),
])
def test_resume_is_of_the_same_run(place, uninterrupted, settings, said):
    uninterrupted("dpo")
    with pytest.raises(ValueError, match=f"holds another run.*{said}. Put that back"):
        train(plan(place, "dpo", "whole-dpo", **settings), resume=True, show=False)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_resume_is_of_the_same_data(place, uninterrupted, name):
    uninterrupted("dpo")
    shutil.copytree(place / "whole-dpo", place / f"changed-{name}")
    before = (place / f"{name}.jsonl").read_text()
    try:
        (place / f"{name}.jsonl").write_text(before.replace("w1", "w2", 1))
        with pytest.raises(ValueError, match=f"holds another run.*: the {name} data has changed. Put that back"):
            go(place, "dpo", f"changed-{name}", resume=True)
    finally:
        (place / f"{name}.jsonl").write_text(before)


def test_how_often_to_save_may_change(place, uninterrupted, monkeypatch):
    expected = uninterrupted("dpo")
    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(folder, "timing", crash(3))
        go(place, "dpo", "often")
    go(place, "dpo", "often", resume=True, **{"train.save_every": 1, "train.keep": 1, "expect": {"loss": "< 9.0"}})
    assert outcome(place / "often") == expected
    assert [p.name for p in (place / "often" / "checkpoints").iterdir()] == ["step-00000006"]


def test_upto(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval/loss": 1}\n{"step": 3}\n{"st')
    assert list(folder.upto(log, 2)) == ['{"step": 1}\n', '{"step": 2}\n', '{"step": 2, "eval/loss": 1}\n']
    assert len(list(folder.upto(log, 9))) == 4 and list(folder.upto(log, 0)) == []
    assert list(folder.upto(tmp_path / "none", 5)) == []


assert set(MOMENTS) == set(loop_cases.CASES)
