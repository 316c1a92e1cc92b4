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

CHUNK_BYTES = 256 * 2**20                                     # float32 logits of one chunk


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

    Chunks of logits share one block of memory. Where it holds all of them it is kept for backward, as exp(z - max z) if nothing
    else is needed of it, else they are computed again. The gradient of the head is summed in float32 or better.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, token, trunk, wants_entropy, parts, differentiable):
        device = hidden.device.type
        low = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        ctx.trunk, ctx.parts, ctx.wants_entropy, ctx.spent = trunk, parts, wants_entropy, not (wants_entropy or trunk.cap)
        ctx.kind = torch.get_autocast_dtype(device) if low else hidden.dtype
        w, block, made = weight.to(ctx.kind), None, []
        with torch.autocast(device, enabled=False) if low else nullcontext():
            for part in parts:
                block = logits(trunk, hidden[part].to(ctx.kind), w, bias, block)
                made.append(summed_up(block, token[part], wants_entropy, ctx.spent))
        log_p, log_z, share, entropy = (torch.cat(x) for x in zip(*made, strict=True))
        ctx.kept = block if differentiable and len(parts) == 1 else None
        ctx.save_for_backward(hidden, weight, bias, token, log_z, share, entropy)
        return log_p, entropy if wants_entropy else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, bias, token, log_z, share, entropy = ctx.saved_tensors
        wants, w, block = ctx.needs_input_grad, weight.to(ctx.kind), None
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = None
        d_bias = torch.zeros_like(bias, dtype=upcast(bias[:0]).dtype) if wants[2] else None
        for part in ctx.parts:
            h = hidden[part].to(ctx.kind)
            block, ctx.kept, spent = (logits(ctx.trunk, h, w, bias, block), None, False) if ctx.kept is None else \
                (ctx.kept, None, ctx.spent)
            d = d_product(ctx.trunk, block, token[part], (share if spent else log_z)[part], g_logp[part],
                          *(g_entropy[part], entropy[part]) if ctx.wants_entropy else (None, None), spent=spent).to(ctx.kind)
            if wants[0]:
                d_hidden[part] = d @ w
            if wants[1]:
                d_weight = upcast(d.T @ h) if d_weight is None else \
                    d_weight.addmm_(d.T, h) if d_weight.dtype == ctx.kind else d_weight.add_(d.T @ h)
            if wants[2]:
                d_bias += d.sum(0, dtype=d_bias.dtype)
        return (d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype),
                d_bias if d_bias is None else d_bias.to(bias.dtype), *[None] * 5)


def logits(trunk: Trunk, hidden: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor | None) -> Tensor:
    """z (m, V) in float32 or better, written into the beginning of `block` where there is one of its kind."""
    trunk.calls["positions"] += len(hidden)
    direct = weight.dtype == upcast(weight[:0]).dtype
    z = torch.mm(hidden, weight.T, out=block[:len(hidden)]) if block is not None and direct else upcast(hidden @ weight.T)
    if bias is not None:
        z.add_(bias)
    if trunk.scale != 1:
        z.mul_(trunk.scale)
    if trunk.cap:
        z.div_(trunk.cap).tanh_().mul_(trunk.cap)
    return z.div_(trunk.temperature) if trunk.temperature != 1 else z


ROWS = 16                                                     # of logits that are worked on at once: they fit into a cache


def summed_up(z: Tensor, token: Tensor, wants_entropy: bool, spent: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p_t, log Z, 1 / sum exp(z - max z) and H (zeros where it is not wanted) of logits, each (m). Where they may be
    `spent`, they are exp(z - max z) from now on."""
    found = []
    for rows, t in zip(z.split(ROWS), token.split(ROWS), strict=True) if z.is_cpu else [(z, token)]:
        largest, chosen = rows.amax(-1, keepdim=True), rows.gather(-1, t[:, None]).squeeze(-1)
        e = rows.sub_(largest).exp_() if spent else torch.sub(rows, largest).exp_()
        total = e.sum(-1)
        log_z = total.log() + largest.squeeze(-1)
        found.append((chosen - log_z, log_z, 1 / total,
                      log_z - torch.linalg.vecdot(e, rows) / total if wants_entropy else torch.zeros_like(total)))
    return tuple(torch.cat(x) for x in zip(*found, strict=True))


def d_product(trunk: Trunk, z: Tensor, token: Tensor, norm: Tensor, g_logp: Tensor, g_entropy: Tensor | None,
              entropy: Tensor | None, *, spent: bool) -> Tensor:
    """Gradient of the product W h + b, in the memory of the logits z with their log Z as `norm`, or what is left of them when
    they are `spent`, with 1 / sum exp(z - max z)."""
    def rows(z, token, norm, g_logp, g_entropy=None, entropy=None):
        slope = trunk.scale / trunk.temperature
        if trunk.cap:
            slope = slope * (1 - (z * (trunk.temperature / trunk.cap)).square_())
        if spent:
            z.mul_((-g_logp * norm)[:, None])
        elif g_entropy is None:
            z.sub_(norm[:, None]).exp_().mul_(-g_logp[:, None])
        else:
            p = z.sub_(norm[:, None]).exp()
            z.add_(entropy[:, None]).mul_(-g_entropy[:, None]).sub_(g_logp[:, None]).mul_(p)
        z.scatter_add_(1, token[:, None], g_logp[:, None])
        if trunk.cap or slope != 1:
            z.mul_(slope)

    columns = [x for x in (z, token, norm, g_logp, g_entropy, entropy) if x is not None]
    for some in zip(*(x.split(ROWS) for x in columns), strict=True) if z.is_cpu else [columns]:
        rows(*some)
    return z
