"""accept slot: which tokens a step trains on, no gradient, groups (B, K, T) -> bool.

What is turned down is in no term, neither in numerators nor in the denominators of reductions.
"""
from __future__ import annotations

import torch  # noqa: F401  (doctests)

from prefopt.corrections import between, log_weight
from prefopt.ops import masked_mean
from prefopt.parts import Tokens

__all__ = ["accept_finished", "accept_sequence", "accept_token"]


def accept_finished(finished, mask) -> Tokens:
    """True on the tokens of responses that ended by themselves (overlong filtering).

    accept = finished

    Gradient    none
    Edge        all responses cut: the step is empty and takes no update
    Relations   `unfinished` of the shaping slot takes something off their reward in its place
    Departs     -
    Reference   Yu et al., DAPO, arXiv:2503.14476, section 3.4; TRL `mask_truncated_completions`

    >>> accept_finished(torch.tensor([True, False]), torch.ones(2, 1)).tolist()
    [[True], [False]]
    """
    return finished.bool()[..., None] & mask.bool()


def accept_token(logp_old, logp_rollout, mask, *, low=0.5, high=2.0) -> Tokens:
    """True on tokens whose importance weight is inside bounds.

    accept = low <= pi_old / pi_rollout <= high

    low, high   0.5, 2
    Gradient    none
    Edge        False outside the mask, and where a probability is unknown (NaN)
    Relations   `masked_out` keeps the denominators
    Departs     bounds are on old / rollout; verl puts those of its k1 test on rollout / old
    Reference   verl, rejection sampling

    >>> accept_token(torch.tensor([.9, .4]).log(), torch.tensor([.3, .6]).log(), torch.ones(2))
    tensor([False,  True])
    """
    return between(log_weight(logp_old, logp_rollout, mask), low, high) & mask.bool()


def accept_sequence(logp_old, logp_rollout, mask, *, low=0.99, high=1.01) -> Tokens:
    """True on the tokens of responses whose geometric mean of importance weights is inside bounds.

    accept = low <= exp( (1/|y|) sum_t log w_t ) <= high,   w = pi_old / pi_rollout

    low, high   0.99, 1.01
    Gradient    none
    Edge        False outside the mask
    Relations   responses of one token: `accept_token`
    Departs     bounds are on old / rollout, as in `accept_token`
    Reference   verl `seq_mean_k1`

    >>> accept_sequence(torch.tensor([[.9, .3], [.9, .9]]).log(), torch.tensor([[.6, .45], [.8, .9]]).log(), torch.ones(2, 2))
    tensor([[ True,  True],
            [False, False]])
    """
    return between(masked_mean(log_weight(logp_old, logp_rollout, mask), mask)[..., None], low, high) & mask.bool()
