"""The data pipeline: stages in shards, killed anywhere and resumed, nothing made twice, and what people do wrong."""
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import build_rules
import pytest
import yaml
from typer.testing import CliRunner

from data_tools import augment, load, select
from data_tools.labels import best_worst, split
from data_tools.pipeline.config import STAGES, make
from data_tools.pipeline.driver import NothingLeft, build, differences, recorded, survey
from data_tools.pipeline.identity import code, imported, named, parsed
from data_tools.pipeline.provenance import normalised, prompt_id, split_of
from data_tools.quality.words import identity
from data_tools.records import Group, Response
from data_tools.select.sampling import linearity
from data_tools.writers import write
from prefopt import cli

ROOT = Path(__file__).parents[1]
PROMPTS = [f"question {n}" + " x" * (n % 5) for n in range(17)]
LATE = [{"build_rules:longest": {"margin": 1}}, {"write": {"name": "pairs", "format": "pair"}}, "build_rules:seen"]


NAMES = ["build_rules:answers", "build_rules:length", "build_rules:longest", "write", "build_rules:seen"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BUILD_LOG", str(tmp_path / "log"))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return tmp_path


def plan(stages=None, **settings):
    stages = ["build_rules:answers", "build_rules:length", *LATE] if stages is None else stages
    return make({"source": "prompts.jsonl", "split": {"test": 0.3}, "shard": 4, "cache": "cache", "out": "out",
                 "stages": stages, **settings})


def files(folder="out") -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def log() -> list[str]:
    path = Path(os.environ["BUILD_LOG"])
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def records(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def prefopt(*arguments):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "100"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


# ------------------------------------------------------------------------------------------------------------ the result
def test_a_build_is_its_stages_one_after_the_other(place):
    """Against the same steps on a list, without shards or files."""
    made = build_rules.length(build_rules.answers([Group(p, []) for p in PROMPTS]))
    expected = [pair for g in made for pair in split(g, best_worst([r.scores["length"] for r in g.responses], margin=1))]
    found = build(plan())
    pairs = {name: records(f"out/pairs/{name}.jsonl") for name in ("train", "test")}
    for name, some in pairs.items():
        wanted = [g for g in expected if split_of(prompt_id(g.prompt), {"test": 0.3}) == name]
        assert [(r["prompt"], r["chosen"], r["rejected"]) for r in some] == \
            [(g.prompt, *(r.text for r in g.responses)) for g in wanted]
        assert all(r["split"] == name and r["prompt_id"] == prompt_id(r["prompt"]) for r in some)
    assert found.splits == {name: len(some) for name, some in pairs.items()} and sum(found.splits.values()) == len(PROMPTS)
    assert json.loads(Path("out/pages/seen.json").read_text()) == PROMPTS
    assert [s.name for s in found.steps] == ["source", *NAMES]
    assert found.steps[-1].said == ["17 groups"]


def test_what_rules_remove_is_counted(place):
    """Of n prompts those whose length is no multiple of 3 have best - worst = 2, the others 1."""
    few = sum(len(p) % 3 != 0 for p in PROMPTS)
    found = build(plan(["build_rules:answers", "build_rules:length", {"build_rules:longest": {"margin": 2}}]))
    step = found.steps[3]
    assert step.groups == [17, few] and step.counts["removed"] == 17 - few > 0 and step.responses == [51, 2 * few]
    kept = json.loads(Path("out/build.json").read_text())
    assert kept["finished"] and kept["steps"][3]["counts"] == {"removed": 17 - few} and kept["splits"] == found.splits


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_the_size_of_shards_changes_nothing(place, size):
    stages = ["build_rules:answers", "build_rules:length", "build_rules:top_half", "build_rules:twice", *LATE]
    build(plan(stages))
    build(plan(stages, shard=size, out="other"))
    changed = {"build.json"}
    assert {k: v for k, v in files().items() if k not in changed} == {k: v for k, v in files("other").items() if k not in changed}


def test_a_stage_of_all_groups_sees_all(place):
    """Median of the best lengths: 2 or 3."""
    found = build(plan(["build_rules:answers", "build_rules:length", "build_rules:top_half"]))
    best = sorted(2 if len(p) % 3 == 0 else 3 for p in PROMPTS)
    assert found.steps[3].groups == [17, sum(b >= best[8] for b in best)]
    assert log().count("top_half") == 1


def test_a_class_is_a_stage(place):
    found = build(plan(["build_rules:Half"]))                 # shards of 4, 4, 4, 4, 1
    assert found.steps[1].groups == [17, 8] and found.steps[1].said == ["kept 8"]
    assert json.loads(Path("out/build.json").read_text())["stages"][0]["own"] == {"half": 1}
    assert log()[-1] == "closed"
    assert build(plan(["build_rules:Half"], out="again")).steps[1].said == ["kept 8"]         # from the cache


def test_few_groups_are_held(place, monkeypatch):
    """While a rule runs, no more groups exist than two shards have."""
    given = ({"prompt": f"{n}", "responses": ["a", "b b"]} for n in range(400))
    Path("prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in given))
    most = []

    def counted(group):
        if int(group.prompt) % 50 == 19:
            gc.collect()
            most.append(sum(isinstance(o, Group) for o in gc.get_objects()))
        return [group]

    counted.__module__ = "build_rules"
    monkeypatch.setattr(build_rules, "counted", counted, raising=False)
    before = sum(isinstance(o, Group) for o in gc.get_objects())
    build(plan(["build_rules:counted"], shard=10))
    assert len(most) == 8 and max(most) - before <= 20


# ------------------------------------------------------------------------------------------------- killed and resumed
STAGES_OF_ALL_KINDS = ["build_rules:answers", "build_rules:length", "build_rules:top_half", *LATE]


def killed_at(count: int, *, after: bool) -> bool:
    """Runs the build in a child that is killed (SIGKILL) at the count-th rename, before or after it; whether it was."""
    child = os.fork()
    if not child:
        calls, rename = 0, os.replace

        def dying(*arguments):
            nonlocal calls
            calls += 1
            if calls == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*arguments)
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = dying
        try:
            build(plan(STAGES_OF_ALL_KINDS), resume=Path("out").exists())
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.fixture
def quick(place, monkeypatch):
    """Nine prompts, so three shards; a killed process needs no fsync, only a machine without power does."""
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS[:9]))
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return place


