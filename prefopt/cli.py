"""The command line. Heavy imports happen inside the commands, so that help comes at once."""
from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from prefopt import __version__
from prefopt.console import COLOURS, argument, console, grid, say, stderr
from prefopt.data_cli import app as data_app
from prefopt.findings import TELLING, exists, sentence
from rewards.cli import app as reward_app


class Readable(TyperGroup):
    """Errors that the user can mend end in one paragraph and exit code 2, Ctrl-C in exit code 130."""

    def invoke(self, ctx):
        try:
            return TyperGroup.invoke(self, ctx)
        except TELLING as problem:
            bug = isinstance(problem, KeyError) and " " not in str(problem.args[0] if problem.args else "")
            if ctx.params["traceback"] or bug:
                raise
            say("error", sentence(problem))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            stderr.print("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(cls=Readable, no_args_is_help=True, rich_markup_mode="markdown", add_completion=False,
                  pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(data_app, name="data")
app.add_typer(reward_app, name="reward")


RunFile = Annotated[Path, argument("RUN.yaml", "The run: recipe, policy, data, train, ...")]
Settings = Annotated[list[str] | None, argument(
    "a.b=c", "Settings that go before those of the file, for instance `train.lr=1e-6 set.beta=0.5`. Values are YAML.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Stop after this many groups.")]


def version(show: bool) -> None:
    if show:
        console.print(__version__)
        raise typer.Exit()


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error came from.")] = False,
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")] = False,
):
    """Preference optimisation of language models.

    Start with `prefopt doctor`, look around with `prefopt list` and `prefopt explain dpo`, write a run file, and then
    `prefopt check RUN.yaml` and `prefopt train RUN.yaml`. `prefopt COMMAND --help` has examples.

    A run file needs four lines:

        recipe: dpo
        policy: Qwen/Qwen2.5-0.5B-Instruct
        data: {train: pairs.jsonl}
        out: runs/first
    """
    usual = warnings.showwarning

    def shown(message, category, *where) -> None:
        if issubclass(category, UserWarning):
            say("warning", " ".join(str(message).split()))
        else:
            usual(message, category, *where)

    warnings.showwarning = shown


# ---------------------------------------------------------------------------------------------------------------- runs
@app.command()
def train(
    run_file: RunFile,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, exactly where the run "
                                                          "stopped.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and unmet expectations only.")] = False,
):
    """Train a policy or a reward model.

    With a block `iterate` these are rounds of sampling, scoring, selecting and training on what was selected.

    The folder `out` gets the model, metrics.jsonl, the resolved run.yaml, what departs from the recipe, samples of what
    the model saw, and checkpoints if `train.save_every` is set. Ctrl-C finishes the step and saves a checkpoint.

    Exit code 0: done. 1: done, but a condition of `expect` is not met. 2: an error. 130: interrupted.

    Examples:

        prefopt train run.yaml
        prefopt train run.yaml set.beta=0.5 train.lr=5e-7 out=runs/second
        prefopt train run.yaml set.ranking=hinge 'set.labels={unflip: {flip: 0.1}}'
        prefopt train run.yaml recipe=bradley_terry out=runs/reward
        prefopt train run.yaml --resume
        torchrun --nproc_per_node 2 -m prefopt train run.yaml
    """
    from prefopt.config import load
    run = load(run_file, settings or [])
    from prefopt.checkpoints import latest
    from prefopt.explain import plan
    from prefopt.iterate import iterate
    from prefopt.train import train
    visible = not quiet and int(os.environ.get("RANK", "0")) == 0
    for setting, model in (("policy", run.policy), ("reference", run.reference)):
        if model:
            exists(f"{setting}.name", model.name)
    if resume and not run.iterate and not latest(Path(run.out) / "checkpoints"):
        say("warning", f"--resume: there is no checkpoint in {run.out}, so the run starts from the beginning")
    if visible:
        console.print(grid(plan(run).items()))
    result = (iterate if run.iterate else train)(run, resume=resume, show=not quiet)
    if visible and run.iterate:
        rounds(Path(run.out))
    if visible:
        finished(result, run.expect)
    for text in result.failed:
        stderr.print(Text("not as expected: ", style="red").append(text, style="default"))
    if result.stopped == "interrupted":
        again = shlex.join(["prefopt", "train", str(run_file), *(settings or []), "--resume"])
        stderr.print(Text(f"interrupted and saved at step {result.steps}; go on with: {again}"), soft_wrap=True)
        raise typer.Exit(130)
    raise typer.Exit(1 if result.failed else 0)


reward_app.command("train")(train)                            # a reward model is a run like any other


