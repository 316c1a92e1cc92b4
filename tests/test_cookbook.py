"""The cookbook runs: files load, commands in its pages exist, small versions meet their expectations."""
import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_tokenizers import fast
from tiny_models import Float64, tiny

from data_tools.batch import Batch
from data_tools.collate import collate
from data_tools.records import Group, Response
from prefopt import config, data_cli, recipes
from prefopt.forward import fill, forward
from prefopt.models import Head, Models

ROOT = Path(__file__).parents[1]
COOKBOOK = ROOT / "cookbook"
OTHERS = ("compute_environment", "\nstages:")                  # of accelerate; pipelines of data
RUN_FILES = sorted(path for path in COOKBOOK.rglob("*.yaml") if not any(word in path.read_text() for word in OTHERS))
PIPELINES = sorted(path for path in COOKBOOK.rglob("*.yaml") if OTHERS[1] in path.read_text())
SCRIPTS = sorted(path for path in COOKBOOK.glob("*/*.py") if "--toy" in path.read_text())
PAGES = sorted([ROOT / "README.md", *COOKBOOK.rglob("*.md")])


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def script(name: str, monkeypatch):
    """A script of the cookbook as a module, with its folder on the path as when it is run."""
    path = COOKBOOK / name
    monkeypatch.syspath_prepend(str(path.parent))
    for other in path.parent.glob("*.py"):
        sys.modules.pop(other.stem, None)
    return importlib.import_module(path.stem)


# -------------------------------------------------------------------------------------------------------- files and pages
@pytest.mark.parametrize("path", RUN_FILES, ids=shown)
def test_run_files_load(path):
    run = config.load(path)
    assert run.objective().reads()


@pytest.mark.parametrize("path", PIPELINES, ids=shown)
def test_pipelines_load(path):
    assert data_cli.pipeline(path, []).stages


def commands(page: Path) -> list[str]:
    """Lines of code in a page that run something of this project."""
    code = "\n".join(re.findall(r"```(?:bash|sh|console)?\n(.*?)```", page.read_text(), re.S))
    code += "\n" + "\n".join(re.findall(r"`([^`\n]+)`", page.read_text()))
    pieces = [piece.strip() for line in code.splitlines() for piece in re.split(r"&&|\|", line.split(" #")[0])]
    return [p for p in pieces if re.match(r"(python|prefopt) ", p)]


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_commands_of_a_page_exist(page):
    """Scripts and run files that a page names are there, scripts know their options, run files take the overrides."""
    for command in commands(page):
        words = command.split()
        files = [w for w in words if re.fullmatch(r"cookbook/\S+\.(py|yaml)", w)]
        files += [m.replace(".", "/") + ".py" for m in re.findall(r"-m (cookbook\.\S+)", command)]
        for name in files:
            assert (ROOT / name).exists(), f"{command!r} in {shown(page)}"
            if name.endswith(".py"):
                known = "".join(p.read_text() for p in [*(ROOT / name).parent.glob("*.py"), *COOKBOOK.glob("*.py")])
                for option in re.findall(r"(?<= )--[a-z-]+", command):
                    assert f'"{option}"' in known, f"{option} of {command!r} in {shown(page)}"
            elif words[:2] == ["prefopt", "train"]:
                config.load(ROOT / name, [w for w in words if re.fullmatch(r"[a-z_.]+=\S+", w)])


def test_the_pages_of_studies_have_commands():
    """The search above finds something in every page of a folder with scripts."""
    for page in COOKBOOK.glob("*/README.md"):
        if any(page.parent.glob("*.py")):
            assert any("cookbook" in command for command in commands(page)), shown(page)


