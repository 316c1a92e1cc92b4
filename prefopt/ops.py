"""Small tensor operations that every part shares: masked sums, stable logs, totals over all processes."""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in float32 or better."""
    return x if x.dtype == torch.float64 else x.float()


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where mask is non-zero, else 0, in float32 or better. inf and NaN under the mask vanish, gradients too."""
    x = upcast(x)
    return torch.where(mask.bool(), x, torch.zeros((), dtype=x.dtype, device=x.device))


def log_ratios(logp: Tensor, logp_ref: Tensor, mask: Tensor) -> Tensor:
    """log pi_t - log pi_ref_t where mask, else 0. Both are raised to float32 before the difference, token by token, so
    that half precision does not cancel; the reference carries no gradient.

    >>> log_ratios(torch.tensor([-1., 0.]), torch.tensor([-3., float("-inf")]), torch.tensor([1, 0]))
    tensor([2., 0.])
    """
    return masked(logp, mask) - masked(logp_ref.detach(), mask)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over the last axis of x where mask; 0 where the mask is empty.

    >>> masked_sum(torch.tensor([1., float("nan"), 3.]), torch.tensor([1, 0, 1]))
    tensor(4.)
    """
    return masked(x, mask).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last axis of x where mask; 0 where the mask is empty.

    >>> masked_mean(torch.tensor([1., 9., 3.]), torch.tensor([1, 0, 1]))
    tensor(2.)
    """
    return masked_sum(x, mask) / mask.bool().sum(-1).clamp(min=1)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation; x is clamped to at most -1e-6, so 0 gives log(1e-6).

    >>> log1mexp(torch.tensor([-0.6931472])).exp()
    tensor([0.5000])
    """
    x = x.clamp(max=-1e-6)
    near = x > -0.6931471805599453
    # each branch sees only inputs it is accurate for, so that the unused one cannot poison the gradient
    a = torch.log(-torch.expm1(torch.where(near, x, -torch.ones_like(x))))
    b = torch.log1p(-torch.exp(torch.where(near, -torch.ones_like(x), x)))
    return torch.where(near, a, b)


def masked_logsumexp(x: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """logsumexp of x where mask; 0 (with zero gradient) where the mask is empty."""
    some = mask.any(dim, keepdim=True)
    out = x.masked_fill(~mask, float("-inf")).masked_fill(~some, 0.0).logsumexp(dim)
    return torch.where(some.squeeze(dim), out, torch.zeros_like(out))


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return processes() == 1 or dist.get_rank() == 0


def total(x: Tensor) -> Tensor:
    """x summed over all processes (x itself when there is one). Every process must call it, also with zeros."""
    if processes() > 1:
        here = x.device if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()   # nccl sums there alone
        summed = x.to(here, copy=True)
        dist.all_reduce(summed)
        return summed.to(x.device)
    return x


def most(count: int, device) -> int:
    """The largest `count` of all processes."""
    found = torch.tensor(count, device=device)
    if processes() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def gather(x: Tensor) -> tuple[Tensor, int]:
    """The 1-D tensors of all processes joined in rank order, and where this process's part starts."""
    if processes() == 1:
        return x, 0
    parts: list = [None] * processes()
    dist.all_gather_object(parts, x.detach().cpu())
    return torch.cat(parts).to(x.device), sum(len(p) for p in parts[:dist.get_rank()])