def rounds(out: Path) -> None:
    """The rounds of an iterative run, a line for each."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [k for k in ("reward", "selected", "loss", "accuracy", "kl/ref", "eval/reward") if any(k in line for line in lines)]
    console.print(grid([(str(line["step"]), *(number(line.get(k)) for k in names)) for line in lines], head=("round", *names)))


def finished(result, expect: dict[str, str]) -> None:
    """The last metrics, training beside held-out, and the expectations that are met."""
    from prefopt.evaluation import MAIN, described, ordered
    terms = [[k for k in result.metrics if k.startswith(head)] for head in ("loss/", "reward/", "pass@")]
    shown = {*MAIN, *(k for some in terms for k in some if len(some) > 1 and not k.endswith("/std"))}
    names = [k for k in ordered({k.removeprefix("eval/"): 0.0 for k in result.metrics}) if k in shown]
    kinds = {f"step {result.steps}": "", "held out": "eval/"}
    if not any(k.startswith("eval/") for k in result.metrics):
        kinds.pop("held out")
    rows = [(name, *(number(result.metrics.get(f"{kind}{name}")) for kind in kinds.values()), described(name))
            for name in names]
    console.print(grid(rows, head=("metric", *kinds, "")))
    if result.stopped != "interrupted":
        early = f", stopped early: {result.stopped}" if result.stopped else ""
        console.print(f"{result.steps} step{'s' * (result.steps != 1)}{early}; the model is in {result.out}/model, all "
                      f"metrics are in {result.out}/metrics.jsonl", soft_wrap=True)
        console.print(result.speed, soft_wrap=True)
        for metric, condition in expect.items():
            if not any(text.startswith(f"{metric} ") for text in result.failed):
                console.print(Text("as expected: ", style="green").append(f"{metric} {condition}", style="default"))


@app.command()
def check(
    run_file: RunFile,
    settings: Settings = None,
    records: Annotated[int | None, typer.Option(min=1, help="Read only so many groups of each data set.")] = None,
):
    """Check everything about a run that can be checked before weights are loaded.

    Settings and recipe; every record of the data, with the checks of training; whether the recipe can learn from such
    data, and which recipes can; tokenizer and chat template; the model folder; packages; memory and disk (estimates);
    steps; the metrics that are expected.

    Exit code 0: nothing found, or warnings only. 1: errors. 2: the run file itself is wrong.

    Examples:

        prefopt check run.yaml
        prefopt check run.yaml recipe=kto data.train=feedback.jsonl --records 1000
    """
    from prefopt.config import load
    run = load(run_file, settings or [])
    from prefopt import check
    with console.status("checking"):
        found = list(check.check(run, records=records))
    raise typer.Exit(report(found))


@app.command()
def doctor():
    """Check this installation.

    Versions, devices, optional packages and what brings them, disk, what protects this machine from code that a model
    wrote and that rewards run, and one training step of a tiny model.

    Exit code 0: fine. 1: something does not work.

    Example:

        prefopt doctor
    """
    from prefopt import doctor
    from rewards.sandbox import protections
    with console.status("looking around, and training one step"):
        found = list(doctor.findings(protections))
    raise typer.Exit(report(found))


def report(found: list) -> int:
    """Print findings; 1 when there is an error among them."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    for n, (level, topic, text) in enumerate(found):
        again = n > 0 and found[n - 1].topic == topic
        table.add_row(Text(level, style=COLOURS[level]), Text("" if again else topic, style="bold"), Text(text))
    console.print(table)
    errors, cautions = (sum(f.level == level for f in found) for level in ("error", "warning"))
    console.print(f"{errors} error{'s' * (errors != 1)}, {cautions} warning{'s' * (cautions != 1)}")
    return int(errors > 0)


@app.command("eval")
def evaluate(
    model: Annotated[str, argument("MODEL", "A run folder, a model folder or a hub id.")],
    settings: Settings = None,
    data: Annotated[str | None, typer.Option(help="Preference data. Left out: the held-out data of the run.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe of the loss. Left out: the run's, or dpo.")] = None,
    reference: Annotated[str | None, typer.Option(help="The model that training started from. Left out: the run's, or "
                                                       "what an adapter sits on.")] = None,
    limit: Limit = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers to FILE.")] = None,
):
    """Evaluate a policy on preference data.

    Loss of the recipe, accuracy of the implicit reward, how well the log-probabilities of policy and reference rank the
    pairs and how well they could (idealised), margins, displacement, length-controlled accuracy, KL to the reference.

    Examples:

        prefopt eval runs/first
        prefopt eval runs/first/model --data held_out.jsonl --json numbers.json
        prefopt eval my/model --data pairs.jsonl --reference Qwen/Qwen2.5-0.5B-Instruct set.beta=0.5
        prefopt eval my/model --data pairs.jsonl --recipe simpo train.tokens=8192
    """
    from prefopt import evaluation
    extra = [*(settings or []), *([f"data.eval_limit={limit}"] if limit else [])]
    run = evaluation.plan(model, data=data, recipe=recipe, reference=reference, overrides=extra)
    with console.status("evaluating"):
        found = evaluation.ordered(evaluation.evaluate(run))
    single = sum(k.startswith("loss/") for k in found) == 1
    rows = [(k, number(v), evaluation.described(k)) for k, v in found.items() if not (single and k == "loss/ranking")]
    console.print(grid(rows, head=("metric", "value", "")))
    if json_file:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- watch
