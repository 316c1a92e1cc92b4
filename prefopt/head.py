"""Reducers of next-token distributions, from hidden states through a head that only ever holds a chunk of logits.

`logp` and `entropy`, which nearly all methods read, have a backward pass of their own: it computes a chunk's logits once more
and turns them into the gradient in place. What else there is goes through checkpoints, chunk by chunk.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from prefopt.models import Trunk
from prefopt.ops import upcast

__all__ = ["CHUNK_BYTES", "ONE", "TWO", "reduced", "reducers"]

CHUNK_BYTES = 64 * 2**20                                      # float32 logits of one chunk


# ------------------------------------------------------------------------------------------------------------- reducers
def logp(logits: Tensor, token: Tensor) -> Tensor:
    """Log-probability of the token that follows."""
    return logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor, token: Tensor) -> Tensor:
    """H = log Z - sum_v p_v logit_v."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def collision(logits: Tensor, token: Tensor) -> Tensor:
    """log sum_v p_v^2."""
    return (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)


def peak(logits: Tensor, token: Tensor) -> Tensor:
    """max_v log p_v: the token that follows is the most likely one where this is its `logp`."""
    return logits.amax(-1) - logits.logsumexp(-1)


def mass_above(logits: Tensor, token: Tensor) -> Tensor:
    """sum of p_v over all v more likely than the token that follows: it is in the nucleus of top_p where this is below top_p."""
    with torch.no_grad():
        above = logits > logits.gather(-1, token[:, None])
    return torch.where(above, logits.softmax(-1), 0).sum(-1)


def token_kl(logits: Tensor, token: Tensor, logits_ref: Tensor) -> Tensor:
    """KL(reference || policy) = sum_v p_ref (log p_ref - log p)."""
    log_ref = logits_ref.log_softmax(-1)
    return (log_ref.exp() * (log_ref - logits.log_softmax(-1))).sum(-1)


ONE = {"logp": logp, "entropy": entropy, "collision": collision, "peak": peak, "mass_above": mass_above}     # of one distribution
TWO = {"token_kl": token_kl}                                              # of the policy's and the reference's


