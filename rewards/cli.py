"""`prefopt reward ...`. Heavy imports happen inside the commands, so that help comes at once."""
from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown",
                  help="Train, use and judge rewards: reward models, verifiers, judges, text metrics.")
console, stderr = Console(highlight=False), Console(highlight=False, stderr=True)

SPEC = ("`NAME`, `folder/of/a/model`, a hub id, `module:function` or `{NAME: {argument: value}}` (YAML), also as `LABEL=...`. "
        "May be repeated. `prefopt reward list` has the names.")
Rewards = Annotated[list[str], typer.Option("--reward", "-r", metavar="REWARD", help=SPEC)]
Format = Annotated[str | None, typer.Option(help="Format of the data. Left out: found by the keys of a record.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Stop after this many groups.")]


def argument(metavar: str, text: str):
    return typer.Argument(metavar=metavar, help=text, show_default=False)


def named(items: Sequence[str], what: str) -> dict[str, str]:
    """LABEL=SPEC and SPEC by label; a label that comes twice is an error."""
    out: dict[str, str] = {}
    for item in items:
        label, sign, spec = item.partition("=")
        if not sign or not label.replace("_", "").replace("-", "").replace(".", "").isalnum():
            label, spec = label_of(item), item
        if label in out:
            raise ValueError(f"{what} {label!r} comes twice: give each a label of its own, {what} LABEL={spec}")
        out[label] = spec
    return out


def label_of(spec: str) -> str:
    """The name of a folder, of a file without its endings, of a function without its module, of a reward without its settings.

    >>> label_of("{my_rewards:politeness: {words: [please]}}"), label_of("{bleu: {order: 2}}")
    ('politeness', 'bleu')
    """
    name = spec.strip("{} ").split(": ")[0]
    path = Path(name)
    return path.name.split(".")[0] if path.is_file() else path.name if path.is_dir() else name.rsplit(":", 1)[-1]


def made(spec: str) -> Callable:
    """A reward from what the command line says."""
    import yaml

    from rewards import index
    try:
        return index.find(yaml.safe_load(spec))
    except yaml.YAMLError as error:
        raise ValueError(f"--reward {spec!r} is not valid YAML: {' '.join(str(error).split())}") from None


@app.command("list")
def list_rewards():
    """List the rewards that have a name.

    Any function of your own is one too: `my_module:function`, whose positional parameters name what it reads (prompt, text,
    messages, or a key of the record) and whose keyword-only parameters are settings.

    Example:

        prefopt reward list
    """
    from rewards import index
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for head in ("reward", "what it is", "reads", "arguments"):
        table.add_column(head, style="cyan" if head == "reward" else "", no_wrap=head == "reward")
    for name in index.WHERE:
        about = index.describe(name)
        arguments = ", ".join(f"{k}={v!r}" if v is not None else k for k, v in about["arguments"].items())
        table.add_row(*map(Text, (name, about["summary"], ", ".join(about["reads"]), arguments)))
    console.print(table)
    console.print("\nTrained reward models are named by their folder or hub id. Recipes to train one: prefopt list")


@app.command()
def score(
    source: Annotated[str, argument("IN", "A file, glob, folder or hub id with responses.")],
    rewards: Rewards,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the scored groups go: .jsonl, .jsonl.gz or .parquet.")],
    on_error: Annotated[str, typer.Option(metavar="raise|mark", help="A response that cannot be scored ends the command, "
                                                                     "or gets the reason in the place of a score.")] = "raise",
    cache: Annotated[Path | None, typer.Option(help="A file of scores to keep and to use again.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which a function of one row is killed.")] = None,
    format: Format = None,
    limit: Limit = None,
):
    """Score every response of a file.

    Scores go into `scores` of each response; a comparison (general preference model, pairwise judge) gives `wins`. What is
    scored is kept: the same command goes on where it was stopped.

    Exit code 0: done. 1: done, but some responses have no score. 2: an error.

    Examples:

        prefopt reward score samples.jsonl -r runs/bt -o scored.jsonl
        prefopt reward score gsm8k.jsonl -r final_answer -r 'bleu={bleu: {smooth_from: null}}' -o scored.jsonl --on-error mark
        prefopt reward score samples.jsonl -r my_rewards:politeness --timeout 5 -o scored.parquet
    """
    from rewards.base import RowReward, as_reward
    from rewards.cached import Timed, score_file
    found = {label: made(spec) for label, spec in named(rewards, "--reward").items()}
    if timeout:
        found = {k: Timed(r, seconds=timeout, name=k) if isinstance(as_reward(r), RowReward) else r for k, r in found.items()}
    counts = score_file(source, found, out, cache=cache, on_error=on_error, format=format, limit=limit,
                        progress=sys.stderr.isatty())
    console.print(f"{counts['groups']:,} groups with {counts['responses']:,} responses written to {out}", soft_wrap=True)
    for name in found:
        mean = "; mean {:.4g}, from {:.4g} to {:.4g}".format(*counts["scores"][name]) if name in counts["scores"] else ""
        console.print(f"{name}: {counts['scored'].get(name, 0):,} scored, {counts['unscored'].get(name, 0):,} not{mean}")
        for reason in counts["reasons"].get(name, []):
            stderr.print(Text("not scored: ", style="yellow").append(reason, style="default"))
    raise typer.Exit(1 if sum(counts["unscored"].values()) else 0)


