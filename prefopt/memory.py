"""How much memory a run will need, from the model's configuration alone: no weights are read.

The model is built and run forward with fake tensors, so parameters and saved activations are counted, not guessed, for
every architecture; what the optimiser keeps is measured on a small parameter. An estimate all the same: padding,
fragmentation, the allocator's cache and what other programs use come on top.
"""
from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from prefopt.config import Run
from prefopt.forward import frozen_models, needs_critic
from prefopt.head import CHUNK_BYTES, ONE, TWO
from prefopt.layout import why_padded
from prefopt.models import DTYPES, LANGUAGE, Head, head_of

LENGTH = 67                                                   # of the trial sequence; recognises (T, T) tensors
HEAD = 2                                                      # tensors of one chunk of logits alive at once; others take
OTHERS = 4                                                    # as many where other reducers than logp and entropy are read


@dataclass(frozen=True)
class Size:
    """Of a model: parameters, how many of them train, their bytes; and the bytes of activations per token that are kept
    for backward. `layer` is the share of one layer, which gradient checkpointing computes again."""
    parameters: int
    trainable: int
    weights: int
    trainable_bytes: int
    activations: float
    layer: float
    layers: int
    width: int
    vocabulary: int
    itemsize: int
    plain: str | None                                         # why its rows are not packed


def size(config, *, dtype: str = "float32", lora: dict | None = None, head: Head = LANGUAGE) -> Size:
    """Count the model of a transformers configuration, as it trains with dropout off and without attention matrices.

    >>> from transformers import Qwen2Config
    >>> tiny = Qwen2Config(vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=1,
    ...                    num_attention_heads=1, num_key_value_heads=1)
    >>> size(tiny).parameters       # embedding and head 80; q, k, v 60, o 16; gate, up, down 96; three norms 12
    264
    """
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode
    auto = getattr(transformers, head.auto)
    config = copy.deepcopy(config)
    if head.outputs:
        config.num_labels = head.outputs
    with FakeTensorMode():
        model = auto.from_config(config, dtype=DTYPES[dtype]).eval()
        parameters = trains = list(model.parameters())
        kept = saved(lambda: model.base_model(input_ids=torch.zeros(1, LENGTH, dtype=torch.long)), parameters) / LENGTH
        plain = why_padded(model.base_model, config.get_text_config())
    if lora is not None:                                      # which keeps about the same activations
        from peft import LoraConfig, get_peft_model
        with torch.device("meta"):
            model = auto.from_config(config, dtype=DTYPES[dtype])
        settings = LoraConfig(**{"task_type": head.task, "target_modules": "all-linear", **lora})
        model = get_peft_model(model, settings, low_cpu_mem_usage=True)
        trains = [p for p in model.parameters() if p.requires_grad]
    text = config.get_text_config()
    return Size(sum(p.numel() for p in parameters), sum(p.numel() for p in trains), sum(p.nbytes for p in parameters),
                sum(p.nbytes for p in trains), kept, kept / text.num_hidden_layers, text.num_hidden_layers,
                text.hidden_size, text.vocab_size, DTYPES[dtype].itemsize, plain)


def saved(call: Callable, parameters: list) -> int:
    """Bytes that autograd keeps for backward of call(), parameters and (T, T) attention matrices left out."""
    known, found, alive = {p.untyped_storage()._cdata for p in parameters}, {}, []

    def keep(x):
        storage = x.untyped_storage()
        if storage._cdata not in known and x.shape[-2:] != (LENGTH, LENGTH):
            found[storage._cdata] = storage.nbytes()
            alive.append(x)                                   # so that no storage is counted under another's address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = call()
    del output
    return sum(found.values())


