"""What the benchmarks share: models and texts made on the spot, clocks, peak memory, processes, rounds.

Nothing is downloaded. A tokenizer is a byte-level BPE trained on the Python sources of installed packages, a model a Qwen2-type
decoder with random weights, a text a span of the same sources cut by tokens. Prompts end with a line break and responses
begin with a letter or sign, so that no token joins the two and both sides compute the same ids.
"""
from __future__ import annotations

import json
import os
import platform
import re
import resource
import site
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
               "HF_HUB_OFFLINE": "1"}
PACKAGES = ("trl", "transformers", "tokenizers", "accelerate", "datasets", "torch", "numpy")
SPECIAL = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SHAPES = {                                                    # hidden size, that of the MLP, layers, heads
    "small": (320, 896, 8, 5),
    "deep": (512, 1408, 16, 8),
    "tiny": (16, 32, 2, 2),
}


# ---------------------------------------------------------------------------------------------------------------- jobs
@dataclass(frozen=True)
class Sizes:
    """Of a model and of a step: `groups` prompts with `rows` responses each. `steps` are timed, after one that is not."""
    shape: str = "small"
    vocabulary: int = 32_000
    groups: int = 1
    rows: int = 2
    prompt: int = 384
    response: int = 128
    steps: int = 3

    def __str__(self) -> str:
        return f"{self.groups} x ({self.prompt} + {self.rows} x {self.response}), {self.shape}, vocabulary {self.vocabulary:,}"


@dataclass(frozen=True)
class Job:
    """The same work done by two sides, the second of which is ours, and what must hold: {measure: (times as fast, share of
    the peak memory)}. A side is called with sizes, a folder of assets, a folder of its own and a clock."""
    sides: Mapping[str, Callable]
    sizes: Sizes
    targets: Mapping[str, tuple[float, float | None]]


# ---------------------------------------------------------------------------------------------------------- the clocks
class Clock:
    """CPU seconds (of all threads), those of them that the program itself takes, and wall seconds of what is named. The first
    step of a run is not counted."""

    def __init__(self):
        self.since: dict[str, tuple[float, ...]] = {}
        self.laps: dict[str, list[tuple[float, ...]]] = {}

    def start(self, name: str) -> None:
        self.since[name] = now()

    def stop(self, name: str) -> None:
        self.laps.setdefault(name, []).append(tuple(b - a for a, b in zip(self.since.pop(name), now(), strict=True)))

    def step(self, *_, **__) -> None:
        """A step ends, and the next begins."""
        for name in list(self.since):
            self.stop(name)
        self.start("step")

    def scored(self) -> None:
        """Responses are sampled and scored; what is left of the step is its update."""
        if "step" in self.since:
            self.start("update")

    def medians(self) -> dict[str, dict[str, float]]:
        """{measure: {"s", "user_s", "wall_s"}}. What is compared is CPU time, which other jobs of the machine disturb least, or
        wall time on a GPU."""
        found = {name: [statistics.median(x) for x in zip(*laps, strict=True)] for name, laps in self.laps.items()}
        return {name: {"s": wall if uses_gpu() else cpu, "user_s": user, "wall_s": wall}
                for name, (cpu, user, wall) in found.items()}


def now() -> tuple[float, ...]:
    if uses_gpu():
        sys.modules["torch"].cuda.synchronize()
    return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter()


def on_gpu() -> bool:
    return "torch" in sys.modules and sys.modules["torch"].cuda.is_available()


def uses_gpu() -> bool:
    """Whether this process has computed on a GPU; preparing data does not."""
    return "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()


def peak_mb() -> float:
    """The largest memory of this process so far: allocated on the GPU that it uses, or resident.

    Resident from /proc where there is one: getrusage's figure outlives exec, so a child of a large process starts with
    its parent's.
    """
    if uses_gpu():
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    if Path("/proc/self/status").exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# -------------------------------------------------------------------------------------------------- processes and rounds
def alone(function: Callable, *arguments):
    """The result of a function in a process of its own, which says nothing unless it fails."""
    os.environ.update(ENVIRONMENT)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=silent) as pool:
        return pool.submit(function, *arguments).result()


def silent() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def measured(side: Callable, sizes: Sizes, assets: Path) -> dict:
    """One side once, in this process."""
    clock = Clock()
    with tempfile.TemporaryDirectory(dir=assets) as own:
        more = side(sizes, assets, Path(own), clock) or {}
    return {"seconds": clock.medians(), "peak_mb": peak_mb(), **more}


def rounds(job: Job, count: int, assets: Path) -> list[dict]:
    """Both sides, in turns, so that a slow spell of the machine hits both."""
    found = []
    for n in range(count):
        order = list(job.sides) if n % 2 == 0 else list(job.sides)[::-1]
        one = {side: alone(measured, job.sides[side], job.sizes, assets) for side in order}
        if len({row.get("ids") for row in one.values()}) > 1:
            raise SystemExit("the two sides do not prepare the same ids: the comparison means nothing")
        found.append({**one, "load": os.getloadavg()[0]})
        spent = {m: " / ".join(f"{one[side]['seconds'][m]['s']:.2f}" for side in job.sides) for m in job.targets}
        print(f"  round {n + 1}, s: " + "; ".join(f"{measure} {s}" for measure, s in spent.items()), flush=True)
    return found


