"""Preparing preference pairs side by side with TRL: examples per CPU second, one thread, one process per job.

    python cookbook/benchmarks/prepare.py --pairs 20000 --repeats 3 --json prepare.json

Nothing is downloaded. The tokenizer is a byte-level BPE trained on the Python sources of installed packages, the texts
are spans of the same sources cut by tokens. Prompts end with a line break and responses begin with a letter or sign, so
that no token joins the two: both sides must then give exactly the same ids, which is checked over all pairs.

The clock covers what lies between records in memory and prepared data. TRL: `DPOTrainer._prepare_dataset` of a
`Dataset` made from the columns. prefopt: `data_tools.prepare.prepare` of groups made from the records, written to disk
and synced. The sides take turns, so that a slow spell of the machine hits both; the ratio is the median over rounds.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import site
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

VOCABULARY = 32_000
SOURCES = ("transformers", "torch", "sklearn")
SPECIAL = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
PACKAGES = ("trl", "transformers", "tokenizers", "datasets", "numpy", "torch")


# -------------------------------------------------------------------------------------------------------------- assets
def sources(megabytes: int = 40) -> list[Path]:
    """Python files of installed packages, up to a total size."""
    files, left = [], megabytes << 20
    for package in SOURCES:
        for file in sorted(Path(site.getsitepackages()[0], package).rglob("*.py")):
            left -= file.stat().st_size
            if left < 0:
                return files
            files.append(file)
    return files


def tokenizer_of(files: list[Path]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train([str(f) for f in files], trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHATML
    return tokenizer


def make_assets(folder: Path, records: Path, pairs: int, prompt: int, response: int) -> None:
    """A tokenizer in `folder`, and `pairs` records of about `prompt` + 2 x `response` tokens in a file."""
    import numpy as np
    folder.mkdir(parents=True, exist_ok=True)
    files = sources()
    tokenizer = tokenizer_of(files)
    tokenizer.save_pretrained(folder / "tokenizer")
    texts = [file.read_text(errors="ignore") for file in files[::max(1, len(files) // 400)]]
    pool = np.concatenate([np.array(e.ids) for e in tokenizer.backend_tokenizer.encode_batch_fast(texts)])
    random = np.random.default_rng(0)

    def span(length: int) -> str:
        while True:
            start = int(random.integers(len(pool) - length))
            if text := tokenizer.decode(pool[start:start + length].tolist()).strip():
                return text

    with open(records, "w", encoding="utf-8") as stream:
        for _ in range(pairs):
            record = {"prompt": span(prompt - 1) + "\n", "chosen": span(response - 1), "rejected": span(response - 1)}
            stream.write(json.dumps(record) + "\n")


# --------------------------------------------------------------------------------------------------------------- sides
def conversation(record: dict) -> dict:
    return {"prompt": [{"role": "user", "content": record["prompt"]}],
            **{side: [{"role": "assistant", "content": record[side]}] for side in ("chosen", "rejected")}}


def prefopt(records: list[dict], tokenizer, folder: Path):
    from data_tools.prepare import prepare
    from data_tools.records import Group, Response
    groups = (Group(r["prompt"], [Response(r["chosen"]), Response(r["rejected"])], [1.0, 0.0]) for r in records)
    with clock() as spent:
        prepared = prepare(groups, tokenizer, folder / "prepared")
    ids = ((g.prompt, *(row.tokens for row in g.rows)) for g in map(prepared.__getitem__, range(len(prepared))))
    return spent, ids


def trl(records: list[dict], tokenizer, folder: Path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    arguments = DPOConfig(output_dir=str(folder / "out"), bf16=False, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = DPOTrainer.__new__(DPOTrainer)                  # preparation needs no model
    trainer._tokenizer = tokenizer
    with clock() as spent:
        data = Dataset.from_dict({name: [r[name] for r in records] for name in ("prompt", "chosen", "rejected")})
        data = trainer._prepare_dataset(data, tokenizer, arguments, "train")
    return spent, ((row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in data)


SIDES = {"trl": trl, "prefopt": prefopt}


class clock:
    """Seconds of CPU time (all threads) and of wall time inside the block."""

    def __enter__(self):
        self.cpu, self.wall = -time.process_time(), -time.perf_counter()
        return self

    def __exit__(self, *_):
        self.cpu, self.wall = self.cpu + time.process_time(), self.wall + time.perf_counter()


def job(side: str, folder: Path, pairs: Path, conversational: bool) -> None:
    """One side once, in this process; prints a line of JSON."""
    import numpy as np
    from transformers import AutoTokenizer
    with open(pairs, encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    records = list(map(conversation, records)) if conversational else records
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        spent, examples = SIDES[side](records, tokenizer, Path(scratch))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        digest, tokens = hashlib.sha256(), 0
        for ids in examples:
            for part in ids:
                digest.update(np.asarray(part, np.int32).tobytes() + b"|")
                tokens += len(part)
    print("RESULT", json.dumps({
        "side": side, "cpu_s": spent.cpu, "wall_s": spent.wall, "examples_per_cpu_s": len(records) / spent.cpu,
        "tokens_per_example": tokens / len(records), "peak_rss_mb": peak, "ids": digest.hexdigest()}))


# ---------------------------------------------------------------------------------------------------------------- main
def run(side: str, folder: Path, pairs: Path, conversational: bool) -> dict:
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1",
           "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"),
           "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, __file__, "--job", side, "--assets", str(folder), "--records", str(pairs)]
    done = subprocess.run(command + ["--conversational"] * conversational, env=env, capture_output=True, text=True)
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"the job {side} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[0])


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def compare(options: argparse.Namespace, folder: Path) -> dict:
    pairs, rounds = folder / f"pairs-{options.pairs}-{options.prompt}-{options.response}.jsonl", []
    if not pairs.exists():
        make_assets(folder, pairs, options.pairs, options.prompt, options.response)
    for n in range(options.repeats):
        order = list(SIDES) if n % 2 == 0 else list(SIDES)[::-1]
        rounds.append({side: run(side, folder, pairs, options.conversational) for side in order})
        print(f"round {n + 1}: " + ", ".join(f"{side} {rounds[-1][side]['examples_per_cpu_s']:.0f} examples/CPU-s"
                                            for side in SIDES), flush=True)
    if len({row["ids"] for one in rounds for row in one.values()}) > 1:
        raise SystemExit("the two sides do not give the same ids: the comparison means nothing")
    ratios = [one["prefopt"]["examples_per_cpu_s"] / one["trl"]["examples_per_cpu_s"] for one in rounds]
    return {"pairs": options.pairs, "prompt": options.prompt, "response": options.response,
            "conversational": options.conversational, "repeats": options.repeats, "threads": 1,
            "processor": processor(), "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES}, "rounds": rounds, "ratios": ratios,
            "ratio": statistics.median(ratios)}


def table(result: dict) -> str:
    def median(side: str, name: str) -> float:
        return statistics.median(one[side][name] for one in result["rounds"])

    shape = "conversations" if result["conversational"] else "plain text"
    rounds = ", ".join(f"{ratio:.2f}" for ratio in result["ratios"])
    return "\n".join([
        f"| {'side':8} | examples/CPU-s | CPU s | wall s | peak RSS, MB |", "|---|---|---|---|---|",
        *(f"| {side:8} | {median(side, 'examples_per_cpu_s'):.0f} | {median(side, 'cpu_s'):.1f} | "
          f"{median(side, 'wall_s'):.1f} | {median(side, 'peak_rss_mb'):.0f} |" for side in SIDES),
        f"ratio {result['ratio']:.2f} (rounds: {rounds}), same ids; {result['pairs']} pairs of "
        f"{median('prefopt', 'tokens_per_example'):.0f} tokens, {shape}, 1 thread, {result['processor']}",
        ", ".join(f"{name} {v}" for name, v in result["versions"].items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--prompt", type=int, default=384, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=128, help="tokens of a response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--conversational", action="store_true", help="messages and a chat template, not plain text")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--job", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--assets", type=Path, help="keep tokenizer and texts in this folder, or use those there")
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return job(options.job, options.assets, options.records, options.conversational)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options, options.assets or Path(folder))
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
