"""Rounds of sampling, scoring, selecting and training: each stage, killed anywhere, against runs put together by hand."""
from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from loop_cases import Killer, plan, processes, quiet, together, workplace
from safetensors.torch import load_file

from data_tools.records import Group, Response
from prefopt.config import make
from prefopt.iterate import everything, iterate, labelled, policy, rule, softened, training
from prefopt.train import train

GAME = {"game": {"payoff": "rps", "style": "test_self_play:style"}}
BASE = {"rollout": {"k": 4, "rewards": [GAME], "max_new_tokens": 4, "batch": 7}, "train.steps": 2, "train.save_every": 1,
        "train.eval_every": None, "data.eval": None, "iterate": {"rounds": 2}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("iterate"), train=8)


def go(place, recipe, out, *, resume=False, **settings):
    return iterate(plan(place, recipe, out, **{**BASE, **settings}), resume=resume, show=False)


def records(path):
    return [Group.from_json(json.loads(line)) for line in path.open()]


def weights(folder):
    return load_file(folder / "model.safetensors")


def whole(out: Path) -> dict[str, bytes]:
    """Everything that a run leaves, but for times and for the checkpoints on the way."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()
            and p.name != "timing.jsonl" and "checkpoints" not in p.parts and not p.name.startswith(".")}


# ------------------------------------------------------------------------------------------------------------- selection
def scored(*rewards, wins=None):
    rows = [Response(f"r{i}", scores={} if r is None else {"reward": r}) for i, r in enumerate(rewards)]
    return Group("p", rows, relevance=list(rewards), wins=wins, meta={"key": 3})


def texts(groups):
    return ["".join(r.text for r in g.responses) for g in groups]


def test_rules_are_those_of_the_data_tools():
    group = scored(0.2, 0.9, 0.5, 0.2)
    assert texts(everything(group)) == ["r0r1r2r3"] and everything(scored(1.0)) == []
    for name, expected in (("best_worst", ["r1r0"]), ({"all_pairs": {"margin": 0.4}}, ["r1r0", "r1r3", "r1r2"])):
        assert texts(rule(name)(group)) == expected and all(g.relevance == [1.0, 0.0] for g in rule(name)(group))


def test_opponents_and_what_has_no_reward_are_left_aside():
    """Of five rows one is an opponent and one unscored: the wins of the other three stay."""
    group = scored(0.1, None, 0.4, 0.8, 0.3, wins=[[10 * i + j for j in range(5)] for i in range(5)])
    group.responses[4].train = False
    hard, soft = labelled(group, soft=False), labelled(group, soft=True)
    assert hard.wins is None and hard.relevance == [0.1, 0.4, 0.8] and texts([hard]) == ["r0r2r3"]
    assert soft.wins == [[0, 2, 3], [20, 22, 23], [30, 32, 33]]
    pair = softened(rule("best_worst")(soft)[0], soft)
    assert texts([pair]) == ["r3r0"] and pair.wins == [[33, 30], [3, 0]] and pair.relevance is None


def test_rules_by_name():
    assert rule({"best_worst": {"margin": 0.3}}).keywords == {"margin": 0.3}
    assert rule("prefopt.iterate:everything").func is everything
    for wrong, said in (("best_wrost", "did you mean 'best_worst'"), ({"all_pairs": {"margins": 1}}, "did you mean 'margin'")):
        with pytest.raises(ValueError, match=said):
            rule(wrong)


# ---------------------------------------------------------------------------------------------------------------- rounds
def test_one_round_is_a_run_on_the_sampled_data(place):
    """Offline DPO on data.jsonl, put together by hand, has the same weights; the next round samples from them."""
    result = go(place, "dpo", "rounds")
    out = place / "rounds"
    assert result.steps == 2 and (out / "model/config.json").exists() and all(math.isfinite(v) for v in result.metrics.values())
    pairs = records(out / "iterations/1/data.jsonl")
    said = records(out / "rollouts/step-00000001.jsonl")
    assert len(said) == 8 and 0 < len(pairs) <= 8 and all(g.relevance == [1.0, 0.0] and g.wins is None for g in pairs)
    by_prompt = {g.prompt: [r.scores["reward"] for r in g.responses] for g in said}
    assert all([r.scores["reward"] for r in g.responses] == [max(by_prompt[g.prompt]), min(by_prompt[g.prompt])] for g in pairs)
    alone = plan(place, "dpo", "alone", **{"train.steps": 2, "train.eval_every": None, "data.eval": None,
                                           "data.train": str(out / "iterations/1/data.jsonl")})
    train(alone, show=False)
    solved = out / "iterations/1/run/model/model.safetensors"
    assert (place / "alone/model/model.safetensors").read_bytes() == solved.read_bytes()
    second = records(out / "rollouts/step-00000002.jsonl")
    assert {g.meta["sampler"]["version"] for g in second} == {2} and {g.meta["key"] for g in second} == set(range(8, 16))
    assert (out / "model/model.safetensors").read_bytes() == (out / "iterations/2/run/model/model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2] and lines[1]["selected"] == len(records(out / "iterations/2/data.jsonl"))


@pytest.mark.parametrize("recipe, reference, cached", [("dpo", None, False), ("inpo", "first", True), ("sppo", None, False)])
def test_references_and_anchors_of_a_recipe(place, recipe, reference, cached):
    """Round 2 starts from round 1's policy; INPO keeps the first policy beside it, and the sampled one as logp_old."""
    run = plan(place, recipe, "settings", **BASE)
    first, second = training(run, 1), training(run, 2)
    assert first.policy.name == run.policy.name and first.reference is None
    assert second.policy.name == str(place / "settings/iterations/1/run/model") == policy(run, 2).name
    assert (second.reference and second.reference.name) == (reference and run.policy.name)
    assert second.data.cache_start == cached and second.rollout is None and second.iterate is None


