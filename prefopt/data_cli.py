"""`prefopt data ...`: from prompts to a data set. Heavy imports happen inside the commands, so that help comes at once."""
from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from prefopt.console import argument, console, grid, say, stderr
from prefopt.findings import sentence

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="""
    Build preference data, look at it, mend it, convert it.

    The way of a data set: `build` samples responses to prompts, scores them, makes labels and pairs, and writes them with a
    card and a page; `stages` lists what a build is made of. `check` says what is wrong with data, `influence` which pairs mislead
    a reward model, `fix` mends it, `view` shows it and takes labels, `relabel` puts those in. `difficulty` says how hard items
    are. `validate`, `convert` and `describe` take any file of preferences, `push` puts a folder on the hub. The tour is
    docs/data.md.
    """)

Source = Annotated[str, argument("IN", "A file, glob, folder or hub id.")]
Format = Annotated[str | None, typer.Option(help="Format of the data. Left out: found by the keys of a record.")]
Rename = Annotated[list[str] | None, typer.Option(
    metavar="KEY=COLUMN", help="Which column of the data plays the part of KEY, as in `--column chosen=better`. May be "
                               "repeated.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Stop after this many groups.")]


# --------------------------------------------------------------------------------------------------------------- build
@app.command()
def build(
    file: Annotated[Path, argument("BUILD.yaml", "The pipeline: source, stages, out, ...")],
    settings: Annotated[list[str] | None, argument("a.b=c", "Settings that go before those of the file, for instance "
                                                            "`source=more.jsonl out=runs/more`. Values are YAML.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a build of the same pipeline stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier build wrote into the folder.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Ask samplers again for the shards in which prompts failed.")] = False,
    dry: Annotated[bool, typer.Option("--dry", help="Only say which stages would run, and why.")] = False,
):
    """Build a data set by a pipeline: generate, score, label, select, augment, check, describe, in any order.

    Every shard of groups is committed as it is done, so that a build can be killed and resumed; what a stage made is kept by
    content in `cache`, so that a change in a late stage runs nothing before it.

    Exit code 0: done. 1: done, but some groups failed (they are in failed.jsonl). 2: an error. 130: interrupted.

    A pipeline file:

        source: prompts.jsonl
        split: {test: 0.1}
        stages:
          - generate:
              policies:
                student: {sampler: {transformers: {model: my/model}}, n: 8}
          - score: {rewards: [final_answer]}
          - select: best_worst
          - write: {name: pairs, format: pair}
          - check
          - describe
        out: runs/pairs

    Examples:

        prefopt data build build.yaml --dry
        prefopt data build build.yaml
        prefopt data build build.yaml --resume
        prefopt data build build.yaml source=more.jsonl out=runs/more
    """
    from data_tools.pipeline import driver
    plan = pipeline(file, settings or [])
    if dry:
        console.print(grid(driver.survey(plan)))
        return
    try:
        with progress() as tell:
            found = driver.build(plan, resume=resume, overwrite=overwrite, retry=retry, tell=tell)
    except driver.NothingLeft as nothing:
        report(nothing.steps)
        raise
    except KeyboardInterrupt:
        again = shlex.join(["prefopt", "data", "build", str(file), *(settings or []), "--resume"])
        stderr.print(f"interrupted; what was done is kept. Go on with: {again}", soft_wrap=True)
        raise typer.Exit(130) from None
    report(found.steps)
    count = sum(found.splits.values())
    told = ", ".join(f"{n:,} in {split}" for split, n in found.splits.items())
    console.print(f"{count:,} group{'s' * (count != 1)} ({told}) in {found.out}", soft_wrap=True)
    if found.failed:
        say("warning", f"{found.failed:,} groups failed: {found.out / 'failed.jsonl'} says why. Ask again with --resume --retry")
    raise typer.Exit(1 if found.failed else 0)


