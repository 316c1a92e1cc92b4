"""What the loop does: values at the start, micro-batches, clipping, stops, precision, caches, evaluations, bad data."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from loop_cases import go, lines, lists, pairs, plan, workplace, write
from safetensors.torch import load_file
from tiny_models import Float64, saved, tokenizer

from prefopt import checkpoints, setup, train
from prefopt.parts import Pairs

STILL = {"train.eval_every": None, "data.eval": None, "train.save_every": None}
SGD = {"train.optimizer": "SGD", "train.schedule": "constant", "train.warmup": 0, "train.lr": 0.1}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return workplace(tmp_path_factory.mktemp("train"), train=12)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> Path:
    return workplace(tmp_path_factory.mktemp("ragged"), train=12, records=lists)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {f"{p.parent.name}/{k}": v for p in sorted(out.glob("*/*.safetensors")) for k, v in load_file(p).items()}


def close(one: Path, two: Path, tolerance: float = 1e-10) -> None:
    """Equal metrics and weights."""
    for a, b in zip(lines(one), lines(two), strict=True):
        assert b == pytest.approx(a, rel=tolerance, abs=tolerance)
    torch.testing.assert_close(weights(two), weights(one), rtol=tolerance, atol=tolerance)


@pytest.fixture
def double():
    """float64 throughout, where models and masks would use float32."""
    torch.set_default_dtype(torch.float64)
    with Float64():
        yield {"policy.dtype": "float64"}
    torch.set_default_dtype(torch.float32)


# -------------------------------------------------------------------------------------------------------------- the start
@pytest.mark.parametrize("recipe, settings, expected", [
    ("dpo", {}, math.log(2)), ("ipo", {"set.tau": 0.25}, 4.0), ("hinge", {}, 1.0), ("kto", {}, 0.5),
    ("bco", {}, math.log(2)),
    ("sppo_hard", {"set.beta": 0.5}, 2.0), ("apo_zero", {}, 1.0), ("aot", {}, math.log(2)), ("tdpo", {}, math.log(2)),
    ("dpo", {"set.ranking": {"squared": {"goal": 3.0}}}, 9.0)])
def test_first_loss_is_the_recipes_constant(place, recipe, settings, expected):
    """ipo 1/(4 tau^2), sppo_hard 1/(2 beta^2), a squared loss its goal's square."""
    out = place / f"start-{recipe}-{len(settings)}"
    go(place, recipe, out.name, **settings, **STILL, **{"train.steps": 1})
    assert lines(out)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_start_check_sees_dropout(tmp_path):
    workplace(tmp_path, attention_dropout=0.5)
    go(tmp_path, "dpo", "without", **STILL, **{"train.steps": 1})
    with pytest.raises(ValueError, match="at the start the policy differs from its reference: .* Check dropout"):
        go(tmp_path, "dpo", "with", **STILL, **{"policy.dropout": True})
    go(tmp_path, "simpo", "no_reference", **STILL, **{"policy.dropout": True, "train.steps": 1})


def test_start_check_sees_a_wrong_cached_reference(tmp_path):
    workplace(tmp_path)
    cached = {**STILL, "data.cache_reference": True, "train.steps": 1}
    go(tmp_path, "dpo", "right", **cached)
    (column,) = tmp_path.glob("cache/*/logp_ref.*.column")
    values = torch.frombuffer(bytearray(column.read_bytes()), dtype=torch.float32)
    column.write_bytes((values + 0.01).numpy().tobytes())
    with pytest.raises(ValueError, match=r"largest gap of a token's log-probability 0.01.* cached reference"):
        go(tmp_path, "dpo", "wrong", **cached)


def test_no_start_check_against_another_reference(place, tmp_path):
    other = saved(tmp_path / "other", seed=1)
    go(place, "dpo", "other", **STILL, **{"reference": other, "train.steps": 1})
    assert abs(lines(place / "other")[0]["loss"] - math.log(2)) > 1e-3


