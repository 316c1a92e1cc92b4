"""Implicit rewards: what a policy and a reference say about tokens, steps and responses, and what to do with it.

A response is a row of token log-ratios. Where its steps end is a list of positions, one past the last token of each step.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from prefopt.ops import log_ratios, masked, masked_mean

__all__ = ["AGGREGATIONS", "best_of_n", "blank_line", "cumulative", "last", "lowest", "mean", "newline", "normalised",
           "offsets", "outcome", "prime_advantages", "product", "regex", "rloo_returns", "sentence", "step_ends",
           "step_rewards", "token_rewards", "total", "weighted_vote"]


# ------------------------------------------------------------------------------------------------- rewards
def token_rewards(logp: Tensor, logp_ref: Tensor, mask: Tensor, *, beta: float = 0.05) -> Tensor:
    """Reward of each token (N, T), 0 outside the mask.

    r_t = beta (log pi_t - log pi_ref_t)

    Edge        without a reference give zeros: r_t = beta log pi_t
    Reference   Yuan et al., Free Process Rewards without Process Labels, arXiv:2412.01981

    >>> token_rewards(torch.tensor([[-1., -2.]]), torch.tensor([[-3., -2.]]), torch.ones(1, 2), beta=0.5)
    tensor([[1., 0.]])
    """
    return beta * log_ratios(logp, logp_ref, mask)


def cumulative(rewards: Tensor) -> Tensor:
    """Value after each token.

    Q_t = sum_{i <= t} r_i

    >>> cumulative(torch.tensor([1., 0., 2.]))
    tensor([1., 1., 3.])
    """
    return rewards.cumsum(-1)


def outcome(rewards: Tensor) -> Tensor:
    """Reward of the response, R = Q_T.

    >>> outcome(torch.tensor([1., 0., 2.]))
    tensor(3.)
    """
    return rewards.sum(-1)


def step_rewards(rewards: Tensor, ends: Sequence[int]) -> Tensor:
    """Reward of each step of one response (T) -> (S).

    r_k = Q_{e_k} - Q_{e_{k-1}},   Q_{e_0} = 0: the sum of the step's tokens

    Edge        they add up to the outcome where the last end is T; a step without tokens has 0

    >>> step_rewards(torch.tensor([1., 0., 2., 3.]), [2, 4])
    tensor([1., 5.])
    """
    sizes = torch.diff(torch.tensor([0, *ends])).tolist()
    return torch.stack([part.sum() for part in rewards[:sum(sizes)].split(sizes)]) if sizes else rewards[:0]


# ------------------------------------------------------------------------------------------------- steps of a text
Splitter = Callable[[str], list[int]]


def offsets(ends: Sequence[int]) -> Splitter:
    """Steps that end at these characters, whatever the text.

    >>> offsets([3, 7])("any text")
    [3, 7]
    """
    return lambda text: list(ends)


def regex(pattern: str) -> Splitter:
    r"""Steps that end where the pattern does; what is left is the last step, and pieces of white space end none.

    >>> regex(r"(?=Step \d)")("Step 1: add. Step 2: carry.")
    [13, 27]
    """
    def split(text: str) -> list[int]:
        ends, start = [], 0
        for end in (*(m.end() for m in re.finditer(pattern, text)), len(text)):
            if text[start:end].strip():
                ends.append(end)
                start = end
            elif ends:                                        # white space goes with the step before
                ends[-1] = start = end
        return ends
    return split


newline, blank_line, sentence = regex(r"\n"), regex(r"\n\s*\n"), regex(r"[.!?](?:\s+|$)")
SPLITTERS = {"newline": newline, "blank_line": blank_line, "sentence": sentence}


def step_ends(text: str, splitter: Splitter, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Where the steps of a response end in tokens, given the characters that each token covers (a tokenizer's offsets).

    A token belongs to the step in which it starts; steps without a token of their own are left out.

    >>> step_ends("a b\\nc", newline, [(0, 1), (1, 3), (3, 4), (4, 5)])
    [3, 4]
    """
    starts = [start for start, _ in spans]
    return list(dict.fromkeys(n for n in (sum(s < end for s in starts) for end in splitter(text)) if n))


def steps_of(words: Sequence[str], rewards: Sequence[float], splitter: Splitter, *, last: bool = False) -> list[dict]:
    """Steps of a response given as the texts of its tokens, with the sum of their tokens' rewards, or that of the last one.

    >>> steps_of(["a ", "b. ", "c"], [1.0, 2.0, 4.0], sentence)
    [{'start': 0, 'end': 2, 'reward': 3.0}, {'start': 2, 'end': 3, 'reward': 4.0}]
    """
    places = list(accumulate(map(len, words), initial=0))
    ends = step_ends("".join(words), splitter, list(pairwise(places)))
    return [{"start": a, "end": b, "reward": float(rewards[b - 1] if last else sum(rewards[a:b]))}
            for a, b in pairwise([0, *ends])]


# ------------------------------------------------------------------------------------------------- aggregation
def _some(steps: Tensor) -> Tensor:
    if not steps.shape[-1]:
        raise ValueError("a response without steps has no reward: mark empty responses before they are scored")
    return steps


