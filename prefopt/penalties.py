"""penalties slot: a cost of each token, (..., T), subtracted from the objective with a weight; 0 outside the mask.

KL estimators of the sampled token, d = log pi - log pi_ref. With samples of the policy itself:
k1 and k3 have the value KL(pi || ref) in expectation; as a loss, k1 has the gradient 0 in expectation, k2 that of
KL(pi || ref), and k3 that of KL(ref || pi). Off policy, `k3_reverse` has value and gradient of KL(pi || ref).
Two controllers, used as annotations, set the column `coefficient` for the controlled penalties.
"""
from __future__ import annotations

import math
from typing import final

import torch

from prefopt.ops import log_ratios, masked, masked_sum, total
from prefopt.parts import Rows, Tokens

__all__ = ["AdaptiveEntropy", "AdaptiveKL", "absolute", "controlled_entropy", "controlled_k2", "controlled_k3",
           "entropy_bonus", "k1", "k1_score", "k2", "k3", "k3_reverse", "k3_straight"]


def k1(logp, logp_ref, mask) -> Tokens:
    """Log-ratio: unbiased value of KL(pi || ref), of either sign.

    c = d,   d = log pi - log pi_ref

    Gradient    1 through logp: 0 in expectation, so as a loss it does nothing
    Edge        pi = ref gives 0
    Relations   `k1_score` has the same value and the right gradient; in the reward: `shaping.kl_in_reward`
    Departs     -
    Reference   Schulman, Approximating KL Divergence

    >>> k1(torch.tensor([-1., -1.]), torch.tensor([-3., 0.]), torch.tensor([1, 0]))
    tensor([2., 0.])
    """
    return log_ratios(logp, logp_ref, mask)


def absolute(logp, logp_ref, mask) -> Tokens:
    """Absolute log-ratio.

    c = |d|,   d = log pi - log pi_ref

    Gradient    sign(d) through logp
    Edge        pi = ref gives 0 with gradient 0
    Relations   -
    Departs     -
    Reference   verl `abs`

    >>> absolute(torch.tensor([-3.]), torch.tensor([-1.]), torch.ones(1))
    tensor([2.])
    """
    return log_ratios(logp, logp_ref, mask).abs()


def k2(logp, logp_ref, mask) -> Tokens:
    """Half the squared log-ratio: the on-policy gradient of KL(pi || ref).

    c = d^2 / 2,   d = log pi - log pi_ref

    Gradient    d through logp
    Edge        pi = ref gives 0 with gradient 0
    Relations   the gradient of k1 in the reward, without baseline; the value is biased, right to second order in d
    Departs     -
    Reference   Schulman, Approximating KL Divergence

    >>> k2(torch.tensor([-3.]), torch.tensor([-1.]), torch.ones(1))
    tensor([2.])
    """
    return log_ratios(logp, logp_ref, mask).square() / 2


def k3(logp, logp_ref, mask, *, limit=20.0, largest=math.inf) -> Tokens:
    """Low-variance estimate of KL(pi || ref), never negative (GRPO).

    c = exp(-d) - 1 + d,   d = log pi - log pi_ref

    limit       d is clamped to +-limit; 20
    largest     c is clamped to it; inf. verl clamps at 10, where d = -2.61
    Gradient    1 - exp(-d) through logp, that of KL(ref || pi) on policy; 0 beyond a clamp
    Edge        pi = ref gives 0 with gradient 0
    Relations   `k2` to second order in d; `k3_reverse` off policy
    Departs     TRL clamps nothing
    Reference   Schulman, Approximating KL Divergence; Shao et al., DeepSeekMath, arXiv:2402.03300, eq. 4

    >>> k3(torch.tensor([0.5]).log(), torch.tensor([1.0]).log(), torch.ones(1))             # 2 - 1 - log 2
    tensor([0.3069])
    """
    d = log_ratios(logp, logp_ref, mask).clamp(-limit, limit)
    return (torch.expm1(-d) + d).clamp(max=largest)


