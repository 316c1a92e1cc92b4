"""`prefopt reward ...` as a user meets it: every command on tiny data, its exit codes, and the mistakes people make first."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from loop_cases import go, workplace, write
from test_cli import prefopt

from data_tools import load
from prefopt import doctor
from rewards import cli, sandbox, trained
from rewards.base import rows_of
from rewards.serve import Server
from rewards.verifiable import final_answer
from rewards.web import post

ROOT = Path(__file__).parents[1]
MINE = '''
def size(text, *, factor=1.0):
    return factor * len(text)

def fussy(text):
    if text == "bad":
        raise RuntimeError("boom")
    return float("nan") if text == "odd" else 1.0

def counted(text):
    with open("calls", "a") as calls:
        calls.write(text + "\\n")
    if text == "w300" and open("calls").read().count("w300\\n") == 1:
        raise KeyboardInterrupt
    return 1.0

class Longer:
    name = "longer"
    def settings(self):
        return {}
    def compare(self, groups):
        return [[[0.5 if a is b else float(len(a.text) > len(b.text)) for b in g.responses] for a in g.responses] for g in groups]

longer = Longer()
'''
GROUPS = [{"prompt": "How many?", "responses": ["It is 4.", "It is 5!"], "meta": {"reference": "4"}},
          {"prompt": "And now?", "responses": ["7", "The answer is 8."], "meta": {"reference": "8"}}]
STEPS = [{"prompt": "w9 ", "completions": ["w11 w1", f"w12 w{1 + n % 2}"], "labels": [True, n % 2 == 0]} for n in range(8)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model of each kind that the commands tell apart, and a policy, after a step or a few."""
    place = workplace(tmp_path_factory.mktemp("models"))
    go(place, "bradley_terry", "bt", **{"train.steps": 1})
    go(place, "general_preference", "gpm", **{"train.steps": 1})
    go(place, "implicit_ce", "implicit", **{"train.steps": 1})
    steps = write(place / "steps.jsonl", STEPS)
    go(place, "process", "prm", **{"train.steps": 4, "data.train": steps, "data.eval": steps, "train.lr": 0.05})
    go(place, "simpo", "policy", **{"train.steps": 1})
    return place


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with data and a module of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    write(tmp_path / "answers.jsonl", GROUPS)
    write(tmp_path / "fussy.jsonl", [{"prompt": "?", "responses": ["good", "bad", "odd"]}])
    return tmp_path


def reward(*arguments):
    return prefopt("reward", *arguments)


def scores(path, name: str) -> list[list]:
    return [[r.scores.get(name) for r in group.responses] for group in load(str(path))]


# ------------------------------------------------------------------------------------------------------------ help, list
@pytest.mark.parametrize("command", ["train", "score", "bench", "serve", "list", "tokens"])
def test_help_has_examples(command):
    found = reward(command, "--help")
    examples = [line.strip() for line in found.raw.splitlines() if line.strip().startswith("prefopt ")]
    assert found.code == 0 and examples and "Example" in found.text


def test_the_list_names_every_reward():
    found = reward("list")
    assert found.code == 0 and "prefopt list" in found.text
    for said in ("final_answer 1 if the final number", "text, reference", "weighted", "by='mean'"):
        assert said in found.text, said


@pytest.mark.parametrize("spec, label", [
    ("bleu", "bleu"), ("{bleu: {order: 2}}", "bleu"), ("mine:size", "size"), ("{mine:size: {factor: 2}}", "size"),
    ("folder/bt.v2", "bt.v2"), ("folder/bt.v2/", "bt.v2"), ("{folder/bt.v2: {aspect: a}}", "bt.v2"),
    ("held_out.jsonl.gz", "held_out")])
def test_labels(spec, label, place):
    (place / "folder" / "bt.v2").mkdir(parents=True)
    (place / "held_out.jsonl.gz").touch()
    assert cli.named([spec], "--reward") == {label: spec}
    assert cli.named([f"own={spec}"], "--reward") == {"own": spec}


# ----------------------------------------------------------------------------------------------------------------- train
def test_train_is_that_of_policies(models, place):
    run = {"recipe": "bradley_terry", "model": str(models / "model"), "out": "bt",
           "data": {"train": str(models / "train.jsonl"), "cache": "cache"}, "train": {"steps": 1, "device": "cpu"}}
    (place / "run.yaml").write_text(yaml.safe_dump(run))
    found = reward("train", "run.yaml", "recipe=bt_list", 'expect={loss: "<= -1"}', "--quiet")
    assert found.code == 1 and "expected <= -1" in found.text
    assert json.loads((place / "bt" / "model" / "prefopt.json").read_text())["recipe"] == "bt_list"