def pipeline(file: Path, settings: Sequence[str]):
    """A pipeline from its file."""
    import yaml

    from data_tools.pipeline.config import make
    from prefopt.config import Loader, override
    if not file.exists():
        raise ValueError(f"no pipeline file {str(file)!r}: give a YAML file, for instance cookbook/build_dataset/build.yaml")
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: a pipeline file holds keys (source, stages, out, ...), found {type(raw).__name__}")
    return make(override(raw, list(settings)), str(file))


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage, where somebody looks."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                  console=stderr, disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, int] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks or done == 0:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield tell


def report(steps: Sequence) -> None:
    """What became of the groups, and what the stages say of it."""
    console.print(summary(steps))
    for step in steps:
        for line in step.said:
            console.print(Text(f"{step.name}: ", style="cyan").append(line, style="default"), soft_wrap=True)


def summary(steps: Iterable):
    """What became of the groups, stage by stage."""
    rows = []
    for step in steps:
        (groups, left), (_, responses) = step.groups, step.responses
        gone = int(step.counts.get("removed", max(groups - left, 0)))
        rows.append((step.name, f"{groups:,}" if groups else "", f"{gone:,}" if gone else "", f"{left:,}", f"{responses:,}",
                     "from the cache" if step.reused == step.inputs else f"{step.reused} of {step.inputs} shards from the cache"
                     if step.reused else ""))
    return grid(rows, head=("stage", "groups", "removed", "left", "responses", ""))


@app.command()
def stages(name: Annotated[str | None, argument("NAME", "A stage or a rule.")] = None):
    """List what a pipeline file may name: stages, and the rules that label, select and augment. With NAME: all about one.

    Examples:

        prefopt data stages
        prefopt data stages best_worst
        prefopt data stages check
    """
    import inspect

    from data_tools.columns import nearest
    from data_tools.pipeline.config import STAGES, function_named, keywords, positional
    from data_tools.rules_page import SECTIONS, functions, shown, summary
    found = {"Stages": {kind: function_named(spec) for kind, spec in STAGES.items() if ":" in spec}}
    found |= {title: {rule.__name__: rule for rule in functions(home)} for title, home in SECTIONS.items()}
    if name is None:
        for title, known in found.items():
            console.print(Text(title, style="bold"))
            console.print(grid((f"  {key}", summary(function)) for key, function in known.items()))
        return
    known = {key: function for some in found.values() for key, function in some.items()}
    if name not in known:
        raise ValueError(f"there is no stage or rule {name!r}{nearest(name, known)}; `prefopt data stages` lists them")
    settings = [p for p in inspect.signature(known[name]).parameters.values() if p.name in keywords(known[name])]
    console.print(Text(f"{name}({', '.join(map(shown, settings))})", style="cyan"), soft_wrap=True)
    console.print(Text(f"sees: {', '.join(positional(known[name]))}\n", style="dim"))
    console.print(Text(inspect.getdoc(known[name])), soft_wrap=True)


# ---------------------------------------------------------------------------------------------------- look at it, mend it
@app.command()
def check(
    source: Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of findings.")] = Path("findings.jsonl"),
    against: Annotated[list[str], typer.Option(metavar="NAME=FILE", help="A test set that the data should not hold. May be "
                                                                         "repeated.")] = (),
    hook: Annotated[list[str], typer.Option(metavar="NAME=MODULE:FUNCTION", help="A function of your own, texts -> numbers "
                                                                                 "from 0 to 1, such as toxicity. May be "
                                                                                 "repeated.")] = (),
    skip: Annotated[list[str], typer.Option(help="A check to leave out: records, texts, hooks, language, contamination, "
                                                 "duplicates, bias or labels. May be repeated.")] = (),
    near: Annotated[float, typer.Option(help="Overlap of pairs of words that makes two groups near duplicates.")] = 0.7,
    language: Annotated[list[str], typer.Option(help="A language that is wanted, such as en. May be repeated.")] = (),
    score: Annotated[str | None, typer.Option(help="The score that judges the labels. Left out: a model of the words.")] = None,
    format: Format = None,
    column: Rename = None,
    limit: Limit = None,
):
    """Find duplicates, leaks from test sets, broken texts, refusals, cut answers, personal data, biases and suspicious labels.

    Exit code 0: nothing found. 1: something found, which is printed in short and stands in OUT.

    Examples:

        prefopt data check runs/pairs/pairs/train.jsonl --against gsm8k=test.jsonl
        prefopt data check pairs.jsonl --language en --hook toxicity=my_hooks:toxicity -o findings.jsonl
    """
    from data_tools import formats
    from data_tools.pipeline.config import function_named
    from data_tools.quality import check, findings
    sets = {name: formats.load(path) for name, path in given("--against", against).items()}
    hooks = {name: function_named(spec) for name, spec in given("--hook", hook).items()}
    groups = formats.load(source, format=format, columns=renamed(column), limit=limit)
    found = check.check(groups, against=sets, hooks=hooks, skip=skip, near=near, languages=language, score=score)
    tally = findings.save(found, out)
    console.print(Text(str(tally)), soft_wrap=True)
    console.print(f"all findings are in {out}", soft_wrap=True)
    raise typer.Exit(int(bool(tally.counts)))


