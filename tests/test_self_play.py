"""Self-play of language models: opponents in the groups, oracles as rewards, the look-ahead update in the loop."""
from __future__ import annotations

import gc
import json
import math
from contextlib import nullcontext

import pytest
import torch
from loop_cases import go, lines, outcome, plan, workplace
from tiny_models import adapted, tiny, tokenizer

from data_tools.records import Group, Response
from prefopt import online, update
from prefopt.config import make
from prefopt.recipes.games import ROLLOUTS
from prefopt.rollout import programs
from prefopt.rollout.base import noise
from prefopt.rollout.transformers import Sampler
from rewards.base import ScoringError
from rewards.online import Scorer

STYLES = ("rock", "scissors", "paper")


def style(text):
    """One of three styles, by the sum of the digits."""
    return STYLES[sum(int(c) for c in text if c.isdigit()) % 3]


def longer(prompt, one, other):
    """A comparison of one's own that prefers what stands first, a little."""
    return min(0.6 + 0.3 * (len(one) > len(other)) - 0.3 * (len(one) < len(other)), 1.0)


def too_sure(prompt, one, other):
    return 1.5


GAME = {"game": {"payoff": "rps", "style": "test_self_play:style"}}
ROLLOUT = {"k": 2, "rewards": [GAME], "max_new_tokens": 5, "batch": 7}
SHORT = {"train.steps": 2, "train.eval_every": None, "data.eval": None}
FAMILY = ["apo_accel", "dno", "egpo", "gpo", "gpo_offline", "inpo", "ipo_md", "nash_ema", "nash_md", "nash_md_pg", "online_dpo",
          "online_ipo", "sppo", "xpo"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("self_play"))


def dumped(out, step=1):
    return [Group.from_json(json.loads(line)) for line in (out / f"rollouts/step-{step:08d}.jsonl").open()]


# ------------------------------------------------------------------------------------------------------ who is sampled from
def forced(model, ids, tokens, bare=False):
    """Logits of the tokens after ids, by one forward pass."""
    with torch.no_grad(), model.disable_adapter() if bare else nullcontext():
        return model.eval()(input_ids=torch.tensor([[*ids, *tokens]]), use_cache=False).logits[0, len(ids) - 1:-1].double()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("share, temperature", [(0.0, 1.0), (0.25, 1.0), (1.0, 1.0), (0.25, 0.7)])
def test_the_mixture_is_the_sum_of_logits(share, temperature, lora):
    """log p = log_softmax((1 - c) logits + c logits_ref) at every token that was sampled; c = 0 and 1 run one model."""
    words, policy = tokenizer(), tiny(seed=0)
    policy = adapted(policy) if lora else policy
    other = policy if lora else tiny(seed=1)
    sampler = Sampler(policy, words, others={} if lora else {"reference": other})
    playing = sampler.playing(programs.mixture(share))
    assert len(playing.decoder.voices) == (2 if 0 < share < 1 else 1)
    group, = playing(["w1 w2 w3"], n=5, max_new_tokens=6, seed=0, temperature=temperature)
    ids = words("w1 w2 w3")["input_ids"]
    for r in group.responses:
        mine, ref = forced(policy, ids, r.tokens), forced(other, ids, r.tokens, bare=lora)
        logp = (((1 - share) * mine + share * ref) / temperature).log_softmax(-1)
        expected = logp.gather(1, torch.tensor(r.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(r.logp, dtype=torch.float64), expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(mine, ref)


def test_frequencies_of_a_mixture_of_one_token():
    """4,000 draws of one token: every frequency within 5 standard errors of the exact mixture pi^(3/4) ref^(1/4) / Z."""
    words, policy, other, n = tokenizer(), tiny(seed=0), tiny(seed=1), 4_000
    group, = Sampler(policy, words, others={"reference": other}, batch=n).playing({"policy": 0.75, "reference": 0.25})(
        ["w1 w2"], n=n, max_new_tokens=1, seed=0)
    ids = words("w1 w2")["input_ids"]
    p, q = (forced(m, ids, [0])[0].softmax(-1) for m in (policy, other))
    expected = p ** 0.75 * q ** 0.25
    expected /= expected.sum()
    found = torch.bincount(torch.tensor([r.tokens[0] for r in group.responses]), minlength=len(p)) / n
    assert bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1e-12).all())