def lowest(steps: Tensor) -> Tensor:
    """min_k r_k, the worst step."""
    return _some(steps).amin(-1)


def mean(steps: Tensor) -> Tensor:
    """(1/S) sum_k r_k."""
    return _some(steps).mean(-1)


def last(steps: Tensor) -> Tensor:
    """r_S; of cumulative values the outcome."""
    return _some(steps)[..., -1]


def total(steps: Tensor) -> Tensor:
    """sum_k r_k; of implicit rewards the outcome."""
    return _some(steps).sum(-1)


def product(steps: Tensor) -> Tensor:
    """prod_k p_k of probabilities, by the sum of logarithms.

    >>> product(torch.tensor([0.5, 0.5]))
    tensor(0.2500)
    """
    return _some(steps).log().sum(-1).exp()


AGGREGATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "min": lowest, "mean": mean, "last": last, "sum": total, "prod": product}


# ------------------------------------------------------------------------------------------------- choice among n
def best_of_n(scores: Sequence[float]) -> int:
    """Which response has the highest score, the first of equals.

    >>> best_of_n([0.1, 0.7, 0.7])
    1
    """
    return max(range(len(scores)), key=lambda i: scores[i])


def weighted_vote(answers: Sequence[Hashable], weights: Sequence[float]) -> Hashable:
    """The answer with the largest sum of weights, the first of equals; weights of 1 are the majority vote.

    With implicit rewards weights are sigmoid(score), whose scale (the beta of scoring) then matters.

    >>> weighted_vote(["4", "5", "5"], [0.9, 0.3, 0.4])
    '4'
    """
    sums: dict[Hashable, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        sums[answer] = sums.get(answer, 0.0) + weight
    return max(sums, key=sums.__getitem__)


# ------------------------------------------------------------------------------------------------- PRIME
def _to_go(x: Tensor) -> Tensor:
    """sum_{i >= t} x_i."""
    return x.flip(-1).cumsum(-1).flip(-1)


def normalised(rewards: Tensor, mask: Tensor) -> Tensor:
    """Token rewards scaled by the largest return in the batch.

    r_t / (max over the batch |sum_{i >= t} r_i| + 1e-6)

    Reference   Cui et al., PRIME, arXiv:2502.01456 (`batch_norm` of the released code)

    >>> normalised(torch.tensor([[1., 3.], [0., -2.]]), torch.ones(2, 2))
    tensor([[ 0.2500,  0.7500],
            [ 0.0000, -0.5000]])
    """
    rewards = masked(rewards, mask)
    return rewards / (_to_go(rewards).abs().max() + 1e-6)


def rloo_returns(rewards: Tensor, mask: Tensor, group: Tensor, scored: Tensor | None = None) -> Tensor:
    """Returns of one source of token rewards (N, T) against the other responses of the group (N).

    A_t = sum_{i >= t} [ r_i n/(n-1) - (1/(n-1)) sum_j m_j ],   m_j the mean reward of response j over its scored tokens

    mask        response tokens
    scored      tokens that the source rewards, by default all of the mask; of an outcome the last token
    Edge        the mean over the scored tokens of what is summed is m_i minus the mean of the others; a group of one is an
                error
    Reference   Cui et al., PRIME, arXiv:2502.01456

    >>> rloo_returns(torch.tensor([[0., 1.], [0., 0.]]), torch.ones(2, 2), torch.zeros(2).long(), torch.tensor([[0, 1]] * 2))
    tensor([[ 1.,  1.],
            [-1., -1.]])
    """
    scored = mask if scored is None else scored
    index = torch.unique(group, return_inverse=True)[1]
    n = torch.bincount(index)[index]
    if bool((n < 2).any()):
        raise ValueError(f"leave-one-out needs at least two responses to every prompt, and {int((n == 1).sum())} prompts have "
                         f"one: sample more, or drop them")
    means = masked_mean(rewards, scored)
    sums = torch.zeros(len(n), dtype=means.dtype, device=means.device).index_add(0, index, means)[index]
    n = n.to(means.dtype)[:, None]
    return masked(_to_go(masked(rewards * n / (n - 1) - sums[:, None] / (n - 1), scored)), mask)


def prime_advantages(returns: Sequence[Tensor], mask: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """The sources' returns added up and whitened over the tokens of the batch.

    A = (G - mean G) / sqrt(var G + 1e-8),   G = sum_s w_s G_s, variance over n - 1 tokens

    weights     1 each in the released code, whose `rm_coef` does not reach the advantage
    Reference   Cui et al., PRIME, arXiv:2502.01456

    >>> prime_advantages([torch.tensor([[1., -1.]])], torch.ones(1, 2))
    tensor([[ 0.7071, -0.7071]])
    """
    some = mask.bool()
    sums = sum(w * g for w, g in zip(weights or [1.0] * len(returns), returns, strict=True))
    values = sums[some]
    return masked((sums - values.mean()) * torch.rsqrt(values.var() + 1e-8), some)
