"""margin slot: scores of a group (B, K) -> preference strength of i over j (B, K, K)."""
from __future__ import annotations

import math

import torch

from prefopt.ops import masked_sum, upcast
from prefopt.parts import Pairs

__all__ = ["anisotropic", "biased", "difference", "gaussian", "gaussian_probit", "general_preference", "graded", "optimistic",
           "shifted", "smoothed", "transported_difference"]


def difference(score) -> Pairs:
    """Bradley-Terry margin.

    m_ij = s_i - s_j

    Gradient    through both scores
    Edge        antisymmetric; 0 on the diagonal
    Relations   `shifted` subtracts a target, `biased` weighs the loser
    Departs     -
    Reference   Bradley and Terry 1952

    >>> difference(torch.tensor([[2., 1.]]))
    tensor([[[ 0.,  1.],
             [-1.,  0.]]])
    """
    return score[..., :, None] - score[..., None, :]


def shifted(score, relevance, *, gamma) -> Pairs:
    """Margin with a target.

    m_ij = s_i - s_j - gamma sign(relevance_i - relevance_j)

    gamma       the margin that a preferred response must exceed; SimPO: beta times its gamma_beta_ratio
    Gradient    through both scores
    Edge        antisymmetric: swapping the statement flips the sign, so that smoothed and corrected labels fit
    Relations   gamma = 0 is `difference`
    Departs     -
    Reference   Meng et al., SimPO, arXiv:2405.14734, eq. 5

    >>> shifted(torch.tensor([[2., 1.]]), torch.tensor([[1., 0.]]), gamma=0.5)[0]
    tensor([[ 0.0000,  0.5000],
            [-0.5000,  0.0000]])
    """
    return difference(score) - gamma * torch.sign(difference(relevance)).to(score.dtype)


def biased(score, *, bias=0.5) -> Pairs:
    """Margin that weighs the loser less, so that it is not invariant to a common shift.

    m_ij = s_i - lambda s_j

    bias        lambda in (0, 1]; CPL 0.5, CPL-KL 0.75
    Gradient    through both scores
    Edge        adding c to both scores adds (1 - lambda) c to the margin: log-probabilities cannot drift down together
    Relations   bias = 1 is `difference`
    Departs     -
    Reference   Hejna et al., Contrastive Preference Learning, arXiv:2310.13639, eq. 7

    >>> biased(torch.tensor([[2., 1.]]))[0, 0, 1]
    tensor(1.5000)
    """
    return score[..., :, None] - bias * score[..., None, :]


def smoothed(score, reward, real, *, tau=1.0, scale=1.0) -> Pairs:
    """Margin weighted by how sure a reward model is.

    m_ij = c (2 p_ij - 1) (s_i - s_j),   p_ij = sigmoid((r_i - r_j) / tau),   2 p - 1 = tanh((r_i - r_j) / (2 tau))

    tau         temperature of the reward difference
    scale       c; the diffusion code uses 10
    Gradient    through the scores only
    Edge        equal rewards give margin 0: loss log 2, zero gradient; a pair labelled against its reward is reversed
    Relations   tau -> 0 with rewards that agree with the labels is scale times `difference`
    Departs     the label keeps its order (the source relabels by the reward); no prior normalisation of rewards
    Reference   SmPO, arXiv:2506.02698, adapted to language models

    >>> smoothed(torch.tensor([[2., 1.]]), torch.tensor([[1., 0.]]), torch.ones(1, 2).bool())[0, 0, 1]    # tanh(1/2)
    tensor(0.4621)
    """
    gap = difference(torch.where(real, reward, 0.0).to(score.dtype))
    return scale * torch.tanh(gap / (2 * tau)) * difference(score)


def anisotropic(score, relevance, *, factor=2.5, best=-1.0) -> Pairs:
    """Margin stretched where the better response is of the best level.

    m_ij = c_i (s_i - s_j),   c_i = factor if relevance_i >= best else 1

    factor      TRPA 2.5
    best        relevance of the best level; with relevance = -level and level 1 the best, that is -1
    Gradient    through the scores
    Edge        factor = 1 is `difference`
    Relations   used with `mean_log_ratio` and every pair of unequal level
    Departs     -
    Reference   Su et al., TRPA, arXiv:2504.04524

    >>> anisotropic(torch.tensor([[2., 1.]]), torch.tensor([[-1., -2.]]))[0, 0]
    tensor([0.0000, 2.5000])
    """
    margin = difference(score)
    return torch.where((relevance >= best)[..., :, None], factor * margin, margin)


def optimistic(logp, logp_ref, mask, *, beta=0.1) -> Pairs:
    """DPO margin that does not let the reference's own ranking stand in for the policy's.

    m_ij = beta [ (log pi(y_i) - log pi(y_j)) - max(0, log pi_ref(y_i) - log pi_ref(y_j)) ]

    beta        as in DPO
    Gradient    through logp only
    Edge        where the reference already ranks i above j this is DPO's margin; elsewhere the reference is ignored
    Relations   the log-ratio `difference` with the reference margin clamped at 0; not antisymmetric
    Departs     -
    Reference   Hybrid-DPO (HyPO), arXiv:2602.11902

    >>> half = torch.tensor([[[-1.], [-2.]]]), torch.tensor([[[-3.], [-1.]]]), torch.ones(1, 2, 1)
    >>> optimistic(*half, beta=1.)[0, 0, 1]                                          # reference margin -2 counts as 0
    tensor(1.)
    """
    return beta * (difference(masked_sum(logp, mask)) - difference(masked_sum(logp_ref.detach(), mask)).clamp(min=0))


