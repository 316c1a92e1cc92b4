"""ranking slot, pairwise: margin (B, K, K) -> loss of the statement 'i beats j' (B, K, K).

The objective weighs every ordered pair with its label, so soft labels, smoothing and flip correction fit all of them.
Logistic losses are -logsigmoid throughout: torch's softplus drops its tail beyond 20, which is 2e-9 in float64.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from prefopt.margins import difference
from prefopt.ops import upcast
from prefopt.parts import Pairs, PartModule

__all__ = ["Davidson", "apo_down", "aspect_logistic", "davidson", "discopop", "exo", "hinge", "logistic", "probit", "squared",
           "squared_logits", "squared_rewards"]


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


def squared_rewards(margin, reward, *, beta=0.1) -> Pairs:
    """Squared distance of the margin to the difference of rewards.

    l_ij = (m_ij - (r_i - r_j) / beta)^2

    beta        weight of the KL to the reference; EGPO 0.1, with `log_ratio(beta=1)`
    Gradient    2 (m_ij - (r_i - r_j) / beta) through the margin only
    Edge        symmetric, so that labels only say which pairs count; an unknown reward (NaN) stands as 0: leave its pairs out
                with `by_reward`
    Relations   rewards 1 and 0: `squared` with goal 1 / beta; over all pairs of a group, beta^2 times it: `listwise.copg`
    Departs     -
    Reference   Zhou et al., EGPO, arXiv:2503.08942; Gao et al., REBEL, arXiv:2404.16767

    >>> squared_rewards(torch.tensor([[[0., 2.], [-2., 0.]]]), torch.tensor([[0.75, 0.25]]), beta=0.5)[0]
    tensor([[0., 1.],
            [1., 0.]])
    """
    return (margin - difference(upcast(reward).nan_to_num(nan=0.0)).to(margin.dtype) / beta) ** 2


def squared_logits(margin, wins, *, beta=0.1, limit=1000.0) -> Pairs:
    """Squared distance of the margin to the log-odds of winning, which is the score of a general preference model.

    l_ij = (m_ij - logit(w_ij) / beta)^2,   the goal clamped to +-limit

    beta        temperature; with `log_ratio(beta=1)`
    limit       1000, as the source's switch
    Gradient    2 (m_ij - goal) through the margin only
    Edge        a certain win has the goal +limit: hard labels want `squared`; NaN, where nobody compared, stands as 1/2
    Relations   `squared` with soft labels has the goal (w_ij - 1/2) / beta
    Departs     -
    Reference   Zhang et al., Beyond Bradley-Terry Models (GPO), arXiv:2410.02197

    >>> squared_logits(torch.zeros(1, 2, 2), torch.tensor([[[.5, .75], [.25, .5]]]), beta=1.)[0, 0, 1]      # log(3)^2
    tensor(1.2069)
    """
    goal = torch.logit(upcast(wins).nan_to_num(nan=0.5)) / beta
    return (margin - goal.clamp(-limit, limit).to(margin.dtype)) ** 2


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


def probit(margin) -> Pairs:
    """Negative log-likelihood under a normal link.

    l = -log Phi(m)

    Gradient    -phi(m) / Phi(m), which grows like m for m << 0
    Edge        m = 0 gives log 2; exact far into the tail
    Relations   `logistic` with the normal distribution in the place of the logistic one
    Departs     -
    Reference   Thurstone 1927

    >>> probit(torch.tensor([0.]))
    tensor([0.6931])
    """
    return -torch.special.log_ndtr(margin)


def davidson(margin, labels, *, nu=1.0) -> Pairs:
    """Bradley-Terry with ties.

    l = -log (exp(m/2) / Z), of a tie -log (nu / Z),   Z = exp(m/2) + exp(-m/2) + nu

    A pair is a tie where both of its labels weigh the same and more than 0 (`tied`, or wins of 1/2).

    nu          how likely ties are: P(tie) = nu / (2 + nu) between equals; greater than 0
    Gradient    through the margin, and through nu where it is learned (`Davidson`)
    Edge        m = 0, nu = 1: log 3 for a win and for a tie
    Relations   nu -> 0 is `logistic` on pairs that are no ties
    Departs     -
    Reference   Davidson, On Extending the Bradley-Terry Model to Accommodate Ties, 1970

    >>> labels = torch.tensor([[[0., 1.], [0., 0.]], [[0., .5], [.5, 0.]]])
    >>> davidson(torch.zeros(2, 2, 2), labels, nu=2.)[:, 0, 1]              # log 4, log 2
    tensor([1.3863, 0.6931])
    """
    log_nu = torch.as_tensor(nu, dtype=margin.dtype, device=margin.device).log()
    log_z = torch.logaddexp(torch.logaddexp(margin / 2, -margin / 2), log_nu)
    tie = (labels == labels.mT) & (labels > 0)
    return log_z - torch.where(tie, log_nu, margin / 2)


class Davidson(PartModule):
    """Bradley-Terry with ties, whose frequency is learned.

    l = davidson(m, labels, nu = exp(log_nu))

    nu          where it starts; 1
    Gradient    through the margin and log_nu
    Edge        without ties nu goes to 0
    Relations   `davidson` with a fixed nu
    Departs     -
    Reference   Davidson 1970

    >>> ties = Davidson(nu=2.0); ties.setup(layers=1, width=1)
    >>> ties(torch.zeros(1, 2, 2), torch.full((1, 2, 2), .5)).detach().exp()[0, 0, 1]       # P(tie) = 1/2
    tensor(2.)
    """

    def __init__(self, *, nu=1.0):
        nn.Module.__init__(self)
        self.nu = nu

    def setup(self, *, layers: int, width: int) -> None:
        self.log_nu = nn.Parameter(torch.tensor(math.log(self.nu)))

    def forward(self, margin, labels) -> Pairs:
        self.check_setup()
        return davidson(margin, labels, nu=self.log_nu.exp())

    def spec(self) -> dict:
        return {"nu": self.nu}


def aspect_logistic(outputs, *, aspect=0) -> Pairs:
    """Logistic loss of one aspect of a reward model with a head per aspect.

    l_ij = -log sigmoid(f_i - f_j),   f = outputs_aspect

    aspect      which output, from 0
    Gradient    through outputs
    Edge        counted on `aspect_pairs`
    Relations   aspect = 0 is `logistic` with the score `head`; `aspect_error` regresses instead
    Departs     -
    Reference   Wang et al., ArmoRM, arXiv:2406.12845; Bradley and Terry 1952

    >>> aspect_logistic(torch.tensor([[[0., 1.], [0., 0.]]]), aspect=1)[0, 0, 1]
    tensor(0.3133)
    """
    return logistic(difference(upcast(outputs)[..., aspect]))


# ------------------------------------------------------------------ terms: which pairs a loss counts
def aspect_pairs(rewards, real, *, aspect) -> Pairs:
    """1 where i is labelled higher than j on that aspect; missing labels (NaN) compare with nothing."""
    label = torch.where(real, rewards[..., aspect], torch.nan)
    return (label[..., :, None] > label[..., None, :]).double()