def test_inpo_anchors_are_the_two_policies(place, monkeypatch):
    """The batch of round 2 has log-probabilities of round 1's policy as logp_old, and of the first as logp_ref."""
    from prefopt import train as loop
    from prefopt.forward import token_logp
    from prefopt.models import Trunk, load_policy
    seen, of = [], loop.Gradients.of

    def taken(self, part, step, logs):
        seen.append((self.run.out, part))
        return of(self, part, step, logs)
    monkeypatch.setattr(loop.Gradients, "of", taken)
    go(place, "inpo", "inpo")
    out, batch = [(o, part) for o, part in seen if "iterations/2" in o][-1]
    for column, name in (("logp_old", place / "inpo/iterations/1/run/model"), ("logp_ref", place / "model")):
        with torch.no_grad():
            expected = token_logp(Trunk(load_policy(str(name)).eval()), batch)
        torch.testing.assert_close(batch[column], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(batch["logp_old"], batch["logp_ref"], atol=1e-3)


@pytest.mark.parametrize("recipe", ["dno", "gpo", "gpo_offline", "online_ipo", "egpo", "kto", "simpo", "lipo"])
def test_recipes_iterate(place, recipe):
    result = go(place, recipe, f"run-{recipe}", iterate={"rounds": 1, **({"select": "everything"} if recipe == "lipo" else {})})
    assert all(math.isfinite(v) for v in result.metrics.values()) and result.metrics["grad_norm"] > 0
    chosen = records(place / f"run-{recipe}/iterations/1/data.jsonl")
    assert all((g.wins is not None) == (recipe in ("gpo_offline", "online_ipo")) for g in chosen)
    assert all(r.train for g in chosen for r in g.responses)


def test_momentum_goes_on_from_the_solution(place):
    """pi_2 = hat_1 + a (hat_1 - pi_1), pi_3 = hat_2 + a (hat_2 - hat_1), by parameter; round 2 samples from pi_2."""
    go(place, "dpo", "momentum", iterate={"rounds": 2, "momentum": 0.5})
    out, start = place / "momentum", weights(place / "model")
    hats = [weights(out / f"iterations/{t}/run/model") for t in (1, 2)]
    for t, (hat, before) in enumerate(((hats[0], start), (hats[1], hats[0])), 1):
        made = weights(out / f"iterations/{t}/model")
        for name, value in made.items():
            torch.testing.assert_close(value, hat[name] + 0.5 * (hat[name] - before[name]), rtol=1e-6, atol=1e-7)
    assert policy(plan(place, "dpo", "momentum", **{**BASE, "iterate": {"momentum": 0.5}}), 2).name.endswith("iterations/1/model")
    assert (out / "model/model.safetensors").read_bytes() == (out / "iterations/2/model/model.safetensors").read_bytes()
    assert not torch.equal(hats[0]["lm_head.weight"], start["lm_head.weight"])


@pytest.mark.parametrize("reference", ["previous", "first"])
def test_adapters_go_on(place, reference):
    """Round 1 starts adapters, round 2 goes on with them; the first policy is the one without."""
    result = go(place, "dpo", f"lora-{reference}", **{"policy.lora": {"r": 2}}, iterate={"rounds": 2, "reference": reference})
    out = place / f"lora-{reference}"
    assert (out / "model/adapter_config.json").exists() and result.metrics["grad_norm"] > 0
    loss = json.loads((out / "iterations/2/run/metrics.jsonl").open().readline())["loss"]
    assert (abs(loss - math.log(2)) < 1e-6) == (reference == "previous")    # the policy starts as its reference, or not


def test_held_out_prompts_and_accumulated_data(place):
    result = go(place, "dpo", "held", **{"data.eval": str(place / "eval.jsonl")},
                iterate={"rounds": 2, "prompts": 5, "accumulate": True, "select": "all_pairs"})
    assert 0 <= result.metrics["eval/reward"] <= 1
    out = place / "held"
    assert len(records(out / "rollouts/step-00000002.jsonl")) == 5
    assert make(json.loads(json.dumps(training(plan(place, "dpo", "held", **BASE), 2).model_dump()))).data.train == \
        [str(out / "iterations/2/data.jsonl")]
    ran = (out / "iterations/2/run/run.yaml").read_text()
    assert "iterations/1/data.jsonl" in ran and "iterations/2/data.jsonl" in ran
    from prefopt.report import page
    from prefopt.report.samples import Sizes
    assert page.write([out], out / "report.html", Sizes(steps=2, groups=2)).exists()


# ------------------------------------------------------------------------------------------------------------ interruptions
def killed(run, at, tell):
    """Go on in this process and die before the file change `at`; else tell how many there were."""
    quiet()
    killer = Killer(Path(run.out), at)
    sys.addaudithook(killer)
    iterate(run, resume=True, show=False)
    tell.send(killer.count)


KILLS = ["iterations/1/sampled", "iterations/1/scored", "rollouts/.step-00000001", "iterations/1/.data",
         "iterations/1/run/metrics",
         "iterations/1/run/checkpoints/.step-00000002", "iterations/1/run/.model", "iterations/1/.model",
         "iterations/1/.held_out", "iterations/2/sampled", "momentum-killed/.metrics", "momentum-killed/.model"]


@pytest.mark.slow
def test_killed_at_every_stage(place):
    """kill -9 before a file of every stage, one after the other: the same bytes as without."""
    settings = {**BASE, "data.eval": str(place / "eval.jsonl"), "iterate": {"rounds": 2, "momentum": 0.5}}
    iterate(plan(place, "dpo", "momentum-whole", **settings), show=False)
    run, context, died = plan(place, "dpo", "momentum-killed", **settings), processes(), []
    for at in [*KILLS, None]:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=killed, args=(run, at, there))
        process.start()
        process.join(120)
        died.append(process.exitcode)
    assert died == [-9] * len(KILLS) + [0]
    one, other = (whole(place / f"momentum-{which}") for which in ("whole", "killed"))
    differ = [name for name in one if one[name].replace(b"momentum-whole", b"momentum-killed") != other.get(name)]
    assert one.keys() == other.keys() and not differ, differ