@app.command()
def bench(
    sets: Annotated[list[str], typer.Argument(metavar="SET...", help="Files of labelled groups, also as `LABEL=FILE`.",
                                              show_default=False)],
    rewards: Annotated[list[str], typer.Option("--reward", "-r", metavar="REWARD", help=SPEC)] = (),
    key: Annotated[list[str], typer.Option(metavar="SCORE", help="A score that the responses already have. May be "
                                                                 "repeated.")] = (),
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for bench.html and bench.json.")] = Path("runs/bench"),
    train: Annotated[str | None, typer.Option(help="Pairs that the TF-IDF baseline learns from.")] = None,
    slice: Annotated[list[str], typer.Option(metavar="KEY", help="Accuracy also for each value of this key of the records. "
                                                                 "May be repeated.")] = (),
    gold: Annotated[str | None, typer.Option(help="The score that is the true reward, for best of n.")] = None,
    paraphrase: Annotated[str | None, typer.Option(metavar="KEY", help="Groups with the same value ask the same question in "
                                                                       "other words.")] = None,
    errors: Annotated[int, typer.Option(help="Wrong pairs shown for each reward.")] = 20,
    limit: Limit = None,
    on_bad: Annotated[str, typer.Option(metavar="error|skip", help="What to do with records that are not good.")] = "error",
):
    """Judge rewards on labelled data, beside the baselines (length, chance, TF-IDF).

    Accuracy with intervals, by slice; lists; calibration; length and position bias; cycles; best of n; agreement between the
    rewards; the pairs each gets most confidently wrong; RewardBench sections where the records are RewardBench's.

    Examples:

        prefopt reward bench held_out.jsonl -r runs/bt -r gpm=runs/gpm --train train.jsonl
        prefopt reward bench help=helpful.jsonl safe=harmless.jsonl -r runs/bt --slice category -o report
    """
    from data_tools import load, validate
    from rewards import bench as protocol

    def read(source: str) -> list:
        return list(validate.checked(load(source, limit=limit), on_bad=on_bad))

    models = {**{label: made(spec) for label, spec in named(rewards, "--reward").items()}, **{k: k for k in key}}
    report = protocol.bench(models, {label: read(source) for label, source in named(sets, "SET").items()},
                            train=read(train) if train else None, slices=slice, gold=gold, paraphrase=paraphrase, errors=errors)
    files = protocol.write(report, out)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for head in ("reward", *report["sets"]):
        table.add_column(head, style="cyan" if head == "reward" else "", no_wrap=head == "reward")
    for name in report["models"]:
        cells = [found["models"][name]["accuracy"] for found in report["sets"].values()]
        table.add_row(name, *(f"{c['share']:.3f} [{c['interval'][0]:.3f}, {c['interval'][1]:.3f}]" for c in cells))
    console.print(table)
    console.print(f"the page is {files[1]}, the numbers are in {files[0]}", soft_wrap=True)


@app.command()
def serve(
    rewards: Rewards,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
):
    """Serve rewards over HTTP, for trainers in other processes or on other machines.

    POST /score with groups or {"prompts", "completions", columns...}; GET /rewards and /health. In a run or another command
    the reward is then `{remote: {url: "http://host:8000", name: ...}}`. Anyone who reaches the port can use it.

    Example:

        prefopt reward serve -r runs/bt -r final_answer --port 8000
    """
    from rewards.serve import serve
    serve({label: made(spec) for label, spec in named(rewards, "--reward").items()}, host, port,
          ready=lambda url: console.print(f"serving on {url}; Ctrl-C ends it", soft_wrap=True))


@app.command()
def tokens(
    model: Annotated[str, argument("MODEL", "The folder of an implicit or process reward model.")],
    source: Annotated[str, argument("IN", "A file, glob, folder or hub id with responses.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("tokens.html"),
    steps: Annotated[str | None, typer.Option(metavar="newline|blank_line|sentence", help="Colour whole steps, which end "
                                                                                         "there.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show this many groups.")] = 10,
    format: Format = None,
):
    """Show what each token or step of a response is worth: a page that colours them by their reward.

    Of an implicit reward model a token's reward is its log-ratio to the reference, beta log(pi / pi_ref), and 0 is neutral; of
    a process reward model it is the probability that the steps so far are right, and 1/2 is neutral. A step's reward is the
    sum of its tokens' of an implicit model, and that of its last token of a process model.

    Examples:

        prefopt reward tokens runs/implicit held_out.jsonl -o tokens.html --limit 20
        prefopt reward tokens runs/prm held_out.jsonl --steps newline
    """
    from data_tools import load
    from data_tools.columns import nearest
    from rewards import implicit, tokens_page, trained
    from rewards.base import rows_of
    reward = trained.load(model)
    if not isinstance(reward, trained.TrainedReward):
        raise ValueError(f"{model} compares responses and grades none: tokens have no rewards of their own")
    rows = rows_of(list(load(source, format=format, limit=limit)))
    process = "token_reward" in reward.objective.reads()
    if steps and steps not in implicit.SPLITTERS:
        raise ValueError(f"--steps: steps end at {', '.join(implicit.SPLITTERS)}, found {steps!r}"
                         f"{nearest(steps, implicit.SPLITTERS)}")
    records = []
    for row, (words, values) in zip(rows, reward.tokens_of(rows), strict=True):
        shown = {"steps": implicit.steps_of(words, values, implicit.SPLITTERS[steps], last=process)} if steps else \
            {"rewards": values}
        records.append({"prompt": row.prompt, "tokens": words, "title": row.place, **shown})
    out.write_text(tokens_page.render(records, title=f"Rewards by token: {reward.name}", centre=0.5 if process else 0.0),
                   encoding="utf-8", errors="replace")
    console.print(f"{len(records)} responses in {out}", soft_wrap=True)