# ------------------------------------------------------------------------------------------------------------ micro-batches
def of_lengths(folder: Path, sizes: list[int]) -> None:
    """Groups of these many tokens in all: prompt w1, which counts once where it may, and two responses with <eos>."""
    records = [{"prompt": "w1 ", "chosen": " ".join(["w2"] * (n - 5)), "rejected": "w3"} for n in sizes]
    write(folder / "train.jsonl", records)


@pytest.mark.parametrize("sizes, tokens, split", [([14, 6, 6, 6], 17, [1, 3]), ([14, 6, 6, 6], 18, [2, 2]),
                                                  ([6, 10, 8, 8], 16, [2, 2]), ([9, 6, 6, 9], 9, [1, 1, 1, 1]),
                                                  ([9, 6, 6, 9], 10, [1, 2, 1]), ([6, 6, 6, 6], 20, [4])])
def test_budgets_split_where_they_should(tmp_path, sizes, tokens, split, monkeypatch):
    workplace(tmp_path)
    of_lengths(tmp_path, sizes)
    seen, forward = [], train.forward
    monkeypatch.setattr(train, "forward", lambda models, micro, reads: seen.append(micro.groups)
                        or forward(models, micro, reads))
    go(tmp_path, "simpo", "out", **STILL, **{"train.tokens": tokens, "train.groups_per_step": 4, "train.shuffle": False,
                                             "train.steps": 1})
    assert seen == split


@pytest.mark.parametrize("recipe, settings", [("dpo", {}), ("kto", {}), ("bco", {}), ("lipo", {}),
                                              ("sparsepo", {"set.l1_reward": 0.01}), ("orpo", {"train.precision": "no"})])
def test_budget_changes_nothing(ragged, double, recipe, settings):
    """A step of 8 groups whole, and cut as small as its largest group allows."""
    for tokens in (None, 60):
        go(ragged, recipe, f"{recipe}-{tokens}", **settings, **double,
           **{"train.tokens": tokens, "train.groups_per_step": 8, "train.warmup": 0})
    close(ragged / f"{recipe}-None", ragged / f"{recipe}-60")


def test_group_larger_than_the_budget(place, monkeypatch):
    """Said before the model is loaded: where, how large, and what to set; the number named is enough."""
    monkeypatch.setattr(setup, "load_policy", pytest.fail)
    said = (r"train.jsonl:\d+.*: a group of (\d+) tokens does not fit the micro-batch budget of 15 tokens: raise "
            r"train.tokens to at least \1, or truncate with data.max_length")
    with pytest.raises(ValueError, match=said) as e:
        go(place, "dpo", "large", **{"train.tokens": 15})
    enough = int(str(e.value).split("at least ")[1].split(",")[0])
    monkeypatch.undo()
    go(place, "dpo", "large", **STILL, **{"train.tokens": enough, "train.steps": 1})
    with pytest.raises(ValueError, match="with 2 sampled responses does not fit the micro-batch budget"):
        go(place, "hypo", "online", **{"train.tokens": enough, "train.online.max_new_tokens": 4})


# ----------------------------------------------------------------------------------------------------- clipping, schedules
def test_clipping(place):
    """One step of SGD at rate 0.1 moves the weights by 0.1 min(norm, clip); what is logged is the norm before."""
    start = load_file(place / "model" / "model.safetensors")
    moved = {}
    for clip in (None, 0.01, 1e6):
        out = place / f"clip-{clip}"
        go(place, "dpo", out.name, **SGD, **STILL, **{"train.clip": clip, "train.steps": 1, "policy.dtype": "float64"})
        gaps = [v - start[k.split("/")[1]].double() for k, v in weights(out).items()]
        moved[clip] = math.sqrt(sum(float(gap.square().sum()) for gap in gaps))
        norm = lines(out)[0]["grad_norm"]
    assert norm > 0.02
    assert moved == pytest.approx({None: 0.1 * norm, 0.01: 0.1 * 0.01, 1e6: 0.1 * norm}, rel=1e-4)