@app.command("report")
def write_report(
    runs: Annotated[list[Path], argument("RUN...", "Run folders; several are drawn into the same charts.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page. Left out: report.html in the run folder, or here of "
                                                                 "several.", show_default=False)] = None,
    steps: Annotated[int, typer.Option(min=1, help="Dumped steps whose rollouts are shown; several runs share them.")] = 6,
    groups: Annotated[int, typer.Option(min=1, help="Groups of such a step.")] = 6,
):
    """Write one HTML page about runs: recipe and departures, what to worry about, curves, settings, rollouts by token.

    The page needs no network and no other file. A run may still be training.

    Examples:

        prefopt report runs/first
        prefopt report runs/grpo runs/rloo --out compare.html --steps 10
    """
    try:
        from prefopt.report import page
    except ModuleNotFoundError as missing:
        raise ImportError(f"the report needs {missing.name}: pip install 'prefopt[report]'") from None
    from prefopt.report.samples import Sizes
    out = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    console.print(f"the page is {page.write(runs, out, Sizes(steps=steps, groups=groups))}", soft_wrap=True)


@app.command()
def rollouts(
    run: Annotated[Path, argument("RUN", "A run folder.")],
    step: Annotated[int | None, typer.Option(min=1, help="A dumped step. Left out: the last.", show_default=False)] = None,
    sort: Annotated[str, typer.Option(help="Order of the groups: reward, contrast or length. Both ends are shown.")] = "reward",
    count: Annotated[int, typer.Option("--show", min=1, help="Show this many groups.")] = 4,
    colour: Annotated[str, typer.Option(help="Colour tokens by advantage, log_ratio (trainer against sampler), reference, logp, "
                                             "or none.")] = "advantage",
    search: Annotated[str, typer.Option(help="Only groups that hold this text.")] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Go on with every new step, until Ctrl-C.")] = False,
):
    """Show what a run sampled.

    Prompts, responses, rewards and their components of one step; tokens on blue were pushed up and those on orange down.

    Examples:

        prefopt rollouts runs/grpo
        prefopt rollouts runs/grpo --step 10 --sort length --show 6 --colour reference
        prefopt rollouts runs/grpo --search answer --watch
    """
    import time

    from prefopt.report import folders, terminal
    seen = terminal.show(console, run, step=step, sort=sort, count=count, colour=colour, search=search)
    while watch:
        time.sleep(2)
        if (newest := max(folders.rollout_files(run))) > seen:
            seen = terminal.show(console, run, step=newest, sort=sort, count=count, colour=colour, search=search)


@app.command()
def play(
    game_file: Annotated[Path, argument("GAME.yaml", "The game: its name or payoff, reference, beta, algorithms.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="PAGE.html", help="Write a page with gap curves and, of "
                                                                                     "three responses, paths.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every iteration to FILE; - prints "
                                                                                  "it.")] = None,
):
    """Play a game of preferences with tables that learn by the losses of the recipes.

    Prints the duality gap under the KL and the exploitability without it, by iteration. A game file may be as short as

        game: rps
        reference: [3, 2, 1]
        beta: 0.1
        algorithms: [egpo, omd, {nash_md: {eta: 0.1}}]

    In the place of a game's name stands a matrix (`payoff: [[0.5, 0.9], [0.1, 0.5]]`) or a CSV file (`payoff: wins.csv`) of
    P(i beats j). `samples: 100` draws responses instead of summing over all pairs, `verdicts: true` has the oracle answer 0
    or 1; `start`, `iterations`, `actions` and `seed` are what they say.

    Examples:

        prefopt play rps.yaml
        prefopt play rps.yaml -o rps.html
        prefopt play rps.yaml --json rps.json
    """
    from prefopt.games import play as games
    plan = games.load(game_file)
    if out:
        try:
            from prefopt.games import page
        except ModuleNotFoundError as missing:
            raise ImportError(f"the page needs {missing.name}: pip install 'prefopt[report]'") from None
    with stderr.status("playing"):
        played = games.run(plan)
    if json_file:
        text = json.dumps(games.record(played)) + "\n"
        print(text, end="") if str(json_file) == "-" else json_file.write_text(text, encoding="utf-8")
    if str(json_file) != "-":
        for key, title in (("gap", "duality gap with the KL"), ("exploitability", "exploitability without a KL")):
            console.print(Text(title, style="bold"))
            names = (r.name.replace("_", "\n_") for r in played.runs)
            console.print(grid(([*row, ""] for row in games.table(played.runs, key)), head=("iteration", *names, "")))
    if out:
        console.print(f"the page is {page.write(played, out)}", soft_wrap=True)


