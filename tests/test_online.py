"""On-policy runs end to end on a tiny model: sources, rewards that misbehave, rollouts recorded and run again, bad input."""
from __future__ import annotations

import json
import math
import threading
import time
import warnings
from contextlib import closing

import loop_cases
import numpy as np
import pytest
import torch
from loop_cases import ROLLOUT, go, lines, outcome, plan, workplace, write

from data_tools.records import Group, Response
from prefopt import check, check_rollout, online
from prefopt.rollout.orders import by_field, shuffled
from prefopt.rollout.sources import Filter, Mix, OnPolicy, Recorded, Replay, measured, scored
from rewards.base import ScoringError
from rewards.online import Scorer, named_rewards


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("online"))


def sampled(groups, keys, version):
    """Two responses to each prompt, which say its key."""
    return [Group(g.prompt, [Response(f"{key} {j}", tokens=[key, j]) for j in range(2)], meta=g.meta)
            for g, key in zip(groups, keys, strict=True)]


def paid(groups):
    for group in groups:
        for j, response in enumerate(group.responses):
            response.scores["reward"] = float(j * (group.meta["key"] % 2))       # odd keys have contrast
    return groups


def prompts(n):
    return [Group(f"p{i}", [], meta={"level": float(-i)}) for i in range(n)]


# ------------------------------------------------------------------------------------------------------------- sources
def test_prompts_come_in_epochs_each_once():
    source = OnPolicy(prompts(5), sampled, paid, seed=3)
    seen = [g.prompt for _ in range(5) for g in source.draw(3)]
    assert len(seen) == 15 and all(sorted(seen[e:e + 5]) == [f"p{i}" for i in range(5)] for e in (0, 5, 10))
    assert seen[:5] != seen[5:10]                             # every epoch has an order of its own
    keys = [g.meta["key"] for g in source.draw(2)]
    assert keys == [15, 16]                                   # a prompt drawn again is another place in the stream


def test_position_is_all_there_is_to_save():
    first, again = (OnPolicy(prompts(7), sampled, paid, seed=1) for _ in range(2))
    first.draw(4), first.feed([])
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [g.prompt for g in first.draw(5)] == [g.prompt for g in again.draw(5)] and again.version == 1


def test_curriculum_by_a_field():
    order = by_field(field="level")
    assert [order(prompts(6), 0, 0)[i] for i in range(6)] == [5, 4, 3, 2, 1, 0]
    assert by_field(field="level", descending=True)(prompts(6), 0, 0).tolist() == list(range(6))
    assert order(prompts(6), 1, 0).tolist() == shuffled(prompts(6), 1, 0).tolist()
    with pytest.raises(ValueError, match="has no number 'depth'.*level"):
        by_field(field="depth")(prompts(2), 0, 0)


def contrast(groups):
    return [len({r.scores["reward"] for r in g.responses}) > 1 for g in groups]


# ----------------------------------------------------------------------------------------- scored while others are sampled
class Desk:
    """A sampler and a scorer that both wait, for as long as a test may last, until the other has begun."""

    def __init__(self, portions: int, fails: int | None = None):
        self.begun, self.told = [threading.Event() for _ in range(portions)], []
        self.scoring, self.fails = [threading.Event() for _ in range(portions)], fails

    def sample(self, n):
        self.begun[n].set()
        assert n == 0 or self.scoring[n - 1].wait(60)         # portions before it are being scored
        self.told.append(("sampled", n))
        return [Group(f"p{n}", [Response("a")])]

    def score(self, groups):
        n = int(groups[0].prompt[1:])
        self.told.append(("scores", n, threading.current_thread() is threading.main_thread()))
        self.scoring[n].set()
        assert n + 1 == len(self.begun) or self.begun[n + 1].wait(60)                   # and they, while it is sampled
        if n == self.fails:
            raise ScoringError(f"portion {n}")
        self.told.append(("scored", n))
        return groups