def test_roles_that_are_not_there():
    sampler = Sampler(tiny(), tokenizer(), others={"reference": tiny(seed=1)})
    with pytest.raises(ValueError, match="holds no 'referense', did you mean 'reference'"):
        sampler.playing({"referense": 1.0})
    with pytest.raises(ValueError, match="one vocabulary"):
        Sampler(tiny(), tokenizer(), others={"reference": tiny(vocab_size=99)}).playing({"policy": 0.5, "reference": 0.5})
    with pytest.raises(ValueError, match="share must be"):
        programs.against_mixture(share=1.5)


# ------------------------------------------------------------------------------------------------------------- programs
def sampler_of(seed=0):
    return Sampler(tiny(seed=seed), tokenizer(), others={"reference": tiny(seed=5), "average": tiny(seed=6)})


def tokens(groups, trains):
    return [[r.tokens for r in g.responses if r.train == trains] for g in groups]


@pytest.mark.parametrize("name, speaks", [("against_policy", 0), ("against_reference", 5), ("against_average", 6)])
def test_opponents_stand_behind_the_responses(name, speaks):
    """The responses are what they are without opponents; opponents are those of the model that they are named after."""
    asks, settings = ["w1 w2", "w3"], dict(max_new_tokens=6, seed=0)
    program = programs.named({name: {"count": 2}})
    groups = program(sampler_of(), asks, n=3, keys=[7, 8], **settings)
    assert tokens(groups, True) == tokens(programs.single(sampler_of(), asks, n=3, keys=[7, 8], **settings), True)
    own = Sampler(tiny(seed=speaks), tokenizer())(asks, n=2, keys=[noise(7, "opponent"), noise(8, "opponent")], **settings)
    assert tokens(groups, False) == tokens(own, True)
    assert {r.meta["probe"] for g in groups for r in g.responses if not r.train} == {"opponent"}


def test_opponents_are_met_again():
    """Other keys, other opponents; the same responses; opponents do not pile up."""
    program, sampler = programs.named("against_policy"), sampler_of()
    settings = dict(max_new_tokens=12, seed=0)
    first = program(sampler, ["w1 w2", "w3"], n=2, keys=[1, 2], **settings)
    again = program.met(sampler, first, keys=[noise(1, "ahead"), noise(2, "ahead")], **settings)
    assert tokens(first, True) == tokens(again, True) and tokens(first, False) != tokens(again, False)
    assert [len(g.responses) for g in again] == [3, 3]
    repeated = program.met(sampler, again, keys=[noise(1, "ahead"), noise(2, "ahead")], **settings)
    assert tokens(repeated, False) == tokens(again, False)


def test_flat_responses_and_opponents_of_the_policy():
    """Temperature 2 and top-k 10 are of the responses alone."""
    program, settings = programs.named({"against_policy": {"temperature": 2.0, "top_k": 10}}), dict(max_new_tokens=6, seed=0)
    found = program(sampler_of(), ["w1 w2"], n=3, keys=[4], temperature=1.0, **settings)
    flat = sampler_of()(["w1 w2"], n=3, keys=[4], temperature=2.0, top_k=10, **settings)
    assert tokens(found, True) == tokens(flat, True)
    assert tokens(found, False) == tokens(sampler_of()(["w1 w2"], n=1, keys=[noise(4, "opponent")], **settings), True)


def test_responses_beside_the_references():
    """Of five responses three are the policy's and two the reference's; all train, two are marked."""
    found, = programs.named("beside_reference")(sampler_of(), ["w1 w2"], n=5, keys=[3], max_new_tokens=6, seed=0)
    assert [r.meta.get("from_reference", False) for r in found.responses] == [False] * 3 + [True] * 2
    own, = Sampler(tiny(seed=5), tokenizer())(["w1 w2"], n=2, keys=[noise(3, "reference")], max_new_tokens=6, seed=0)
    assert [r.tokens for r in found.responses[3:]] == [r.tokens for r in own.responses] and all(r.train for r in found.responses)
    with pytest.raises(ValueError, match="rollout.k to at least 2"):
        programs.named("beside_reference")(sampler_of(), ["w1"], n=1)


