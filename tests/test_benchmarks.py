"""The benchmarks run, and what they show can be counted: tokens through the trunk, positions through the head, forwards."""
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt import train

HERE = Path(__file__).parents[1] / "cookbook" / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    """The benchmarks' modules, with their folder on the path as when they are run."""
    names = [path.stem for path in HERE.glob("*.py")]
    sys.path.insert(0, str(HERE))
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(HERE))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return tmp_path_factory.mktemp("assets")


# ---------------------------------------------------------------------------------------------------- what can be counted
def counted(modules, assets, own, monkeypatch, job: str, **settings):
    """The last step of our side of a small job: its batch, and what each model computed in it."""
    seen, counts, fill = [], [], train.fill
    side, job = modules["jobs"].JOBS[job].sides["prefopt"], modules["jobs"].tiny(modules["jobs"].JOBS[job])

    def spy(models, batch, *others, **named):
        seen.append((models, batch))
        return fill(models, batch, *others, **named)

    class Counting(modules["bench"].Clock):
        def step(self, *_, **__):
            models = seen[-1][0]
            trunks = [models.policy_model()]
            if models.reference is not None:
                with models.reference_model() as reference:
                    trunks.append(reference)
            counts.append([dict(trunk.calls) for trunk in trunks])

    monkeypatch.setattr(train, "fill", spy)
    own.mkdir()
    side(job.sizes, assets, own, Counting(), **settings)
    return seen[-1][1], [{k: new[k] - old[k] for k in new} for old, new in zip(*counts[-2:], strict=True)]


def once(batch) -> int:
    """Tokens where what all rows of a group begin with counts once: a loop over groups and places."""
    total = 0
    for b in range(batch.groups):
        rows = [batch["tokens"][n][batch["attend"][n].bool()].tolist() for n in range(batch.N) if batch.index[n] == b]
        same = next((t for t in range(min(map(len, rows))) if len({row[t] for row in rows}) > 1), min(map(len, rows)))
        total += same + sum(len(row) - same for row in rows)
    return total


@pytest.mark.parametrize("job, models", [("dpo", 2), ("dpo_cached", 1), ("reward", 1), ("lists", 2), ("grpo", 1),
                                         ("never_slower", 1)])
def test_a_step_computes_what_it_must_and_nothing_else(modules, assets, tmp_path, monkeypatch, job, models):
    batch, calls = counted(modules, assets, tmp_path / "own", monkeypatch, job)
    real, answers = int(batch["attend"].sum()), int(batch["mask"].sum())
    assert len(calls) == models
    for one in calls:
        assert one["forwards"] == 1                           # no pass for old log-probabilities, none for the reference of it
        assert one["tokens"] == once(batch) < real            # every prompt once, no padding
        assert one["positions"] == (batch.N if job == "reward" else answers)      # no prompt meets the head, nothing twice


def test_without_packing_every_row_computes_its_prompt(modules, assets, tmp_path, monkeypatch):
    batch, calls = counted(modules, assets, tmp_path / "own", monkeypatch, "lists", packing=False)
    for one in calls:
        assert one["tokens"] == one["rectangle"] == batch.N * int(batch["attend"].sum(1).max())
        assert one["positions"] == int(batch["mask"].sum())


def test_a_run_tells_what_it_computed(modules, assets, tmp_path):
    job = modules["jobs"].tiny(modules["jobs"].JOBS["lists"])
    row = modules["bench"].measured(job.sides["prefopt"], job.sizes, assets)
    assert row["computed"] < row["padded"] / 2                # (P + 8 R) / (8 P + 8 R) = .42 of two models, P = 16, R = 8
    assert row["seconds"]["step"]["s"] > 0 and row["peak_mb"] > row["weights_mb"] > 0


# ------------------------------------------------------------------------------------------------------------ the program
def test_the_first_step_is_not_counted_and_an_update_begins_with_the_scores(modules, monkeypatch):
    bench = modules["bench"]
    times = iter([(float(t), t / 2, 10.0 * t) for t in (1, 4, 6, 6, 7)])
    monkeypatch.setattr(bench, "now", lambda: next(times))
    clock = bench.Clock()
    clock.scored()                                            # of the first step: no time is read
    clock.step()                                              # 1
    clock.scored()                                            # 4
    clock.step()                                              # step 6 - 1, update 6 - 4; the next begins at 7
    assert clock.laps == {"step": [(5.0, 2.5, 50.0)], "update": [(2.0, 1.0, 20.0)]}
    assert clock.medians()["update"] == {"s": 2, "user_s": 1, "wall_s": 20}


@pytest.mark.parametrize("speed, share, met", [(2.5, 0.5, True), (2.5, None, True), (2.6, None, False), (2.5, 0.4, False)])
def test_what_must_hold_is_judged_by_medians_of_ratios(modules, speed, share, met):
    bench = modules["bench"]
    rounds = [{"trl": {"seconds": {"step": {"s": theirs, "user_s": 3.0}}, "peak_mb": 100.0}, "load": 0.0,
               "prefopt": {"seconds": {"step": {"s": 2.0, "user_s": 2.0}}, "peak_mb": peak}}
              for theirs, peak in ((4.0, 90.0), (5.0, 50.0), (100.0, 50.0))]
    found = bench.summary(bench.Job({"trl": print, "prefopt": print}, bench.Sizes(), {"step": (speed, share)}), rounds)
    assert found["measures"]["step"]["ratios"] == [2, 2.5, 50] and found["measures"]["step"]["user_ratio"] == 1.5
    assert (found["measures"]["step"]["ratio"], found["memory"], found["measures"]["step"]["met"]) == (2.5, 0.5, met)


def test_a_job_that_is_not_there_is_named():
    done = subprocess.run([sys.executable, HERE / "run.py", "--only", "dpo,rewards"], capture_output=True, text=True)
    assert done.returncode == 2 and "there is no job rewards; jobs: dpo, dpo_cached, reward" in done.stderr


@pytest.mark.slow
def test_both_sides_run_and_prepare_the_same_ids(modules, assets, tmp_path):
    """Small jobs through the program; a line fitted through two points; a profile."""
    found = tmp_path / "found.json"
    run = [sys.executable, HERE / "run.py", "--tiny", "--assets", assets]
    done = subprocess.run([*run, "--only", "dpo,reward,grpo,prepare", "--rounds", "1", "--json", found], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    jobs = json.loads(found.read_text())["jobs"]
    assert {(name, measure) for name, job in jobs.items() for measure in job["measures"]} == {
        ("dpo", "step"), ("reward", "step"), ("grpo", "step"), ("grpo", "update"), ("prepare", "prepare")}
    assert all(f"| {name}, {measure} |" in done.stdout for name, job in jobs.items() for measure in job["measures"])
    trl, ours = (jobs["prepare"]["rounds"][0][side]["ids"] for side in ("trl", "prefopt"))
    assert trl == ours
    assert jobs["grpo"]["measures"]["update"]["seconds"] < jobs["grpo"]["measures"]["step"]["seconds"]
    assert found.with_suffix(".png").stat().st_size > 5000

    curve = modules["curves"].traced(modules["curves"].CURVES[0], assets, small=True)
    assert [p["x"] for p in curve["points"]] == [256, 512] and curve["r2"] == pytest.approx(1)
    modules["curves"].plot([curve], tmp_path / "curve.png")
    done = subprocess.run([*run, "--only", "lists", "--profile"], capture_output=True, text=True)
    assert done.returncode == 0 and "train.py" in done.stdout and "aten::" in done.stdout