# ----------------------------------------------------------------------------------------------------- any of them, any head
def chunks(count: int, vocabulary: int, chunk: int | None) -> list[slice]:
    """Runs of positions whose float32 logits take CHUNK_BYTES, and never fewer than 16."""
    size = max(16, CHUNK_BYTES // (4 * vocabulary)) if chunk is None else chunk
    return [slice(start, start + size) for start in range(0, count, size)]


def reduced(hidden: Tensor, token: Tensor, head: Callable[[Tensor], Tensor], names: Iterable[str], *,
            hidden_ref: Tensor | None = None, head_ref: Callable[[Tensor], Tensor] | None = None,
            vocabulary: int = 1, chunk: int | None = None) -> dict[str, Tensor]:
    """Reducers of the next-token distributions, chunk positions at a time; each chunk is recomputed in backward."""
    names = list(names)

    def piece(h: Tensor, t: Tensor, h_ref: Tensor | None):
        logits = upcast(head(h))
        with torch.no_grad():
            logits_ref = upcast(head_ref(h_ref)) if h_ref is not None else None
        return tuple(ONE[n](logits, t) if n in ONE else TWO[n](logits, t, logits_ref) for n in names)

    pieces = []
    for part in chunks(len(hidden), vocabulary, chunk):
        arguments = hidden[part], token[part], hidden_ref[part] if hidden_ref is not None else None
        pieces.append(checkpoint(piece, *arguments, use_reentrant=False) if torch.is_grad_enabled() else piece(*arguments))
    if not pieces:
        return {n: upcast(hidden).sum(-1) for n in names}
    return {n: torch.cat([p[i] for p in pieces]) for i, n in enumerate(names)}


def reducers(trunk: Trunk, hidden: Tensor, token: Tensor, names: Iterable[str], *, hidden_ref: Tensor | None = None,
             head_ref: Callable[[Tensor], Tensor] | None = None, chunk: int | None = None) -> dict[str, Tensor]:
    """`reduced` by a model's own head, the fast way where there is one."""
    names = list(names)
    if not len(hidden) or not {*names} <= {"logp", "entropy"} or not linear(trunk.output):
        return reduced(hidden, token, trunk.head, names, hidden_ref=hidden_ref, head_ref=head_ref, vocabulary=trunk.vocabulary,
                       chunk=chunk)
    parts = chunks(len(hidden), trunk.vocabulary, chunk)
    found = Projected.apply(hidden, trunk.output.weight, trunk.output.bias, token, trunk, "entropy" in names, parts,
                            torch.is_grad_enabled())
    return {n: v for n, v in zip(("logp", "entropy"), found, strict=True) if n in names}


def linear(head: nn.Module) -> bool:
    """Whether a head is a whole matrix and nothing else."""
    return type(head) is nn.Linear and not isinstance(head.weight, DTensor) and not head._forward_hooks


# ------------------------------------------------------------------------------------------------- logp and entropy, in place
class Projected(torch.autograd.Function):
    """log p_t and, where it is wanted, H of softmax(z), z = cap tanh(scale (W h + b) / cap) / temperature.

    d log p_t / d z_v = [v = t] - p_v;   d H / d z_v = -p_v (log p_v + H)

    Log-probabilities are kept for backward where one chunk holds them all, else computed again. The gradient of the head is
    summed in float32 or better.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, token, trunk, wants_entropy, parts, differentiable):
        device = hidden.device.type
        low = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        ctx.kind = torch.get_autocast_dtype(device) if low else hidden.dtype
        ctx.precision = torch.autocast(device, ctx.kind) if low else nullcontext()
        found, entropies, ctx.kept = [], [], None
        for part in parts:
            log_p, log_z = log_probabilities(trunk, hidden[part])
            found.append(log_p.gather(-1, token[part, None]).squeeze(-1))
            entropies.append(-log_p.exp().mul_(log_p).sum(-1) if wants_entropy else found[-1])
        if differentiable and len(parts) == 1:
            ctx.kept = log_p, log_z
        H = torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, bias, token, H)
        ctx.trunk, ctx.parts, ctx.wants_entropy = trunk, parts, wants_entropy
        return torch.cat(found), H if wants_entropy else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, bias, token, H = ctx.saved_tensors
        trunk, wants = ctx.trunk, ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=upcast(weight[:0]).dtype) if wants[1] else None
        d_bias = torch.zeros_like(bias, dtype=upcast(bias[:0]).dtype) if wants[2] else None
        w = None
        for part in ctx.parts:
            made, ctx.kept = ctx.kept, None
            if made is None:
                with ctx.precision:
                    made = log_probabilities(trunk, hidden[part])
            d = d_logits(trunk, *made, token[part], g_logp[part], H[part], g_entropy[part] if ctx.wants_entropy else None)
            del made
            d, h, w = d.to(ctx.kind), hidden[part].to(ctx.kind), weight.to(ctx.kind) if w is None else w
            if wants[0]:
                d_hidden[part] = d @ w
            if wants[1]:
                d_weight.addmm_(d.T, h) if d_weight.dtype == ctx.kind else d_weight.add_(d.T @ h)
            if wants[2]:
                d_bias += d.sum(0, dtype=d_bias.dtype)
        return (d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype),
                d_bias if d_bias is None else d_bias.to(bias.dtype), *[None] * 5)


@torch.no_grad()
def log_probabilities(trunk: Trunk, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """log p (M, V) in float32 or better, in memory of its own, and log Z (M, 1)."""
    z = upcast(trunk.head(hidden))
    log_z = z.logsumexp(-1, keepdim=True)
    return z.sub_(log_z), log_z


def d_logits(trunk: Trunk, log_p: Tensor, log_z: Tensor, token: Tensor, g_logp: Tensor, H: Tensor,
             g_entropy: Tensor | None) -> Tensor:
    """Gradient of the product W h + b, in the memory of `log_p`; the entropy and a cap take as much once more."""
    slope = trunk.scale / trunk.temperature
    if trunk.cap:
        slope = 1 - ((log_p + log_z) * (trunk.temperature / trunk.cap)).square_()
        slope = slope.mul_(trunk.scale / trunk.temperature)
    if g_entropy is None:
        d = log_p.exp_().mul_(-g_logp[:, None])
    else:
        p = log_p.exp()
        d = log_p.add_(H[:, None]).mul_(-g_entropy[:, None]).sub_(g_logp[:, None]).mul_(p)
    d.scatter_add_(1, token[:, None], g_logp[:, None])
    return d.mul_(slope)
