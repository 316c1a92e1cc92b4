"""The command line as a newcomer meets it: every command, and the mistakes people make first."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from prefopt import check, cli, doctor
from prefopt.config import make
from prefopt.findings import attempt

ROOT = Path(__file__).parents[1]
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return doctor.tiny(tmp_path_factory.mktemp("model") / "tiny")


def lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def pairs(n: int, start: int = 0) -> list[dict]:
    return [{"prompt": "? " * (i + 1), "chosen": "good", "rejected": "bad bad"} for i in range(start, start + n)]


@pytest.fixture
def place(tmp_path, monkeypatch, model):
    """A folder with a run file, data and room for results, which is the current one."""
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "pairs.jsonl", pairs(6))
    lines(tmp_path / "held_out.jsonl", pairs(3, 10))
    lines(tmp_path / "feedback.jsonl", [{"prompt": "? " * (i + 1), "completion": "good", "label": i % 2 == 0}
                                        for i in range(6)])
    settings = {"recipe": "dpo", "policy": model, "out": "out", "data": {"train": "pairs.jsonl", "cache": "cache"},
                "train": {"groups_per_step": 3, "lr": 1e-3}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def prefopt(*arguments: str) -> SimpleNamespace:
    """Exit code and everything printed, in one line, as wide as it may be."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "100"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return SimpleNamespace(code=result.exit_code, text=" ".join(result.output.split()), raw=result.output)


# ---------------------------------------------------------------------------------------------------------------- help
def test_help_imports_nothing_heavy():
    code = ("import sys; from typer.testing import CliRunner; from prefopt import cli; "
            "r = CliRunner().invoke(cli.app, ['train', '--help']); assert r.exit_code == 0 and 'RUN.yaml' in r.output; "
            "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'yaml') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [[], ["train"], ["check"], ["doctor"], ["eval"], ["list"], ["explain"], ["data"],
                                     ["data", "validate"], ["data", "convert"], ["data", "describe"]])
def test_help_of_every_command(command):
    """Every command says what it does and gives examples, each on a line of its own."""
    found = prefopt(*command, "--help")
    assert found.code == 0
    examples = [line for line in found.raw.splitlines() if line.strip().startswith("prefopt " + " ".join(command))]
    if command not in ([], ["data"]):
        assert "Example" in found.text and examples


def test_version():
    assert prefopt("--version").text == cli.__version__


# --------------------------------------------------------------------------------------------------------------- train
def test_train_from_start_to_end(place):
    found = prefopt("train", "run.yaml", "data.eval=held_out.jsonl", "train.eval_every=2", "set.ranking=hinge",
                    'expect={eval/loss: "<= 2.0"}')
    assert found.code == 0
    for said in ("dpo: Direct Preference", "ranking hinge(delta=1) instead of logistic", "kl/ref",
                 "a copy of the policy, for logp_ref", "held out held_out.jsonl", "1 epoch, 3 groups per step",
                 "2 steps; the model is in out/model", "as expected: eval/loss <= 2.0"):
        assert said in found.text, said
    assert (place / "out" / "model" / "config.json").exists()


def test_quiet_says_nothing(place):
    found = prefopt("train", "run.yaml", "--quiet")
    assert (found.code, found.text) == (0, "")


def test_unmet_expectation_is_exit_code_1(place):
    found = prefopt("train", "run.yaml", "--quiet", 'expect={loss: "<= 0.1", margin: ">= -100"}')
    assert found.code == 1
    assert found.text == "not as expected: loss = 0.6931, expected <= 0.1" or "expected <= 0.1" in found.text
    assert "margin" not in found.text


def test_existing_run_is_not_overwritten_and_can_be_resumed(place):
    assert prefopt("train", "run.yaml", "train.save_every=1", "--quiet").code == 0
    again = prefopt("train", "run.yaml", "train.save_every=1")
    assert again.code == 2 and "--resume" in again.text and "out=" in again.text
    assert prefopt("train", "run.yaml", "train.save_every=1", "--resume").code == 0


def test_resume_without_a_checkpoint_says_so(place):
    found = prefopt("train", "run.yaml", "--resume")
    assert found.code == 0 and "no checkpoint in out, so the run starts from the beginning" in found.text


