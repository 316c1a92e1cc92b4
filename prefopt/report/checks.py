"""What the curves of a run warn of: numbers, the steps they are from, and what to do.

A curve's start and end are the means of its first and last fifth, at least three points where there are as many. Every check
takes the run and gives sentences; it gives none where its metrics were not measured.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median, pvariance

from prefopt.config import met
from prefopt.findings import Finding, error, warning
from prefopt.report.folders import Curve, RunFolder

__all__ = ["CHECKS", "findings"]

FEW = 0.5                                                     # share of groups with contrast
COLLAPSED = 0.2                                               # entropy at the end, as a share of the start
FAR, STRIDE = 0.2, 0.05                                       # nats per token from the reference, and in one rollout
GAP = 1e-2                                                    # between sampler and trainer, per token
CLIPPED, CUT = 0.2, 0.1                                       # shares of tokens, of responses
EFFECTIVE = 0.5                                               # effective sample size
LONGER = 1.5                                                  # growth of the length while the reward rises
SPIKE = 10.0                                                  # gradient norm over the median of the steps around it


def span(curve: Curve) -> int:
    return min(len(curve.values), max(3, len(curve.values) // 5))


def start(curve: Curve) -> float:
    return math.fsum(curve.values[:span(curve)]) / span(curve)


def end(curve: Curve) -> float:
    return math.fsum(curve.values[-span(curve):]) / span(curve)


def noise(curve: Curve) -> float:
    """Standard error of `end` - `start`, from the spread inside both."""
    n = span(curve)
    return math.sqrt((pvariance(curve.values[:n]) + pvariance(curve.values[-n:])) / max(n - 1, 1))


def moved(curve: Curve) -> float:
    """`end` - `start`, or 0 where that is within three standard errors."""
    change = end(curve) - start(curve)
    return change if len(curve.values) >= 6 and abs(change) > 3 * noise(curve) else 0.0


def get(run: RunFolder, key: str) -> Curve | None:
    """A metric that was measured somewhere."""
    curve = run.curves.get(key)
    return curve if curve and curve.values else None


def last(run: RunFolder) -> str:
    return f"at the end (step {run.step})"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


# --------------------------------------------------------------------------------------------------------------- checks
def expected(run: RunFolder) -> Iterator[Finding]:
    """Conditions of expect that do not hold."""
    for metric, condition in (run.settings.get("expect") or {}).items():
        curve = get(run, metric)
        if curve is None:
            yield error("expect", f"{metric} {condition} was asked for and never measured")
        elif not met(condition, curve.values[-1], metric):
            yield error("expect", f"{metric} is {curve.values[-1]:.4g} at step {curve.steps[-1]}, expected {condition}")


def finite(run: RunFolder) -> Iterator[Finding]:
    """Metrics that were not finite."""
    for key, curve in run.curves.items():
        if curve.lost:
            yield error("not finite", f"{key} was not finite at {times(curve.lost)}. A division by zero or an overflow in the "
                                      f"metric or the loss: look at the samples of these steps")


def contrast(run: RunFolder) -> Iterator[Finding]:
    """Groups whose responses all have the same reward."""
    curve = get(run, "groups/contrast")
    if curve and end(curve) < FEW:
        reward = get(run, "reward")
        side = f", with a mean reward of {end(reward):.3g}" if reward else ""
        yield warning("contrast", f"only {percent(end(curve))} of the groups have responses with different rewards "
                                  f"{last(run)}{side}: the others teach a group recipe nothing. Take prompts that are neither "
                                  f"solved nor hopeless (rollout.order, set.keep: contrast), more responses (rollout.k), or "
                                  f"a finer reward")


def collapse(run: RunFolder) -> Iterator[Finding]:
    """Entropy that is nearly gone."""
    curve = get(run, "entropy")
    if curve and start(curve) > 0 and end(curve) < COLLAPSED * start(curve):
        yield warning("entropy", f"the entropy fell from {start(curve):.3g} to {end(curve):.3g} nats per token: responses to a "
                                 f"prompt become the same, and nothing new is tried. Raise set.high (clip-higher), lower "
                                 f"train.lr, or add an entropy bonus")


def divergence(run: RunFolder) -> Iterator[Finding]:
    """Distance to the reference, and of one rollout's updates."""
    curve, old = get(run, "kl/ref"), get(run, "kl/old")
    if curve and run.settings.get("rollout") and end(curve) > FAR:
        yield warning("KL", f"the policy is {end(curve):.3g} nats per token from its reference {last(run)}, from "
                            f"{start(curve):.3g}: read the rollouts for text that pleases the reward alone, and raise set.beta "
                            f"or lower train.lr if there is any")
    if old and max(map(abs, old.values)) > STRIDE:
        step, value = max(zip(old.steps, old.values, strict=True), key=lambda point: abs(point[1]))
        yield warning("KL", f"the updates of one rollout take the policy up to {abs(value):.3g} nats per token from where it "
                            f"sampled (step {step}): lower train.lr, rollout.epochs, or raise rollout.samples_per_update")