# --------------------------------------------------------------------------------------------------------- look around
@app.command("list")
def list_recipes(
    slot: Annotated[str | None, typer.Option(help="List the parts of a slot instead. Preference recipes: score, margin, "
                                                  "ranking, labels, pair_weight, regularisers, reduce, reference, "
                                                  "annotations, providers. On-policy recipes: shaping, keep, advantage, "
                                                  "credit, normalise, ratio, surrogate, weight, penalties, reduce, "
                                                  "reward_at, accept, correction, annotations, selections. Both: update. Or "
                                                  "`recipe` for what each recipe is.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of recipes as Markdown.")] = False,
):
    """List all recipes with what fills their slots.

    Only what differs from dpo, or of on-policy recipes from grpo, is shown; `prefopt explain NAME` shows everything.

    Examples:

        prefopt list
        prefopt list --slot recipe
        prefopt list --slot ranking
    """
    from prefopt import explain
    if markdown:
        print(explain.markdown_table())
    elif slot == "recipe":
        for theme, names in explain.themes().items():
            console.print(Text(f"\n{theme}", style="bold"))
            console.print(grid((name, explain.document(explain.recipes.find(name)).summary) for name in names))
    elif slot:
        console.print(grid((name, explain.document(part).summary) for name, part in explain.parts_of(slot).items()))
    else:
        for base in explain.BASES:
            table = explain.table(base)
            for theme, names in explain.themes().items():
                if rows := {name: table[name] for name in names if name in table}:
                    console.print(Text(f"\n{theme}", style="bold"))
                    console.print(recipes_table(rows))
        console.print("\nA cell that is not there is as in dpo, or grpo. What a recipe is: prefopt list --slot recipe, and "
                      "prefopt explain NAME.")


def recipes_table(rows: dict[str, dict[str, str]]) -> Table:
    """Two main slots in columns, every other slot on a line of the last one."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    main = ("score", "ranking") if "score" in next(iter(rows.values())) else ("advantage", "surrogate")
    for head, width in (("recipe", 20), (main[0], 25), (main[1], 20)):
        table.add_column(head, width=width, style="cyan" if head == "recipe" else "", overflow="fold")
    table.add_column("other slots", overflow="fold")
    for name, filled in rows.items():
        added, made = ("regularisers", "penalties"), ("annotations", "providers", "selections")
        rest = [f"{slot.replace('_', ' ')}: {text}" for slot, text in filled.items()
                if text and slot not in (*main, *added, *made)]
        rest += [f"{'+' if slot == 'regularisers' else '-'} {term}" for slot in added
                 for term in filled.get(slot, "").split("; ") if term]
        rest += [line for slot in made for line in filled.get(slot, "").split("; ") if line]
        table.add_row(name, *(filled[slot] for slot in main), Text("\n".join(rest)))
    return table


@app.command()
def explain(
    name: Annotated[str, argument("NAME", "A recipe, a part, a column or a metric.")],
    settings: Annotated[list[str] | None, argument("a=b", "Departures of a recipe: its arguments, or slots. Values are "
                                                          "YAML.")] = None,
):
    """Explain a recipe, a part, a column or a metric.

    Of a recipe: equation, arguments, what fills its slots, the columns it reads and hence the models it loads, what a
    step costs, which data it takes, relations and reference.

    Examples:

        prefopt explain dpo
        prefopt explain ipo tau=0.2 'labels={unflip: {flip: 0.3}}'
        prefopt explain hinge
        prefopt explain logp_ref
        prefopt explain ranking/gap
    """
    from prefopt import explain
    from prefopt.config import override
    departures = override({}, [item.removeprefix("set.") for item in settings or []])
    explain.show(explain.pages(name, departures), console)


# -------------------------------------------------------------------------------------------------------------- tables
def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def main() -> None:
    sys.path.insert(0, "")                                    # module:function is found where one is, as by python -m
    app(prog_name="prefopt")


if __name__ == "__main__":
    main()