# ----------------------------------------------------------------------------------------------------------------- score
def test_score(models, place):
    found = reward("score", "answers.jsonl", "-r", "final_answer", "-r", "twice={mine:size: {factor: 2}}", "-r", models / "bt",
                   "-o", "scored.jsonl")
    assert found.code == 0, found.text
    assert found.text.startswith("2 groups with 4 responses written to scored.jsonl final_answer: 4 scored, 0 not; mean 0.5, "
                                 "from 0 to 1 twice: 4 scored, 0 not; mean 16.5, from 2 to 32 bt: 4 scored, 0 not; mean ")
    assert scores("scored.jsonl", "final_answer") == [[1, 0], [0, 1]]
    assert scores("scored.jsonl", "twice") == [[16, 16], [2, 32]]
    assert all(isinstance(x, float) for row in scores("scored.jsonl", "bt") for x in row)
    assert not list(place.glob(".*"))                         # nothing is left of what was kept for going on


def test_a_comparison_gives_wins(models, place):
    assert reward("score", "answers.jsonl", "-r", "mine:longer", "-o", "scored.parquet").code == 0
    assert [g.wins for g in load("scored.parquet")] == [[[0.5, 0], [0, 0.5]], [[0.5, 0], [1, 0.5]]]
    assert scores("scored.parquet", "longer") == [[0, 0], [0, 1]]
    assert reward("score", "answers.jsonl", "-r", models / "gpm", "-o", "scored.jsonl", "--limit", 1).code == 0
    (group,) = load("scored.jsonl")
    assert group.wins[0][1] + group.wins[1][0] == pytest.approx(1) and group.responses[0].scores["gpm"] == group.wins[0][1]


def test_a_process_reward_model_scores_steps_without_labels(models, place):
    """Steps as the record names them, or lines; the score is the worst logit at their ends. A conversation is an error."""
    texts = ["w11 w1\nw12 w2", "w11 w1\nw12 w1", "w11 w1"]
    write(place / "lines.jsonl", [{"prompt": "w9 ", "responses": texts}])
    write(place / "named.jsonl", [{"prompt": "w9 ", "responses": [{"text": t, "meta": {"steps": t.split("\n")}} for t in texts]}])
    for name in ("lines", "named"):
        assert reward("score", f"{name}.jsonl", "-r", models / "prm", "-o", f"{name}-scored.jsonl").code == 0
    (found,), (named,) = scores("lines-scored.jsonl", "prm"), scores("named-scored.jsonl", "prm")
    assert found == named and len(set(found)) == 3 and 0 not in found
    (words, values), = trained.load(str(models / "prm")).tokens_of(
        [row for row in rows_of(list(load("lines.jsonl"))) if row.text == texts[2]])
    assert len(words) == 3 and values[-1] == pytest.approx(1 / (1 + 2.718281828459045 ** -found[2]), abs=1e-5)
    write(place / "chat.jsonl", [{"prompt": "w9 ", "responses": [[{"role": "assistant", "content": "w1"}]]}])
    wrong = reward("score", "chat.jsonl", "-r", models / "prm", "-o", "x.jsonl", "--on-error", "mark")
    assert wrong.code == 1 and "grades the steps of a text, and the response is a conversation" in wrong.text


def test_rows_that_cannot_be_scored(place):
    raised = reward("score", "fussy.jsonl", "-r", "mine:fussy", "-o", "scored.jsonl")
    assert raised.code == 2 and "fussy.jsonl:1: response 2: reward 'fussy'" in raised.text and "boom" in raised.text
    assert not (place / "scored.jsonl").exists()
    marked = reward("score", "fussy.jsonl", "-r", "mine:fussy", "-o", "scored.jsonl", "--on-error", "mark")
    assert marked.code == 1 and "fussy: 1 scored, 2 not" in marked.text
    assert "not scored: RuntimeError: boom" in marked.text and "not scored: returned nan" in marked.text
    assert scores("scored.jsonl", "fussy") == [[1.0, None, None]]
    lacks = reward("score", "fussy.jsonl", "-r", "final_answer", "-o", "x.jsonl")
    assert lacks.code == 2 and "'final_answer'" in lacks.text and "'reference', which the row lacks" in lacks.text


def test_an_interrupted_score_goes_on(place):
    """The first 256 rows are kept, and not computed again; of the rest those whose chunk was not done are."""
    write(place / "many.jsonl", [{"prompt": "?", "responses": [f"w{n}"]} for n in range(400)])
    go_on = ("score", "many.jsonl", "-r", "mine:counted", "-o", "scored.jsonl")
    assert reward(*go_on).code == 130 and not (place / "scored.jsonl").exists()
    assert reward(*go_on).code == 0
    calls = (place / "calls").read_text().split()
    assert calls.count("w0") == calls.count("w255") == 1 and calls.count("w300") == 2 and calls.count("w399") == 1
    assert scores("scored.jsonl", "counted") == [[1.0]] * 400
    assert reward(*go_on, "--cache", "kept.sqlite").code == 0 and reward(*go_on, "--cache", "kept.sqlite").code == 0
    assert (place / "calls").read_text().split().count("w0") == 2