def test_interrupted_is_exit_code_130(place, monkeypatch):
    from prefopt import train

    def stopped(run, **options):
        return train.Result({"loss": 0.5}, 4, Path(run.out), stopped="interrupted")

    monkeypatch.setattr(train, "train", stopped)
    found = prefopt("train", "run.yaml", "out=a b")
    assert found.code == 130
    assert "interrupted and saved at step 4; go on with: prefopt train run.yaml 'out=a b' --resume" in found.text
    assert "the model is in" not in found.text


def test_keyboard_interrupt_is_exit_code_130(place, monkeypatch):
    from prefopt import train

    def stopped(run, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", stopped)
    assert prefopt("train", "run.yaml").code == 130


@pytest.mark.parametrize("arguments, said", [
    (["recipe=dpoo"], "unknown recipe 'dpoo', did you mean 'dpo'"),
    (["set.bta=1"], "recipe 'dpo' has no argument or slot 'bta', did you mean 'beta'"),
    (["set.beta=-1"], "beta must be a number greater than 0, found -1"),
    (["set.beta=big"], "must be a number, found 'big'"),
    (["set.ranking=hing"], "no ranking 'hing', did you mean 'hinge'"),
    (["set.labels={unflip: {flp: 0.1}}"], "'flp', did you mean 'flip'"),
    (["trian.lr=1.0"], "trian: no such setting, did you mean 'train'"),
    (["train.leraning_rate=1"], "train.leraning_rate: no such setting"),
    (["train.lr=fast"], "train.lr:"),
    (["train.lr"], "'train.lr' is not of the form a.b=c"),
    (["recipe=kto", "train.groups_per_step=1"], "set train.groups_per_step to at least 2"),
    (["set.beta={"], "is not valid YAML"),
    (["data.train=pears.jsonl"], "pears.jsonl does not exist, did you mean 'pairs.jsonl'"),
    (["policy=./tinyy"], "policy.name: there is no folder './tinyy'"),
])
def test_mistakes_in_the_settings(place, arguments, said):
    found = prefopt("train", "run.yaml", *arguments)
    assert found.code == 2
    assert said in found.text
    assert "Traceback" not in found.text and found.text.count("error: ") == 1


def test_learning_rate_as_text_is_read(place):
    """YAML's text 1e-6 is a number where only a number can be meant."""
    (place / "run.yaml").write_text((place / "run.yaml").read_text().replace("lr: 0.001", "lr: 1e-3"))
    assert "1e-3" in (place / "run.yaml").read_text()
    assert prefopt("train", "run.yaml", "--quiet").code == 0


def test_misspelt_key_in_the_file(place):
    (place / "run.yaml").write_text((place / "run.yaml").read_text().replace("groups_per_step", "group_per_step"))
    found = prefopt("check", "run.yaml")
    assert found.code == 2 and "train.group_per_step: no such setting, did you mean 'groups_per_step'" in found.text


@pytest.mark.parametrize("name, content, said", [
    ("none.yaml", None, "no run file 'none.yaml'"),
    ("bad.yaml", "recipe: [dpo", "bad.yaml: not valid YAML"),
    ("list.yaml", "- recipe", "a run file holds keys"),
    ("empty.yaml", "", "recipe: missing; policy: missing; data: missing")])
def test_run_files_that_are_none(place, name, content, said):
    if content is not None:
        (place / name).write_text(content)
    found = prefopt("train", name)
    assert found.code == 2 and said in found.text


@pytest.mark.parametrize("line, said", [
    ('{"prompt": "?", "chosen": "good"', "bad.jsonl:7: malformed json"),
    ('{"prompt": "?", "chosen": "good", "rejected": ""}', "bad.jsonl:7: response 2 is empty"),
    ('{"prompt": "?", "chosen": "good", "rejected": "good"}', "bad.jsonl:7: responses 1 and 2 are equal"),
    ('{"prompt": "?", "chosen": "good"}', "bad.jsonl:7: the key 'rejected' is missing")])
def test_bad_records_say_where(place, line, said):
    (place / "bad.jsonl").write_text((place / "pairs.jsonl").read_text() + line + "\n")
    found = prefopt("train", "run.yaml", "data.train=bad.jsonl")
    assert found.code == 2 and said in found.text
    found = prefopt("check", "run.yaml", "data.train=bad.jsonl")
    assert found.code == 1 and said in found.text and "1 of 7 records are not good" in found.text


def test_bad_records_are_skipped_on_demand(place):
    (place / "bad.jsonl").write_text((place / "pairs.jsonl").read_text() + "{\n")
    skip = ["run.yaml", "data.train=bad.jsonl", "data.on_bad=skip"]
    assert "1 of 7 records will be skipped" in prefopt("check", *skip).text
    found = prefopt("train", *skip, "--quiet")
    assert found.code == 0 and "warning: skipped: 6 of 7 records are good" in found.text


def test_conversations_without_a_chat_template(place):
    chat = [{"prompt": [{"role": "user", "content": "?"}], "chosen": [{"role": "assistant", "content": "good"}],
             "rejected": [{"role": "assistant", "content": "bad"}]}] * 2
    lines(place / "chat.jsonl", chat)
    for command, code in (("train", 2), ("check", 1)):
        found = prefopt(command, "run.yaml", "data.train=chat.jsonl")
        assert found.code == code and "chat.jsonl:1" in found.text and "no chat template" in found.text


def test_traceback_on_demand(place):
    result = CliRunner().invoke(cli.app, ["--traceback", "train", "run.yaml", "recipe=dpoo"])
    assert isinstance(result.exception, ValueError)


def test_a_bug_is_not_dressed_up(place, monkeypatch):
    """Errors that no user can mend keep their traceback."""
    from prefopt import train

    def broken(run, **options):
        return {}["logp"]

    monkeypatch.setattr(train, "train", broken)
    result = CliRunner().invoke(cli.app, ["train", "run.yaml"])
    assert isinstance(result.exception, KeyError)


# --------------------------------------------------------------------------------------------------------------- check
def test_check_finds_nothing_wrong(place):
    found = prefopt("check", "run.yaml")
    assert found.code == 0
    for said in ("6 groups are good", "dpo learns from each of the first 6 groups", "Qwen2 with", "weights",
                 "2 steps of 3 groups", "results go to out", "0 errors"):
        assert said in found.text, said
    assert not (place / "out").exists() and not (place / "cache").exists()


def test_check_names_recipes_that_fit(place):
    found = prefopt("check", "run.yaml", "data.train=feedback.jsonl")
    assert found.code == 1
    fits = found.text.split("Recipes that fit: ")[1]
    assert "kto" in fits and "bco" in fits and "dpo" not in fits.split("ok")[0].replace(",", "").split()
    assert "feedback.jsonl:1: 1 response, and pairs need two" in found.text


@pytest.fixture
def raw(place, model):
    return yaml.safe_load((place / "run.yaml").read_text())


@pytest.mark.parametrize("changes, examine, level, said", [
    ({"recipe": "kto", "data": {"train": "feedback.jsonl"}}, check.fit, "ok", "kto learns from each"),
    ({"recipe": "smpo"}, check.fit, "error", "reward_chosen and reward_rejected"),
    ({"recipe": "aot", "data": {"train": "lists.jsonl"}}, check.fit, "error", "exactly two labelled responses"),
    ({"recipe": "bco", "data": {"train": "praise.jsonl"}}, check.fit, "warning", "all responses count as desirable"),
    ({"data": {"train": "ties.jsonl"}}, check.fit, "warning", "1 of the first 7 groups teach dpo nothing"),
    ({"recipe": "rdpo"}, check.recipe, "warning", "no lower bound"),
    ({"log": ["trackio"]}, check.packages, "error", "pip install trackio"),
    ({"policy": {"name": "m", "quantize": 4}}, check.packages, "error", "prefopt[quantize]"),
    ({"policy": {"name": "m", "quantize": 4}}, check.device, "error", "needs a CUDA device"),
    ({"policy": {"name": "nowhere/at/all"}}, check.tokens_of, "error", "there is no folder 'nowhere/at/all'"),
])
def test_check_of_one_thing(raw, place, changes, examine, level, said, monkeypatch):
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    lines(place / "lists.jsonl", [{"prompt": "?", "completions": ["a", "b", "c"], "scores": [1, 3, 2]}])
    lines(place / "praise.jsonl", [{"prompt": "?", "completion": "good", "label": True}] * 2)
    lines(place / "ties.jsonl", [{"prompt": "? " * n, "completions": ["a", "b"], "scores": [1, min(n, 2)]}
                                 for n in range(1, 8)])
    found = list(attempt("topic", examine, make({**raw, **changes})))
    assert any(f.level == level and said in f.text for f in found), found


@pytest.mark.parametrize("changes, topic, level, said", [
    ({"data": {"train": "pairs.jsonl", "max_length": 4}}, "encoding", "warning", "max_length=4"),
    ({"train": {"tokens": 4}}, "memory", "error", "raise train.tokens to at least"),
    ({"train": {"groups_per_step": 100}}, "steps", "warning", "there are 6 groups"),
    ({"data": {"train": "pairs.jsonl", "eval": "pairs.jsonl"}}, "data.eval", "warning", "6 of 6 held-out prompts"),
    ({"expect": {"acuracy": "> 0"}}, "metrics", "error", "not measured by this run, did you mean 'accuracy'"),
    ({"policy": "nowhere/at/all"}, "policy", "error", "there is no folder")])
def test_check_of_a_whole_run(raw, changes, topic, level, said):
    found = list(check.check(make({**raw, **changes})))
    assert any((f.level, f.topic) == (level, topic) and said in f.text for f in found), found


def test_expected_metrics_that_are_measured(raw):
    raw |= {"data": {"train": "pairs.jsonl", "eval": "held_out.jsonl"}, "train": {"eval_every": 1},
            "expect": {"eval/ranking/gap": "> 0", "accuracy": "> 0", "eval/accuracy/length_controlled": "> 0"}}
    assert not [f for f in check.check(make(raw)) if f.topic == "metrics"]


def test_check_reads_no_more_than_asked(raw, place):
    text = [f.text for f in check.check(make(raw), records=2) if f.topic in ("data.train", "steps")]
    assert text[0] == "pairs.jsonl: the first 2 groups are good" and text[1].startswith("at least 1 step of 3 groups")


def test_check_of_a_model_folder_without_weights(raw, place, model):
    half = place / "half"
    half.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (half / name).write_bytes((Path(model) / name).read_bytes())
    found = {f.topic: f for f in check.check(make({**raw, "policy": str(half)}))}
    assert found["policy"].level == "error" and "*.safetensors" in found["policy"].text


def test_check_of_a_tokenizer_of_another_model(raw, place, model):
    from transformers import PreTrainedTokenizerFast
    other = PreTrainedTokenizerFast.from_pretrained(model)
    other.add_tokens([f"new{i}" for i in range(5)])
    other.save_pretrained(place / "other")
    found = [f for f in check.check(make({**raw, "tokenizer": "other"})) if f.topic == "policy"]
    assert found[0].level == "warning" and "10 tokens and the model 5" in found[0].text


def test_a_check_that_breaks_does_not_stop_the_others():
    def broken():
        yield "first"
        raise IndexError("7")

    assert list(attempt("topic", broken)) == ["first", ("error", "topic", "IndexError: 7")]


# ---------------------------------------------------------------------------------------------------------------- eval
def test_eval_of_a_run_repeats_its_last_evaluation(place):
    assert prefopt("train", "run.yaml", "data.eval=held_out.jsonl", "train.eval_every=2", "--quiet").code == 0
    last = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()][-1]
    found = prefopt("eval", "out", "--json", "numbers.json")
    assert found.code == 0 and "ranking/idealised_median" in found.text
    numbers = json.loads((place / "numbers.json").read_text())
    assert {f"eval/{k}": v for k, v in numbers.items()} == pytest.approx({k: v for k, v in last.items() if k != "step"},
                                                                        rel=1e-5, abs=1e-6)
    assert prefopt("eval", "out/model", "--data", "held_out.jsonl", "--json", "again.json").code == 0
    assert json.loads((place / "again.json").read_text()) == numbers