def test_programs_by_name():
    assert programs.named("single") is programs.single
    turns = programs.named({"against_reference": {"program": {"conversation": {"step": "test_self_play:style", "turns": 2}}}})
    assert turns.program is not programs.single and programs.plain(turns) is turns.program
    assert programs.roles_of(turns) == {"reference"} and not programs.roles_of(programs.named("against_policy"))
    for wrong, said in (("against_polcy", "did you mean 'against_policy'"), ("conversation", "needs step"),
                        ({"against_policy": {"cuont": 1}}, "did you mean 'count'"), (["single"], "is written as"),
                        ({"single": {"n": 3}}, "has no argument 'n'")):
        with pytest.raises(ValueError, match=said):
            programs.named(wrong)


# -------------------------------------------------------------------------------------------------------------- oracles
def group_of(*texts, opponents=0, **more):
    rows = [Response(t, train=n < len(texts) - opponents) for n, t in enumerate(texts)]
    return Group("p", rows, meta={"place": "here"}, **more)


def test_rewards_are_wins_against_opponents():
    """w0, w1, w2 are rock, scissors, paper; rock against an opponent of scissors and one of paper: (1 + 0) / 2."""
    group, = Scorer([GAME], against="opponents")([group_of("w0", "w1", "w1", "w2", opponents=2)])
    assert [r.scores.get("reward") for r in group.responses] == [0.5, pytest.approx((0.5 + 1) / 2), None, None]
    assert group.responses[0].scores["rps"] == 0.5 and group.wins[0] == [0.5, 1.0, 1.0, 0.0] == group.meta["wins"]["rps"][0]


@pytest.mark.parametrize("against, payoff, expected", [
    ("others", "mean_win", [0.5, 0.5, 0.5]), ("everyone", "mean_win", [0.5, 0.5, 0.5]),
    ("others", "mean_score", [0.0, 0.0, 0.0])])
def test_a_whole_cycle_wins_as_often_as_it_loses(against, payoff, expected):
    group, = Scorer([GAME], against=against, payoff=payoff)([group_of("w1", "w2", "w0")])
    assert [r.scores["reward"] for r in group.responses] == expected


def test_everyone_counts_the_response_itself():
    """A pair with P = 1: 1 among others, (1 + 1/2) / 2 among everyone (SPPO's table)."""
    values = [[r.scores["reward"] for r in Scorer([GAME], against=a)([group_of("w0", "w1")])[0].responses]
              for a in ("others", "everyone")]
    assert values == [[1.0, 0.0], [0.75, 0.25]]


def test_a_greedy_probe_is_worth_what_it_wins():
    """Beside the others a probe row is a baseline (ReMax) and no opponent: rock against scissors and paper."""
    group, = Scorer([GAME])([group_of("w1", "w2", "w0", opponents=1)])
    assert [r.scores["reward"] for r in group.responses] == [1.0, 0.0, 0.5]


def test_a_reward_as_an_oracle():
    """P = sigmoid((r - r') / tau) with r = ones: w1 against w1 w1 at tau = 1/2 is sigmoid(-2)."""
    group, = Scorer([{"bradley_terry": {"reward": "loop_cases:ones", "tau": 0.5}}])([group_of("w1", "w1 w1")])
    low = 1 / (1 + math.exp(2.0))
    assert [r.scores["reward"] for r in group.responses] == [pytest.approx(low), pytest.approx(1 - low)]
    assert group.wins[0][1] == pytest.approx(low) and group.wins[0][0] == 0.5


def test_a_function_as_an_oracle_is_asked_in_both_orders():
    """It prefers what stands first by 0.1: that cancels."""
    group, = Scorer([{"preference": {"function": "test_self_play:longer"}}])([group_of("w1", "w1 w2")])
    assert [r.scores["reward"] for r in group.responses] == [pytest.approx(0.2), pytest.approx(0.8)]