def test_a_portion_is_scored_while_the_next_is_sampled():
    """Neither can end before the other has begun, so that the time of both is that of the longer; one is scored at a time, in
    order, and the last one in this thread."""
    desk, before = Desk(4), threading.active_count()
    assert [g.prompt for g in scored(range(4), desk.sample, desk.score)] == ["p0", "p1", "p2", "p3"]
    assert [t for t in desk.told if t[0] == "sampled"] == [("sampled", n) for n in range(4)]
    assert [t for t in desk.told if t[0] != "sampled"] == [t for n in range(4) for t in (("scores", n, n == 3), ("scored", n))]
    assert threading.active_count() <= before
    alone = Desk(1)
    assert len(scored([0], alone.sample, alone.score)) == 1 and alone.told[1] == ("scores", 0, True)
    assert scored([], None, None) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_sampler_that_is_stopped_leaves_no_thread(error):
    """What is being scored comes to its end; what waits is not begun."""
    told, going, before = [], threading.Event(), threading.active_count()

    def sample(n):
        if n == 3:
            assert going.wait(60)
            threading.Timer(0.2, told.append, ("stopped",)).start()
            raise error
        return [n]

    def score(groups):
        going.set()
        while "stopped" not in told:
            time.sleep(0.01)
        told.append(groups[0])
        return groups

    with pytest.raises(error):
        scored(range(5), sample, score)
    assert told == ["stopped", 0] and threading.active_count() <= before


def test_a_scorer_that_fails_ends_the_step():
    desk, before = Desk(3, fails=0), threading.active_count()
    with pytest.raises(ScoringError, match="portion 0"):
        scored(range(3), desk.sample, desk.score)
    assert ("scores", 2, True) not in desk.told and threading.active_count() <= before


def test_portions_come_back_in_the_order_of_the_prompts():
    """Sampled and scored as the sampler likes them, with the keys of their places."""
    whole = OnPolicy(prompts(7), sampled, paid, seed=3)
    apart = OnPolicy(prompts(7), sampled, paid, seed=3, portions=lambda groups: [[4, 1], [3], [0, 2]])
    for _ in range(3):
        assert [g.to_json() for g in apart.draw(5)] == [g.to_json() for g in whole.draw(5)]
    with pytest.raises(ValueError, match="the sampler returned 0 groups with responses for 2 prompts"):
        OnPolicy(prompts(7), lambda *_: [], paid, portions=lambda groups: [[0, 1], [2]]).draw(3)


def test_filter_draws_until_enough_is_kept():
    source = OnPolicy(prompts(50), sampled, paid)
    filtered = Filter(source, contrast, rounds=10)
    found = filtered.draw(4)
    assert all(contrast(found)) and len(found) == 4
    # halves are kept: 4 -> 2 kept, 2 -> 1, 1 -> 0 or 1, ...
    assert 7 <= source.position <= 9
    assert [g.meta["key"] for g in source.latest] == list(range(source.position))             # what was sampled, kept or not


def test_filter_ends_after_its_rounds_and_fills_up():
    source = OnPolicy(prompts(5), sampled, paid)
    none = Filter(source, lambda groups: [False] * len(groups), rounds=3)
    assert len(none.draw(2)) == 2 and source.position == 6    # dropped groups, which weigh nothing


def test_replay_mixes_in_what_was_trained_on():
    source = Replay(OnPolicy(prompts(50), sampled, paid), size=6, share=0.5)
    for step in range(4):
        found = source.draw(4)
        old = [g for g in found if g.meta.get("replayed")]
        assert len(old) == (0 if step == 0 else 2) and len(found) == 4
        assert all(g.meta["key"] in {b.meta["key"] for b in source.buffer} for g in old)
        source.feed(found)
    assert len(source.buffer) == 6 and not any(g.meta.get("replayed") for g in source.buffer)
    again = Replay(OnPolicy(prompts(50), sampled, paid), size=6, share=0.5)
    again.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert [g.to_json() for g in again.draw(4)] == [g.to_json() for g in source.draw(4)]