@pytest.mark.parametrize("arguments, said", [
    (["-r", "final_anser"], "there is no reward 'final_anser', did you mean 'final_answer'"),
    (["-r", "{bleu: {ordr: 2}}"], "reward 'bleu' has no argument 'ordr', did you mean 'order'"),
    (["-r", "{weighted: {}}"], "reward 'weighted' needs parts"),
    (["-r", "{bleu: ["], "--reward '{bleu: [' is not valid YAML"),
    (["-r", "mine:sise"], "mine has no 'sise', did you mean 'size'"),
    (["-r", "nowhere:size"], "cannot import 'nowhere'"),
    (["-r", "bleu", "-r", "{bleu: {order: 2}}"], "--reward 'bleu' comes twice: give each a label of its own"),
    (["-r", "bleu", "--on-error", "zero"], "on_error is 'raise' or 'mark', found 'zero'"),
    (["-r", "folders/empty"], "folders/empty holds no model: a reward model is the folder of a run"),
    (["-r", "folders/empti"], "there is no folder 'folders/empti', did you mean 'empty'"),
    (["-r", "./none"], "there is no folder './none'")])
def test_mistakes(place, arguments, said):
    (place / "folders" / "empty").mkdir(parents=True)
    found = reward("score", "answers.jsonl", *arguments, "-o", "x.jsonl")
    assert found.code == 2 and found.text.count("error: ") == 1, found.text
    assert said in found.text and "Traceback" not in found.text and not (place / "x.jsonl").exists()


def test_a_policy_is_no_reward_model(models, place):
    found = reward("score", "answers.jsonl", "-r", models / "policy", "-o", "x.jsonl")
    assert found.code == 2 and "was trained with 'simpo', which has no reward" in found.text