# --------------------------------------------------------------------------------------------------------------- toy runs
@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=shown)
def test_toy_scripts_meet_their_expectations(path, tmp_path):
    """Exit code 0: every claim that the script checks at toy size holds."""
    done = subprocess.run([sys.executable, str(path), "--toy", "--out", str(tmp_path)], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list(tmp_path.glob("*.json"))


# ------------------------------------------------------------------------------------------------------------- quickstart
def test_the_careless_writer(monkeypatch):
    """Right with probability ((1/2 + 1/2 0.35) 0.8)^2 but for totals that leave 0..2 largest or cancel; and 0.3 boast.

    Of two events up to 6 that stay in range, both verbs gain in g, one loses in m, both lose in l of the problems: right
    in 0.64 (g + 0.35 m + 0.35^2 l), and in a few more where two mistakes cancel.
    """
    task = script("quickstart/task.py", monkeypatch)
    rng, n = random.Random(0), 4000
    asked = [task.problem(rng, task.Table()) for _ in range(n)]
    assert all(0 <= total <= 12 for one in asked for total in one.totals)
    answers = [task.careless(one, rng) for one in asked]
    right = [task.right(text, True, 2, one.totals[-1]) for one, text in zip(asked, answers, strict=True)]
    losses = [sum(verb in task.LOSSES for verb, _ in one.events) for one in asked]
    expected = sum(0.64 * 0.35 ** k for k in losses) / n
    assert abs(sum(right) / n - expected) < 0.03
    assert abs(sum(text.endswith("sure !") for text in answers) / n - 0.3) < 0.03
    assert all(task.right(task.careless(one, rng, misread=0, slip=0), True, 2, one.totals[-1]) for one in asked[:200])


def test_the_verifier_is_strict(monkeypatch):
    task = script("quickstart/task.py", monkeypatch)
    asked = task.Problem("Ida", "coins", 5, (("loses", 3), ("buys", 1)))
    assert asked.prompt == "Ida has 5 coins . Ida loses 3 . Ida buys 1 . How many coins are left ?"
    assert asked.totals == [5, 2, 3] and asked.record() == {"prompt": asked.prompt, "events": 2, "total": 3}

    def right(text, finished=True):
        marked, = task.mark([asked], [Group(asked.prompt, [Response(text, meta={"finished": finished})])])
        return marked.relevance == [1.0]

    assert right("5 - 3 = 2 ; 2 + 1 = 3 ; answer 3") and right("5 - 3 = 2 ; 2 + 1 = 3 ; answer 3 sure !")
    for wrong in ("5 + 3 = 8 ; 8 + 1 = 9 ; answer 9", "5 - 3 = 2 ; 2 + 1 = 3 ; answer 4", "answer 3", "",
                  "5 - 3 = 2 ; 2 + 1 = 3 ; answer 3 answer 3", "5 - 3 = 2 ; 2 + 1 = 3 ; answer 3 = 3",
                  "5 - 3 = 2 ; 2 + 1 = 3 ; answer 3 sure", "5 - 3 = 2 ; answer 3",
                  "5 - 3 = 2 ; 2 + 1 = 3 ; 3 + 0 = 3 ; answer 3"):
        assert not right(wrong)
    assert not right("5 - 3 = 2 ; 2 + 1 = 3 ; answer 3", finished=False)


def test_problems_differ_and_every_word_is_known(monkeypatch):
    task = script("quickstart/task.py", monkeypatch)
    words, asked = task.tokenizer(), task.problems(300, task.Table(), 0)
    assert len(set(asked)) == 300 and asked == task.problems(300, task.Table(), 0) != task.problems(300, task.Table(), 1)
    for one in asked:
        text = f"{one.prompt} {task.careless(one, random.Random(0))}"
        ids = words(text)["input_ids"]
        assert words.unk_token_id not in ids and len(ids) == len(text.split()) and words.decode(ids) == text
    assert {len(words(one.prompt)["input_ids"]) for one in asked} == {19}


def test_warm_up_trains_answers_and_their_end(monkeypatch):
    """Labels are the ids of the answer and <eos>; prompts and padding are not learnt."""
    warmup, task = script("quickstart/warmup.py", monkeypatch), sys.modules["task"]
    words, asked = task.tokenizer(), task.problems(8, task.Table(), 0)
    batch = warmup.demonstrations(words, asked, random.Random(0))
    rng = random.Random(0)
    for one, ids, labels in zip(asked, batch["input_ids"], batch["labels"], strict=True):
        answer = words(f"{task.careless(one, rng)} <eos>")["input_ids"]
        assert labels[labels != -100].tolist() == answer
        assert ids.tolist()[:19 + len(answer)] == words(one.prompt)["input_ids"] + answer
        assert labels[:19].tolist() == [-100] * 19


def test_preferences_pair_right_with_wrong(monkeypatch):
    """The rule and the verifier of pairs.yaml: three right and two wrong answers give two pairs, all right ones none."""
    task = script("quickstart/task.py", monkeypatch)
    plan = data_cli.pipeline(COOKBOOK / "quickstart" / "pairs.yaml", [])
    one = task.Problem("Ida", "coins", 5, (("loses", 3), ("buys", 1)))
    good, bad = "5 - 3 = 2 ; 2 + 1 = 3 ; answer 3", "5 + 3 = 8 ; 8 + 1 = 9 ; answer 9"
    texts, facts = [[good, bad, good, bad, good], [good] * 5], {k: v for k, v in one.record().items() if k != "prompt"}
    sampled = [Group(one.prompt, [Response(t, tokens=[n], meta={"finished": True}) for n, t in enumerate(row)], meta=dict(facts))
               for row in texts]
    generate, score, select, _ = plan.stages
    assert generate.settings["policies"]["warmup"]["n"] == 8
    with score.made() as scored, select.made() as selected:
        pairs = [pair for group in scored(sampled) for pair in selected(group)]
    assert [[r.tokens for r in pair.responses] for pair in pairs] == [[[0], [1]], [[2], [3]]]
    assert all(pair.relevance == [1.0, 0.0] and pair.prompt == one.prompt for pair in pairs)


def test_the_rule_of_the_smaller_answer(tmp_path, monkeypatch):
    """Of four pairs two have the smaller answer chosen, one the larger, one none at all."""
    run = script("quickstart/run.py", monkeypatch)
    pairs = [("answer 3", "answer 12 sure !"), ("answer 0", "answer 1"), ("answer 9", "answer 8"), ("answer 3", "3 =")]
    lines = [{"prompt": "?", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run.smaller_is_right(tmp_path / "pairs.jsonl") == run.Rate(2, 4)


def test_the_verifier_is_the_reward_of_the_run_files(monkeypatch):
    """What grpo.yaml names finds its fields in a line of the prompt file."""
    from rewards.online import Scorer
    task = script("quickstart/task.py", monkeypatch)
    one = task.Problem("Ida", "coins", 5, (("loses", 3), ("buys", 1)))
    facts, texts = one.record(), ("5 - 3 = 2 ; 2 + 1 = 3 ; answer 3", "5 + 3 = 8 ; 8 + 1 = 9 ; answer 9")
    group = Group(facts.pop("prompt"), [Response(text, meta={"finished": True}) for text in texts], meta=facts)
    Scorer(config.load(COOKBOOK / "quickstart/grpo.yaml").rollout.rewards)([group])
    assert [r.scores for r in group.responses] == [{"right": 1.0, "reward": 1.0}, {"right": 0.0, "reward": 0.0}]


def test_the_true_reward_beside_the_proxy_has_no_weight(monkeypatch):
    """Only the reward model trains; the two files differ in the KL and the folder alone."""
    task = script("quickstart/task.py", monkeypatch)
    from rewards.online import named_rewards
    free, held = (config.load(COOKBOOK / f"quickstart/grpo_proxy{kl}.yaml") for kl in ("", "_kl"))
    assert free.rollout == held.rollout and free.train == held.train and (free.set, held.set) == ({}, {"beta": 1.0})
    model, truth = free.rollout.rewards
    assert list(model.values()) == [{"as": "proxy"}]
    (function, weight), = named_rewards([truth]).values()
    assert weight == 0 and function.__qualname__ == task.right.__qualname__ and list(named_rewards([truth])) == ["truth"]


@pytest.mark.parametrize("toy", [False, True])
def test_run_files_of_the_quickstart_go_where_they_are_told(toy, tmp_path, monkeypatch):
    """Nothing in them points to the default folder any more; every recipe of recipes.py loads as itself."""
    recipes_of = script("quickstart/recipes.py", monkeypatch)
    run = sys.modules["run"]
    size = run.TOY if toy else run.Size()
    assert set(size.settings) <= {path.stem for path in (COOKBOOK / "quickstart").glob("*.yaml")}
    run.copied("pairs", tmp_path)
    plan = data_cli.pipeline(tmp_path / "pairs.yaml", [])
    assert "runs/quickstart" not in repr(plan) and plan.out == tmp_path / "data"
    for path in set((COOKBOOK / "quickstart").glob("*.yaml")) - set(PIPELINES):
        found = run.run_file(path.stem, tmp_path, 3, size)
        assert "runs/quickstart" not in repr(found) and found.train.seed == 3 and found.out == str(tmp_path / path.stem)
        assert config.load(tmp_path / path.name).recipe == found.recipe
    for name, settings in recipes_of.RECIPES.items():
        found = run.run_file("grpo", tmp_path, 0, size, *settings)
        assert found.recipe == name and found.rollout.rewards == ["cookbook.quickstart.task:right"]


def test_promises_of_the_quickstart_can_break(tmp_path, monkeypatch):
    run = script("quickstart/run.py", monkeypatch)
    size = run.Size()

    def broken(proxy, truth, **right):
        (tmp_path / "grpo_proxy").mkdir(exist_ok=True)
        lines = [{"step": n, "reward/proxy": p, "reward/truth": t} for n, (p, t) in enumerate(zip(proxy, truth, strict=True), 1)]
        (tmp_path / "grpo_proxy/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        shares = {"warmup": 300, "dpo": 450, "grpo": 900, "grpo_proxy": 100, "grpo_proxy_kl": 350, **right}
        return run.broken_promises({k: {"sampled": run.Rate(v, 1000)} for k, v in shares.items()}, tmp_path, size)

    assert broken((-1, 1), (0.3, 0.1)) == []
    assert broken((-1, 1), (0.3, 0.1), dpo=449) == ["DPO adds at least 0.15, found +0.149"]
    assert broken((-1, 1), (0.3, 0.1), grpo=899) == ["GRPO reaches at least 0.9, found 0.899"]
    assert broken((1, -1), (0.3, 0.1)) == ["without KL the proxy rises, found 1.00 to -1.00"]
    assert broken((-1, 1), (0.3, 0.1), grpo_proxy=301)[0].startswith("without KL the truth falls, found 0.30 to 0.10")
    assert broken((-1, 1), (0.1, 0.3))[0].startswith("without KL the truth falls, found 0.10 to 0.30")
    assert broken((-1, 1), (0.3, 0.1), grpo_proxy_kl=99) == ["with KL more of the truth is left, found 0.099"]


# ------------------------------------------------------------------------------------------------------------- gsm8k_grpo
def gsm8k(path: Path, count: int) -> Path:
    lines = [{"question": f"Ada has {n} nuts and finds {n}. How many?",
              "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_gsm8k_prompts(tmp_path):
    """The reference decides between right and wrong answers, boxed or not; three of ten demonstrations are boxed."""
    from cookbook.gsm8k_grpo import prepare, toy
    from rewards.verifiable import final_answer, has_boxed
    records = list(prepare.prompts(str(gsm8k(tmp_path / "rows.jsonl", 400))))
    asked, = records[7]["prompt"]
    assert asked == {"role": "user", "content": f"Ada has 7 nuts and finds 7. How many?\n{prepare.INSTRUCTION}"}
    assert final_answer("It is \\boxed{14}.", records[7]["reference"]) == final_answer("so 14", records[7]["reference"]) == 1
    assert final_answer("It is \\boxed{15}.", records[7]["reference"]) == 0
    said = [(one.responses[0].text, record["reference"]) for one, record in zip(toy.answers(records), records, strict=True)]
    assert all(final_answer(*pair) == 1 for pair in said)
    assert abs(sum(has_boxed(text) for text, _ in said) / 400 - 0.3) < 0.07            # 3 standard deviations
    assert toy.short(str(tmp_path / "rows.jsonl"), letters=1) == []


def test_the_toy_of_gsm8k_takes_the_path_of_the_real_run():
    real, small = (config.load(COOKBOOK / f"gsm8k_grpo/{name}.yaml") for name in ("run", "toy"))
    assert (real.recipe, real.rollout.rewards, real.rollout.k) == (small.recipe, small.rollout.rewards, small.rollout.k)
    assert real.train.save_every and small.train.save_every and real.expect and small.expect


@pytest.mark.slow
def test_the_toy_of_gsm8k_meets_its_expectations(tmp_path, capsys):
    from cookbook.gsm8k_grpo import toy
    folder = ROOT.parent / "shared" / "data" / "gsm8k"
    if not folder.is_dir():
        pytest.skip("no GSM8K beside the project")
    result = toy.run(tmp_path, {name: str(folder / f"{name}.jsonl.gz") for name in ("train", "test")})
    assert result.failed == () and result.metrics["eval/reward/has_boxed"] >= 0.8


# ---------------------------------------------------------------------------------------------------------------- hh_rlhf
def transcripts(path: Path, count: int) -> Path:
    lines = [{"chosen": f"\n\nHuman: say {n} please\n\nAssistant: {n} it is, as you asked.",
              "rejected": f"\n\nHuman: say {n} please\n\nAssistant: no."} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.filterwarnings("ignore:.*kept with")
def test_a_model_from_pairs_and_a_recipe_on_it(tmp_path, monkeypatch):
    """The path of the page at the smallest size: tokenizer and model from transcripts, then local.yaml on them."""
    make_model = script("hh_rlhf/make_model.py", monkeypatch)
    from prefopt.models import load_tokenizer
    from prefopt.train import train
    pairs = transcripts(tmp_path / "pairs.jsonl", 20)
    first = make_model.make([str(pairs)], tmp_path / "model", vocabulary=280, width=48, layers=1, steps=1)
    loss = make_model.make([str(pairs)], tmp_path / "model", vocabulary=280, width=48, layers=1, steps=12)
    assert loss < first - 0.1
    words = load_tokenizer(str(tmp_path / "model"))
    asked = [{"role": "user", "content": "a"}]
    assert words.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == "\n\nHuman: a\n\nAssistant:"
    answered = [*asked, {"role": "assistant", "content": "b"}]
    assert words.apply_chat_template(answered, tokenize=False) == "\n\nHuman: a\n\nAssistant: b<eos>"
    run = config.load(COOKBOOK / "hh_rlhf/local.yaml", [
        f"policy={tmp_path / 'model'}", f"data.train={pairs}", f"data.eval={pairs}", f"data.cache={tmp_path / 'cache'}",
        f"out={tmp_path / 'run'}", "train.groups_per_step=10", "train.epochs=2"])
    metrics = train(run, show=False).metrics
    assert metrics["eval/length/chosen_longer"] == 1.0 and metrics["eval/loss"] < 0.69


def test_comparison_table(monkeypatch):
    """Wilson's interval by its formula; baselines come first and are those of the recipes that measure them."""
    compare = script("hh_rlhf/compare.py", monkeypatch)
    k, n, z = 210, 350, 1.959963984540054
    centre, half = (k / n + z * z / 2 / n), z * (k / n * (1 - k / n) / n + z * z / 4 / n / n) ** 0.5
    assert compare.interval(0.6, 350) == pytest.approx([(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)])
    longer, before = compare.BASELINES.values()
    found = compare.accuracies({"simpo": {"eval/accuracy": 0.5, longer: 0.56, "pairs": 100},
                                "dpo": {"eval/accuracy": 0.6, longer: 0.56, before: 0.4, "pairs": 100}})
    assert {name: row["accuracy"] for name, row in found.items()} == {
        "longer is better": 0.56, "the model before training": 0.4, "simpo": 0.5, "dpo": 0.6}
    with pytest.raises(ValueError, match="different numbers of pairs"):
        compare.accuracies({"dpo": {"eval/accuracy": 0.5, "pairs": 1}, "ipo": {"eval/accuracy": 0.5, "pairs": 2}})


# --------------------------------------------------------------------------------------------------------------- one file
PAIRS = [{"prompt": "The quick brown fox", "chosen": " jumps over the lazy dog.", "rejected": " is"},
         {"prompt": "Question: what is 2 + 2?", "chosen": "\nAnswer: It is 4, of course.", "rejected": " It is not 5."},
         {"prompt": "def f(x):", "chosen": "\n    return x", "rejected": " tool system user naïve café"}]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("tokens", [None, 60])
def test_one_file_is_the_library(bos, tokens, monkeypatch):
    """Loss and every gradient on one batch, the policy away from its reference, whole and in micro-batches."""
    one_file, words, beta = script("one_file/dpo.py", monkeypatch), fast("bytes", bos=bos), 0.3
    policy, reference = (tiny("llama", seed=seed, vocab_size=len(words)) for seed in (0, 1))
    batch = collate([Group(p["prompt"], [Response(p["chosen"]), Response(p["rejected"])], [1.0, 0.0]) for p in PAIRS], words)
    tokens_here, mask = one_file.collate(PAIRS, words)
    assert torch.equal(mask, batch["mask"]) and torch.equal(tokens_here * batch["attend"], batch["tokens"] * batch["attend"])
    with Float64():
        loss, accuracy = one_file.dpo_loss(policy, reference, tokens_here, mask, beta)
        loss.backward()
        expected = {name: p.grad.clone() for name, p in policy.named_parameters()}
        policy.zero_grad()
        objective, models = recipes.dpo(beta=beta), Models(policy, reference)
        step = objective.annotate(fill(models, batch, objective.reads()))
        found = [objective.loss(forward(models, micro, objective.reads())) for micro in step.microbatches(tokens)]
        assert len(found) == (1 if tokens is None else 2)
        sum(part.value for part in found).backward()
    assert abs((sum(part.value for part in found) - loss).item()) < 1e-10
    assert sum(part.metrics["accuracy"] for part in found).item() == pytest.approx(accuracy.item(), abs=1e-6)
    assert len(expected) > 15
    for name, p in policy.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-10, atol=1e-10), name
        assert bool(expected[name].abs().max() > 1e-6), name


def test_one_file_learns(monkeypatch, capsys):
    """At the start the loss is log 2; in a few steps every toy pair is ranked right."""
    one_file = script("one_file/dpo.py", monkeypatch)
    policy, words = one_file.tiny()
    one_file.train(policy, words, one_file.TOY, lr=1e-3, epochs=4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "loss 0.6931" in lines[0]
    assert "accuracy 1.00" in lines[-1] and float(lines[-1].split()[3]) < 0.6
    assert len((COOKBOOK / "one_file/dpo.py").read_text().splitlines()) <= 200


@pytest.mark.parametrize("tokens", [None, 60])
def test_one_file_reward_model_is_the_library(tokens, monkeypatch):
    """Loss and every gradient on one batch, whole and in micro-batches."""
    one_file, words = script("one_file/reward_model.py", monkeypatch), fast("bytes", bos=False)
    model = tiny("llama", vocab_size=len(words), head=Head("AutoModelForSequenceClassification", "SEQ_CLS", 1))
    batch = collate([Group(p["prompt"], [Response(p["chosen"]), Response(p["rejected"])], [1.0, 0.0]) for p in PAIRS], words)
    here, last = one_file.collate(PAIRS, words)
    assert torch.equal(here * batch["attend"], batch["tokens"] * batch["attend"])
    assert torch.equal(last, batch["attend"].sum(1) - 1)
    with Float64():
        loss, accuracy = one_file.bradley_terry_loss(model, here, last)
        loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        objective, models = recipes.bradley_terry(), Models(model)
        step = objective.annotate(batch)
        found = [objective.loss(forward(models, micro, objective.reads())) for micro in step.microbatches(tokens)]
        sum(part.value for part in found).backward()
    assert abs((sum(part.value for part in found) - loss).item()) < 1e-10
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-10, atol=1e-10), name


@pytest.mark.parametrize("tokens", [None, 40])
def test_one_file_grpo_is_the_library(tokens, monkeypatch):
    """Its own rollout of ragged prompts, scored at random: loss and every gradient, off policy too."""
    one_file = script("one_file/grpo.py", monkeypatch)
    _, words = one_file.tiny()
    policy = tiny("llama", vocab_size=len(words), eos_token_id=0, bos_token_id=None)
    torch.manual_seed(0)
    found, _ = one_file.rollout(policy, words, [{"prompt": "Is 1", "answer": "ok"}, {"prompt": "Is 22 a", "answer": "ok"}], 3, 6)
    old = 0.3 * torch.randn(found["tokens"].shape, dtype=torch.float64)
    reward = torch.tensor([1.0, 0.0, 0.5, 0.2, 0.2, 0.9], dtype=torch.float64)
    with Float64():
        logp = one_file.token_logp(policy, found["tokens"], found["attend"])
        loss = one_file.grpo_loss(logp, logp.detach() + old, found["mask"], one_file.advantages(reward, found["group"]))
        loss.backward()
        expected = {name: p.grad.clone() for name, p in policy.named_parameters()}
        policy.zero_grad()
        objective, models = recipes.grpo(), Models(policy)
        batch = Batch({"tokens": found["tokens"], "attend": found["attend"], "mask": found["mask"], "group": found["group"],
                       "prompt_length": (found["attend"] * ~found["mask"]).sum(1), "reward": reward,
                       "logp_old": logp.detach() + old})
        step = objective.annotate(batch)
        parts = [objective.loss(forward(models, micro, objective.reads())) for micro in step.microbatches(tokens, False)]
        assert (len(parts) > 1) == (tokens is not None)
        sum(part.value for part in parts).backward()
    assert abs((sum(part.value for part in parts) - loss).item()) < 1e-10
    for name, p in policy.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-10, atol=1e-10), name


def test_one_files_learn(monkeypatch, capsys):
    """The reward model ranks the toy pairs; GRPO's mean reward rises."""
    one_file = script("one_file/reward_model.py", monkeypatch)
    model, words = one_file.tiny()
    one_file.train(model, words, one_file.TOY, lr=1e-3, epochs=6)
    assert "accuracy 1.00" in capsys.readouterr().out.splitlines()[-1]
    one_file = script("one_file/grpo.py", monkeypatch)
    policy, words = one_file.tiny()
    assert one_file.train(policy, words, one_file.TOY, k=16, steps=30, lr=5e-3) > 0.15
    first = float(capsys.readouterr().out.splitlines()[0].split()[3])
    assert first < 0.1
    for name in ("grpo", "reward_model"):
        assert len((COOKBOOK / f"one_file/{name}.py").read_text().splitlines()) <= 200