@pytest.mark.parametrize("after", [False, True])
def test_killed_anywhere_and_run_again_gives_the_same_bytes(quick, after):
    """At every rename of a build, before and after it. Three shards of answers: at most the open one is made twice."""
    build(plan(STAGES_OF_ALL_KINDS))
    expected = files()
    for count in range(1, 200):
        for folder in ("out", "cache"):
            subprocess.run(["rm", "-rf", folder], check=True)
        log()
        if not killed_at(count, after=after):
            break
        build(plan(STAGES_OF_ALL_KINDS), resume=True)
        assert {k: v for k, v in files().items() if ".part" not in k} == expected, count
        assert sum(line.startswith("answers") for line in log()) <= 4, count
    assert 30 < count < 200


def test_killed_again_and_again(quick):
    """A build that dies after every few commits ends at last, and its shards are made once, but for the open ones."""
    build(plan(STAGES_OF_ALL_KINDS))
    expected = files()
    for folder in ("out", "cache"):
        subprocess.run(["rm", "-rf", folder], check=True)
    log()
    deaths = 0
    while killed_at(6 + deaths, after=False):
        deaths += 1
    assert deaths > 3 and {k: v for k, v in files().items() if ".part" not in k} == expected
    assert sum(line.startswith("answers") for line in log()) <= 3 + deaths


def test_a_damaged_cache_is_mended(place):
    build(plan())
    expected = files()
    for n, path in enumerate(sorted(Path("cache").rglob("*"))):
        if path.is_file() and n % 3 == 0:
            path.unlink()
    build(plan(), overwrite=True)
    assert files() == expected


# ---------------------------------------------------------------------------------------------------------- the cache
def test_a_late_change_runs_nothing_earlier(place):
    build(plan())
    assert [line.split()[0] for line in log()] == ["answers"] * 5 + ["length"] * 5 + ["seen"]
    early = ["build_rules:answers", "build_rules:length"]
    build(plan([*early, {"build_rules:longest": {"margin": 2}}, *LATE[1:]]), overwrite=True)
    assert log() == ["seen"]
    build(plan(out="third"))
    assert log() == []
    build(plan([{"build_rules:answers": {"word": "b"}}, *early[1:], *LATE]), overwrite=True)
    assert [line.split()[0] for line in log()] == ["answers"] * 5 + ["length"] * 5 + ["seen"]
    build(plan(seed=1), overwrite=True)                       # only answers has a seed, which changes no answer
    assert [line.split()[0] for line in log()] == ["answers"] * 5


def test_more_prompts_run_only_where_they_are(place):
    build(plan())
    log()
    with open("prompts.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "one more"}) + "\n")
    build(plan(), overwrite=True)
    assert log() == ["answers 2", "length 2", "seen"]


def test_code_counts_and_words_about_it_do_not(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))

    def digest(text):
        Path("my_rules.py").write_text(text)
        sys.modules.pop("my_rules", None)
        parsed.cache_clear()
        return code("my_rules")

    first = digest('def f(group):\n    return [group]\n')
    assert digest('"""Words."""\n\n\ndef f(group):  # more\n    """And more."""\n    return [group]\n') == first
    assert digest('def f(group):\n    return []\n') != first