def test_logged_rate_is_the_one_used(place):
    """Warm-up over 2 of 8 steps, then a line to 0: the first step is taken at rate 0, so its loss is the second's too."""
    go(place, "dpo", "rates", **STILL, **{"train.lr": 0.6, "train.schedule": "linear", "train.warmup": 2, "train.steps": 8,
                                          "train.groups_per_step": 12, "train.tokens": None})
    found = lines(place / "rates")
    assert [x["lr"] for x in found] == pytest.approx([0, 0.3, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6) and found[2]["loss"] < found[1]["loss"]
    assert [x["epoch"] for x in found] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("settings, steps", [({"train.epochs": 1.5}, [1, 2, 3]), ({"train.steps": 5}, [1, 2, 3, 4, 5]),
                                             ({"train.epochs": 2, "train.log_every": 3}, [3, 4]),
                                             ({"train.epochs": 0.01}, [1])])
def test_steps(place, settings, steps):
    """12 groups in steps of 6; the last step is always logged."""
    result = go(place, "simpo", f"steps-{len(steps)}", **STILL, **settings)
    assert [x["step"] for x in lines(place / f"steps-{len(steps)}")] == steps and result.steps == steps[-1]


# ------------------------------------------------------------------------------------------------------------ early stopping
def test_early_stopping_keeps_the_best(place):
    """`best` holds the model of a run that ends at the best step, `model` that of the last one."""
    hot = {"train.lr": 0.3, "train.clip": None, "train.eval_every": 1, "train.epochs": 10, "train.schedule": "constant"}
    result = go(place, "dpo", "early", **hot, **{"train.patience": 3})
    held_out = [x["eval/loss"] for x in lines(place / "early") if "eval/loss" in x]
    best = held_out.index(min(held_out)) + 1
    assert result.stopped == f"eval/loss has not improved for 3 evaluations; best at step {best}"
    assert len(held_out) == result.steps == best + 3 < 20
    for step, kept in ((best, "best"), (result.steps, "model")):
        go(place, "dpo", f"until-{step}", **hot, **{"train.steps": step})
        assert (place / f"until-{step}" / "model" / "model.safetensors").read_bytes() == \
            (place / "early" / kept / "model.safetensors").read_bytes()


@pytest.mark.parametrize("metric, values, best, stops", [
    ("eval/loss", [3.0, 2.0, 2.0, 2.5], 2, 4), ("eval/accuracy", [0.5, 0.7, 0.6, 0.7], 2, 4),
    ("eval/kl/ref", [1.0, 0.5, 0.6], 2, 0), ("eval/loss", [math.nan, 2.0, math.nan, 1.0], 4, 0),
    ("eval/loss", [math.nan, math.inf], 0, 2)])
def test_judge(place, tmp_path, metric, values, best, stops, monkeypatch):
    """Losses and divergences should fall, other metrics rise; what is not a number is no improvement."""
    monkeypatch.setattr(checkpoints, "save_model", lambda *_: None)
    run = plan(place, "dpo", "out", **{"train.metric": metric, "train.patience": 2})
    progress = {"step": 0, "last": {}, "stopped": "", "best": None, "best_step": 0, "evaluations_since": 0}
    for value in values:
        progress["step"] += 1
        progress["last"][metric] = value
        train.judge(progress, run, None, type("Models", (), {"policy": None, "tokenizer": None}),
                    type("One", (), {"is_main_process": True}), tmp_path)
        assert bool(progress["stopped"]) == (progress["step"] == stops)
    assert progress["best_step"] == best


def test_unknown_metric_names_the_nearest(place):
    with pytest.raises(ValueError, match="metric 'eval/acuracy' is not measured, did you mean 'eval/accuracy'.*eval/kl/ref"):
        go(place, "dpo", "metric", **{"train.metric": "eval/acuracy", "train.eval_every": 1})


# ---------------------------------------------------------------------------------------------------------------- not finite
POISON = {"call": None, "calls": 0, "kind": None}


def poisoned(margin) -> Pairs:
    """The logistic loss, of which one call gives NaN, or a gradient of NaN at a finite value."""
    POISON["calls"] += 1
    if POISON["calls"] != POISON["call"]:
        return torch.nn.functional.softplus(-margin)
    return margin * float("nan") if POISON["kind"] == "loss" else (margin * 0).clamp(min=0).sqrt()


@pytest.mark.parametrize("update, call", [("plain", 3), ("extragradient", 5), ("extragradient", 6)])
@pytest.mark.parametrize("kind, said", [("loss", "loss is nan at step 3"), ("grad_norm", "grad_norm is nan at step 3")])
def test_nothing_trains_on_nan(place, update, call, kind, said, monkeypatch):
    """Step 3 breaks: in its only gradient, or in extragradient's first or second one. Weights are those of step 2."""
    out = f"nan-{update}-{call}-{kind}"
    poison = {**STILL, "set.ranking": "test_train:poisoned", "train.save_every": 1, "train.tokens": None, "train.lr": 0.1}
    POISON.update(call=call, calls=0, kind=kind)
    kept, load = [], train.load_models
    monkeypatch.setattr(train, "load_models", lambda *a: kept.append(load(*a)) or kept[-1])
    with pytest.raises(FloatingPointError, match=f"{said}: the run stops before it trains on it.*is whole"):
        go(place, "simpo", out, update=update, **poison)
    last = checkpoints.latest(place / out / "checkpoints")
    assert last.name == "step-00000002" and [x["step"] for x in lines(place / out)] == [1, 2]
    saved_there = load_file(last / "model" / "model.safetensors")
    assert all(torch.equal(saved_there[k], p) for k, p in kept[0].policy.named_parameters())
    assert not (place / out / "model").exists()
    POISON.update(call=None)
    assert go(place, "simpo", out, resume=True, update=update, **poison).steps == 4


def test_loss_scaling_may_overflow(tmp_path):
    """With fp16 the gradient is not finite now and then, and the scaler skips the step; a loss that is not is an end."""
    train.check_finite({"loss": 1.0, "grad_norm": math.inf}, 1, tmp_path, scaled=True)
    with pytest.raises(FloatingPointError, match="grad_norm is inf at step 1"):
        train.check_finite({"loss": 1.0, "grad_norm": math.inf}, 1, tmp_path, scaled=False)
    with pytest.raises(FloatingPointError, match="loss is inf"):
        train.check_finite({"loss": math.inf, "grad_norm": 1.0}, 1, tmp_path, scaled=True)


def test_what_is_not_finite_is_null_in_the_log(tmp_path):
    from types import SimpleNamespace

    from prefopt.folder import log
    log(SimpleNamespace(is_main_process=True, trackers=[]), tmp_path, {"step": 1, "a": math.inf, "b": math.nan, "c": 2.5}, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": 2.5}\n'


# ------------------------------------------------------------------------------------------- precision, memory, references
def test_precision(place):
    """bf16 has 8 bits: losses near those of float32. One process may run one after the other. fp16 needs a GPU."""
    for precision in ("no", "bf16", "no"):
        go(place, "dpo", f"precision-{precision}", **STILL, **SGD, **{"train.precision": precision})
    a, b = (lines(place / f"precision-{p}")[-1]["loss"] for p in ("no", "bf16"))
    assert 0 < abs(a - b) < 0.02 and a < 0.68
    with pytest.raises(ValueError, match="train.precision=fp16 needs a GPU, and this is cpu: set it to bf16 or no"):
        go(place, "dpo", "precision-fp16", **{"train.precision": "fp16"})


def test_gradient_checkpointing_changes_nothing(place):
    for on in (False, True):
        go(place, "dpo", f"checkpointing-{on}", **{"policy.gradient_checkpointing": on})
    close(place / "checkpointing-False", place / "checkpointing-True", 0.0)


@pytest.mark.parametrize("settings", [{}, {"policy.lora": {"r": 2}}, {"train.precision": "bf16"}], ids=["", "lora", "bf16"])
def test_cached_reference_is_the_live_one(place, tmp_path, settings, monkeypatch):
    """The same run with less in memory; only where adapters can be switched off is kl/ref still measured."""
    loaded, load = [], setup.load_policy
    monkeypatch.setattr(setup, "load_policy", lambda **a: loaded.append(a["lora"]) or load(**a))
    held, make = [], train.load_models
    monkeypatch.setattr(train, "load_models", lambda *a: held.append(make(*a)) or held[-1])
    common = {**SGD, **settings, "data.cache": str(tmp_path / "cache")}
    for name, cached, times in (("live", False, 1), ("cached", True, 2), ("again", True, 1)):
        go(place, "dpo", f"{tmp_path.name}-{name}", **common, **{"data.cache_reference": cached})
        assert len(loaded) == times, name
        assert (held[-1].reference is None) == (cached or "policy.lora" in settings)
        loaded.clear()
    one, two, three = (lines(place / f"{tmp_path.name}-{n}") for n in ("live", "cached", "again"))
    assert two == three and abs(one[0]["loss"] - math.log(2)) < 0.007
    assert all("eval/kl/ref" in x for x in one if "eval/loss" in x)
    assert all(("eval/kl/ref" in x) == ("policy.lora" in settings) for x in two if "eval/loss" in x)
    tolerance = 1e-5 if "train.precision" not in settings else 0.05
    chance = {k for k in two[0] if k.startswith("accuracy")}  # of a policy that is its reference: rounding decides
    for a, b in zip(one, two, strict=True):
        told = b.keys() - (chance if b["step"] == 1 else {})
        assert {k: a[k] for k in told} == pytest.approx({k: b[k] for k in told}, rel=tolerance, abs=tolerance)


def test_cache_knows_the_weights(tmp_path):
    """Another model in the same folder is another reference."""
    workplace(tmp_path)
    cached = {**STILL, "data.cache_reference": True, "train.steps": 1}
    go(tmp_path, "dpo", "first", **cached)
    shutil.rmtree(tmp_path / "model")
    saved(tmp_path / "model", seed=5)
    go(tmp_path, "dpo", "second", **cached)
    assert len(list(tmp_path.glob("cache/*/logp_ref.*.column"))) == 2
    assert lines(tmp_path / "second")[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_reference_moves_in_the_loop(place):
    """alpha = 1 every step: the policy is its reference before each step, so that every loss is log 2."""
    go(place, "tr_dpo", "moving", **STILL, **SGD, **{"set.alpha": 1.0, "set.every": 1})
    assert [x["loss"] for x in lines(place / "moving")] == pytest.approx([math.log(2)] * 4, rel=1e-6)
    go(place, "tr_dpo", "slow", **STILL, **SGD, **{"set.alpha": 1.0, "set.every": 2})
    losses = [x["loss"] for x in lines(place / "slow")]
    assert [x == pytest.approx(math.log(2), rel=1e-6) for x in losses] == [True, False, True, False]


# -------------------------------------------------------------------------------------------------------------- evaluations
@pytest.mark.parametrize("recipe, settings", [("hypo", {"set.kl": 0.5, "train.online.max_new_tokens": 3}), ("bco", {}),
                                              ("sparsepo", {"set.dropout": 0.3}), ("kto", {}),
                                              ("dpo", {"policy.lora": {"r": 2, "lora_dropout": 0.3}})])
def test_evaluation_changes_nothing(place, recipe, settings):
    """Not the noise of sampling and dropout, not a running mean, not a mode: weights are those of a run without."""
    name = f"evaluated-{recipe}-{len(settings)}"
    go(place, recipe, name, **settings, **{"train.eval_every": 1, "train.save_every": None})
    go(place, recipe, f"{name}-not", **settings, **STILL)
    one, two = weights(place / name), weights(place / f"{name}-not")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    trained = [x for x in lines(place / name) if "loss" in x]
    assert trained == lines(place / f"{name}-not")


def test_evaluation_repeats_itself(place, tmp_path):
    """Weights that stay give the same numbers every time, sampled responses and all."""
    go(place, "hypo", "repeated", reference=saved(tmp_path / "other", seed=1), **{
        "train.lr": 1e-30, "set.kl": 0.5, "train.eval_every": 1, "train.online.max_new_tokens": 3})
    found = [{k: v for k, v in x.items() if k != "step"} for x in lines(place / "repeated") if "eval/loss" in x]
    assert len(found) == 4 and all(x == found[0] for x in found) and found[0]["eval/loss/online_kl"] != 0
    same = [x["loss/online_kl"] for x in lines(place / "repeated") if x["step"] in (1, 2, 3, 4) and "loss" in x]
    assert len(set(same)) == 4


def test_evaluation_is_without_dropout(place, tmp_path):
    """A mask with dropout is evaluated as the same mask without; a policy far from its reference makes it show."""
    other = saved(tmp_path / "other", seed=1)
    for dropout in (0.0, 0.7):
        go(place, "sparsepo", f"dropout-{dropout}", reference=other, **{
            "train.lr": 1e-30, "train.modules.lr": 1e-30, "set.dropout": dropout, "set.l1_kl": 0.1, "train.steps": 1})
    (trained, held_out), (noisy, same) = (lines(place / f"dropout-{d}") for d in (0.0, 0.7))
    assert held_out == same and trained["loss"] != pytest.approx(noisy["loss"], rel=1e-3)


def test_held_out_data_is_evaluated_at_the_end(place):
    go(place, "dpo", "end", **{"train.eval_every": None})
    assert [("eval/loss" in x, x["step"]) for x in lines(place / "end")][-2:] == [(False, 4), (True, 4)]


def test_evaluation_by_hand(place):
    """The held-out loss of the last step is that of `evaluate` on the saved model; steps of other sizes change nothing."""
    from prefopt import evaluation
    go(place, "dpo", "judged", **{"train.eval_every": 4, "expect": {}})
    logged = {k.removeprefix("eval/"): v for k, v in lines(place / "judged")[-1].items() if k != "step"}
    for size in (1, 4, 6):
        found = evaluation.evaluate(evaluation.plan(str(place / "judged"), overrides=[f"train.groups_per_step={size}"]))
        assert found == pytest.approx(logged, rel=1e-5, abs=1e-5)


def test_expectations(place):
    result = go(place, "dpo", "expect", expect={"eval/loss": "<= 9", "loss": "> 9.0", "accuracy": ">= 0.0", "lost": "< 1"},
                **{"data.eval": str(place / "eval.jsonl")})
    assert len(result.failed) == 2 and result.failed[1] == "lost was not measured"
    assert result.failed[0] == f"loss = {result.metrics['loss']:.4g}, expected > 9.0"


PAIRED = {"loss", "loss/ranking", "accuracy", "accuracy/length_controlled", "margin", "score/chosen", "score/rejected",
          "logp/chosen", "logp/rejected", "shift/chosen", "shift/rejected", "displaced", "ranking/policy",
          "ranking/policy_per_token", "ranking/reference", "length/chosen_longer"}
IDEAL = {"ranking/idealised_min", "ranking/idealised_median", "ranking/idealised_max", "ranking/gap"}
UNPAIRED = {"loss", "loss/ranking", "score/desirable", "score/undesirable"}


def test_metrics_of_pairs(place):
    go(place, "dpo", "paired", **{"train.eval_every": 4})
    *trained, held_out = lines(place / "paired")
    assert set(trained[0]) == {"step", "epoch", "lr", "grad_norm", *PAIRED}
    assert set(held_out) == {"step", *(f"eval/{k}" for k in PAIRED | IDEAL | {"kl/ref"})}
    reference_free = {k for k in PAIRED if not k.startswith(("shift/", "displaced", "ranking/reference"))}
    go(place, "simpo", "free", **{"train.eval_every": 4, "set.sft": 0.1})
    *trained, held_out = lines(place / "free")
    assert set(trained[0]) == {"step", "epoch", "lr", "grad_norm", "loss/sft", *reference_free}
    assert trained[0]["loss"] == pytest.approx(trained[0]["loss/ranking"] + trained[0]["loss/sft"], rel=1e-6)


def test_metrics_of_unpaired_feedback(tmp_path):
    workplace(tmp_path, records=lambda n, seed=0: [
        {"prompt": r["prompt"], "completion": r["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, r in enumerate(pairs(n, seed))])
    go(tmp_path, "kto", "out", **{"train.eval_every": 6})
    *trained, held_out = lines(tmp_path / "out")
    assert set(trained[0]) == {"step", "epoch", "lr", "grad_norm", *UNPAIRED}
    assert set(held_out) == {"step", *(f"eval/{k}" for k in UNPAIRED)}


# ---------------------------------------------------------------------------------------------------------------- the folder
def test_run_folder(place, capsys):
    """Everything that says what was run, and samples of what the model saw."""
    from prefopt.config import load
    train.train(plan(place, "dpo", "folder", **{"set.beta": 0.3, "train.save_every": None}), show=True)
    assert "train" in capsys.readouterr().out
    out = place / "folder"
    assert {p.name for p in out.iterdir()} == {"run.yaml", "departures.yaml", "versions.json", "metrics.jsonl",
                                               "timing.jsonl", "samples.jsonl", "model"}
    assert load(out / "run.yaml") == plan(place, "dpo", "folder", **{"set.beta": 0.3, "train.save_every": None})
    versions = json.loads((out / "versions.json").read_text())
    assert versions["torch"] == torch.__version__ and versions["steps"] == 4 and versions["data"]["train_groups"] == 12
    timing = [json.loads(x) for x in (out / "timing.jsonl").read_text().splitlines()]
    assert [x["step"] for x in timing] == [1, 2, 3, 4]
    first, second = (json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()[:2])
    record = json.loads((place / "train.jsonl").read_text().splitlines()[0])
    assert first["response"].split() == [*record["chosen"].split(), "<eos>"]
    assert (first["relevance"], second["relevance"]) == (1, 0)
    assert first["prompt"].split() == record["prompt"].split()
    assert first["trained_tokens"] == len(record["chosen"].split()) + 1
    both = timing[0]["tokens"] + timing[1]["tokens"]         # an epoch: every token once, prompts once per response
    words = [len(f"{r['prompt']} {r[k]}".split()) + 1 for r in pairs(12) for k in ("chosen", "rejected")]
    assert both == sum(words)


def test_learned_parts_are_saved(place):
    go(place, "sparsepo", "masks", **STILL)
    assert {k.split(".", 1)[1] for k in load_file(place / "masks" / "model" / "objective.safetensors")} >= {"inner", "outer"}


def test_tracker_that_is_not_there(place, monkeypatch):
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="log asks for wandb, which is not installed"):
        go(place, "dpo", "tracked", log=["wandb"])


# ------------------------------------------------------------------------------------------------------------------ bad data
GOOD = {"prompt": "w1 w2 ", "chosen": "w3", "rejected": "w4 w5"}
TALK = {"prompt": [{"role": "user", "content": "w1"}], "chosen": [{"role": "assistant", "content": "w2"}],
        "rejected": [{"role": "assistant", "content": "w3"}]}
BAD = {
    "malformed": (GOOD, '{"prompt": "w1"', {}, r"train.jsonl.*2"),
    "empty": (GOOD, {**GOOD, "chosen": ""}, {}, "train.jsonl:2.*empty"),
    "equal": (GOOD, {**GOOD, "chosen": "w4 w5"}, {}, "train.jsonl:2.*equal"),
    "one response": (GOOD, {"prompt": "w1", "responses": [{"text": "w2"}], "relevance": [1.0]},
                     {"data.format": "group"}, "train.jsonl:1"),
    "K = 1": ({"prompt": "w1", "responses": [{"text": "w2"}], "relevance": [1.0]}, None, {}, "jsonl:1.*pairs need two"),
    "unpaired": ({"prompt": "w1 ", "completion": "w2", "label": True}, None, {}, "train.jsonl:1.*pairs need two"),
    "no template": (TALK, None, {"tokenizer": "plain"}, "chat template"),
    "truncated": (GOOD, None, {"data.max_length": 2}, "no group is left.*max_length=2"),
    "no column": (GOOD, None, {"recipe": "smpo"}, "'smpo' reads the column 'reward' .scalar reward., which no record"),
    "nothing": ("", None, {}, "train.jsonl"),
    "no file": (GOOD, None, {"data.train": "none.jsonl"}, "none.jsonl"),
    "unknown format": (GOOD, None, {"data.format": "pairr"}, "unknown format 'pairr', did you mean 'pair'"),
    "held out": (GOOD, None, {"data.eval": "bad.jsonl"}, "bad.jsonl:1.*empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_an_error_before_any_model(place, tmp_path, case, monkeypatch):
    first, second, settings, said = BAD[case]
    records = [r if isinstance(r, str) else json.dumps(r) for r in (first, second) if r is not None]
    (tmp_path / "train.jsonl").write_text("\n".join(records))
    write(tmp_path / "bad.jsonl", [{**GOOD, "rejected": ""}])
    plain = tokenizer()
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    settings = {k: str(tmp_path / v) if k in ("tokenizer", "data.train", "data.eval") else v for k, v in settings.items()}
    settings = {**STILL, "data.train": str(tmp_path / "train.jsonl"), "data.cache": str(tmp_path / "cache"), **settings}
    monkeypatch.setattr(setup, "load_policy", pytest.fail)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        go(place, settings.pop("recipe", "dpo"), "bad", **settings)
    assert "\n" not in str(caught.value).strip() and not (place / "bad").exists()


def test_bad_records_can_be_skipped(place, tmp_path):
    path = write(tmp_path / "train.jsonl", [GOOD, {**GOOD, "chosen": ""}, {**GOOD, "chosen": "w4 w5"}, GOOD])
    with pytest.warns(UserWarning, match="skipped: 2 of 4 records are good"):
        go(place, "dpo", "skipped", **STILL, **{"data.train": path, "data.on_bad": "skip", "train.steps": 1})
    assert json.loads((place / "skipped" / "versions.json").read_text())["data"]["train_groups"] == 2


# --------------------------------------------------------------------------------------------- what is not paid for twice
def test_steps_that_are_not_logged_measure_nothing(place, monkeypatch):
    """Diagnostics run at logged steps and in evaluations only, and training does not change."""
    from prefopt import objectives
    calls, measured = [], objectives.measured
    monkeypatch.setattr(objectives, "measured", lambda *a: calls.append(1) or measured(*a))
    go(place, "dpo", "every-step", **{"train.eval_every": 6, "train.epochs": 3})
    often = len(calls)
    go(place, "dpo", "every-third", **{"train.eval_every": 6, "train.log_every": 3, "train.epochs": 3})
    assert len(calls) - often < 0.7 * often
    assert [line["step"] for line in lines(place / "every-third") if "loss" in line] == [3, 6]
    one, other = ((place / name / "model/model.safetensors").read_bytes() for name in ("every-step", "every-third"))
    assert one == other


def test_an_evaluation_goes_on_from_the_memory_of_training(place):
    """BCO's running shift is beside the model: the loss is that of the last evaluation of the run."""
    from prefopt import evaluation
    result = go(place, "bco", "shifted", **{"train.epochs": 3})
    found = evaluation.evaluate(evaluation.plan(str(place / "shifted")))
    assert found["loss"] == pytest.approx(result.metrics["eval/loss"], rel=1e-5)
    (place / "shifted/model/prefopt.json").unlink()
    assert evaluation.evaluate(evaluation.plan(str(place / "shifted")))["loss"] != pytest.approx(found["loss"], rel=1e-5)