def test_mix_takes_a_share_of_given_groups():
    given = [Group("given", [Response("a", scores={"reward": 1.0})])]
    found = Mix(OnPolicy(prompts(9), sampled, paid), given, share=0.25).draw(4)
    assert [g.prompt == "given" for g in found] == [False, False, False, True]


def test_measured_by_hand():
    """Two prompts: rewards (1, 0) and (1, unknown); 3, 1, 2 and 2 tokens, the last cut."""
    rows = [[(1.0, 3, True), (0.0, 1, True)], [(1.0, 2, True), (None, 2, False)]]
    groups = [Group("p", [Response("", tokens=[0] * n, scores={} if r is None else {"reward": r, "part": 2 * r},
                                   meta={"finished": done}) for r, n, done in row]) for row in rows]
    found = measured(groups)
    assert found["reward"] == pytest.approx(2 / 3) and found["reward/part"] == pytest.approx(4 / 3)
    assert found["reward/std"] == pytest.approx(math.sqrt(2 / 9))
    assert (found["length"], found["truncated"], found["unscored"]) == (2.0, 0.25, 0.25)
    assert found["groups/contrast"] == 1.0 and found["pass@2"] == 1.0 and found["pass@1"] == pytest.approx(2 / 3)


# ------------------------------------------------------------------------------------------------------------- rewards
def half(text):
    return 0.5


def nothing(text):
    return None


def broken(text):
    if "bad" in text:
        raise RuntimeError("no such luck")
    return 1.0


def hang(text):
    if "bad" in text:
        time.sleep(60)
    return 1.0


def mixed():
    return [Group("p", [Response("good"), Response("bad")], meta={"place": "here"})]


def test_rewards_are_weighted_and_kept():
    group, = Scorer([{"test_online:half": {"weight": 3.0, "as": "flat"}}, "loop_cases:ones"])(
        [Group("p", [Response("w1 w9")])])
    assert group.responses[0].scores == {"flat": 0.5, "ones": pytest.approx(1.1), "reward": pytest.approx(2.6)}


@pytest.mark.parametrize("reward", ["nothing", "broken"])
def test_a_reward_without_a_number_stops_or_marks(reward):
    with pytest.raises(ScoringError, match="here"):
        Scorer(f"test_online:{reward}")(mixed())
    group, = Scorer(f"test_online:{reward}", unscored="mark")(mixed())
    bad = group.responses[1]
    assert "reward" not in bad.scores and bad.meta["unscored"]
    assert measured([group])["unscored"] == (0.5 if reward == "broken" else 1.0)


def test_a_reward_that_hangs_is_stopped_and_leaves_no_thread():
    before = threading.active_count()
    started = time.monotonic()
    with closing(Scorer("test_online:hang", unscored="mark", timeout=1.0)) as score:
        group, = score(mixed())
    assert time.monotonic() - started < 45
    assert group.responses[0].scores["reward"] == 1.0 and "reward" not in group.responses[1].scores
    assert threading.active_count() <= before


def test_names_of_rewards():
    with pytest.raises(ValueError, match="twice"):
        named_rewards(["test_online:half", "test_online:half"])
    with pytest.raises(ValueError, match="weight of bleu must be a number"):
        named_rewards([{"bleu": {"weight": "high"}}])
    with pytest.raises(ValueError, match="cannot be called reward"):
        named_rewards([{"bleu": {"as": "reward"}}])
    with pytest.raises(ValueError, match="final_answer"):
        named_rewards(["final_anser"])