def test_code_that_a_rule_needs_counts(place, monkeypatch):
    """Of its own package, however far away; another package does not count."""
    monkeypatch.syspath_prepend(str(place))
    (place / "mine").mkdir()
    written = {"__init__": "", "rules": "import json\nfrom mine import steps\n", "far": "x = 1\n", "apart": "x = 1\n",
               "steps": "def f():\n    from .far import x\n    return x\n"}
    for name, text in written.items():
        (place / "mine" / f"{name}.py").write_text(text)

    def digests(name, text):
        (place / "mine" / f"{name}.py").write_text(text)
        for known in [m for m in sys.modules if m.partition(".")[0] == "mine"]:
            del sys.modules[known]
        parsed.cache_clear()
        return imported("mine.rules"), code("mine.rules")

    first = digests("far", "x = 1\n")
    assert digests("apart", "x = 2\n") == first == digests("far", "x = 1  # one\n")
    changed = digests("far", "x = 22\n")
    assert changed[0] != first[0] and changed[1] == first[1]


def test_what_settings_name_counts(place):
    (place / "models" / "a").mkdir(parents=True)
    (place / "models" / "a" / "w").write_text("1")
    (place / "list.txt").write_text("x")
    settings = {"model": {"path": "models/a"}, "file": "list.txt", "fn": ["build_rules:length"], "text": "a: b", "stop": ["/"]}
    first = named(settings)
    assert set(first) == {"models/a", "list.txt", "build_rules:length"} and named(settings) == first
    (place / "models" / "a" / "w").write_text("2")
    assert {k for k, v in named(settings).items() if v != first[k]} == {"models/a"}
    (place / "words").mkdir()
    (place / "run" / "model").mkdir(parents=True)
    (place / "run" / "model" / "config.json").write_text("{}")
    assert set(named({"model": "run", "word": "words"})) == {"run"}                   # a folder's name may be just a word


def test_dry_says_what_would_run_and_why(place):
    assert dict(survey(plan())) == {"source": "is read, since nothing was built here yet",
                                    **dict.fromkeys(NAMES, "runs, since what it is given is made anew")}
    assert not Path("out").exists() and not Path("cache").exists()
    build(plan())
    assert set(dict(survey(plan())).values()) == {"in the cache"}
    late = dict(survey(plan([*plan_specs()[:2], {"build_rules:longest": {"margin": 3}}, *LATE[1:]])))
    assert late["build_rules:length"] == "in the cache" and late["write"].startswith("runs, since what it is given")
    assert late["build_rules:longest"] == "runs on 5 of 5 shards, since build_rules:longest.margin: 1 -> 3"
    with open("prompts.jsonl", "a") as file:
        file.write('{"prompt": "one more"}\n')
    assert "what prompts.jsonl holds changed" in dict(survey(plan()))["source"]


def plan_specs():
    return ["build_rules:answers", "build_rules:length", *LATE]


# ------------------------------------------------------------------------------------------------- the folder of results
def test_a_folder_that_is_there_is_refused(place):
    build(plan())
    expected = files()
    with pytest.raises(ValueError, match="out is there already: go on with --resume, replace it with --overwrite"):
        build(plan())
    build(plan(["build_rules:answers", "build_rules:length", *LATE]), resume=True)
    assert files() == expected
    with pytest.raises(ValueError, match="no good"):
        build(plan(["build_rules:answers", {"build_rules:breaks": {"at": PROMPTS[3]}}], out="stopped"))
    build(plan(["build_rules:answers"], out="stopped"))       # nothing was written yet, so there is nothing to lose
    (place / "out" / "mine.txt").write_text("mine")
    build(plan(["build_rules:answers"]), overwrite=True)
    assert set(files()) == {"build.json", "mine.txt", "groups/test.jsonl", "groups/train.jsonl"}
    (place / "foreign").mkdir()
    (place / "foreign" / "mine.txt").write_text("mine")
    for more in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match="foreign holds files, and no build.json"):
            build(plan(out="foreign"), **more)


