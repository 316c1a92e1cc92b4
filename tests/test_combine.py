"""Combinations, frozen normalisation, gates, ensembles, tiers; calibration and the intercept of subsampled negatives."""
import json
import math
import random

import numpy as np
import pytest

from data_tools.records import Group, Response
from rewards import calibrate, combine
from rewards.base import ScoringError, rows_of, score
from rewards.cached import Store, cached
from rewards.combine import (
    Combined,
    constants,
    ensemble,
    lower_bound,
    mean,
    minimum,
    product,
    standardised,
    tiers,
    weighted,
    weighted_sum,
)


def size(text):
    return len(text)


def shouts(text):
    return text.count("!")


def fussy(text):
    if "?" in text:
        raise RuntimeError("no questions")
    return 1.0


def group(*texts, **meta):
    return Group("q", [Response(t) for t in texts], meta=meta)


# -------------------------------------------------------------------------------------------------------- pure functions
def test_one_component_of_weight_one_is_itself():
    r = random.Random(0)
    for _ in range(20):
        x = r.gauss(0, 100)
        assert weighted_sum({"a": x}, weights={"a": 1.0}) == product({"a": x}) == mean({"a": x}) == minimum({"a": x}) == x
        assert lower_bound({"a": x}, k=5.0) == x


def test_weighted_sum_by_hand():
    frozen = {"a": {"mean": 1.0, "std": 2.0}}
    scores = {"a": 9.0, "b": -1.0}                              # z_a = 4, capped at 3
    assert weighted_sum(scores, weights={"a": 0.5, "b": 2.0}, frozen=frozen, caps={"a": 3.0}) == 0.5 * 3 - 2
    assert standardised({"a": -9.0}, frozen, {"a": 3.0}) == {"a": -3.0}
    gate = dict(weights={"a": 1.0, "b": 0.0}, gates={"b": -1.0}, closed=-7.0)
    assert weighted_sum(scores, **gate) == 9.0                   # at the threshold the gate is open
    assert weighted_sum({"a": 9.0, "b": -1.001}, **gate) == -7.0


def test_gates_and_caps_see_what_they_say():
    """Gates look at the score as it came, caps at the standardised one."""
    frozen = {"a": {"mean": 100.0, "std": 10.0}}
    assert weighted_sum({"a": 95.0}, weights={"a": 1.0}, frozen=frozen, caps={"a": 1.0}, gates={"a": 90.0}) == -0.5


def test_ensembles():
    members = {"a": 1.0, "b": 3.0, "c": 8.0}
    std = math.sqrt(((1 - 4) ** 2 + (3 - 4) ** 2 + (8 - 4) ** 2) / 3)
    assert mean(members) == 4.0 and minimum(members) == 1.0 and product(members) == 24.0
    assert lower_bound(members, k=0.5) == pytest.approx(4 - 0.5 * std, rel=1e-12) and lower_bound(members, k=0) == 4.0
    assert lower_bound({"a": 1.0, "b": 3.0}) == minimum({"a": 1.0, "b": 3.0})


def test_weights_scale_out_of_group_normalised_advantages_only():
    r = random.Random(0)
    rows = [{"a": r.random(), "b": r.random()} for _ in range(8)]
    def rewards(scale):
        return np.array([weighted_sum(x, weights={"a": scale, "b": 2 * scale}) for x in rows])
    z = lambda x: (x - x.mean()) / x.std()
    assert z(rewards(1.0)) == pytest.approx(z(rewards(10.0)), abs=1e-12)
    centred = lambda x: x - x.mean()                                # Dr. GRPO
    assert centred(rewards(10.0)) == pytest.approx(10 * centred(rewards(1.0)), abs=1e-12)