def optimizer_bytes(run: Run) -> float:
    """Bytes of optimiser state per byte of parameters, measured: AdamW 2, SGD 0, factored ones in between."""
    weight = torch.nn.Parameter(torch.zeros(256, 256))
    optimizer = run.make_optimizer()([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in state if x.ndim) / weight.nbytes


def estimate(run: Run, config, *, tokens: int, reference_config=None) -> dict[str, float]:
    """Bytes by what they are for, of one process whose largest micro-batch holds `tokens` tokens, padding included.

    Quantised weights count `quantize` bits everywhere but in the embedding and the head. With `train.shard`, which divides all
    but these, the process is one of those that are launched, or of as many as there are GPUs here.
    """
    objective, policy = run.objective(), run.policy
    reads, head = objective.reads(), head_of(objective)
    own = size(config, dtype=policy.dtype, lora=policy.lora, head=head)
    low = {"bf16": "bfloat16", "fp16": "float16"}.get(run.train.precision)
    acts = size(config, dtype=low, lora=policy.lora, head=head) if low else own
    adapters = own.trainable_bytes if policy.lora else 0
    held = own.trainable_bytes * _share(own, run)
    out = {"weights": _stored(own, policy.quantize) * _share(own, run) + adapters, "gradients": held,
           "optimiser": held * optimizer_bytes(run)}
    if run.train.shard:
        out["layers gathered, this one and the next"] = 2 * (own.parameters - _whole(own)) / own.layers * own.itemsize
    if low and acts.itemsize < own.itemsize:
        at_once = run.train.shard and policy.gradient_checkpointing           # the head, and a layer at a time
        out["autocast copies of weights"] = acts.weights if not at_once else \
            acts.itemsize * (acts.vocabulary * acts.width + (acts.parameters - _whole(acts)) / acts.layers)
    if frozen_models(reads) and not (policy.lora and run.reference is None and not objective.reference.moves):
        other = run.reference or policy
        reference = size(reference_config or config, dtype=other.dtype)
        out["reference"] = _stored(reference, other.quantize) * _share(reference, run)
    if needs_critic(reads):
        critic = size(config, dtype=(run.critic or policy).dtype, head=Head("AutoModelForTokenClassification", "TOKEN_CLS", 1))
        out["critic, with gradients and optimiser"] = critic.weights * _share(critic, run) * (2 + optimizer_bytes(run))
    out["activations"] = tokens * (acts.layers * acts.width * acts.itemsize + acts.layer
                                   if policy.gradient_checkpointing else acts.activations)
    if head is LANGUAGE:
        logits = min(max(CHUNK_BYTES, 64 * own.vocabulary), 4 * tokens * own.vocabulary)
        others = reads & {*ONE, *TWO} - {"logp", "entropy"}
        out["logits, a chunk at a time"] = (OTHERS if others else HEAD) * logits * (2 if "token_kl" in reads else 1)
    if "states_ref" in reads:
        out["hidden states of the reference"] = tokens * own.layers * own.width * 4 * 2
    return out


def _stored(model: Size, bits: int | None) -> float:
    if bits is None:
        return model.weights
    return _whole(model) * model.itemsize + (model.parameters - _whole(model)) * bits / 8


def _whole(model: Size) -> int:
    """Parameters of embedding and head."""
    return min(2 * model.vocabulary * model.width, model.parameters)


def _share(model: Size, run: Run) -> float:
    """The share of a model that one process holds."""
    if not run.train.shard:
        return 1.0
    processes = int(os.environ.get("WORLD_SIZE", 0)) or torch.cuda.device_count() or 1
    return (_whole(model) + (model.parameters - _whole(model)) / processes) / model.parameters


def capacity(device: str | None) -> int:
    """Bytes of the device that training will use, free or not."""
    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.mem_get_info()[1]
    import psutil
    return psutil.virtual_memory().total


def available(device: str | None) -> int:
    """Bytes free on the device that training will use. A container's own limit is not seen."""
    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.mem_get_info()[0]
    import psutil
    return psutil.virtual_memory().available


def gigabytes(count: float) -> str:
    """
    >>> gigabytes(3 * 2**30), gigabytes(2.5 * 2**20), gigabytes(100)
    ('3.0 GB', '2.5 MB', '0.1 KB')
    """
    scale, unit = next((s, u) for s, u in ((2**30, "GB"), (2**20, "MB"), (2**10, "KB")) if count >= s or u == "KB")
    return f"{count / scale:.1f} {unit}"
