"""Speed and memory side by side with TRL, or with our own plain path, in one run; one process per job, sides in turns.

    python cookbook/benchmarks/run.py --json bench.json              every job, three rounds, a table and bench.png
    python cookbook/benchmarks/run.py --only dpo,grpo --rounds 1
    python cookbook/benchmarks/run.py --curves --json curves.json    cost against sizes: curves.png
    python cookbook/benchmarks/run.py --profile --only dpo           where the time of our steps goes

On a CPU: one thread, float32, CPU seconds and resident memory. On a GPU: bfloat16, wall seconds and allocated memory.
Nothing is downloaded: models, tokenizers and texts are made on the spot, and kept in the folder --assets where it is given.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))            # prefopt, where it is not installed
import bench
import curves
import jobs
import profiles


def table(found: dict) -> str:
    """Markdown: a line per measure of a job. System time is mostly that of memory handed out by the kernel, which a busy machine
    stretches; a ratio without it does not depend on that."""
    lines = ["| job | times as fast | must be | without system time | s, other | s, ours | share of memory | must be | MB, other "
             "| MB, ours | |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, job in found["jobs"].items():
        for measure, m in job["measures"].items():
            cells = [f"{name}, {measure}", f"**{m['ratio']:.2f}** ({min(m['ratios']):.2f} to {max(m['ratios']):.2f})",
                     f"{m['target']:g}", f"{m['user_ratio']:.2f}", *(f"{s:.2f}" for s in m["seconds"]), f"{job['memory']:.0%}",
                     "" if m["target_memory"] is None else f"{m['target_memory']:.0%}", *(f"{mb:.0f}" for mb in job["peak_mb"]),
                     "met" if m["met"] else "NOT MET"]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name, job in found["jobs"].items():
        computed = "; {computed:,} of {padded:,} tokens computed".format(**job["tokens"]) if job["tokens"]["computed"] else ""
        lines.append(f"- {name}: {job['sides'][0]} against {job['sides'][1]}, {job['settings']}{computed}")
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items())
    return "\n".join([*lines, "", f"{found['device']}; {found['threads']} thread, {found['dtype']}; medians of {found['rounds']} "
                      f"rounds, load {found['load'][0]:.1f} to {found['load'][1]:.1f}; Python {found['python']}, {versions}"])


def plot(found: dict, file: Path) -> None:
    """Times as fast, with what must be."""
    from matplotlib import pyplot
    bars = [(f"{name}, {measure}", m) for name, job in found["jobs"].items() for measure, m in job["measures"].items()][::-1]
    figure, axes = pyplot.subplots(figsize=(7, 0.45 * len(bars) + 1), layout="constrained")
    axes.barh([label for label, _ in bars], [m["ratio"] for _, m in bars], color="#4c72b0")
    axes.plot([m["target"] for _, m in bars], range(len(bars)), "|", color="black", markersize=18, label="must be")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("times as fast as the other side")
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)


def compare(chosen: dict[str, bench.Job], count: int, assets: Path, keep) -> dict:
    found = {**bench.alone(bench.machine), "rounds": count, "jobs": {}, "load": [os.getloadavg()[0]] * 2}
    for name, job in chosen.items():
        print(f"{name}: {' / '.join(job.sides)}, {job.sizes}", flush=True)
        rounds = bench.rounds(job, count, assets)
        found["jobs"][name] = bench.summary(job, rounds)
        loads = [*found["load"], *(one["load"] for one in rounds)]
        found["load"] = [min(loads), max(loads)]
        keep(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(jobs.JOBS), help=f"some of {', '.join(jobs.JOBS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write what was found here, and a plot beside it")
    parser.add_argument("--assets", type=Path, help="keep models and texts in this folder, or use those there")
    parser.add_argument("--curves", action="store_true", help="cost against sizes in the place of the table")
    parser.add_argument("--profile", action="store_true", help="where the time of our steps goes in the place of the table")
    parser.add_argument("--tiny", action="store_true", help="sizes that take a second, to try the program")
    o = parser.parse_args()
    if unknown := [name for name in o.only.split(",") if name not in jobs.JOBS]:
        parser.error(f"there is no job {unknown[0]}; jobs: {', '.join(jobs.JOBS)}")
    chosen = {name: jobs.tiny(jobs.JOBS[name]) if o.tiny else jobs.JOBS[name] for name in o.only.split(",")}

    def keep(found: dict | list) -> None:
        if o.json:
            o.json.write_text(json.dumps(found, indent=1))

    with tempfile.TemporaryDirectory() as folder:
        assets = o.assets or Path(folder)
        assets.mkdir(parents=True, exist_ok=True)
        if o.profile:
            for name, job in chosen.items():
                print(f"## {name}: {job.sizes}\n\n{bench.alone(profiles.profiled, job, assets)}\n", flush=True)
            return
        if o.curves:
            found, draw = [], curves.plot
            for curve in curves.CURVES:
                found.append(curves.traced(curve, assets, o.tiny))
                keep(found)
            print(curves.table(found))
        else:
            found, draw = compare(chosen, o.rounds, assets, keep), plot
            print(table(found))
    keep(found)
    if o.json:
        draw(found, o.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