# ------------------------------------------------------------------------------------------------------------- constants
def test_constants_are_frozen_and_saved(tmp_path):
    groups = score([group("a", "bbb"), group("!!", "dddddd")], [size, shouts])
    found = constants(groups, ["size", "shouts"])
    assert found["size"] == {"mean": 3.0, "std": pytest.approx(np.std([1, 3, 2, 6]), rel=1e-12), "n": 4}
    combine.save(found, tmp_path / "c.json")
    reward = weighted(parts={"size": size, "shouts": shouts}, weights={"size": 1.0, "shouts": 0.0},
                      normalise=str(tmp_path / "c.json"))
    other, = score([group("x" * 10)], [reward])                      # the new data do not move the constants
    assert other.responses[0].scores["combined"] == pytest.approx((10 - 3) / np.std([1, 3, 2, 6]), rel=1e-12)
    assert json.dumps(reward.settings()).count("mean") == 2


def test_constants_need_a_spread_and_a_score(tmp_path):
    with pytest.raises(ValueError, match="1 different scores of 'size'"):
        constants(score([group("a", "b")], [size]), ["size"])
    with pytest.raises(ValueError, match="did you mean 'size'"):
        constants(score([group("a", "bb")], [size]), ["sizes"])
    (tmp_path / "c.json").write_text('{"size": {"mean": 1, "std": 0}}')
    with pytest.raises(ValueError, match="std > 0"):
        combine.load(tmp_path / "c.json")


# ---------------------------------------------------------------------------------------------------------- combinations
def test_every_component_stays_in_the_scores():
    found, = score([group("a!", "bbb")], [weighted(parts={"size": size, "loud": shouts}, weights={"size": 1.0, "loud": 10.0})])
    assert [r.scores for r in found.responses] == [{"size": 2.0, "loud": 1.0, "combined": 12.0},
                                                   {"size": 3.0, "loud": 0.0, "combined": 3.0}]


def test_a_missing_component_is_never_a_zero():
    reward = weighted(parts={"size": size, "fussy": fussy}, weights={"size": 1.0, "fussy": 0.0})
    with pytest.raises(ScoringError, match="response 2.*lacks its component 'fussy'.*no questions"):
        score([group("a", "b?")], [reward])
    found, = score([group("a", "b?")], [reward], on_error="mark")
    assert found.responses[1].scores == {"size": 2.0} and "no questions" in found.responses[1].meta["unscored"]["combined"]
    assert found.responses[0].scores == {"size": 1.0, "fussy": 1.0, "combined": 1.0}


def test_weights_may_be_a_function_of_the_row():
    def by_domain(row):
        return {"size": 1.0, "loud": 0.0} if row.fields()["domain"] == "essay" else {"size": 0.0, "loud": 1.0}
    reward = weighted(parts={"size": size, "loud": shouts}, weights=by_domain)
    found = score([group("a!!", domain="essay"), group("a!!", domain="chat")], [reward])
    assert [g.responses[0].scores["combined"] for g in found] == [3.0, 2.0]
    assert "by_domain" in json.dumps(reward.settings())


@pytest.mark.parametrize("settings, message", [
    (dict(weights={"size": 1.0}), "weights leave out loud"), (dict(weights={"size": 1, "lout": 1}), "did you mean 'loud'"),
    (dict(weights={"size": 1, "loud": 1}, caps={"siz": 1.0}), "did you mean 'size'"),
    (dict(weights={"size": 1, "loud": 1}, gates={"x": 1.0}), "gates name 'x'")])
def test_names_are_checked_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        weighted(parts={"size": size, "loud": shouts}, **settings)


def test_ensembles_of_rewards_by_name():
    reward = ensemble(parts={"bleu": None, "rouge": "rouge_l", "chars": {"chrf": {"order": 1}}}, by="minimum")
    found, = score([group("a b", reference="a b c d")], [reward])
    s = found.responses[0].scores
    assert s["combined"] == min(s["bleu"], s["rouge"], s["chars"]) == s["bleu"] == pytest.approx(math.exp(-1))
    assert score([group("a!!")], [ensemble(parts={"s": size, "l": shouts}, by="lower_bound", k=1.0)])[0].responses[0].scores[
        "combined"] == 2.0
    with pytest.raises(ValueError, match="has no argument 'k'"):
        ensemble(parts={"s": size}, k=1.0)
    with pytest.raises(ValueError, match="did you mean 'minimum'"):
        ensemble(parts={"s": size}, by="minimun")


