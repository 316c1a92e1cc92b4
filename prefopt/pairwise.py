"""ranking slot, pairwise: margin (B, K, K) -> loss of the statement 'i beats j' (B, K, K).

The objective weighs every ordered pair with its label, so soft labels, smoothing and flip correction fit all of them.
Logistic losses are -logsigmoid throughout: torch's softplus drops its tail beyond 20, which is 2e-9 in float64.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from prefopt.parts import Pairs

__all__ = ["apo_down", "discopop", "exo", "hinge", "logistic", "squared"]


def logistic(margin) -> Pairs:
    """Logistic loss (Bradley-Terry negative log-likelihood).

    l = -log sigmoid(m)

    Gradient    -sigmoid(-m)
    Edge        m = 0 gives log 2; no overflow at any m
    Relations   soft label p: p l(m) + (1 - p) l(-m), stationary at m = logit(p); l(-m) = l(m) + m
    Departs     -
    Reference   Rafailov et al., DPO, arXiv:2305.18290, eq. 7

    >>> logistic(torch.tensor([0., 1.]))
    tensor([0.6931, 0.3133])
    """
    return -F.logsigmoid(margin)


def squared(margin, *, goal) -> Pairs:
    """Squared distance of the margin to a goal.

    l = (m - goal)^2

    goal        IPO: 1 / (2 tau)
    Gradient    2 (m - goal)
    Edge        soft label p: the minimiser is (2 p - 1) goal; a tie pulls the margin to 0
    Relations   IPO with `mean_log_ratio(beta=1)` (normalised) or `log_ratio(beta=1)` (summed)
    Departs     -
    Reference   Azar et al., IPO, arXiv:2310.12036, eq. 17

    >>> squared(torch.tensor([2.]), goal=1.)
    tensor([1.])
    """
    return (margin - goal) ** 2


def hinge(margin, *, delta=1.0) -> Pairs:
    """Hinge loss.

    l = max(0, delta - m)

    delta       the margin from which on a pair is good enough; 1
    Gradient    -1 below delta, exactly 0 at and beyond it
    Edge        m = 0 gives delta
    Relations   with `log_ratio`: hinge-norm of RSO and TRL's `hinge`; with `log_likelihood`: SLiC
    Departs     -
    Reference   Zhao et al., SLiC-HF, arXiv:2305.10425; Liu et al., RSO, arXiv:2309.06657, eq. 10

    >>> hinge(torch.tensor([0.25, 1.5]))
    tensor([0.7500, 0.0000])
    """
    return (delta - margin).relu()


def exo(margin, *, label_smoothing=1e-3) -> Pairs:
    """Exact optimisation: reverse KL between the policy's pair distribution and the smoothed label.

    l = sigmoid(m) (log sigmoid(m) - log(1 - eps)) + sigmoid(-m) (log sigmoid(-m) - log eps)

    label_smoothing   eps > 0, the probability of the label being wrong; 1e-3
    Gradient    through both the probabilities and their logarithms
    Edge        eps must be positive: a hard label has infinite reverse KL
    Relations   minimised at m = logit(1 - eps), as smoothed `logistic` is, which is the forward KL
    Departs     the two constants are exact; TRL rounds them to float32 (2e-8 relative)
    Reference   Ji et al., EXO, arXiv:2402.00856; TRL `exo_pair`

    >>> exo(torch.tensor([0.]), label_smoothing=0.5).abs() < 1e-7
    tensor([True])
    """
    return (torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
            + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing)))


def discopop(margin, *, tau=0.05) -> Pairs:
    """Log-ratio modulated loss, found by search over programs.

    l = (1 - g) softplus(-m) + g exp(-m),   g = sigmoid(m / tau)

    tau         temperature of the gate; 0.05
    Gradient    through m and g; not monotone: at tau = 0.05 minimum at m = -0.119, maximum at m = 0.072, slope 0.784 at 0
    Edge        exp(-m) is reached with g ~ 0 for m << 0: evaluated as exp(log g - m), which cannot overflow for tau < 1
    Relations   tau -> inf is the mean of the logistic and the exponential loss
    Departs     -
    Reference   Lu et al., DiscoPOP, arXiv:2406.08414; TRL `discopop`

    >>> discopop(torch.tensor([0.]))                                # (log 2 + 1) / 2
    tensor([0.8466])
    """
    return torch.exp(F.logsigmoid(margin / tau) - margin) - torch.sigmoid(-margin / tau) * F.logsigmoid(margin)


def apo_down(score, margin) -> Pairs:
    """Anchored preference optimisation that lowers the chosen response and widens the gap.

    l_ij = sigmoid(s_i) + 1 - sigmoid(m_ij)

    Gradient    through both
    Edge        s = m = 0 gives 1
    Relations   `pointwise.apo_zero` raises the chosen and lowers the rejected response
    Departs     -
    Reference   D'Oosterlinck et al., APO, arXiv:2408.06266; TRL `apo_down`

    >>> apo_down(torch.zeros(1, 2), torch.zeros(1, 2, 2))[0, 0, 1]
    tensor(1.)
    """
    return torch.sigmoid(score)[..., :, None] + torch.sigmoid(-margin)