@app.command()
def influence(
    source: Source,
    queries: Annotated[str | None, typer.Option(metavar="FILE", help="Pairs that you trust, such as a clean dev set, or those "
                                                                     "that a model gets wrong: the harm is what they "
                                                                     "suffer. In the format of IN.")] = None,
    model: Annotated[str | None, typer.Option(metavar="FOLDER", help="What `prefopt reward train` wrote: its last layer. Left "
                                                                     "out: the model of the words that `check` uses.")] = None,
    by: Annotated[str | None, typer.Option(help="influence, gradient_dot, self_influence or loss. Left out: influence with "
                                                "--queries, else loss.", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of findings.")] = Path("influence.jsonl"),
    most: Annotated[int, typer.Option(min=1, help="How many pairs are listed.")] = 100,
    ridge: Annotated[float, typer.Option(help="Of the fitted head, ridge |w|^2 / 2; more of it damps.")] = 1.0,
    format: Format = None,
    column: Rename = None,
    limit: Limit = None,
):
    """Rank training pairs by the harm that they do to a reward model, the worst first.

    OUT is read by `view` and `fix`. A pair is `sure` by the share of the pairs that do less harm, so that `fix --sure 0.9` takes
    the worst tenth, as far as --most lists it.

    Examples:

        prefopt data influence pairs.jsonl --queries clean.jsonl
        prefopt data influence pairs.jsonl --queries wrong.jsonl --model runs/reward --by gradient_dot
        prefopt data influence pairs.jsonl --model runs/reward --most 20
        prefopt data view pairs.jsonl --findings influence.jsonl
        prefopt data fix pairs.jsonl mended.jsonl --findings influence.jsonl --repair influence=flip --sure 0.9
    """
    from data_tools import formats
    from data_tools.pipeline.config import function_named
    from data_tools.quality import findings
    from data_tools.quality.influence import ranked
    groups = formats.load(source, format=format, columns=renamed(column), limit=limit)
    trusted = formats.load(queries, format=format, columns=renamed(column)) if queries else None
    features = function_named("rewards.trained:features")(model) if model else None
    found = ranked(groups, queries=trusted, features=features, by=by, ridge=ridge, most=most)
    console.print(Text(str(findings.save(found, out))), soft_wrap=True)
    console.print(f"all findings are in {out}", soft_wrap=True)


Findings = Annotated[Path | None, typer.Option(help="What `prefopt data check` or `influence` wrote.", show_default=False)]


@app.command()
def fix(
    source: Source,
    target: Annotated[Path, argument("OUT", "A .jsonl, .jsonl.gz or .parquet file that is not there yet.")],
    repair: Annotated[list[str], typer.Option(metavar="KIND[=REPAIR]", help="A kind of finding to repair, as proposed or by "
                                                                            "another repair. May be repeated.")],
    findings: Annotated[Path, typer.Option(help="What `prefopt data check` or `influence` wrote.")] = Path("findings.jsonl"),
    sure: Annotated[float, typer.Option(help="Leave findings that are less sure alone.")] = 0.8,
    format: Format = None,
    column: Rename = None,
):
    """Repair what `check` or `influence` found, into a new file; OUT.log.jsonl says what was done.

    Examples:

        prefopt data fix pairs.jsonl mended.jsonl --repair duplicate --repair 'suspected flip=unlabel' --sure 0.9
    """
    from data_tools import formats
    from data_tools.quality import findings as found
    from data_tools.quality.fix import fixed
    known = list(found.load(findings))
    proposed = {one.kind: one.repair for one in known}
    chosen = {kind: name or proposed.get(kind, "") for kind, _, name in (item.partition("=") for item in repair)}
    counts = fixed(formats.load(source, format=format, columns=renamed(column)), known, target, repairs=chosen, sure=sure)
    console.print(f"{counts.pop('groups'):,} groups written to {target}, what was done to {target}.log.jsonl", soft_wrap=True)
    for name, count in counts.items():
        console.print(f"{name}: {count:,} groups")


@app.command()
def view(
    source: Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("view.html"),
    findings: Findings = None,
    title: Annotated[str, typer.Option(help="What stands above.")] = "Groups",
    sample: Annotated[int, typer.Option(min=1, help="Groups on the page; of more, an even sample of every stratum.")] = 500,
    format: Format = None,
    column: Rename = None,
):
    """Write a page to read groups side by side, filter, search, compare and label them with keys.

    The page is one file that needs no server. It exports labels, which `prefopt data relabel` puts into the data.

    Examples:

        prefopt data view runs/pairs/pairs/train.jsonl
        prefopt data view pairs.jsonl --findings findings.jsonl --sample 100 -o look.html
    """
    from data_tools import formats
    from data_tools.quality import findings as found
    from data_tools.quality.page import write_page
    from data_tools.quality.view import view
    groups = formats.load(source, format=format, columns=renamed(column))
    write_page(view(groups, findings=found.load(findings) if findings else (), title=title, sample=sample), out)
    console.print(f"the page is {out}", soft_wrap=True)


@app.command()
def relabel(
    source: Source,
    labels: Annotated[Path, argument("LABELS", "What the page of `prefopt data view` exported.")],
    target: Annotated[Path, argument("OUT", "A .jsonl, .jsonl.gz or .parquet file.")],
    format: Format = None,
    column: Rename = None,
):
    """Put the labels of a person into the data.

    Example:

        prefopt data relabel pairs.jsonl labels.jsonl relabelled.jsonl
    """
    from data_tools import formats
    from data_tools.quality.view import apply_labels
    if str(target) == source:
        raise ValueError(f"{target} is both read and written: give another name")
    count = formats.dump(apply_labels(formats.load(source, format=format, columns=renamed(column)), labels), target)
    console.print(f"{count:,} groups written to {target}", soft_wrap=True)


# ------------------------------------------------------------------------------------------------------------ any file
@app.command()
def validate(
    files: Annotated[list[str], argument("FILE...", "Files, globs, folders or hub ids.")],
    format: Format = None,
    column: Rename = None,
    limit: Limit = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Also ask for two compared responses in every group.")] = False,
):
    """Find everything that is wrong with preference data, and where.

    Exit code 0: all records are good. 1: some are not.

    Examples:

        prefopt data validate pairs.jsonl
        prefopt data validate 'data/*.parquet' --pairs --column chosen=better --column rejected=worse
    """
    from data_tools import formats, validate
    checks, bad = (*validate.CHECKS, *([validate.paired] if pairs else [])), False
    for name in files:
        try:
            groups = formats.load(name, format=format, columns=renamed(column), limit=limit)
            found = validate.validate(groups, checks=checks)
            bad = bad or bool(found.counts) or not found.groups
        except (ValueError, OSError) as problem:              # nothing of this file can be read; on to the next
            found, bad = sentence(problem), True
        console.print(Text(f"{'' if str(found).startswith(name) else f'{name}: '}{found}"), soft_wrap=True)
    raise typer.Exit(int(bad))


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, argument("OUT", "A .jsonl, .jsonl.gz or .parquet file.")],
    to: Annotated[str, typer.Option(help="Format of OUT: group (keeps everything), pair, unpaired, stepwise, "
                                         "demonstration or prompts (columns as in TRL).")] = "group",
    split: Annotated[str | None, typer.Option(help="Take groups apart: all_pairs, best_worst or singles.")] = None,
    format: Format = None,
    column: Rename = None,
    limit: Limit = None,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out records that are not good, and count them, instead of "
                                                      "stopping at the first.")] = False,
):
    """Convert preference data from any format that prefopt reads.

    OUT appears when it is complete; until then a file of that name stays as it was.

    Examples:

        prefopt data convert ultrafeedback.jsonl pairs.jsonl --to pair --split best_worst
        prefopt data convert ratings.csv groups.jsonl --format ranked --column responses=answers
        prefopt data convert pairs.parquet feedback.jsonl.gz --to unpaired --split singles
    """
    from data_tools import formats, validate
    from data_tools.fields import DataError
    if target.exists() and str(target) == source:
        raise ValueError(f"{target} is both read and written: give another name")
    groups = validate.checked(formats.load(source, format=format, columns=renamed(column), limit=limit),
                              on_bad="skip" if skip else "error")
    barren: list[str] = []
    try:
        count = formats.dump(apart(groups, split, barren) if split else groups, target, format=to)
    except DataError as problem:
        hint = problem.problem == "does not fit" and not split
        raise ValueError(f"{problem}{'. See --split, which takes groups apart' * hint}") from None
    console.print(f"{count:,} record{'s' * (count != 1)} written to {target}", soft_wrap=True)
    if barren:
        say("warning", f"{len(barren):,} groups gave no record: ties, or no labels. The first is {barren[0]}")