@pytest.mark.parametrize("change, said", [
    ({"seed": 1}, "seed: 0 -> 1; build_rules:answers.seed: 0 -> 1"),
    ({"split": {"test": 0.5}}, "split.test: 0.3 -> 0.5"),
    ({"stages": [{"build_rules:answers": {"n": 4}}, *plan_specs()[1:]]}, "build_rules:answers.n: left out -> 4"),
    ({"stages": plan_specs()[:-1]}, "build_rules:seen is gone"),
    ({"stages": [*plan_specs(), "build_rules:twice", "build_rules:seen"]},
     "build_rules:twice is new; build_rules:seen (2) is new"),
    ({"stages": [*plan_specs()[:3], plan_specs()[4], plan_specs()[3]]}, "the order of the stages: "),
    ({"source": {"path": "prompts.jsonl", "limit": 3}}, "source.limit: left out -> 3")])
def test_a_changed_pipeline_is_not_resumed(place, change, said):
    build(plan())
    with pytest.raises(ValueError) as found:
        build(plan(**change), resume=True)
    assert said in str(found.value) and "--overwrite" in str(found.value)


def test_settings_of_python_are_those_of_a_file(place):
    """Tuples and lists are the same pipeline."""
    build(plan([{"check": {"skip": ("labels", "duplicates")}}]))
    build(plan([{"check": {"skip": ["labels", "duplicates"]}}]), resume=True)


def test_changed_code_and_data_are_told(place):
    before = recorded(plan())
    assert differences(before, recorded(plan())) == []
    now = recorded(plan())
    now["stages"][1]["code"] = "other"
    Path("prompts.jsonl").write_text('{"prompt": "other"}\n')
    now["source"]["content"] = recorded(plan())["source"]["content"]
    assert differences(before, now) == ["source: what prompts.jsonl holds changed", "build_rules:length: its code changed"]


# ------------------------------------------------------------------------------------------------------------- splits
def test_a_prompt_is_in_one_split_however_it_is_written(place):
    said = ["What is  it?", "what is it?\n", "WHAT IS IT?", [{"role": "system", "content": "Be brief."},
                                                           {"role": "user", "content": "What is it?"}]]
    assert len({normalised(p) for p in said}) == 1
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in said))
    found = build(plan(["build_rules:twice"], split={"a": 0.3, "b": 0.3}))
    assert len(found.splits) == 1 and sum(found.splits.values()) == 8
    made = [r for name in found.splits for r in records(f"out/groups/{name}.jsonl")]
    assert len({r["meta"]["prompt_id"] for r in made}) == 1 and [r["meta"].get("copy", 0) for r in made[::2]] == [0, 1, 2, 3]


def test_shares_of_splits():
    """10,000 prompts: the count is binomial, 6 standard deviations wide; a larger share only adds prompts."""
    names = [prompt_id(f"prompt {n}") for n in range(10_000)]
    found = [split_of(name, {"test": 0.1, "validation": 0.2}) for name in names]
    for split_name, share in (("test", 0.1), ("validation", 0.2), ("train", 0.7)):
        assert abs(found.count(split_name) - 10_000 * share) < 6 * (10_000 * share * (1 - share)) ** 0.5
    more = [split_of(name, {"test": 0.15}) for name in names]
    assert all(b == "test" for a, b in zip(found, more, strict=True) if a == "test")


def test_splits_named_by_the_records(place):
    rows = [{"prompt": "a", "part": "train"}, {"prompt": "b", "part": "held_out"}]
    Path("prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert build(plan(["build_rules:answers"], split="part")).splits == {"held_out": 1, "train": 1}
    with pytest.raises(ValueError, match="prompts.jsonl:1: the pipeline takes the split from the field 'port', which holds None; "
                                         "fields: part, place"):
        build(plan(["build_rules:answers"], split="port", out="o2"))
    Path("prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"prompt": "A ", "part": "held_out"}]))
    with pytest.raises(ValueError, match="prompts.jsonl:3: the prompt is in split 'held_out' here, and was in 'train' before"):
        build(plan(["build_rules:answers"], split="part", out="o3"))


def test_the_source_prompt_is_kept_from_build_to_build(place):
    """A prompt made from another one stays with it when its group comes into a second build."""
    build(plan(["build_rules:answers", "build_rules:twice"]))
    build(plan(["build_rules:length"], source="out/groups/*.jsonl", out="second"))
    for name in ("train", "test"):
        first, second = ({r["prompt"] for r in records(f"{folder}/groups/{name}.jsonl")} for folder in ("out", "second"))
        assert first == second and any("Please." in p for p in first)


# -------------------------------------------------------------------------------------------------------- what goes wrong
def test_a_broken_line_is_named(place):
    lines = Path("prompts.jsonl").read_text().splitlines()
    Path("prompts.jsonl").write_text("\n".join([*lines[:4], '{"prompt": "broken', '{"prompt": " "}', *lines[4:]]) + "\n")
    with pytest.raises(ValueError, match="prompts.jsonl:5: malformed json.* on_bad: skip}"):
        build(plan())
    found = build(plan(source={"path": "prompts.jsonl", "on_bad": "skip"}))
    assert found.steps[0].counts["skipped"] == 2 and found.steps[0].groups == [0, 17]
    said = " ".join(found.steps[0].said)
    assert "prompts.jsonl:5: malformed json" in said and "prompts.jsonl:6: the prompt is empty" in said


def test_an_error_says_which_group_in_which_stage(place):
    with pytest.raises(ValueError, match=r"^stage 'build_rules:breaks': prompts.jsonl:4: no good$"):
        Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(6)))
        build(plan(["build_rules:breaks"]))