def test_an_oracle_beside_other_rewards():
    """Where several rewards count, labels come from their sum; where one counts and it compares, from its wins."""
    both, = Scorer([GAME, {"loop_cases:ones": {"weight": 0.5}}])([group_of("w1 w1 w1", "w1")])
    assert [r.scores["reward"] for r in both.responses] == [2.5, 0.5] and both.wins is None
    one, = Scorer([GAME, {"loop_cases:ones": {"weight": 0}}])([group_of("w1 w1 w1", "w1")])
    assert one.wins == [[0.5, 1.0], [0.0, 0.5]]


@pytest.mark.parametrize("reward, against, group, error, message", [
    (GAME, "opponents", group_of("w", "w w"), ValueError, "here has no opponent among its 2 responses"),
    (GAME, "others", group_of("w"), ValueError, "here has a single response that trains"),
    ({"preference": {"function": "test_self_play:too_sure"}}, "others", group_of("w", "w w"), ScoringError,
     "here.*beats response 1 with 1.5, which is no probability"),
    ({"game": {"payoff": "rps"}}, "others", group_of("rok", "paper"), ScoringError, "no action 'rok', did you mean 'rock'")])
def test_what_an_oracle_refuses(reward, against, group, error, message):
    with pytest.raises(error, match=message):
        Scorer([reward], against=against)([group])


@pytest.mark.parametrize("spec, message", [
    ({"game": {"payoff": [[0.5, 0.7], [0.7, 0.5]]}}, "do not sum to 1"), ({"game": {"payoff": "rsp"}}, "did you mean 'rps'"),
    ({"bradley_terry": {"reward": "final_anser"}}, "did you mean 'final_answer'"),
    ({"bradley_terry": {"reward": "has_boxed", "tau": 0}}, "tau must be")])
def test_oracles_that_cannot_be(spec, message):
    with pytest.raises(ValueError, match=message):
        Scorer([spec])


# ---------------------------------------------------------------------------------------------------------- the recipes
@pytest.mark.parametrize("recipe", FAMILY)
def test_every_recipe_runs_from_a_run_file(place, recipe):
    """policy, rollout, an oracle, and nothing else."""
    out = place / f"run-{recipe}"
    result = go(place, recipe, out.name, rollout=ROLLOUT, **SHORT)
    assert result.steps == 2 and all(math.isfinite(v) for v in result.metrics.values()) and result.metrics["grad_norm"] > 0
    groups, rewarded = dumped(out), [r for g in dumped(out) for r in g.responses if r.train]
    assert all("reward" in r.scores for r in rewarded) and len(rewarded) == 12
    against = "against" in str(ROLLOUTS.get(recipe, {}).get("program"))
    assert all(len(g.responses) == 2 + against for g in groups) and all(g.wins for g in groups)
    assert any("ahead" in r.meta for r in rewarded) == (recipe == "egpo")
    assert any(r.meta.get("from_reference") for r in rewarded) == (recipe == "xpo")


def test_how_a_recipe_plays_is_in_the_resolved_run_file(place):
    run = plan(place, "egpo", "never", rollout=ROLLOUT)
    assert run.update == "look_ahead" and run.rollout.program == {"against_policy": {"temperature": 2.0, "top_k": 10}}
    assert run.against() == "opponents" and make(run.model_dump()) == run
    own = plan(place, "egpo", "never", rollout={**ROLLOUT, "program": "against_reference"}, update="plain")
    assert own.update == "plain" and own.rollout.program == "against_reference"
    gpo = plan(place, "gpo", "never", rollout=ROLLOUT)
    assert (gpo.against(), gpo.rollout.payoff, plan(place, "grpo", "never", rollout=ROLLOUT).against()) == \
        ("everyone", "mean_score", "others")
    assert plan(place, "egpo", "never", rollout={"recorded": "runs/x", "k": 2}).update == "plain"


