"""Models that no device holds whole: each process keeps a share of every decoder layer (`train.shard`), by torch's FSDP2.

A layer's weights are gathered when it runs and freed behind it, its gradients are summed over processes, not averaged, and
end up divided again, with the optimiser's state. Embedding, final norm and head stay whole everywhere: `prefopt.forward`
calls body and head apart, and the two may share their weights. Every forward and backward gathers from all processes, so
that each must run as many: `evened`.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from prefopt.models import Trunk, is_peft
from prefopt.ops import is_first, most, processes

T = TypeVar("T")


def check_launch(sharded: bool) -> None:
    """An error for a launch file that asks accelerate for a wrapper around models, and for shares of one process."""
    for name, what in (("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP"), ("MEGATRON_LM", "Megatron-LM")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(f"accelerate was launched with {what}, whose settings prefopt does not read: its loop sums "
                             f"gradients itself. Launch plainly (cookbook/distributed/one_node.yaml, or torchrun), and set "
                             f"train.shard=true where a model does not fit one device: it does the work of FSDP and ZeRO-3")
    if sharded and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise ValueError("train.shard divides models over processes, and there is one: launch several (torchrun "
                         "--nproc_per_node 8 -m prefopt train run.yaml, or accelerate launch), or set train.shard=false")


def shard(model: nn.Module, device) -> None:
    """Divide the layers of a model over all processes, in place; the rest of it goes to `device` whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    if is_peft(model):
        raise ValueError("train.shard divides weights that train as they are, and this model has adapters: set "
                         "train.shard=false, or merge them into their model first")
    mesh = init_device_mesh(torch.device(device).type, (processes(),))
    body = Trunk(model).body
    kind = type(body)
    for layer in layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        layer.set_gradient_divide_factor(1.0)                 # losses are weighted for the whole step, so gradients add
        layer.set_force_sum_reduction_for_comms(True)
        layer.set_reduce_scatter_unused_params(True)          # experts that no token of this process went to
    # the body holds no share of its own: as the root of its layers it has them gather ahead
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if not isinstance(p, DTensor)})
    body.__class__ = kind                                     # by which transformers knows what it can return
    model.to(device)


def layers(model: nn.Module) -> nn.ModuleList:
    """The stack of layers in the body of a model."""
    trunk = Trunk(model)
    for module in trunk.body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == trunk.layer_count:
            return module
    raise ValueError(f"{trunk.name} has no list of its {trunk.layer_count} layers, which train.shard divides: set "
                     f"train.shard=false")


# ------------------------------------------------------------------------------------------------------- while training
def evened(found: Iterable[T], sharded: bool, device) -> Iterator[tuple[T, bool]]:
    """Micro-batches, each with True. Of sharded models the last one is repeated, with False, until every process has had as
    many as the one with most.

    >>> list(evened("ab", False, "cpu"))
    [('a', True), ('b', True)]
    """
    if not sharded:
        yield from ((one, True) for one in found)
        return
    found = list(found)
    for n in range(most(len(found), device)):
        yield found[min(n, len(found) - 1)], n < len(found)


def clip(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients so that their norm is at most `limit`; the norm before, over whole and divided parameters together.

    >>> p = nn.Parameter(torch.zeros(2)); p.grad = torch.tensor([3., 4.])
    >>> clip([p], 1.0), p.grad
    (tensor(5.), tensor([0.6000, 0.8000]))
    """
    kinds = [[p for p in parameters if isinstance(p, DTensor) == divided] for divided in (False, True)]
    kinds = [some for some in kinds if some]
    norms = [whole(nn.utils.get_total_norm([p.grad for p in some])) for some in kinds]
    norm = norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)
    for some in kinds:
        nn.utils.clip_grads_with_norm_(some, limit, norm)
    return norm


# ------------------------------------------------------------------------------------------------------- whole and divided
def whole(value: Tensor) -> Tensor:
    """A tensor with all its shares. Every process calls it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def collected(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors by name, on the CPU of the first process; nothing on the others. Gathered one at a time; tensors that
    share their memory go on doing so."""
    found: dict[str, Tensor] = {}
    known: dict = {}
    for name, value in tensors:
        full = whole(value.detach())
        if is_first():
            key = name if isinstance(value, DTensor) else (value.data_ptr(), value.shape, value.stride(), value.dtype)
            found[name] = known.setdefault(key, full.cpu())
    return found


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict` of whole tensors, as `collected` gives them."""
    return collected(model.state_dict().items())


def whole_model(model: nn.Module) -> nn.Module | None:
    """A sharded model as an ordinary one, on the CPU of the first process; None on the others. For samplers, which take
    weights from a model."""
    state, buffers = whole_state(model), dict(model.named_buffers())
    if not state:
        return None
    with torch.device("meta"):
        found = type(model)(model.config)
    found.load_state_dict(state, assign=True)
    for name, value in buffers.items():                       # those that are in no state_dict
        home, _, key = name.rpartition(".")
        found.get_submodule(home)._buffers[key] = value.cpu()
    return found.eval()


def save(model: nn.Module, folder) -> None:
    """`save_pretrained` of whole weights by the first process. Every process calls it where the model is sharded."""
    state = whole_state(model) if any(isinstance(p, DTensor) for p in model.parameters()) else None
    if is_first():
        model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))


def divided(value: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor where `like`, of the same shape, is divided; else all of it."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