@pytest.mark.parametrize("reward", ["nothing", "broken_often"])
def test_unscored_rows_train_nothing(place, reward):
    """All or some responses without a reward: the run goes on, and what is unscored is counted."""
    settings = {"rollout": {**ROLLOUT, "rewards": [f"test_online:{reward}"], "unscored": "mark"}, "train.steps": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        go(place, "grpo", reward, **settings)
    first = lines(place / reward)[0]
    assert first["unscored"] == 1.0 if reward == "nothing" else 0 < first["unscored"] < 1
    if reward == "nothing":
        assert first["grad_norm"] == 0 if "grad_norm" in first else "loss" not in first


def broken_often(text):
    return None if len(text) % 2 else float(len(text))


# ------------------------------------------------------------------------------------------------------- whole runs
def test_same_seed_same_weights_whatever_the_batches(place):
    """The sampler's batches and the trainer's micro-batches change nothing but rounding; the same settings change nothing."""
    for name, changes in {"a": {}, "b": {}, "c": {"rollout": {**ROLLOUT, "batch": 3}, "train.tokens": 12}}.items():
        go(place, "grpo", f"same-{name}", **{"rollout": ROLLOUT, "policy.dtype": "float64", **changes})
    a, b, c = (outcome(place / f"same-{n}") for n in "abc")
    assert a == b
    from safetensors.torch import load
    one, other = (load(found["model/model.safetensors"]) for found in (a, c))
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-6, atol=1e-7)           # norms are float32 in any model


@pytest.mark.parametrize("recipe, changes", [("grpo", {}), ("dapo", {"set.limit": 5}), ("remax", {})])
def test_rewards_beside_the_sampler_change_nothing(place, monkeypatch, recipe, changes):
    """Two prompts at a time, scored while others are sampled, in training and where it is evaluated: the same run byte for byte
    as with rewards that come after all sampling. Of several programs, only samples of one turn are divided."""
    calls, score = {True: [], False: []}, Scorer.__call__

    def counting(told):
        def counted(self, groups):
            told.append((len(groups), threading.current_thread() is threading.main_thread()))
            return score(self, groups)
        return counted

    for beside in (True, False):
        monkeypatch.setattr(Scorer, "apart", beside)
        monkeypatch.setattr(Scorer, "__call__", counting(calls[beside]))
        go(place, recipe, f"beside-{recipe}-{beside}", rollout={**ROLLOUT, "batch": 7}, **changes)
    assert outcome(place / f"beside-{recipe}-True") == outcome(place / f"beside-{recipe}-False")
    assert all(here for _, here in calls[False]) and (6, True) in calls[False]
    assert (2, False) in calls[True] if recipe != "remax" else calls[True] == calls[False]


def test_recorded_rollouts_train_the_same_model_without_a_sampler(place, monkeypatch):
    go(place, "grpo", "live", rollout=ROLLOUT)
    monkeypatch.setattr("prefopt.rollout.transformers.Sampler.__call__", None)
    go(place, "grpo", "again", rollout={"recorded": str(place / "live/rollouts"), "k": 3, "max_new_tokens": 5, "eval_k": 1},
       **{"data.eval": None, "train.eval_every": None})
    weights = [(place / name / "model/model.safetensors").read_bytes() for name in ("live", "again")]
    assert weights[0] == weights[1]
    with pytest.raises(ValueError, match="no rollouts of step 7"):
        source = Recorded(place / "live/rollouts")
        source.step = 6
        source.draw(6)


def test_rollouts_hold_what_training_made_of_them(place):
    go(place, "ppo", "traced", **{
        "rollout": {**ROLLOUT, "samples_per_update": 9}, "train.steps": 1})
    groups = [Group.from_json(json.loads(line)) for line in (place / "traced/rollouts/step-00000001.jsonl").open()]
    assert len(groups) == 6 and all(len(g.responses) == 3 for g in groups)
    for r in (r for g in groups for r in g.responses):
        assert {len(v) for v in r.meta["trace"].values()} == {len(r.tokens)} == {len(r.logp)}
        assert set(r.meta["trace"]) == {"advantage", "logp_ref", "log_ratio"}
        assert max(abs(x) for x in r.meta["trace"]["log_ratio"]) < 1e-4         # the sampler is the policy