def test_an_absent_score(place):
    with pytest.raises(ValueError, match="'build_rules:longest': prompts.jsonl:1: no response has the score 'lenght'.*length"):
        build(plan(["build_rules:answers", "build_rules:length", {"build_rules:longest": {"score": "lenght"}}]))


def test_nothing_left(place):
    with pytest.raises(NothingLeft, match="nothing is left after 'build_rules:longest', which was given 17 groups") as found:
        build(plan(["build_rules:answers", "build_rules:length", {"build_rules:longest": {"margin": 9}}, "build_rules:seen"]))
    assert [(s.name, s.groups) for s in found.value.steps][2:] == [("build_rules:length", [17, 17]),
                                                                   ("build_rules:longest", [17, 0])]
    assert "seen" not in log()


def test_groups_keep_where_they_come_from(place):
    with pytest.raises(ValueError, match="a group that stage 'build_rules:lost' made has no 'prompt_id' in its meta"):
        build(plan(["build_rules:answers", "build_rules:lost"]))


def test_failed_groups_are_apart_and_told(place, monkeypatch):
    failing = [p for p in PROMPTS if len(p) % 3 == 0]
    stages = ["build_rules:answers", "build_rules:fails", "build_rules:length"]
    found = build(plan(stages))
    assert found.failed == len(failing) and sum(found.splits.values()) == 17 - len(failing)
    assert [r["prompt"] for r in records("out/failed.jsonl")] == failing
    assert all(r["meta"]["failed"] == "the model is tired" for r in records("out/failed.jsonl"))
    assert found.steps[2].counts["failed"] == len(failing) and "the model is tired" in found.steps[2].said[0]
    assert build(plan(stages), resume=True).failed == len(failing)                  # it is known, and not asked again
    monkeypatch.setenv("AWAKE", "1")
    found = build(plan(stages), resume=True, retry=True)
    assert found.failed == 0 and sum(found.splits.values()) == 17
    assert "failed.jsonl" not in files()


@pytest.mark.parametrize("change, said", [
    ({"stages": ["selct"]}, "stages, number 1: there is no stage 'selct', did you mean 'select'?"),
    ({"stages": [{"build_rules:answrs": {}}]}, "build_rules has no function 'answrs', did you mean 'answers'?"),
    ({"stages": [{"build_rules:answers": {"m": 2, "word": "x"}}]}, "build_rules:answers has no setting 'm'"),
    ({"stages": [{"build_rules:answers": {"n": "2"}}]}, "n is a number, found '2' (str)"),
    ({"stages": [{"build_rules:answers": 3}]}, "settings have names"),
    ({"stages": ["build_rules:odd"]}, "build_rules:odd takes (groups, size), and a stage takes one of (group), (shard)"),
    ({"stages": [3]}, "stages, number 1: write a name or {name: settings}, found 3"),
    ({"stages": [{"select": "best_wurst"}]}, "there is no select 'best_wurst', did you mean 'best_worst'?"),
    ({"stages": ["select"]}, "select: write a name"),
    ({"stages": "answers"}, "stages is a list"), ({"stages": []}, "stages is missing"), ({"source": ""}, "source is missing"),
    ({"source": {"format": "pair"}}, "source names no data"), ({"source": {"pth": "x"}}, "did you mean 'path'"),
    ({"sede": 1}, "there is no setting 'sede', did you mean 'seed'?"), ({"seed": -1}, "seed is a whole number from 0"),
    ({"shard": 0}, "shard is a whole number from 1"), ({"split": {"test": 1.5}}, "split: write shares"),
    ({"split": {"train": 0.5}}, "split: write shares"), ({"split": {"a": 0.5, "b": 0.5}}, "add up to less than 1"),
    ({"stages": [{"score": {}}]}, "score needs rewards: write {score: {rewards: ...}}"),
    ({"stages": ["write", "build_rules:twice", "write"]}, "two stages write groups/*.jsonl: give each a name of its own"),
    ({"stages": ["no_such_module:f"]}, "cannot import 'no_such_module'")])