def k3_reverse(logp, logp_ref, log_ratio, mask, *, limit=20.0) -> Tokens:
    """Importance-weighted k3: value and gradient of KL(pi || ref) from samples of the old policy.

    c = r (exp(-d) - 1 + d),   d = log pi - log pi_ref

    limit       d and log r are clamped to +-limit; 20
    Gradient    r d through logp where the ratio is that of the token: d/dd (exp(-d) - 1 + d) + (exp(-d) - 1 + d) = d
    Edge        pi = ref gives 0 with gradient 0
    Relations   on policy the value of `k3` and the gradient of `k2`
    Departs     -
    Reference   TRL `use_bias_correction_kl`; DeepSeek-V3.2, arXiv:2512.02556

    >>> k3_reverse(torch.tensor([0.5]).log(), torch.tensor([1.0]).log(), torch.tensor([2.0]).log(), torch.ones(1))
    tensor([0.6137])
    """
    return masked(log_ratio, mask).clamp(-limit, limit).exp() * k3(logp, logp_ref, mask, limit=limit)


def with_k2_gradient(value, logp, logp_ref, mask):
    carrier = k2(logp, logp_ref, mask)
    return value.detach() + carrier - carrier.detach()


def k1_score(logp, logp_ref, mask) -> Tokens:
    """Value of k1 with its score-function gradient.

    c = k2 - sg[k2] + sg[k1]

    Gradient    d through logp: that of KL(pi || ref), on policy
    Edge        pi = ref gives 0 with gradient 0
    Relations   value of `k1`, gradient of `k2`
    Departs     -
    Reference   verl `k1+`

    >>> k1_score(torch.tensor([-3.]), torch.tensor([-1.]), torch.ones(1))
    tensor([-2.])
    """
    return with_k2_gradient(k1(logp, logp_ref, mask), logp, logp_ref, mask)


def k3_straight(logp, logp_ref, mask, *, limit=20.0, largest=math.inf) -> Tokens:
    """Value of k3 with the gradient of k2.

    c = k2 - sg[k2] + sg[k3]

    limit, largest   as in `k3`, on the value; the gradient is not clamped
    Gradient    d through logp: that of KL(pi || ref), on policy
    Edge        pi = ref gives 0 with gradient 0
    Relations   value of `k3`, gradient of `k2`
    Departs     verl documents `k3+`, and the version read raises on it
    Reference   verl `k3+`

    >>> k3_straight(torch.tensor([0.5]).log(), torch.tensor([1.0]).log(), torch.ones(1))
    tensor([0.3069])
    """
    return with_k2_gradient(k3(logp, logp_ref, mask, limit=limit, largest=largest), logp, logp_ref, mask)


def entropy_bonus(entropy, mask) -> Tokens:
    """Negative entropy of the next-token distribution: a bonus, as penalties are subtracted.

    c = -H

    Gradient    -1 through entropy
    Edge        tokens outside the mask give 0
    Relations   `controlled_entropy` with a coefficient that is set by a controller
    Departs     -
    Reference   Williams and Peng 1991; Mnih et al., A3C, arXiv:1602.01783

    >>> entropy_bonus(torch.tensor([2.]), torch.ones(1))
    tensor([-2.])
    """
    return -masked(entropy, mask)


def controlled_k2(logp, logp_ref, mask, coefficient) -> Tokens:
    """`k2` times the row's coefficient.

    c = coefficient d^2 / 2

    Gradient    coefficient d through logp
    Edge        pi = ref gives 0 with gradient 0
    Relations   with `AdaptiveKL`
    Departs     -
    Reference   Ziegler et al., arXiv:1909.08593

    >>> controlled_k2(torch.tensor([[-3.]]), torch.tensor([[-1.]]), torch.ones(1, 1), torch.tensor([0.5]))
    tensor([[1.]])
    """
    return coefficient[..., None] * k2(logp, logp_ref, mask)


def controlled_k3(logp, logp_ref, mask, coefficient, *, limit=20.0, largest=math.inf) -> Tokens:
    """`k3` times the row's coefficient.

    c = coefficient (exp(-d) - 1 + d)

    limit, largest   as in `k3`
    Gradient    coefficient (1 - exp(-d)) through logp
    Edge        pi = ref gives 0 with gradient 0
    Relations   with `AdaptiveKL`
    Departs     -
    Reference   Ziegler et al., arXiv:1909.08593

    >>> controlled_k3(torch.tensor([[0.5]]).log(), torch.tensor([[1.0]]).log(), torch.ones(1, 1), torch.tensor([0.5]))
    tensor([[0.1534]])
    """
    return coefficient[..., None] * k3(logp, logp_ref, mask, limit=limit, largest=largest)