def gap(run: RunFolder) -> Iterator[Finding]:
    """What sampler and trainer think of the same tokens."""
    curve = get(run, "gap/rollout")
    if curve and max(curve.values) > GAP:
        over = [s for s, v in zip(curve.steps, curve.values, strict=True) if v > GAP]
        yield warning("sampler", f"sampler and trainer differ by up to {max(curve.values):.3g} in a token's log-probability, by "
                                 f"more than {GAP:g} at {times(over)}: samples are off-policy without anybody wanting it. Check "
                                 f"precision, temperature and weight sync of the sampler, or correct with set.correction: "
                                 f"truncated")


def clipping(run: RunFolder) -> Iterator[Finding]:
    """Tokens that the clip takes out, and importance weights that rest on few tokens."""
    high, low, effective = (get(run, key) for key in ("clip/high", "clip/low", "ratio/effective"))
    share = sum(end(c) for c in (high, low) if c)
    if share > CLIPPED:
        yield warning("clipping", f"{percent(share)} of the tokens are clipped {last(run)} and train nothing: lower train.lr or "
                                  f"rollout.epochs, or widen set.low and set.high")
    if effective and end(effective) < EFFECTIVE:
        yield warning("ratio", f"the effective sample size is {percent(end(effective))} of the tokens {last(run)}: few large "
                               f"importance ratios make the gradient. Train on fresher samples, or truncate the ratios")


def truncation(run: RunFolder) -> Iterator[Finding]:
    """Responses that were cut."""
    curve = get(run, "truncated")
    if curve and end(curve) > CUT:
        limit = (run.settings.get("rollout") or {}).get("max_new_tokens")
        yield warning("truncated", f"{percent(end(curve))} of the responses are cut at {limit} tokens {last(run)}, from "
                                   f"{percent(start(curve))} at the start: raise rollout.max_new_tokens, or price length "
                                   f"(set.shaping: overlong)")


def unscored(run: RunFolder) -> Iterator[Finding]:
    """Responses without a reward."""
    curve = get(run, "unscored")
    if curve and max(curve.values) > 0:
        over = [s for s, v in zip(curve.steps, curve.values, strict=True) if v > 0]
        yield warning("unscored", f"up to {percent(max(curve.values))} of the responses of a step have no reward "
                                  f"({times(over)}); they count nowhere. Find them among the rollouts, and mend the reward "
                                  f"that fails on them")


def length(run: RunFolder) -> Iterator[Finding]:
    """A reward that rises with the length."""
    reward, tokens = get(run, "reward"), get(run, "length")
    if reward and tokens and moved(reward) > 0 and moved(tokens) > 0 and end(tokens) > LONGER * start(tokens):
        yield warning("length", f"the reward rises from {start(reward):.3g} to {end(reward):.3g} while responses grow from "
                                f"{start(tokens):.3g} to {end(tokens):.3g} tokens: the reward may prefer length itself. Compare "
                                f"the best and the worst responses below, or price length")


