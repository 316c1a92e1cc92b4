"""Is this installation fit to train? Versions, devices, packages, disk, and one step of a tiny model."""
from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from prefopt.findings import Finding, attempt, error, missing, ok, warning

REQUIRED = ("torch", "transformers", "accelerate", "peft", "datasets", "safetensors")
OPTIONAL = {                                                  # package: what needs it, what brings it
    "tensorboard": ("log: [tensorboard]", "pip install 'prefopt[track]'"),
    "wandb": ("log: [wandb]", "pip install wandb"),
    "trackio": ("log: [trackio]", "pip install trackio"),
    "bitsandbytes": ("policy.quantize", "pip install 'prefopt[quantize]'"),
    "matplotlib": ("plots of reports and studies", "pip install 'prefopt[report]'"),
    "vllm": ("sampling with vLLM", "pip install 'prefopt[vllm]'"),
    "trl": ("comparisons with TRL", "pip install 'prefopt[trl]'")}
WORDS = ("<pad>", "<eos>", "?", "good", "bad")


def findings(sandbox: Callable[[], Iterable[tuple[str, str]]] = tuple) -> Iterator[Finding]:
    """What there is, what is missing, whether training works, and what `sandbox` says of the protections of the sandbox:
    (level, text) of each."""
    yield from attempt("versions", versions)
    yield from attempt("device", devices)
    for package, (need, install) in OPTIONAL.items():
        if find_spec(package) is None:
            yield missing("optional", f"{package}, for {need}: {install}")
        else:
            yield ok("optional", f"{package} {_version(package)}")
    yield from attempt("disk", disk)
    yield from attempt("sandbox", lambda: (Finding(level, "sandbox", text) for level, text in sandbox()))
    yield from attempt("training", training)


def versions() -> Iterator[Finding]:
    from prefopt import __version__
    yield ok("versions", f"prefopt {__version__}, Python {platform.python_version()}")
    for package in REQUIRED:
        if find_spec(package) is None:
            yield error("versions", f"{package} is not installed: pip install {package}")
    yield ok("versions", ", ".join(f"{p} {_version(p)}" for p in REQUIRED if find_spec(p)))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:                     # a folder of that name on the path
        return "without a version"


def devices() -> Iterator[Finding]:
    import torch
    cores = len(os.sched_getaffinity(0)) if "sched_getaffinity" in vars(os) else os.cpu_count()
    yield ok("device", f"CPU: {torch.get_num_threads()} threads on {cores} cores")
    for n in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(n)
        yield ok("device", f"cuda:{n} {torch.cuda.get_device_name(n)}: {free / 2**30:.0f} of {total / 2**30:.0f} GB "
                           f"free")
    if not torch.cuda.is_available():
        yield ok("device", "no CUDA device: fine for small models, slow beyond some 100 million parameters")


def disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free / 2**30
    yield (ok if free > 5 else warning)("disk", f"{free:.1f} GB free at {Path().absolute()}")


def training() -> Iterator[Finding]:
    """One step of DPO, whose loss at the start is log 2."""
    from prefopt.config import make
    from prefopt.train import train
    with TemporaryDirectory() as place:
        folder = Path(place)
        pairs = [{"prompt": "?", "chosen": "good", "rejected": "bad"}] * 2
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        run = make({"recipe": "dpo", "policy": tiny(folder / "tiny"), "out": str(folder / "run"),
                    "data": {"train": str(folder / "pairs.jsonl"), "cache": str(folder / "cache")},
                    "train": {"groups_per_step": 2, "lr": 1e-3}})
        loss = train(run, show=False).metrics["loss"]
        made = (folder / "run" / "model" / "config.json").exists()
    fine = made and math.isclose(loss, math.log(2), rel_tol=1e-4)
    yield (ok if fine else error)("training", f"one step of DPO with a tiny model: loss {loss:.4f} at the start, "
                                              f"{'as it should be' if fine else 'and it should be 0.6931'}")


def tiny(folder: Path) -> str:
    """A random model of two layers and its tokenizer of whole words, saved in `folder`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return str(folder)