def test_eval_at_the_reference_is_log_2(place, model):
    found = prefopt("eval", model, "--data", "pairs.jsonl", "--reference", model, "--json", "n.json", "set.beta=0.5")
    numbers = json.loads((place / "n.json").read_text())
    assert found.code == 0
    assert numbers["loss"] == pytest.approx(0.6931471805599453, rel=1e-6) and numbers["accuracy"] == pytest.approx(0.5)
    assert numbers["kl/ref"] == pytest.approx(0, abs=1e-6)


def test_eval_of_learned_parts(place):
    """The token mask of the run is put back: the evaluation of training is repeated."""
    train = ["recipe=sparsepo", "data.eval=held_out.jsonl", "train.eval_every=2", "train.modules={lr: 0.5}"]
    assert prefopt("train", "run.yaml", *train, "--quiet").code == 0
    last = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()][-1]
    assert prefopt("eval", "out", "--json", "n.json").code == 0
    assert json.loads((place / "n.json").read_text())["loss"] == pytest.approx(last["eval/loss"], rel=1e-5)


def test_eval_of_adapters_takes_their_base_as_reference(place, model):
    assert prefopt("train", "run.yaml", f"policy={{name: '{model}', lora: {{r: 2}}}}", "--quiet").code == 0
    (place / "out" / "model").rename(place / "adapter")
    found = prefopt("eval", "adapter", "--data", "pairs.jsonl", "--json", "n.json")
    assert found.code == 0, found.text
    numbers = json.loads((place / "n.json").read_text())
    assert numbers["shift/chosen"] != 0 and numbers["loss"] != pytest.approx(0.6931471805599453, rel=1e-6)