@pytest.mark.parametrize("recipe, changes", [
    ("remax", {}), ("dapo", {"set.limit": 5}), ("clip_cov", {"rollout.samples_per_update": 9}), ("gspo", {"train.steps": 2}),
    ("kl_cov", {"rollout.samples_per_update": 6}), ("fdpg", {}), ("copg", {}), ("ipo", {}), ("lipo", {}), ("best_of_n", {}),
    ("reinforce", {"rollout.k": 1}), ("grpo", {"set.accept": "accept_finished"}), ("grpo", {"policy.lora": {"r": 2}}),
    ("grpo", {"rollout.top_p": 0.9, "set.correction": "exact"}), ("grpo", {"update": "extragradient"}),
    ("grpo", {"set.penalties": [{"entropy_bonus": {"weight": 0.01}}]}), ("grpo", {"rollout.temperature": 0.7}),
    ("grpo", {"set.annotations": {"coefficient": {"AdaptiveEntropy": {"target": 3.0}}},
              "set.penalties": [{"controlled_entropy": {}}]})])
def test_recipes_run(place, recipe, changes):
    """Each of these goes through the loop in a way of its own; the policy moves, and nothing is NaN."""
    roll = {k.removeprefix("rollout."): v for k, v in changes.items() if k.startswith("rollout.")}
    rest = {k: v for k, v in changes.items() if not k.startswith("rollout.")}
    out = f"run-{recipe}-{abs(hash(str(changes)))}"
    result = go(place, recipe, out, rollout={**ROLLOUT, **roll}, **{"train.steps": 2, "train.eval_every": None, "data.eval": None,
                                                                  **rest})
    assert result.steps == 2 and all(math.isfinite(v) for v in result.metrics.values())
    assert result.metrics["grad_norm"] > 0
    if "temperature" in roll:
        assert result.metrics["gap/rollout"] < 1e-5           # both sides divide the logits


TURNS = {"conversation": {"step": "test_online:ask_again", "turns": 2}}


def ask_again(messages):
    """A user who asks once more, then is silent."""
    return [{"role": "user", "content": "w7 w8"}] if len(messages) < 3 else None


def test_several_turns(place, tmp_path):
    """What the user says in between is in the response and trains nothing; the trainer agrees with the sampler on the rest."""
    write(tmp_path / "talks.jsonl", [{"prompt": [{"role": "user", "content": f"w{i} w{i + 1} "}]} for i in range(6)])
    result = go(place, "grpo", "talks", rollout={**ROLLOUT, "stop": ["w1"], "program": TURNS},
                **{"data.train": str(tmp_path / "talks.jsonl"), "train.steps": 1, "train.eval_every": None, "data.eval": None,
                   "train.tokens": 200})
    assert result.metrics["gap/rollout"] < 1e-5
    groups = [Group.from_json(json.loads(line)) for line in (place / "talks/rollouts/step-00000001.jsonl").open()]
    responses = [r for g in groups for r in g.responses]
    several = [r for r in responses if 0 in r.meta.get("mask", [])]
    assert several and all(len(r.text) > 1 for r in several)
    for r in several:
        assert all(logp == 0 for logp, trains in zip(r.logp, r.meta["mask"], strict=True) if not trains)