def transported_difference(score, relevance, transported) -> Pairs:
    """Policy margin against the reference margin of the same rank.

    m_ij = s_i - s_j - sign(relevance_i - relevance_j) q,   q the reference margin that sorting pairs with this group

    Gradient    through the scores; the assignment q is fixed for the optimiser step, which is exact for a sort
    Edge        antisymmetric; a batch of one pair gives DPO
    Relations   with q = the group's own reference margin it is `log_ratio` with `difference`
    Departs     -
    Reference   Melnyk et al., Distributional Preference Alignment via Optimal Transport, arXiv:2406.05882

    >>> transported_difference(torch.tensor([[2., 1.]]), torch.tensor([[1., 0.]]), torch.tensor([[.5, .5]]))[0, 0, 1]
    tensor(0.5000)
    """
    sign = torch.sign(difference(relevance)).to(score.dtype)
    return difference(score) - sign * transported[:, :1, None]


def graded(score, relevance, *, scale=1.0) -> Pairs:
    """Margin with a target that grows with the distance of the labels.

    m_ij = s_i - s_j - scale (psi_i - psi_j)

    scale       reward that one unit of the label must be worth
    Gradient    through both scores
    Edge        antisymmetric; a pair given as relevance (m, 0) has the target m
    Relations   `shifted` for labels 1/0; scale = 0 is `difference`
    Departs     -
    Reference   Touvron et al., Llama 2, arXiv:2307.09288, eq. 2; TRL's `margin` column

    >>> graded(torch.tensor([[2., 1.]]), torch.tensor([[3., 0.]]), scale=0.5)[0]
    tensor([[ 0.0000, -0.5000],
            [ 0.5000,  0.0000]])
    """
    return difference(score) - scale * difference(relevance).to(score.dtype)


def _mean_and_variance(outputs):
    outputs = upcast(outputs)
    return outputs[..., 0], torch.exp(2 * outputs[..., 1].clamp(-5, 2))


def gaussian(outputs) -> Pairs:
    """Margin of two uncertain rewards r ~ N(mu, s^2), so that sigmoid(m) is close to the mean of sigmoid(r_i - r_j).

    m_ij = (mu_i - mu_j) / sqrt(1 + pi (s_i^2 + s_j^2) / 8),   outputs = (mu, log s)

    Gradient    through mu and log s; none to log s outside [-5, 2], where it is clamped
    Edge        antisymmetric; a response against itself has 0 whatever s; the probability is within 0.02 for s <= 2
    Relations   s -> 0 is `difference`; `gaussian_probit` is exact for the normal link
    Departs     -
    Reference   PEARL, Zero-shot Cross-task Preference Alignment; MacKay 1992 for the approximation

    >>> s = math.log(math.sqrt(12 / math.pi))                       # pi (s^2 + s^2) / 8 = 3
    >>> gaussian(torch.tensor([[[2., s], [0., s]]]))[0, 0, 1]
    tensor(1.)
    """
    mean, variance = _mean_and_variance(outputs)
    return difference(mean) / torch.sqrt(1 + math.pi / 8 * (variance[..., :, None] + variance[..., None, :]))


def gaussian_probit(outputs) -> Pairs:
    """Margin of two uncertain rewards r ~ N(mu, s^2): Phi(m) = P(r_i > r_j). For the ranking `probit`.

    m_ij = (mu_i - mu_j) / sqrt(s_i^2 + s_j^2),   outputs = (mu, log s)

    Gradient    through mu and log s; none to log s outside [-5, 2], where it is clamped
    Edge        antisymmetric; the clamp keeps the denominator above 0.009
    Relations   `gaussian` for the logistic link
    Departs     -
    Reference   PEARL, Zero-shot Cross-task Preference Alignment; Thurstone 1927

    >>> gaussian_probit(torch.tensor([[[2., math.log(3)], [-3., math.log(4)]]]))[0, 0, 1]
    tensor(1.)
    """
    mean, variance = _mean_and_variance(outputs)
    return difference(mean) / torch.sqrt(variance[..., :, None] + variance[..., None, :])


def general_preference(embedding, gate, *, tau=0.1) -> Pairs:
    """Preference of two embeddings under a skew-symmetric operator, which may be cyclic.

    m_ij = (1/tau) sum_l gate_l (v_i[2l-1] v_j[2l] - v_i[2l] v_j[2l-1])

    K embeddings give all K^2 preferences.

    tau         temperature; GPM 0.1 with embeddings of length 1
    Gradient    through embedding and gate
    Edge        exactly antisymmetric: a matrix minus its transpose; equal responses have 0; an odd width is an error
    Relations   v = (r, 1), gate = 1, tau = 1 is `difference`; unit vectors at angles phi: sin(phi_j - phi_i) / tau
    Departs     the gate belongs to the row: rows of one prompt share it
    Reference   Zhang et al., Beyond Bradley-Terry Models (GPM), arXiv:2410.02197, eq. 6

    >>> general_preference(torch.tensor([[[3., 1.], [1., 1.]]]), torch.ones(1, 2, 1), tau=1.)
    tensor([[[ 0.,  2.],
             [-2.,  0.]]])
    """
    if embedding.shape[-1] % 2:
        raise ValueError(f"a general preference needs an embedding of even width, found {embedding.shape[-1]}: blocks of two "
                         f"dimensions are rotated against each other. Give the recipe an even `dim`")
    v = upcast(embedding)
    half = (gate.to(v.dtype) * v[..., 0::2]) @ v[..., 1::2].mT
    return (half - half.mT) / tau