def test_mistakes_in_a_pipeline_file(place, change, said):
    with pytest.raises(ValueError) as found:
        plan(**change)
    assert str(found.value).startswith("pipeline: ") and said in str(found.value)


def test_a_source_that_is_not_there(place):
    with pytest.raises(FileNotFoundError, match="did you mean 'prompts.jsonl'"):
        build(plan(source="prompt.jsonl"))


def test_every_stage_that_is_named_is_there():
    """Kinds that are one function, and namespaces of rules."""
    for spec in STAGES.values():
        if ":" in spec:
            assert list(make({"source": "x", "out": "y", "stages": ["write"]}).stages)
        from importlib import import_module
        module, _, name = spec.partition(":")
        assert hasattr(import_module(module), name or "__all__"), spec


# ------------------------------------------------------------------------------------------------------------- writers
def group(n: int, split_name: str) -> Group:
    return Group(f"p{n}", [Response("good", scores={"r": 1.0}), Response("bad", meta={"generator": "m"})], [1.0, 0.0],
                 meta={"split": split_name, "prompt_id": f"{n:016x}"})


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("format", ["group", "pair"])
def test_written_data_can_be_read(tmp_path, ending, format):
    given = [group(n, "test" if n % 3 == 0 else "train") for n in range(7)]
    said = write(given, tmp_path, name="d", format=format, ending=ending)
    assert said == [f"d: 3 records of format {format} in d/test{ending}", f"d: 4 records of format {format} in d/train{ending}"]
    for name in ("train", "test"):
        back = list(load(tmp_path / "d" / f"{name}{ending}"))
        wanted = [g for g in given if g.meta["split"] == name]
        assert [(g.prompt, [r.text for r in g.responses], g.relevance) for g in back] == \
            [(g.prompt, [r.text for r in g.responses], g.relevance) for g in wanted]
        if format == "group":
            assert [{k: v for k, v in g.meta.items() if k != "place"} for g in back] == [g.meta for g in wanted]
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [f"test{ending}", f"train{ending}"]


def test_many_rows_make_several_files(tmp_path):
    write([group(n, "train") for n in range(7)], tmp_path, name="d", format="trl", ending=".parquet", rows=3)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [f"train-0000{n}-of-00003.parquet" for n in range(3)]
    assert [g.prompt for g in load(tmp_path / "d")] == [f"p{n}" for n in range(7)]
    write([group(n, "train") for n in range(6)], tmp_path, name="e", rows=3)
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]


def test_mistakes_of_writing(tmp_path):
    with pytest.raises(ValueError, match="unknown format 'pear', did you mean 'pair'"):
        write([], tmp_path, format="pear")
    with pytest.raises(ValueError, match="did you mean '.parquet'"):
        write([], tmp_path, ending=".parqet")
    with pytest.raises(ValueError, match="at least 1, found 0"):
        write([], tmp_path, rows=0)
    tie = Group("p", [Response("a"), Response("b")], [1.0, 1.0], meta={"place": "x.jsonl:7"})
    with pytest.raises(ValueError, match="x.jsonl:7: a group of 2 responses: neither is preferred"):
        write([tie], tmp_path, format="pair")


def test_push_uploads_a_folder_as_a_private_data_set(tmp_path, monkeypatch):
    import huggingface_hub

    from data_tools.writers import push
    calls = []

    class Hub:
        def create_repo(self, name, **settings):
            calls.append((name, settings["repo_type"], settings["private"]))

        def upload_folder(self, **settings):
            calls.append((settings["folder_path"], settings["repo_id"], settings["repo_type"], settings["allow_patterns"]))
            return "https://hub/me/d"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    (tmp_path / "d" / ".hidden").mkdir(parents=True)
    for name in ("d/x.jsonl", "d/.x.7.part", ".y", "d/.hidden/z"):
        (tmp_path / name).write_text("x")
    assert push(tmp_path, "me/d") == "https://hub/me/d"
    assert calls == [("me/d", "dataset", True), (str(tmp_path), "me/d", "dataset", ["d/x.jsonl"])]
    Hub.create_repo = lambda *_, **__: 1 / 0                  # whatever a client raises
    with pytest.raises(ConnectionError, match="ZeroDivisionError: division by zero.*hf auth login"):
        push(tmp_path, "me/d")


# ---------------------------------------------------------------------------------------------------- quality as stages
DOUBLE = [{"prompt": f"what is {n} and {n} more", "chosen": f"it is {2 * n} of course", "rejected": f"no idea at all about {n}"}
          for n in (1, 2, 3, 1)]