def apart(groups: Iterable, how: str, barren: list[str]) -> Iterator:
    """Groups taken apart as `how` says; the places of those that give nothing go to `barren`."""
    from data_tools import labels
    from data_tools.columns import nearest
    from data_tools.fields import PLACE
    ways = {"all_pairs": lambda g: labels.split(g, labels.pairs(labels.wins_of(g))), "singles": labels.singles,
            "best_worst": lambda g: labels.split(g, labels.best_worst(
                g.relevance if g.wins is None else labels.lipo(g.wins)))}
    if how not in ways:
        raise ValueError(f"--split {how!r} is not known{nearest(how, ways)}; known: {', '.join(ways)}")
    for group in groups:
        pieces = ways[how](group) if group.relevance or group.wins else []
        barren += [] if pieces else [group.meta.get(PLACE, "")]
        yield from pieces


@app.command()
def describe(
    source: Source,
    tokenizer: Annotated[str | None, typer.Option(metavar="MODEL", help="Also count tokens, with the tokenizer of this "
                                                                        "folder or hub id.")] = None,
    format: Format = None,
    column: Rename = None,
    limit: Limit = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Write a card (README.md) and a page "
                                                                                   "(index.html) instead.")] = None,
    findings: Findings = None,
    title: Annotated[str, typer.Option(help="Of card and page.")] = "Preference data",
):
    """Describe preference data.

    Sizes, lengths, labels, position and length bias, duplicates, agreement of annotators: in one pass. With --out a card for the
    hub and a page: warnings first, distributions by model, agreement of rewards, topics, samples.

    Examples:

        prefopt data describe pairs.jsonl
        prefopt data describe pairs.jsonl --tokenizer Qwen/Qwen2.5-0.5B-Instruct --json
        prefopt data describe pairs.jsonl --findings findings.jsonl --title 'My pairs' --out card
    """
    from data_tools import describe, formats
    if out:
        from data_tools.quality import describe as pages
        from data_tools.quality import findings as found
        groups = formats.load(source, format=format, columns=renamed(column), limit=limit)
        report = pages.describe(groups, findings=found.load(findings) if findings else (), title=title)
        console.print(f"wrote {', '.join(map(str, pages.write(report, out)))}", soft_wrap=True)
        return
    count = None
    if tokenizer:
        from prefopt.models import load_tokenizer
        count = load_tokenizer(tokenizer)
    found = describe.describe(formats.load(source, format=format, columns=renamed(column), limit=limit), count)
    print(json.dumps(found, indent=1) if as_json else describe.render(found))