def test_tiers_cannot_be_overturned():
    parts, ranges = {"correct": shouts, "short": size}, {"correct": [0, 1], "short": [0, 50]}
    with pytest.raises(ValueError, match="a step of 'correct' is worth 1, what comes after it up to 50"):
        tiers(parts=parts, weights={"correct": 1.0, "short": 1.0}, steps={"correct": 1.0}, ranges=ranges)
    with pytest.raises(ValueError, match="could overturn"):
        tiers(parts=parts, weights={"correct": 50.0, "short": 1.0}, steps={"correct": 1.0}, ranges=ranges)
    reward = tiers(parts=parts, weights={"correct": 50.1, "short": 1.0}, steps={"correct": 1.0}, ranges=ranges)
    found, = score([group("!", "x" * 50)], [reward])
    assert found.responses[0].scores["combined"] > found.responses[1].scores["combined"]
    with pytest.raises(ScoringError, match="'short' is 51.0, outside its range"):
        score([group("x" * 51)], [reward])


def test_components_remember_and_a_comparison_is_one(tmp_path):
    calls = []
    def once(text):
        calls.append(text)
        return len(text)
    class First:
        name = "first"
        def settings(self): return {}
        def compare(self, groups): return [[[0.5, 1.0], [0.0, 0.5]] for _ in groups]
    reward = weighted(parts={"once": once, "first": First()}, weights={"once": 1.0, "first": 10.0})
    store = Store(tmp_path / "s")
    for _ in range(2):
        found, = score([group("a", "bb")], {"r": cached(reward, store)})
        assert [r.scores for r in found.responses] == [{"once": 1.0, "first": 1.0, "r": 11.0},
                                                       {"once": 2.0, "first": 0.0, "r": 2.0}]
    assert calls == ["a", "bb"] and isinstance(cached(reward, store), Combined)


# ----------------------------------------------------------------------------------------------------------- calibration
def simulated(n, temperature, seed=0):
    r = np.random.default_rng(seed)
    scores = r.normal(0, 3, n)
    return scores, (r.random(n) < 1 / (1 + np.exp(-scores / temperature))).astype(float)


def test_temperature_is_the_minimum_of_the_log_loss():
    scores, labels = simulated(3000, 2.5)
    found = calibrate.temperature(scores, labels)["temperature"]
    loss = lambda t: np.logaddexp(0, np.where(labels > 0, -1, 1) * scores / t).mean()
    assert abs(found - 2.5) < 0.25
    assert loss(found) < min(loss(found * 1.01), loss(found / 1.01))
    assert (loss(found * (1 + 1e-6)) - loss(found * (1 - 1e-6))) / 2e-6 == pytest.approx(0.0, abs=1e-8)
    soft = 1 / (1 + np.exp(-scores / 4.0))
    assert calibrate.temperature(scores, soft)["temperature"] == pytest.approx(4.0, rel=1e-9)
    assert calibrate.temperature(scores * 10, soft)["temperature"] == pytest.approx(40.0, rel=1e-9)


@pytest.mark.parametrize("scores, labels, message", [
    ([1.0, -1.0], [1, 0], "separate the labels"), ([1.0, -1.0], [0, 1], "rise against"), ([0.0, 0.0], [0, 1], "tell nothing"),
    ([1.0], [2.0], "labels in"), ([], [], "found 0 scores"), ([math.nan], [1.0], "finite scores")])
