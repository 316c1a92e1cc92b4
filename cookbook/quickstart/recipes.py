"""Four on-policy recipes on the same problems: grpo.yaml with another recipe and its settings, three seeds each.

    python cookbook/quickstart/recipes.py             about 12 minutes on one core
    python cookbook/quickstart/recipes.py --toy       one seed of the small problems

Exits with 1 if a recipe leaves the sampled accuracy below the level of the README, or takes two minutes of CPU time.
"""
from __future__ import annotations

import json
import time

from report import Rate
from rich.table import Table
from run import TOY, Problems, Size, accuracy, console, learn, options, run_file, small_and_quiet

from prefopt.train import train

RECIPES = {
    "grpo": [],
    "rloo": ["recipe=rloo"],
    "ppo": ["recipe=ppo", "set.beta=0", "set.lam=1", "train.critic.lr=1e-3"],
    "online_dpo": ["recipe=online_dpo", "set.beta=0.1", "train.lr=5e-4"],
}
LIMIT = 120                                                   # CPU seconds


def table(found: dict[int, dict]) -> Table:
    """Accuracy and CPU seconds of every recipe and seed."""
    out = Table(title="right answers (95 % interval)", title_justify="left")
    for title in ("", "seed", "sampled", "greedy", "CPU s"):
        out.add_column(title, no_wrap=True)
    for name in ("warmup", *RECIPES):
        for seed, one in found.items():
            rates, seconds = (str(one[name][how]) for how in ("sampled", "greedy")), one[name]["cpu_seconds"]
            out.add_row(name, str(seed), *rates, f"{seconds:.0f}")
        out.add_section()
    return out


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    small_and_quiet()
    size, found, failed = TOY if given.toy else Size(), {}, []
    for seed in given.seeds[:1] if given.toy else given.seeds:
        out, asked = given.out / f"seed-{seed}", Problems(seed, size)
        out.mkdir(parents=True, exist_ok=True)
        console.rule(f"[bold]seed {seed}", align="left")
        start = time.process_time()
        learn(out, seed, size)
        found[seed] = {"warmup": {"cpu_seconds": time.process_time() - start, **accuracy(out / "warmup", asked.test)}}
        for name, settings in RECIPES.items():
            console.rule(f"{name} {' '.join(settings)}", align="left")
            start = time.process_time()
            result = train(run_file("grpo", out, seed, size, *settings, f"out={out / name}"))
            seconds = time.process_time() - start
            found[seed][name] = {"cpu_seconds": seconds, **accuracy(result.out / "model", asked.test)}
            reached = found[seed][name]["sampled"].share
            failed += [f"{name}, seed {seed}: {reached:.3f} of samples are right in {seconds:.0f} s, expected {size.level} in "
                       f"{LIMIT} s"] if reached < size.level or seconds > LIMIT else []
    console.print(table(found))
    (given.out / "recipes.json").write_text(json.dumps(found, indent=1, default=Rate.facts))
    if failed:
        raise SystemExit("not as expected: " + "; ".join(failed))


if __name__ == "__main__":
    main()