def test_a_remote_reward(place):
    with Server([final_answer]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        spec = f'{{remote: {{url: "{server.url}", name: final_answer}}}}'
        found = reward("score", "answers.jsonl", "-r", f"there={spec}", "-o", "scored.jsonl")
        server.shutdown()
        thread.join()
    assert found.code == 0 and scores("scored.jsonl", "there") == [[1, 0], [0, 1]]


# ----------------------------------------------------------------------------------------------------------------- bench
def test_bench(models, place):
    found = reward("bench", f"held={models / 'eval.jsonl'}", "-r", models / "bt", "-r", "mine:size", "--train",
                   models / "train.jsonl", "-o", "report")
    assert found.code == 0, found.text
    for said in ("reward held", "baseline: longer", "baseline: TF-IDF", "bt ", "size ", "the page is report/bench.html"):
        assert said in found.text, said
    numbers = json.loads((place / "report" / "bench.json").read_text())
    assert {"bt", "size"} < set(numbers["sets"]["held"]["models"])
    shown = float(re.search(r"baseline: longer +(\d\.\d+) \[", found.text)[1])
    assert shown == pytest.approx(numbers["sets"]["held"]["models"]["baseline: longer"]["accuracy"]["share"], abs=5e-4)
    held = list(load(str(models / "eval.jsonl")))
    assert shown == pytest.approx(sum(len(g.responses[0].text) > len(g.responses[1].text) for g in held) / len(held), abs=5e-4)
    assert "<html" in (place / "report" / "bench.html").read_text()


def test_bench_of_scores_that_are_there(place):
    records = [{"prompt": "?", "relevance": [1, 0], "responses": [{"text": "a", "scores": {"mine": n}},
                                                                  {"text": "b", "scores": {"mine": 1}}]} for n in (0, 2, 3)]
    write(place / "scored.jsonl", records)
    found = reward("bench", "scored.jsonl", "--key", "mine", "-o", "report")
    assert found.code == 0 and re.search(r"mine +0\.667 \[", found.text)


@pytest.mark.parametrize("arguments, said", [
    (["answers.jsonl", "-r", "mine:size"], "the set 'answers' has 2 groups and no pair with a preferred response"),
    (["pairs.jsonl", "pairs.jsonl", "-r", "mine:size"], "SET 'pairs' comes twice"),
    (["pairs.jsonl", "-r", "mine:size", "--slice", "colour"], "colour"),
    (["pears.jsonl", "-r", "mine:size"], "pears.jsonl does not exist, did you mean 'pairs.jsonl'")])
def test_mistakes_of_bench(place, arguments, said):
    write(place / "pairs.jsonl", [{"prompt": "?", "chosen": "aa", "rejected": "b"}] * 3)
    found = reward("bench", *arguments, "-o", "report")
    assert found.code == 2 and said in found.text and "Traceback" not in found.text, found.text


# ---------------------------------------------------------------------------------------------------------------- tokens
@pytest.mark.parametrize("name", ["implicit", "prm"])
def test_tokens(models, place, name):
    found = reward("tokens", models / name, models / "steps.jsonl", "-o", "tokens.html", "--limit", 2)
    assert found.code == 0 and found.text == "2 responses in tokens.html"
    page = (place / "tokens.html").read_text()
    assert name in page and "w11" in page


def test_tokens_by_step(models, place):
    found = reward("tokens", models / "implicit", models / "steps.jsonl", "-o", "steps.html", "--limit", 2, "--steps", "newline")
    assert found.code == 0 and "step 1" in (place / "steps.html").read_text()
    wrong = reward("tokens", models / "implicit", models / "steps.jsonl", "--steps", "new_line")
    assert wrong.code == 2 and "did you mean 'newline'" in wrong.text


@pytest.mark.parametrize("name, said", [("bt", "grades whole responses: rewards of tokens need an implicit reward model"),
                                        ("gpm", "compares responses and grades none")])
def test_tokens_of_models_that_have_none(models, place, name, said):
    found = reward("tokens", models / name, models / "steps.jsonl")
    assert found.code == 2 and said in found.text and not (place / "tokens.html").exists()


# ----------------------------------------------------------------------------------------------------------------- serve
def test_serve(place):
    """From the console script, which finds modules of the current folder; Ctrl-C ends it without a word."""
    process = subprocess.Popen([sys.executable, "-P", "-c", "from prefopt.cli import main; main()", "reward", "serve", "-r",
                                "mine:size", "-r", "final_answer", "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        url = re.match(r"serving on (\S+); Ctrl-C ends it", process.stdout.readline())[1]
        asked = {"prompts": ["How many?"], "completions": ["It is 4."], "reference": ["4"]}
        assert post(f"{url}/score", asked) == {"scores": {"size": [8.0], "final_answer": [1.0]}}
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("", "") and process.returncode == 0
    finally:
        process.kill()


# ---------------------------------------------------------------------------------------------------------------- doctor
@pytest.mark.parametrize("tried, code, said", [
    ({"root": ""}, 0, "namespaces: no network"),
    ({"root": "unshare: Operation not permitted", "uid": ""}, 0, "warning an unprivileged user id, but no namespaces"),
    ({"user": "unshare: Operation not permitted"}, 0, "sandbox code that a model wrote is not run here")])
def test_the_doctor_knows_what_protects(monkeypatch, tried, code, said):
    monkeypatch.setattr(sandbox, "trials", lambda: tried)
    monkeypatch.setattr(doctor, "training", lambda: iter(()))
    found = prefopt("doctor")
    assert found.code == code and said in found.text


# -------------------------------------------------------------------------------------------------------------- the page
def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "cookbook" / "rewards" / "README.md").read_text(), re.S)


def test_the_page_reads_files_that_are_there():
    named = set(re.findall(r"cookbook/rewards/[\w.]+\.(?:jsonl|yaml)", "".join(blocks("bash"))))
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name
    assert {Path(name).name for name in named} >= {p.name for p in (ROOT / "cookbook" / "rewards").glob("*.jsonl")}


@pytest.mark.slow
def test_every_command_of_the_page(tmp_path, monkeypatch):
    """As written, in the page's order, in a fresh folder; the server in a thread, and what Python prints is what is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copytree(ROOT / "cookbook", tmp_path / "cookbook")
    page = (ROOT / "cookbook" / "rewards" / "README.md").read_text()
    with Server([final_answer]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            for kind, block in re.findall(r"```(bash|python)\n(.*?)```", page, re.S):
                if kind == "python":
                    exec(compile(block, "README.md", "exec"), {})
                    continue
                for line in block.splitlines():
                    words = shlex.split(line.replace("http://127.0.0.1:8123", server.url))
                    if words[:3] == ["prefopt", "reward", "serve"] or words[0] == "curl":
                        continue
                    if words[0] == "python":
                        subprocess.run([sys.executable, *words[1:]], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
                    else:
                        found = prefopt(*words[1:])
                        assert found.code == 0, f"{line}\n{found.text}"
        finally:
            server.shutdown()
            thread.join()
    (ranked,) = [scores("runs/rewards/scored.jsonl", "bt")]
    assert all(better > worse for better, worse in ranked)
    assert scores("runs/rewards/programs.jsonl", "passed_share") == [[1.0, 0.5, 0.0]]