@pytest.mark.parametrize("recipe, changes, message", [
    ("dpo", {"update": "look_ahead"}, "this run samples none: set rollout.program: against_policy"),
    ("dpo", {"update": "look_ahead", "rollout": ROLLOUT}, "this run samples none"),
    ("egpo", {"rollout": {**ROLLOUT, "epochs": 2}}, "leave rollout.mix, replay, epochs and samples_per_update out"),
    ("egpo", {"rollout": {**ROLLOUT, "recorded": "runs/x"}, "update": "look_ahead"}, "this run samples none"),
    ("nash_md", {"rollout": {**ROLLOUT, "sampler": "vllm"}}, "lets the reference speak, and vLLM holds the policy alone"),
    ("egpo", {"rollout": {**ROLLOUT, "against": "oponents"}}, "did you mean 'opponents'"),
    ("egpo", {"rollout": {**ROLLOUT, "program": "against_self"}}, "parts: .*against_policy")])
def test_settings_that_cannot_work(place, recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(place, recipe, "never", **changes)


def test_a_held_out_set_is_played_against_the_reference(place):
    """At the start the policy is its reference: equal texts tie, and the styles of the two are alike on average."""
    result = go(place, "online_ipo", "judged", rollout={**ROLLOUT, "eval_k": 2}, **{"train.steps": 1, "train.lr": 1e-12})
    assert 0 < result.metrics["eval/reward"] < 1
    from prefopt import check
    levels = {(f.level, f.topic) for f in check.check(plan(place, "egpo", "checked", rollout=ROLLOUT))}
    assert ("ok", "rewards") in levels and not any(level == "error" for level, _ in levels)


def test_the_average_follows_the_policy(place):
    """Two steps: 0.9 (0.9 theta_0 + 0.1 theta_1) + 0.1 theta_2, from the checkpoints."""
    from safetensors.torch import load_file
    go(place, "nash_ema", "averaged", rollout=ROLLOUT, **{**SHORT, "train.save_every": 1, "train.keep": 9})
    steps = [load_file(place / "model/model.safetensors"),
             *(load_file(place / f"averaged/checkpoints/step-{n:08d}/model/model.safetensors") for n in (1, 2))]
    state = load_file(place / "averaged/checkpoints/step-00000002/state.safetensors")
    names = [n for n in steps[1] if n in steps[0]]
    expected = {n: 0.9 * (0.9 * steps[0][n] + 0.1 * steps[1][n]) + 0.1 * steps[2][n] for n in names}
    kept = [v for k, v in state.items() if k.startswith("average.")]
    assert len(kept) == len(expected)
    for value in kept:
        assert any(e.shape == value.shape and torch.allclose(e, value, rtol=1e-5, atol=1e-7) for e in expected.values())


# ------------------------------------------------------------------------------------------------------------- look ahead
def watched(monkeypatch, seen):
    """Notes of every renewal: the batch before and after, and the weights while opponents were drawn."""
    from prefopt import train
    renew = train.Step.renew

    def noted(self):
        before, weights = self.part, [p.detach().clone() for p in self.gradients.parameters]
        renew(self)
        seen.append((before, self.part, weights))
    monkeypatch.setattr(train.Step, "renew", noted)


def test_look_ahead_changes_rewards_alone(place, monkeypatch):
    """The second batch has the same rows; opponents came from weights that are not those of either gradient."""
    seen, asked, met = [], [], programs.Against.met

    def telling(self, sampler, groups, *, keys, **settings):
        asked.append((settings["version"], tuple(keys)))
        return met(self, sampler, groups, keys=keys, **settings)
    monkeypatch.setattr(programs.Against, "met", telling)
    watched(monkeypatch, seen)
    go(place, "egpo", "ahead", rollout={**ROLLOUT, "k": 4}, **SHORT)
    assert [v for v, _ in asked] == [0, online.AHEAD + 1, 1, online.AHEAD + 2]
    assert len({key for _, keys in asked for key in keys}) == 4 * 6                    # no two draws share their noise
    for before, after, _ in seen:
        differ = {c for c in before if not torch.equal(before[c].nan_to_num(), after[c].nan_to_num())}
        assert {"reward", "relevance"} <= differ <= {"reward", "relevance", "wins", "unit", "unit@pairs"}
        own = before["train"].bool()
        assert not torch.equal(before["reward"][own], after["reward"][own])


def test_look_ahead_by_hand(place, monkeypatch):
    """Plain SGD: theta' = theta - lr g(theta; first rewards), where opponents are drawn; theta <- theta - lr g(theta; second)."""
    from prefopt import train
    seen, gradients, of = [], [], train.Gradients.of

    def taken(self, part, step, logs):
        here = [p.detach().clone() for p in self.parameters]
        found = of(self, part, step, logs)
        gradients.append((here, [p.grad.clone() for p in self.parameters]))
        return found
    monkeypatch.setattr(train.Gradients, "of", taken)
    watched(monkeypatch, seen)
    sgd = {"train.steps": 1, "train.optimizer": "SGD", "train.warmup": 0, "train.schedule": "constant", "policy.dtype": "float64"}
    go(place, "egpo", "hand", rollout={**ROLLOUT, "k": 4}, **{**SHORT, **sgd})
    (start, first), (again, second) = gradients
    (_, _, ahead), = seen
    from safetensors.torch import load_file
    last = load_file(place / "hand/model/model.safetensors")
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for p, g, q, g2, middle in zip(start, first, again, second, ahead, strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(middle, p - 0.01 * g, rtol=1e-12, atol=1e-14)
        end = [v for v in last.values() if v.shape == p.shape and torch.allclose(v, p - 0.01 * g2, rtol=1e-12, atol=1e-14)]
        assert end


@pytest.mark.parametrize("lora", [False, True])
def test_look_ahead_keeps_one_copy_of_what_trains(place, monkeypatch, lora):
    """While opponents are drawn: of a trained weight the policy, the reference (of LoRA's none), the snapshot; two moments and
    theirs; a gradient. Of LoRA's base there is one."""
    kept, alive = [], []
    snapshot, met = update.snapshot, programs.Against.met

    def counted(parameters, optimizer):
        found = snapshot(parameters, optimizer)
        kept.append((sum(t.numel() for t in found[0]), sum(p.numel() for p in parameters)))
        return found

    def living(self, sampler, groups, *, keys, **settings):
        if settings["version"] > online.AHEAD:
            shape = sampler.decoder.trunk.output.weight.shape
            alive.append(len({t.data_ptr() for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.shape == shape}))
        return met(self, sampler, groups, keys=keys, **settings)
    monkeypatch.setattr(update, "snapshot", counted)
    monkeypatch.setattr(programs.Against, "met", living)
    gc.collect(), gc.freeze()
    try:
        go(place, "egpo", f"copies-{lora}", rollout=ROLLOUT, **SHORT, **({"policy.lora": {"r": 2}} if lora else {}))
    finally:
        gc.unfreeze()
    whole = sum(v.numel() for v in tiny("llama").state_dict().values())
    assert all(copied == trained for copied, trained in kept) and len(kept) == 2
    assert kept[0][0] < whole / 4 if lora else kept[0][0] > whole / 2
    tied = tiny("llama").config.tie_word_embeddings
    assert alive[1] == (1 if tied else 2) * (1 if lora else 8), alive


@pytest.mark.parametrize("case", ["egpo", "nash_ema", "nash_md"])
def test_interrupted_runs_go_on_exactly(place, monkeypatch, case):
    """Four steps at once, and two and two: the same weights and metrics, byte for byte."""
    settings = {"rollout": ROLLOUT, **SHORT, "train.steps": 4, "train.save_every": 2}
    go(place, case, f"whole-{case}", **settings)
    from prefopt import train
    step, calls = train.Gradients.of, []

    def fails(self, part, number, logs):
        calls.append(number)
        if number == 3:
            raise KeyboardInterrupt
        return step(self, part, number, logs)
    with monkeypatch.context() as patched:
        patched.setattr(train.Gradients, "of", fails)
        with pytest.raises(KeyboardInterrupt):
            go(place, case, f"half-{case}", **settings)
    go(place, case, f"half-{case}", resume=True, **settings)
    assert outcome(place / f"half-{case}") == outcome(place / f"whole-{case}")
    assert len(lines(place / f"half-{case}")) == 4