def summary(job: Job, found: list[dict]) -> dict:
    """Medians over rounds: of seconds, of peak memory, and of ratios within a round."""
    theirs, ours = job.sides
    peaks = [[one[side]["peak_mb"] for one in found] for side in job.sides]
    memory, measures = statistics.median(b / a for a, b in zip(*peaks, strict=True)), {}
    for measure, (speed, share) in job.targets.items():
        (theirs_s, ours_s), user = ([[one[side]["seconds"][measure][kind] for one in found] for side in job.sides]
                                    for kind in ("s", "user_s"))
        ratios = [a / b for a, b in zip(theirs_s, ours_s, strict=True)]
        ratio = statistics.median(ratios)
        measures[measure] = {"seconds": [statistics.median(theirs_s), statistics.median(ours_s)], "ratios": ratios,
                             "ratio": ratio, "user_ratio": statistics.median(a / b for a, b in zip(*user, strict=True)),
                             "target": speed, "target_memory": share,
                             "met": ratio >= speed and (share is None or memory <= share)}
    tokens = {name: found[-1][ours].get(name) for name in ("computed", "padded")}
    return {"sides": [theirs, ours], "sizes": asdict(job.sizes), "settings": str(job.sizes), "tokens": tokens, "memory": memory,
            "peak_mb": [statistics.median(peak) for peak in peaks], "measures": measures, "rounds": found}


def machine() -> dict:
    import torch
    gpu = torch.cuda.is_available()
    return {"device": torch.cuda.get_device_name() if gpu else processor(), "dtype": "bfloat16" if gpu else "float32",
            "threads": 1, "python": platform.python_version(), "versions": {p: version(p) for p in PACKAGES}}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return f"{os.cpu_count()} cores, {next((s.split(': ')[1] for s in lines if s.startswith('model name')), platform.machine())}"


# -------------------------------------------------------------------------------------------------------------- assets
def model(assets: Path, sizes: Sizes) -> str:
    """The folder of a model with its tokenizer, made where it is missing."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    folder = assets / f"{sizes.shape}-{sizes.vocabulary}"
    if not folder.exists():
        hidden, inner, layers, heads = SHAPES[sizes.shape]
        torch.manual_seed(0)
        made = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=sizes.vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=8192, tie_word_embeddings=True,
            pad_token_id=0, eos_token_id=1, bos_token_id=None))
        AutoTokenizer.from_pretrained(tokenizer(assets, sizes)).save_pretrained(folder)
        made.save_pretrained(folder)
    return str(folder)


def tokenizer(assets: Path, sizes: Sizes) -> Path:
    """The folder of a tokenizer of at most 32,000 tokens, with a pool of tokens to cut texts from."""
    import numpy as np
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    vocabulary = min(sizes.vocabulary, 32_000)
    folder = assets / f"tokenizer-{vocabulary}"
    if not folder.exists():
        files = sources(max(1, vocabulary // 800))
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.train([str(f) for f in files], trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
        made.chat_template = CHATML
        texts = [file.read_text(errors="ignore") for file in files[::max(1, len(files) // 400)]]
        made.save_pretrained(folder)
        np.save(folder / "pool.npy", np.concatenate([np.array(e.ids) for e in backend.encode_batch_fast(texts)]))
    return folder


def sources(megabytes: int) -> list[Path]:
    """Python files of installed packages, up to a total size."""
    files, left = [], megabytes << 20
    for package in ("transformers", "torch", "sklearn"):
        for file in sorted(Path(site.getsitepackages()[0], package).rglob("*.py")):
            left -= file.stat().st_size
            if left < 0:
                return files
            files.append(file)
    return files


def records(assets: Path, sizes: Sizes, count: int) -> Path:
    """A file of `count` records {"prompt", "responses", "scores"}; pairs are {"prompt", "chosen", "rejected"}."""
    import numpy as np
    from transformers import AutoTokenizer
    folder = tokenizer(assets, sizes)
    file = folder / f"{count}-{sizes.prompt}-{sizes.rows}-{sizes.response}.jsonl"
    if not file.exists():
        known, pool, random = AutoTokenizer.from_pretrained(folder), np.load(folder / "pool.npy"), np.random.default_rng(0)

        def span(length: int) -> str:
            while True:
                start = int(random.integers(len(pool) - length))
                if text := known.decode(pool[start:start + length].tolist()).strip():
                    return text

        with open(file, "w", encoding="utf-8") as stream:
            for _ in range(count):
                prompt, answers = span(sizes.prompt - 1) + "\n", [span(sizes.response - 1) for _ in range(sizes.rows)]
                many = {"responses": answers, "scores": [n / sizes.rows for n in range(sizes.rows)]}
                stream.write(json.dumps({"prompt": prompt, **(dict(zip(("chosen", "rejected"), answers, strict=True))
                                                              if sizes.rows == 2 else many)}) + "\n")
    return file


def at(job: Job, **sizes) -> Job:
    """The job at other sizes."""
    return replace(job, sizes=replace(job.sizes, **sizes))
