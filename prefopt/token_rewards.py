"""provider of `reward_at`: what the policy receives at each token, (B, K, T), 0 outside the mask. No gradient."""
from __future__ import annotations

import torch

from prefopt.ops import log_ratios, masked
from prefopt.parts import Tokens

__all__ = ["at_end", "at_end_with_coefficient", "at_end_with_kl", "steps_and_end"]


def at_end(reward, mask) -> Tokens:
    """The response's reward at its last token that trains.

    r_t = R [t is the last token]

    Edge        a response without a token receives nothing
    Relations   `reward_to_go` of it with gamma = 1 is `broadcast` of the reward
    Departs     -
    Reference   Ziegler et al., arXiv:1909.08593

    >>> at_end(torch.tensor([[2.]]), torch.tensor([[[1, 1, 0]]]))
    tensor([[[0., 2., 0.]]])
    """
    mask = mask.bool()
    place = mask.cumsum(-1)
    return masked(reward[..., None].expand(mask.shape), mask & (place == place[..., -1:]))


def at_end_with_kl(reward, mask, logp_old, logp_ref, *, beta=0.05) -> Tokens:
    """The response's reward at its last token, and a KL penalty at each.

    r_t = R [t is the last token] - beta (logp_old_t - logp_ref_t)

    beta        weight of the KL; 0.05
    Edge        at tokens outside the mask, tool output included, there is no KL
    Relations   the sum over t is `kl_in_reward`
    Departs     -
    Reference   Ziegler et al., arXiv:1909.08593; verl `apply_kl_penalty`

    >>> at_end_with_kl(torch.tensor([[2.]]), torch.ones(1, 1, 2), -torch.ones(1, 1, 2), torch.full((1, 1, 2), -3.), beta=0.1)
    tensor([[[-0.2000,  1.8000]]])
    """
    return at_end(reward, mask) - beta * log_ratios(logp_old, logp_ref, mask)


def at_end_with_coefficient(reward, mask, logp_old, logp_ref, coefficient) -> Tokens:
    """`at_end_with_kl` with a weight that a controller sets.

    r_t = R [t is the last token] - coefficient (logp_old_t - logp_ref_t)

    Edge        as `at_end_with_kl`
    Relations   `at_end_with_kl` with beta = coefficient
    Departs     -
    Reference   Ziegler et al., arXiv:1909.08593, section 2.2

    >>> two = torch.ones(1, 1, 2)
    >>> at_end_with_coefficient(torch.tensor([[2.]]), two, -two, -3 * two, torch.tensor([[0.1]]))
    tensor([[[-0.2000,  1.8000]]])
    """
    return at_end(reward, mask) - coefficient[..., None] * log_ratios(logp_old, logp_ref, mask)


def steps_and_end(reward, step_reward, mask, *, weight=1.0) -> Tokens:
    """Rewards of steps where they end, and the response's at its last token.

    r_t = weight s_t [a step ends at t] + R [t is the last token]

    weight      of the step rewards; 1
    Edge        NaN is no step; a step that ends outside the mask is not counted: it ends at a token that trains
    Relations   without steps, or weight = 0: `at_end`
    Departs     -
    Reference   Lightman et al., arXiv:2305.20050; Shao et al., GRPO, arXiv:2402.03300

    >>> steps_and_end(torch.tensor([[2.]]), torch.tensor([[[0.5, float("nan"), 1.]]]), torch.ones(1, 1, 3))
    tensor([[[0.5000, 0.0000, 3.0000]]])
    """
    return weight * masked(step_reward, mask.bool() & ~torch.isnan(step_reward)) + at_end(reward, mask)