def test_weighted_top_p_samples_are_within_the_policy(place):
    """Truncated sampling renormalises, so that pi / pi_rollout is at most 1, and its mean is the mass that was kept."""
    result = go(place, "grpo", "top", rollout={**ROLLOUT, "top_p": 0.5}, **{"set.correction": "exact", "train.steps": 1})
    assert result.metrics["gap/rollout"] > 0.01


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("recipe, changes, message", [
    ("grpo", {}, "give a block rollout"),
    ("grpo", {"rollout": {**ROLLOUT, "sampler": "vlm"}}, "no sampler 'vlm', did you mean 'vllm'"),
    ("grpo", {"rollout": {**ROLLOUT, "order": "shufled"}}, "did you mean 'shuffled'"),
    ("grpo", {"rollout": {**ROLLOUT, "k": 1}}, "set rollout.k to at least 2, found 1"),
    ("grpo", {"rollout": {**ROLLOUT, "samples_per_update": 4}}, "multiple of rollout.k"),
    ("grpo", {"rollout": {**ROLLOUT, "samples_per_update": 180}}, "at most train.groups_per_step"),
    ("grpo", {"rollout": {**ROLLOUT, "top_p": 0.9}}, "set.correction: exact"),
    ("dapo", {"rollout": ROLLOUT}, "set set.limit=5"),
    ("dr_grpo", {"rollout": ROLLOUT}, "set set.length=5"),
    ("kto", {"rollout": ROLLOUT}, "needs other rows"),
    ("dpo", {"rollout": ROLLOUT, "data.cache_reference": True}, "no cache can hold"),
    ("grpo", {"rollout": {**ROLLOUT, "max_tokens": 4}}, "did you mean 'max_new_tokens'"),
    ("grpo", {"rollout": ROLLOUT, "set.advantage": "z_score"}, "did you mean 'zscore'"),
    ("grpo", {"rollout": ROLLOUT, "set.margin": "difference"}, "no argument or slot 'margin'"),
])
def test_settings_that_cannot_work(place, recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(place, recipe, "never", **changes)


def test_prompts_that_cannot_work(place, tmp_path):
    write(tmp_path / "none.jsonl", [])
    write(tmp_path / "empty.jsonl", [{"prompt": "w1"}, {"prompt": ""}])
    write(tmp_path / "long.jsonl", [{"prompt": "w1 " * 100}])
    for name, message in (("none", "no prompt|no records|empty"), ("empty", "empty"), ("long", "raise train.tokens")):
        with pytest.raises(ValueError, match=message):
            go(place, "grpo", "never", rollout=ROLLOUT, **{"data.train": str(tmp_path / f"{name}.jsonl")})


def test_rewards_that_nobody_named(place):
    with pytest.raises(ValueError, match="rollout.rewards: missing"):
        go(place, "grpo", "never", rollout={"k": 3, "max_new_tokens": 5})
    result = go(place, "grpo", "own", rollout={"k": 3, "max_new_tokens": 5}, score=paid_by_length, **{"train.steps": 1})
    assert result.metrics["reward"] > 0                       # a function in the place of names


def paid_by_length(groups):
    for response in (r for g in groups for r in g.responses):
        response.scores["reward"] = float(len(response.tokens))
    return groups


def test_broken_prompts_are_skipped_only_if_so_told(place, tmp_path):
    write(tmp_path / "some.jsonl", [{"prompt": f"w{i}"} for i in range(6)])
    (tmp_path / "some.jsonl").open("a").write('{"prompt": "w7\n{"prompt": ""}\n')
    settings = {"data.train": str(tmp_path / "some.jsonl"), "train.steps": 1, "data.eval": None, "train.eval_every": None}
    with pytest.raises(ValueError, match="some.jsonl:7"):
        go(place, "grpo", "never", rollout=ROLLOUT, **settings)
    with pytest.warns(UserWarning, match="6 of 8 records are good"):
        result = go(place, "grpo", "skipped", rollout=ROLLOUT, **settings, **{"data.on_bad": "skip"})
    assert result.steps == 1


def test_a_sampler_that_returns_too_few_is_an_error(place, monkeypatch):
    from prefopt.rollout import programs
    monkeypatch.setattr(programs, "single", lambda sampler, prompts, *, n, **settings: [
        Group(p, [Response("w1", tokens=[9], logp=[-1.0])]) for p in prompts])
    with pytest.raises(ValueError, match="returned 1 responses to a prompt where 3 were asked for"):
        go(place, "grpo", "few", rollout=ROLLOUT)


def test_a_sampler_of_other_weights_is_found_at_the_first_step(place, monkeypatch):
    from prefopt.rollout import programs
    plain = programs.single

    def off(sampler, prompts, *, n, **settings):
        groups = plain(sampler, prompts, n=n, **settings)
        for r in (r for g in groups for r in g.responses):
            r.logp = [x - 0.5 for x in r.logp]
        return groups
    monkeypatch.setattr(programs, "single", off)
    with pytest.raises(ValueError, match="sampler and trainer disagree"):
        go(place, "grpo", "off", rollout=ROLLOUT)


def test_no_contrast_is_told(place):
    with pytest.warns(UserWarning, match="all responses to each prompt have the same reward"):
        go(place, "grpo", "flat", rollout={**ROLLOUT, "rewards": ["test_online:half"]}, **{"train.steps": 1})


def test_check_of_an_on_policy_run(place, tmp_path):
    levels = {(f.level, f.topic) for f in check.check(plan(place, "grpo", "checked", rollout=ROLLOUT))}
    assert ("ok", "rewards") in levels and ("ok", "rollout") in levels and not any(level == "error" for level, _ in levels)
    run = plan(place, "grpo", "checked", rollout={**ROLLOUT, "rewards": ["final_answer"]}, expect={"rewards": "> 0"})
    found = {(f.level, f.topic): f.text for f in check.check(run)}
    assert "MissingField" in found["error", "rewards"] and "did you mean 'reward'" in found["error", "metrics"]
    several = plan(place, "gpg", "checked", rollout={**ROLLOUT, "samples_per_update": 9})
    assert any("only the first of them is on-policy" in f.text for f in check_rollout.numbers(several))


def test_updates_cover_every_group_once_an_epoch(place):
    run = plan(place, "grpo", "split", rollout={**ROLLOUT, "samples_per_update": 6, "epochs": 2})
    from data_tools.batch import Batch
    batch = Batch({"group": torch.arange(6).repeat_interleave(3), "mask": torch.ones(18, 2)})
    parts = list(online.updates(batch, run, step=1))
    assert len(parts) == online.update_count(run) == 6 and all(p.groups == 2 for p in parts)
    for epoch in (parts[:3], parts[3:]):
        assert sorted(int(g) for p in epoch for g in p["group"].unique()) == list(range(6))
    again = list(online.updates(batch, run, step=1))
    assert all(torch.equal(a["group"], b["group"]) for a, b in zip(parts, again, strict=True))
    assert np.random.default_rng((0, 1)).permutation(6).tolist() != list(range(6))


assert set(loop_cases.CASES) >= {"grpo", "ppo", "replay", "online_dpo"}


def lengths(prompts, completions, **columns):
    """A reward as TRL calls it."""
    return [float(len(c)) for c in completions]


def test_a_reward_function_of_trl():
    group, = Scorer([{"trl": {"function": "test_online:lengths", "weight": 2.0}}])([Group("p", [Response("abc")])])
    assert group.responses[0].scores == {"lengths": 3.0, "reward": 6.0}
    with pytest.raises(ValueError, match="has no 'length', did you mean 'lengths'"):
        Scorer([{"trl": {"function": "test_online:length"}}])


def test_a_field_of_the_record_chooses_the_reward():
    spec = {"chosen": {"field": "verifier", "parts": {"flat": "test_online:half", "count": "loop_cases:ones"}}}
    groups = [Group("p", [Response("w1 w1"), Response("w9")], meta={"verifier": which}) for which in ("count", "flat", "cont")]
    with pytest.raises(ScoringError, match="is 'cont', did you mean 'count'"):
        Scorer(spec)(groups)
    Scorer(spec, unscored="mark")(groups)
    assert [[r.scores.get("reward") for r in g.responses] for g in groups] == [[2.0, 0.1], [0.5, 0.5], [None, None]]
    assert "cont" in groups[2].responses[0].meta["unscored"]["chosen"]