@pytest.mark.parametrize("arguments, said", [
    (["--data", "pairs.jsonl"], "--reference MODEL"), ([], "--data"),
    (["--data", "pairs.jsonl", "--recipe", "simpoo"], "did you mean 'simpo'"),
    (["--data", "pears.jsonl", "--recipe", "simpo"], "did you mean 'pairs.jsonl'")])
def test_mistakes_of_eval(place, model, arguments, said):
    found = prefopt("eval", model, *arguments)
    assert found.code == 2 and said in found.text


def test_eval_of_a_folder_that_is_not_there(place):
    found = prefopt("eval", "out/model", "--data", "pairs.jsonl")
    assert found.code == 2


# --------------------------------------------------------------------------------------------------------- look around
def test_list():
    found = prefopt("list")
    assert found.code == 0
    rows = {line.split()[0]: line.split()[1:] for line in found.raw.splitlines() if line and not line.startswith(" ")}
    assert rows["dpo"][:2] == ["log_ratio", "logistic"] and rows["hinge"] == ["hinge"]
    assert "tr_dpo" in rows and "Moving" in found.raw and "best_nll" in found.raw


def test_list_as_markdown_is_the_table_of_the_readme():
    from prefopt.explain import markdown_table
    result = CliRunner().invoke(cli.app, ["list", "--markdown"])
    assert result.output == markdown_table() + "\n"