def test_what_has_no_temperature(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        calibrate.temperature(scores, labels)


def test_isotonic_lowers_the_error_and_keeps_the_order(tmp_path):
    scores, labels = simulated(4000, 6.0)
    fitted = calibrate.isotonic(scores[:2000], labels[:2000])
    calibrate.save(fitted, tmp_path / "i.json")
    again = calibrate.load(tmp_path / "i.json")
    held = [calibrate.apply(again, s) for s in scores[2000:]]
    raw = 1 / (1 + np.exp(-scores[2000:]))
    assert calibrate.ece(held, labels[2000:]) < 0.06 < calibrate.ece(raw, labels[2000:])
    order = np.argsort(scores[2000:])
    assert (np.diff(np.array(held)[order]) >= 0).all() and min(held) >= 0 and max(held) <= 1
    assert calibrate.apply(again, -1e9) == again["isotonic"]["y"][0] and calibrate.apply(again, 1e9) == again["isotonic"]["y"][-1]
    from sklearn.isotonic import IsotonicRegression
    theirs = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores[:2000], labels[:2000])
    assert held == pytest.approx(theirs.predict(scores[2000:]).tolist(), abs=1e-12)


def test_ece_against_a_row_loop_and_its_ends():
    r = random.Random(0)
    p, y = [r.random() for _ in range(300)] + [0.0, 1.0], [float(r.random() < 0.5) for _ in range(302)]
    total = 0.0
    for b in range(10):
        rows = [n for n in range(302) if b / 10 <= p[n] < (b + 1) / 10 or (b == 9 and p[n] == 1.0)]
        total += abs(sum(p[n] for n in rows) - sum(y[n] for n in rows))
    assert calibrate.ece(p, y, bins=10) == pytest.approx(total / 302, rel=1e-12)
    assert calibrate.ece([0.0, 1.0], [0, 1]) == 0.0 and calibrate.ece([0.0, 1.0], [1, 0]) == 1.0
    assert sum(b["n"] for b in calibrate.reliability(p, y)) == 302


def test_a_calibrated_reward(tmp_path):
    calibrate.save({"temperature": 2.0}, tmp_path / "t.json")
    reward = calibrate.calibrated(reward=f"{__name__}:size", file=str(tmp_path / "t.json"))
    assert reward(rows_of([group("", "xx")])) == [0.5, 1 / (1 + math.exp(-1))] and reward.name == "size"
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(ValueError, match="no calibration"):
        calibrate.load(tmp_path / "t.json")


@pytest.mark.parametrize("base", [0.02, 0.3])
@pytest.mark.parametrize("rate", [1.0, 0.1, 0.01])
def test_the_corrected_intercept_recovers_the_base_rate(base, rate):
    """A model without features fitted on all positives and a share of the negatives: f is the log odds of that sample."""
    f = math.log(base / (rate * (1 - base)))
    assert calibrate.p_love(f, rate=rate) == pytest.approx(base, rel=1e-12)
    assert calibrate.p_love(0.7) == pytest.approx(1 / (1 + math.exp(-0.7)), rel=1e-15)


def test_subsampled_logistic_regression_is_right_after_correction():
    from sklearn.linear_model import LogisticRegression
    r = np.random.default_rng(0)
    x = r.normal(size=(200_000, 1))
    truth = 1 / (1 + np.exp(-(x[:, 0] - 4)))
    label = r.random(len(x)) < truth
    keep = label | (r.random(len(x)) < 0.05)
    fitted = LogisticRegression(C=1e6).fit(x[keep], label[keep])
    found = [calibrate.p_love(f, rate=0.05) for f in fitted.decision_function(x[:20000])]
    assert abs(np.mean(found) / truth[:20000].mean() - 1) < 0.03
    assert np.mean(1 / (1 + np.exp(-fitted.decision_function(x[:20000])))) > 5 * truth[:20000].mean()
    with pytest.raises(ValueError, match="lies in"):
        calibrate.corrected_logit(0.0, rate=0.0)
    assert calibrate.p_love(-2000.0) == 0.0 and calibrate.p_love(2000.0) == 1.0