@app.command()
def difficulty(
    source: Annotated[str, argument("IN", "A response matrix: a row for each model, its name and then for each item 0, 1, a "
                                          "share, or nothing. Or games: the columns player, opponent, score and, where there "
                                          "are several, period.")],
    by: Annotated[str | None, typer.Option(help="irt (Rasch, 1PL), irt_2pl or glicko (Glicko-2). Left out: irt of a matrix, "
                                                "glicko of games.", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The table: .csv, .jsonl or .parquet.")] = Path("difficulty.csv"),
    show: Annotated[int, typer.Option(min=1, help="How many at either end are printed.")] = 5,
    transpose: Annotated[bool, typer.Option("--transpose", help="The rows of the matrix are items, its columns models.")] = False,
):
    """Say how hard items are and how able models, with 95 % intervals, from a response matrix or from games.

    Where the responses of several models are scored in groups, the rules by_irt, by_irt_2pl and by_glicko of a pipeline put the
    same numbers beside each group: `prefopt data stages by_irt`.

    Examples:

        prefopt data difficulty right_or_wrong.csv
        prefopt data difficulty preference_matrix.csv.gz --by irt_2pl -o items.jsonl
        prefopt data difficulty games.csv --show 10
    """
    from data_tools import abilities
    rows = abilities.table(abilities.load(source, transpose=transpose), by=by)
    abilities.save(rows, out)
    for line in abilities.told(rows):
        console.print(line)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        lines = [(row["name"], *(f"{row[key]:.4g}" for key in ("estimate", "low", "high")), f"{row['answers']:,}",
                  f"{row['share']:.1%}" if row["answers"] else "") for row in rows if row["kind"] == kind]
        ends = lines if len(lines) <= 2 * show else [*lines[:show], ("...",) * 6, *lines[-show:]]
        console.print(grid(ends, head=(kind, "estimate", "low", "high", "answers", "share")))
    console.print(f"the table is {out}", soft_wrap=True)


@app.command()
def push(
    folder: Annotated[Path, argument("FOLDER", "What a build wrote.")],
    repository: Annotated[str, argument("OWNER/NAME", "The data set on the hub; it is made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it.")] = False,
    dry: Annotated[bool, typer.Option("--dry", help="Only say what would be uploaded.")] = False,
):
    """Put a folder that a build wrote on the hub, as a private data set.

    Nothing else in prefopt uploads anything. You are asked for no password: `hf auth login` comes before.

    Examples:

        prefopt data push runs/pairs me/pairs --dry
        prefopt data push runs/pairs me/pairs
    """
    from data_tools.writers import push, uploaded
    if not (folder / "build.json").exists() or not json.loads((folder / "build.json").read_text(encoding="utf-8"))["finished"]:
        raise ValueError(f"{folder} is no finished build: run prefopt data build first")
    if dry:
        console.print(f"the {'public' if public else 'private'} data set {repository} would have", soft_wrap=True)
        console.print(grid((f"  {name}", f"{(folder / name).stat().st_size:,} bytes") for name in uploaded(folder)))
        return
    console.print(f"the data set is {push(folder, repository, private=not public)}", soft_wrap=True)


def renamed(columns: list[str] | None) -> dict[str, str] | None:
    return given("--column", columns or [], "KEY=COLUMN") or None


def given(option: str, items: Iterable[str], form: str = "NAME=VALUE") -> dict[str, str]:
    """What NAME=VALUE options say."""
    pairs = [item.partition("=") for item in items]
    if wrong := [f"{a}{sign}{b}" for a, sign, b in pairs if not (a and b)]:
        raise ValueError(f"{option} {wrong[0]} is not of the form {form}")
    return {name: value for name, _, value in pairs}