def test_list_of_parts():
    found = prefopt("list", "--slot", "ranking")
    assert "list_mle Plackett-Luce" in found.text and found.code == 0
    assert "kto Kahneman-Tversky" in prefopt("list", "--slot", "recipe").text
    assert prefopt("list", "--slot", "rankin").text.startswith("error: no slot 'rankin', did you mean 'ranking'")


def test_explain():
    found = prefopt("explain", "dpo", "set.beta=0.5", "labels={unflip: {flip: 0.3}}")
    assert found.code == 0
    for said in ("log_ratio(beta=0.5)", "unflip(flip=0.3)", "logp_ref reference", "arXiv:2305.18290"):
        assert said in found.text, said
    assert "max(0, delta - m)" in prefopt("explain", "hinge").text


def test_explain_of_nothing():
    found = prefopt("explain", "dpoo")
    assert found.code == 2 and "did you mean 'dpo'" in found.text


def test_doctor(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "wandb" else object())
    found = prefopt("doctor")
    assert found.code == 0
    for said in ("torch", "pip install wandb", "loss 0.6931 at the start, as it should be", "0 errors"):
        assert said in found.text, said


def test_doctor_reports_what_does_not_work(monkeypatch):
    from prefopt import train

    def broken(run, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(train, "train", broken)
    found = prefopt("doctor")
    assert found.code == 1 and "RuntimeError: no such kernel" in found.text and "1 error," in found.text


# ---------------------------------------------------------------------------------------------------------------- data
def test_validate(place):
    (place / "bad.jsonl").write_text('{"prompt": "?", "chosen": "good"\n')
    (place / "odd.jsonl").write_text('{"colour": "red"}\n')
    assert prefopt("data", "validate", "pairs.jsonl", "feedback.jsonl").code == 0
    found = prefopt("data", "validate", "bad.jsonl", "odd.jsonl", "none.jsonl", "pairs.jsonl")
    assert found.code == 1
    for said in ("bad.jsonl:1: malformed json", "odd.jsonl:1: cannot tell the format", "none.jsonl does not exist",
                 "pairs.jsonl: 6 of 6 records are good"):
        assert said in found.text, said
    assert prefopt("data", "validate", "feedback.jsonl", "--pairs").code == 1


def test_convert(place):
    found = prefopt("data", "convert", "pairs.jsonl", "singles.jsonl", "--to", "unpaired", "--split", "singles")
    assert (found.code, found.text) == (0, "12 records written to singles.jsonl")
    made = [json.loads(line) for line in (place / "singles.jsonl").read_text().splitlines()]
    assert len(made) == 12 and made[:2] == [{"prompt": "? ", "completion": "good", "label": True},
                                            {"prompt": "? ", "completion": "bad bad", "label": False}]
    lists = [{"prompt": "?", "completions": ["a", "b", "c"], "scores": [1, 3, 2]},
             {"prompt": "??", "completions": ["a", "b"], "scores": [1, 1]}]
    lines(place / "lists.jsonl", lists)
    for split, count, first in (("all_pairs", 3, ("b", "a")), ("best_worst", 1, ("b", "a"))):
        found = prefopt("data", "convert", "lists.jsonl", "p.jsonl", "--to", "pair", "--split", split)
        assert found.code == 0 and "warning: 1 groups gave no record" in found.text and "lists.jsonl:2" in found.text
        made = [json.loads(line) for line in (place / "p.jsonl").read_text().splitlines()]
        assert len(made) == count and (made[0]["chosen"], made[0]["rejected"]) == first
    assert prefopt("data", "convert", "pairs.jsonl", "all.parquet").code == 0
    assert prefopt("data", "convert", "all.parquet", "back.jsonl", "--to", "pair").code == 0
    assert (place / "back.jsonl").read_text() == (place / "pairs.jsonl").read_text()


@pytest.mark.parametrize("arguments, said", [
    (["pairs.jsonl", "o.jsonl", "--to", "pears"], "unknown format 'pears', did you mean 'pair'"),
    (["pairs.jsonl", "o.jsonl", "--to", "unpaired"], "--split"),
    (["pairs.jsonl", "o.jsonl", "--split", "best_worse"], "did you mean 'best_worst'"),
    (["pairs.jsonl", "o.txt"], "cannot write this file ending"),
    (["pairs.jsonl", "pairs.jsonl"], "both read and written"),
    (["pairs.jsonl", "o.jsonl", "--column", "chosen"], "not of the form KEY=COLUMN"),
    (["pairs.jsonl", "o.jsonl", "--column", "chosen=better"], "better")])
def test_mistakes_of_convert(place, arguments, said):
    found = prefopt("data", "convert", *arguments)
    assert found.code == 2 and said in found.text and not (place / "o.jsonl").exists()


def test_convert_skips_on_demand(place):
    (place / "bad.jsonl").write_text((place / "pairs.jsonl").read_text() + "{\n")
    assert prefopt("data", "convert", "bad.jsonl", "good.jsonl").code == 2
    found = prefopt("data", "convert", "bad.jsonl", "good.jsonl", "--skip")
    assert found.code == 0 and "6 records written" in found.text and "warning: skipped" in found.text


def test_columns_are_renamed(place):
    lines(place / "named.jsonl", [{"prompt": "?", "better": "good", "worse": "bad"}])
    named = ["--column", "chosen=better", "--column", "rejected=worse"]
    found = prefopt("data", "convert", "named.jsonl", "o.jsonl", "--to", "pair", *named)
    assert found.code == 0 and json.loads((place / "o.jsonl").read_text())["chosen"] == "good"


def test_describe(place, model):
    found = prefopt("data", "describe", "pairs.jsonl", "--tokenizer", model)
    assert found.code == 0 and "response tokens" in found.text and "longer is preferred 0" in found.text
    numbers = json.loads(prefopt("data", "describe", "pairs.jsonl", "--json").raw)
    assert numbers["size"]["groups"] == 6 and numbers["pairs"]["earlier is preferred"] == 1.0