def controlled_entropy(entropy, mask, coefficient) -> Tokens:
    """`entropy_bonus` times the row's coefficient.

    c = -coefficient H

    Gradient    -coefficient through entropy
    Edge        tokens outside the mask give 0
    Relations   with `AdaptiveEntropy`
    Departs     -
    Reference   TRL `entropy_coef`

    >>> controlled_entropy(torch.tensor([[2.]]), torch.ones(1, 1), torch.tensor([0.1]))
    tensor([[-0.2000]])
    """
    return coefficient[..., None] * entropy_bonus(entropy, mask)


# ------------------------------------------------------------------------- controllers, annotations of the whole rollout
class Controller:
    """A coefficient with memory, alike for all rows. A call returns the one in force and updates it for the next."""

    def __init__(self, **settings):
        self.settings, self.coefficient = settings, settings["start"]

    def spec(self) -> dict:
        return self.settings

    def state_dict(self) -> dict:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict) -> None:
        self.coefficient = state["coefficient"]


@final
class AdaptiveKL(Controller):
    """KL coefficient that holds the KL of a response near a target, (B, K).

    coefficient *= 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon,   KL = mean over rows of sum_t (log pi_old - log pi_ref)

    start       the first coefficient; 0.2
    target      KL of a response, in nats; 6
    horizon     rows over which the largest error, 0.2, makes a factor of about exp(0.2); 10000; must be more than n / 5
    Edge        n = 0 changes nothing; the update takes effect at the next rollout, not in this one
    Departs     verl takes the mean over tokens for KL
    Reference   Ziegler et al., Fine-Tuning Language Models from Human Preferences, arXiv:1909.08593, section 2.2

    >>> control, zero, one = AdaptiveKL(target=1.0, horizon=10), torch.zeros(1, 1, 1), torch.ones(1, 1)
    >>> [control(zero + 5, zero, one[..., None], one.bool())[0] for _ in range(2)]              # 0.2, then 0.2 (1 + .2 / 10)
    [tensor([0.2000]), tensor([0.2040])]
    """

    def __init__(self, *, start=0.2, target=6.0, horizon=10000):
        super().__init__(start=start, target=target, horizon=horizon)

    def __call__(self, logp_old, logp_ref, mask, real) -> Rows:
        kl = masked(log_ratios(logp_old, logp_ref, mask).sum(-1), real)
        rows, horizon = int(total(real.sum())), self.settings["horizon"]
        if rows >= 5 * horizon:
            raise ValueError(f"AdaptiveKL: a rollout of {rows} rows against a horizon of {horizon} could turn the sign of the "
                             f"coefficient: set horizon above {rows // 5}")
        out = torch.full_like(kl, self.coefficient)
        error = float(total(kl.double().sum())) / max(rows, 1) / self.settings["target"] - 1
        self.coefficient *= 1 + min(max(error, -0.2), 0.2) * rows / horizon
        return out


@final
class AdaptiveEntropy(Controller):
    """Entropy coefficient that rises while the mean entropy of tokens is below a target and falls above it, (B, K).

    coefficient = clip( coefficient + rate (target - H), 0, largest ),   H = mean entropy over the rollout's tokens

    target      entropy per token, in nats
    start       the first coefficient; 0
    rate        change of the coefficient per nat and rollout; 0.005
    largest     1
    Edge        no token changes nothing; the update takes effect at the next rollout, not in this one
    Departs     ours: in proportion to the error; TRL goes up or down by a fixed step, and switches off above the target
    Reference   TRL `entropy_target`; He et al., Skywork-OR1, arXiv:2505.22312

    >>> control, one = AdaptiveEntropy(target=1.0, rate=0.5), torch.ones(1, 1)
    >>> [float(control(0.5 * one[..., None], one[..., None], one.bool())) for _ in range(2)]
    [0.0, 0.25]
    """

    def __init__(self, *, target, start=0.0, rate=0.005, largest=1.0):
        super().__init__(target=target, start=start, rate=rate, largest=largest)

    def __call__(self, entropy, mask, real) -> Rows:
        counted = mask.bool() & real.bool()[..., None]
        entropies, tokens = masked_sum(entropy, counted), int(total(counted.sum()))
        out = torch.full_like(entropies, self.coefficient)
        mean = float(total(entropies.double().sum())) / max(tokens, 1)
        if tokens:
            changed = self.coefficient + self.settings["rate"] * (self.settings["target"] - mean)
            self.coefficient = min(max(changed, 0.0), self.settings["largest"])
        return out