def test_checks_repairs_and_pages(place):
    """A group that comes twice is found, dropped by the next stage, and no finding is told of what was repaired."""
    Path("pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in DOUBLE))
    stages = ["check", {"fix": {"repairs": ["duplicate"]}}, "write", {"check": {"against": {"mine": "pairs.jsonl"}, "ngram": 5}},
              {"describe": {"title": "Doubles"}}, "view"]
    found = build(plan(stages, source="pairs.jsonl", split={}))
    steps = dict(zip(["source", "check", "fix", "write", "again", "describe", "view"], found.steps, strict=True))
    assert any("duplicate: 1" in line for line in steps["check"].said)
    assert steps["fix"].groups == [4, 3] and steps["fix"].said == ["drop: 1 groups"]
    assert {"README.md", "index.html", "view.html", "findings.jsonl", "groups/train.jsonl"} <= set(files())
    kinds = [r["kind"] for r in records("out/findings.jsonl")]
    assert "duplicate" not in kinds and kinds.count("contaminated") == 3          # those of the second check
    card = Path("out/README.md").read_text()
    assert "# Doubles" in card and "contaminated" in card
    with pytest.raises(ValueError, match="'fix': fix repairs what check or influence found: put one of these"):
        build(plan([{"fix": {"repairs": ["duplicate"]}}], source="pairs.jsonl", split={}, out="o2"))
    again = build(plan(stages, source="pairs.jsonl", split={}), resume=True)
    assert [s.said for s in again.steps] == [s.said for s in found.steps]


def test_which_filter_to_take(place):
    """The middle response is off the line, which the best and the worst are on."""
    rows = [{"prompt": f"{n}", "responses": [{"text": f"{r}", "scores": {"reward": r, "true": t}} for r, t in
                                             ((0, n), (1, 9), (2, 2))]} for n in range(3)]
    Path("lists.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    said = build(plan([{"linearity": {"truth": "true"}}], source="lists.jsonl")).steps[1].said
    loaded, weights = list(load("lists.jsonl")), {"best": 1, "others": 0, "worst": 1}
    assert len(said) == 4 and "no R^2 by {'best': 1, 'others': 0, 'worst': 0}: no line fits" in said[0]
    assert f"R^2 {linearity(loaded, truth='true', **weights):.3f} by {weights}" == said[1]


def test_attack_success_is_a_table(place):
    """Attacks, their scored responses, the table, and pairs of them: topics x styles, empty where nothing was asked."""
    rows = [{"prompt": f"{topic} {n}?", "topic": topic} for topic, count in (("fraud", 2), ("drugs", 1)) for n in range(count)]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = build(plan([{"augment": {"attacks": {"styles": ["plain", "steps"]}}}, {"build_rules:answers": {"n": 4}},
                        {"build_rules:length": {"scale": 0.2}}, {"attack_success": {"score": "length"}},
                        {"augment": {"safety_pairs": {"score": "length"}}}], source="asked.jsonl"))
    assert found.steps[4].said == ["       plain  steps", "drugs         50%", "fraud  50%    50%"]
    with pytest.raises(ValueError, match="'attack_success': .*has no 'theme', which names the topic of the request"):
        build(plan([{"build_rules:answers": {}}, {"attack_success": {"topic": "theme"}}], source="asked.jsonl", out="two"))


def test_commands_to_look_and_mend(place):
    Path("pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in DOUBLE))
    code_, said = prefopt("data", "check", "pairs.jsonl", "--against", "mine=pairs.jsonl", "-o", "f.jsonl", "--skip", "bias")
    assert code_ == 1 and "duplicate: 1" in said and "all findings are in f.jsonl" in said
    code_, said = prefopt("data", "fix", "pairs.jsonl", "mended.jsonl", "--findings", "f.jsonl", "--repair", "duplicate")
    assert (code_, said) == (0, "3 groups written to mended.jsonl, what was done to mended.jsonl.log.jsonl drop: 1 groups")
    code_, said = prefopt("data", "fix", "pairs.jsonl", "other.jsonl", "--findings", "f.jsonl", "--repair", "duplicat")
    assert code_ == 2 and "did you mean 'duplicate'" in said
    code_, said = prefopt("data", "check", "mended.jsonl", "-o", "g.jsonl", "--skip", "bias", "--skip", "labels")
    assert (code_, said) == (0, "nothing was found all findings are in g.jsonl")
    code_, said = prefopt("data", "view", "mended.jsonl", "--findings", "g.jsonl", "-o", "look.html", "--title", "Look")
    assert code_ == 0 and "Look" in Path("look.html").read_text()
    code_, said = prefopt("data", "describe", "mended.jsonl", "--findings", "g.jsonl", "--title", "Mine", "--out", "card")
    assert code_ == 0 and "# Mine" in Path("card/README.md").read_text() and Path("card/index.html").exists()
    first = next(iter(load("mended.jsonl")))
    Path("labels.jsonl").write_text(json.dumps({"id": identity(first), "relevance": [0.0, 1.0]}) + "\n")
    code_, said = prefopt("data", "relabel", "mended.jsonl", "labels.jsonl", "new.jsonl")
    assert (code_, said) == (0, "3 groups written to new.jsonl")
    assert [g.relevance for g in load("new.jsonl")] == [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    assert prefopt("data", "relabel", "new.jsonl", "labels.jsonl", "new.jsonl")[0] == 2
    assert prefopt("data", "check", "mended.jsonl", "--against", "mine")[1].startswith("error: --against mine is not of the form")


# ------------------------------------------------------------------------------------------------------- command line
def test_the_command(place):
    raw = {"source": "prompts.jsonl", "stages": plan_specs(), "out": "out", "shard": 4, "cache": "cache", "split": {"test": 0.3}}
    Path("build.yaml").write_text(yaml.safe_dump(raw))
    code_, said = prefopt("data", "build", "build.yaml", "--dry")
    assert code_ == 0 and "build_rules:longest runs" in said and not Path("out").exists()
    code_, said = prefopt("data", "build", "build.yaml")
    assert code_ == 0 and "17 groups (" in said and "build_rules:seen: 17 groups" in said
    code_, said = prefopt("data", "build", "build.yaml")
    assert code_ == 2 and said.startswith("error: out is there already")
    code_, said = prefopt("data", "build", "build.yaml", "out=two", "seed=3")
    assert code_ == 0 and "from the cache" in said and Path("two/pairs/train.jsonl").exists()
    code_, said = prefopt("data", "build", "nothing.yaml")
    assert code_ == 2 and "no pipeline file 'nothing.yaml'" in said
    raw["stages"] = ["build_rules:answers", "build_rules:Half", "build_rules:nothing"]
    Path("build.yaml").write_text(yaml.safe_dump(raw))
    code_, said = prefopt("data", "build", "build.yaml", "--overwrite")
    assert code_ == 2 and "build_rules:nothing 8 8 0 0" in said and "error: nothing is left after" in said
    assert "build_rules:Half: kept 8" in said                 # what the stages before say, too
    raw["stages"] = ["build_rules:answers", "build_rules:fails"]
    Path("build.yaml").write_text(yaml.safe_dump(raw))
    code_, said = prefopt("data", "build", "build.yaml", "--overwrite")
    assert code_ == 1 and "failed.jsonl says why" in said
    code_, said = prefopt("data", "push", "nowhere", "me/d")
    assert code_ == 2 and "no finished build" in said
    code_, said = prefopt("data", "push", "two", "me/d", "--dry")
    assert code_ == 0 and said.startswith("the private data set me/d would have build.json") and "pairs/train.jsonl" in said


def test_the_list_of_stages():
    code_, said = prefopt("data", "stages")
    known = [*(kind for kind, spec in STAGES.items() if ":" in spec), *select.__all__, *augment.__all__]
    assert code_ == 0 and len(known) > 50 and all(f" {name} " in said for name in known)
    code_, said = prefopt("data", "stages", "best_worst")
    assert code_ == 0 and said.startswith('best_worst(score="reward", margin=0.0) sees: group') and "Edge" in said
    code_, said = prefopt("data", "stages", "scor")
    assert code_ == 2 and "did you mean 'score'" in said


def test_the_tour():
    code_, said = prefopt("data", "--help")
    said = said.partition("Commands")[2]
    names = ("build", "stages", "check", "influence", "fix", "view", "relabel", "validate", "convert", "describe", "difficulty",
             "push")
    order = [said.index(f" {name} ") for name in names]
    assert code_ == 0 and order == sorted(order)


@pytest.mark.slow
def test_a_large_build_tells_its_cost(tmp_path, monkeypatch, capsys):
    from cookbook.build_dataset import large
    monkeypatch.setattr("sys.argv", ["large", "--groups", "60", "--out", str(tmp_path)])
    large.main()
    said = capsys.readouterr().out
    assert said.startswith("60 groups, ") and "CPU s" in said and (tmp_path / "built" / "index.html").exists()
    assert int(said.split("; ")[-1].split()[0]) == sum(len(p.read_text().splitlines()) for p in tmp_path.glob("built/groups/*"))