def overoptimised(run: RunFolder) -> Iterator[Finding]:
    """Held-out numbers that get worse, by more than noise, while those of training get better.

    Noise is two standard errors of a difference of means, or of a loss, whose spread is not measured, a fifth of its range.
    """
    for key, better in (("reward", 1), ("loss", -1), ("accuracy", 1)):
        train, held = get(run, key), get(run, f"eval/{key}")
        if not (train and held) or len(held.values) < 2 or (key != "reward" and run.settings.get("rollout")):
            continue
        at = max(range(len(held.values)), key=lambda k: better * held.values[k])
        after = [better * v for s, v in zip(train.steps, train.values, strict=True) if s >= held.steps[at]]
        since = Curve([0] * len(after), after, [])
        lost, spread = better * (held.values[at] - held.values[-1]), get(run, f"eval/{key}/std")
        deviation = math.sqrt(max(held.values[at] * (1 - held.values[at]), 0.0)) if key == "accuracy" else \
            spread.values[at] if spread else None
        known = deviation is not None and samples(run)
        margin = 2 * deviation * math.sqrt(2 / samples(run)) if known else (max(held.values) - min(held.values)) / 5
        if after and lost > max(margin, 1e-9) and end(since) > start(since):
            yield warning("over-optimised", f"eval/{key} was best at step {held.steps[at]} ({held.values[at]:.4g}) and is "
                                            f"{held.values[-1]:.4g} at step {held.steps[-1]}, while {key} of training goes on "
                                            f"getting better: stop there (train.patience), or hold the policy closer to its "
                                            f"reference")


def samples(run: RunFolder) -> int | None:
    """Responses, or pairs, of one evaluation."""
    groups = run.facts.get("data", {}).get("eval_groups")
    return groups and groups * (run.settings.get("rollout") or {}).get("eval_k", 1)


def learning(run: RunFolder) -> Iterator[Finding]:
    """Rewards that do not rise, accuracies of a coin."""
    reward, accuracy = get(run, "reward"), get(run, "accuracy")
    if reward and len(reward.values) >= 20 and moved(reward) <= 0:
        way = "fell" if moved(reward) < 0 else "did not rise"
        yield warning("reward", f"the reward {way}: {start(reward):.3g} at the start, {end(reward):.3g} {last(run)}. Look for "
                                f"groups with contrast, at the gradient norm and at train.lr")
    if accuracy and len(accuracy.values) >= 20 and end(accuracy) < 0.55:
        yield warning("accuracy", f"the preferred response has the higher score in {percent(end(accuracy))} of the pairs "
                                  f"{last(run)}, about as a coin would: raise train.lr, or look at the labels (prefopt data "
                                  f"describe)")


def displaced(run: RunFolder) -> Iterator[Finding]:
    """Preferred responses that lose probability."""
    share, shift = get(run, "displaced"), get(run, "shift/chosen")
    if share and shift and end(share) > 0.5 and end(shift) < 0:
        yield warning("displaced", f"in {percent(end(share))} of the pairs the margin grew while the preferred response became "
                                   f"less likely ({end(shift):.3g} nats on average): probability goes to text that nobody "
                                   f"compared. Add an SFT term (recipe rpo), or lower train.lr")


def gradient(run: RunFolder) -> Iterator[Finding]:
    """Gradients that vanish or spike."""
    for key, curve in run.curves.items():
        if not key.startswith("grad_norm") or not curve.values:
            continue
        points = list(zip(curve.steps, curve.values, strict=True))
        if zero := [s for s, v in points if v == 0]:
            yield warning("gradient", f"{key} is 0 at {times(zero)}: nothing was learnt there. No group has contrast, all is "
                                      f"clipped, or no weight trains")
        spikes = [s for n, (s, v) in enumerate(points) if v > SPIKE * median(curve.values[max(0, n - 25):n + 26]) > 0]
        if spikes:
            top = max(curve.values)
            clip = (run.settings.get("train") or {}).get("clip")
            kept = f"train.clip = {clip:g} holds them down" if clip else "train.clip is not set"
            yield warning("gradient", f"{key} is more than {SPIKE:g} times the median around it at {times(spikes)}, up to "
                                      f"{top:.3g}; {kept}. Look at the rollouts of these steps")


def times(steps: list[int]) -> str:
    """'step 3', 'steps 3, 5 and 7', '120 steps, first 3, last 999'.

    >>> times([3]), times([3, 5, 7]), times([*range(3, 100)])
    ('step 3', 'steps 3, 5 and 7', '97 steps (first 3, last 99)')
    """
    if len(steps) > 4:
        return f"{len(steps):,} steps (first {steps[0]}, last {steps[-1]})"
    return f"step{'s' * (len(steps) > 1)} " + " and ".join(filter(None, (", ".join(map(str, steps[:-1])), str(steps[-1]))))


CHECKS = (expected, finite, overoptimised, length, contrast, collapse, divergence, gap, clipping, truncation, unscored, learning,
          displaced, gradient)


def findings(run: RunFolder) -> list[Finding]:
    """Everything that is found, errors first."""
    return sorted((f for check in CHECKS for f in check(run)), key=lambda f: f.level != "error")