def test_a_finished_stage_is_not_done_again(place, monkeypatch):
    from prefopt import online
    go(place, "dpo", "again")
    before = whole(place / "again")
    monkeypatch.setattr(online, "sampled", None)
    monkeypatch.setattr("prefopt.iterate.train", None)
    go(place, "dpo", "again", resume=True)
    assert whole(place / "again") == before
    with pytest.raises(ValueError, match="holds a run already: go on with it"):
        go(place, "dpo", "again")
    with pytest.raises(ValueError, match="set.beta is .* there and 0.7 here"):
        go(place, "dpo", "again", resume=True, **{"set.beta": 0.7})


def both(rank, place):
    go(Path(place), "dpo", "two")


@pytest.mark.slow
def test_two_processes_are_one(place):
    """The first process samples and scores, both train: the same data, and weights to rounding."""
    together(2, both, str(place))
    go(place, "dpo", "one")
    assert (place / "one/iterations/1/data.jsonl").read_bytes() == (place / "two/iterations/1/data.jsonl").read_bytes()
    one, two = (weights(place / f"{which}/iterations/1/run/model") for which in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("recipe, changes, message", [
    ("dpo", {"rollout": None}, "give a block rollout"), ("grpo", {}, "samples in training: take dpo"),
    ("bradley_terry", {}, "trains a reward model"), ("tr_dpo", {}, "moves it as well"), ("apo_accel", {}, "iterate.momentum"),
    ("dpo", {"iterate": {"select": "best_wrost"}}, "there is no rule 'best_wrost', did you mean 'best_worst'"),
    ("dpo", {"iterate": {"momentum": 0.3}, "policy.lora": {"r": 2}}, "factors of what they add"),
    ("dpo", {"iterate": {"round": 2}}, "did you mean 'rounds'"), ("dpo", {"update": "look_ahead"}, "this run samples none")])
def test_settings_that_cannot_work(place, recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(place, recipe, "never", **{**BASE, **changes})


def test_nothing_is_selected(place):
    with pytest.raises(ValueError, match="round 1: nothing is selected from 8 groups"):
        go(place, "dpo", "none", iterate={"select": {"best_worst": {"margin": 2.0}}})


def test_training_alone_is_refused(place):
    with pytest.raises(ValueError, match="call prefopt.iterate.iterate"):
        train(plan(place, "dpo", "never", **BASE), show=False)
