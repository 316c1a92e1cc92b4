"""What recipes and parts are made of, what they read and hence cost: as data, as text, and as docs/methods.md.

Everything is derived from signatures, docstrings and the column table. `python -m prefopt.explain` writes
docs/methods.md and the table of recipes in README.md anew.
"""
from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path

from data_tools.columns import COLUMNS, nearest
from prefopt import recipes
from prefopt.config import Run, assemble
from prefopt.evaluation import METRICS
from prefopt.folder import columns
from prefopt.forward import CRITIC, FROZEN, GRADED, GRADIENT, REFERENCE, frozen_models, needs_critic
from prefopt.objectives import PreferenceObjective, Term
from prefopt.online import at_once, update_count
from prefopt.parts import columns_read, to_spec
from prefopt.policy import Penalty, PolicyObjective
from prefopt.recipes.games import ITERATIONS, ROLLOUTS, UPDATES
from prefopt.reductions import group_mean
from prefopt.rehearsal import example, rehearse

Objective = PreferenceObjective | PolicyObjective
HOMES = {slot: tuple(dict.fromkeys((*PreferenceObjective.home.get(slot, ()), *PolicyObjective.home.get(slot, ()))))
         for slot in {**PreferenceObjective.home, **PolicyObjective.home}} | {"update": ("prefopt.update",)}
PASSES = {
    "value_old": "critic forward before the rollout is trained on, no gradient",
    "value": "critic forward and backward",
    "entropy_old": "policy forward before the rollout is trained on, no gradient",
    "logp_now": "policy forward before every update of a rollout but its first, no gradient",
    "logp_ref": "reference forward, no gradient (none with data.cache_reference: they are computed once)",
    "logp_old": "policy forward before the step, no gradient",
    "outputs_old": "forward before the step, no gradient",
    "mismatched": "policy and reference forward over every prompt with another prompt's response, no gradient",
    "activation_mask": "reference forward that keeps its activations, no gradient",
    "token_kl": "reference forward whose next-token distributions are compared with the policy's",
    "states_ref": "reference forward that keeps the hidden states of all layers",
    "online": "sampling of train.online.k responses of the policy to every prompt"}
SHAPES = {"pairs": [[1.0, 0.0], [1.0, 0.0]], "lists of three or more": [[1.0, 0.75, 0.25, 0.0]] * 2,
          "single responses marked good or bad": [[1.0], [0.0], [1.0], [0.0]]}
SYMBOLS = {
    "h": "rho_w - rho_l", "rho": "lp - lr, the log-ratio of a response",
    "alp": "lp / |y|, the log-probability of a response per token",
    "lp": "log-probability of a response under the policy, summed over its tokens",
    "lr": "log-probability of a response under the reference, summed over its tokens",
    "y_w": "the preferred response; y_l is the other one, |y| counts tokens",
    "psi": "graded label of a response, the column `relevance`", "sg": "no gradient flows through",
    "mu": "token weights on the log-ratio; md are those on the token KL"}
UNBOUNDED = "the loss has no lower bound: small learning rate, few epochs, early stopping (train.patience)"


# ---------------------------------------------------------------------------------------------------------- docstrings
@dataclass(frozen=True)
class Doc:
    """A docstring in its sections; `notes` maps Gradient, Edge, Relations, Departs, Reference, ... to text."""
    summary: str
    equation: str
    prose: str
    arguments: dict[str, str]
    notes: dict[str, str]


NOTE = re.compile(r"(At policy = (?:old = )?reference|Gradient|Edge|Relations|Departs|Reference)(?::|\s)\s*(.*)")


def document(thing) -> Doc:
    """The docstring of a recipe or a part, taken apart; notes of '-' are left out.

    >>> document(recipes.ipo).equation, document(recipes.ipo).notes["At policy = reference"]
    ('L = (rho_w / |y_w| - rho_l / |y_l| - 1 / (2 tau))^2', '1 / (4 tau^2)')
    """
    head, *paragraphs = (inspect.getdoc(thing) or "").split(">>>")[0].strip().split("\n\n")
    known = set(inspect.signature(thing).parameters)
    equation = paragraphs.pop(0) if paragraphs and not _entry(paragraphs[0], known) else ""
    entries, prose, last = {}, [], None
    for line in "\n\n".join(paragraphs).split("\n"):
        if found := _entry(line, known):
            last, entries[found[0]] = found
        elif last and line.startswith(" "):
            entries[last] += " " + line.strip()
        else:
            last = None
            prose.append(line)
    notes = {k: v for k, v in entries.items() if NOTE.match(f"{k} ")}
    return Doc(" ".join(head.split()), equation, re.sub(r"(?<=\S)\n(?=\S)", " ", "\n".join(prose)).strip(),
               {k: v for k, v in entries.items() if k not in notes}, {k: v for k, v in notes.items() if v != "-"})


def _entry(line: str, known: set[str]) -> tuple[str, str] | None:
    """(name, text) of a labelled line: a note, or arguments that the signature has."""
    if found := NOTE.match(line):
        return found[1], found[2]
    found = re.match(r"(\w+(?:, \w+)*)\s\s+(.*)", line)
    return (found[1], found[2]) if found and known.issuperset(found[1].split(", ")) else None


# --------------------------------------------------------------------------------------------------------------- slots
def source(part):
    """What carries a part's docstring and defaults: its function, or its class."""
    part = part.func if isinstance(part, partial) else part
    return part if inspect.isroutine(part) or inspect.isclass(part) else type(part)


def defaults(part) -> dict[str, object]:
    """Hyperparameters with their defaults, `inspect.Parameter.empty` where there is none."""
    return {p.name: p.default for p in inspect.signature(source(part)).parameters.values()
            if p.kind is p.KEYWORD_ONLY or p.default is not p.empty}


def shown(part, *, brief: bool = False) -> str:
    """`name(argument=value, ...)`; `brief` leaves out what the part's own defaults say.

    >>> from prefopt.pairwise import hinge
    >>> shown(hinge), shown(hinge, brief=True), shown(partial(hinge, delta=2.0), brief=True)
    ('hinge(delta=1)', 'hinge', 'hinge(delta=2)')
    """
    spec = to_spec(part)
    (name, bound), = spec.items() if isinstance(spec, dict) else [(spec, {})]
    own = defaults(part)
    values = {k: v for k, v in bound.items() if own.get(k) != v} if brief else {**own, **bound}
    return f"{name}({', '.join(f'{k}={words(v)}' for k, v in values.items())})" if values else name


def words(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def slots(objective: Objective, *, brief: bool = False) -> dict[str, str]:
    """What fills each slot, '' where nothing does.

    >>> slots(recipes.kto())["annotations"], slots(recipes.slic(), brief=True)["regularisers"]
    ('baseline: kl_baseline(beta=0.1)', '0.1 * best_nll')
    """
    out = {slot: _filling(getattr(objective, slot), slot, brief) for slot in objective.home}
    if "ranking" in out:
        out["ranking"] = _term(Term(objective.ranking, objective.weight, group_mean, objective.ranking_terms), brief)
    return out


def _filling(filling, slot: str, brief: bool) -> str:
    """A part, the terms of a slot, or the columns that its parts write."""
    if isinstance(filling, Mapping):
        named = slot in ("annotations", "providers", "selections")
        return "; ".join(f"{column}: {shown(part, brief=brief)}" if named else _term(part, brief)
                         for column, part in filling.items())
    return shown(filling, brief=brief) if filling is not None else ""


def _term(term, brief: bool) -> str:
    if not isinstance(term, (Term, Penalty)):
        return shown(term, brief=brief)
    usual = group_mean if isinstance(term, Term) else None
    on = getattr(term, "terms", None)
    return (f"{term.weight:g} * " if term.weight != 1 else "") + shown(term.part, brief=brief) \
        + (f" by {term.reduce.__name__}" if term.reduce is not usual else "") \
        + (f" on {shown(on, brief=brief)}" if on else "")


# ---------------------------------------------------------------------------------------------- what it reads and costs
def origin(column: str) -> str:
    """Who makes a column, in words."""
    if column in FROZEN | GRADIENT:
        both = {"token_kl", "mismatched"}
        own = "critic" if column in CRITIC else "reward model" if column in GRADED or column == "outputs_old" else "policy"
        return "policy and reference" if column in both else "reference" if column in REFERENCE else own
    return {"labels": "the data", "rewards": "the data or the rewards", "augment": "the data", "source": "the data",
            "user": "the data"}.get(COLUMNS[column].maker, COLUMNS[column].maker) if column != "online" else "sampling"


def models(objective: Objective) -> dict[str, str]:
    """The models that a run loads, and why.

    >>> list(models(recipes.simpo())), models(recipes.dpo())["reference"][:21]
    (['policy'], 'because of `logp_ref`')
    """
    out = {"reward model" if objective.outputs else "policy": "trains"}
    if frozen_models(objective.reads()):
        because = ", ".join(f"`{c}`" for c in sorted(objective.reads() & REFERENCE))
        kept = f"follows the policy, {shown(objective.reference)}" if objective.reference.moves else \
            "the policy as it was at the start (with LoRA its adapters are switched off, which costs no memory), or " \
            "the run file's `reference`"
        out["reference"] = f"because of {because}: {kept}"
    if needs_critic(objective.reads()):
        out["critic"] = "trains beside the policy, in its own optimiser group: the run file's `critic`, or the policy's body " \
                        "under a head that starts at 0"
    return out


def passes(objective: Objective) -> list[str]:
    """What one optimiser step runs."""
    own = "reward model" if objective.outputs else "policy"
    first = [] if objective.whole_groups else ["sampling of rollout.k responses to every prompt, and their rewards"]
    return [*first, f"{own} forward and backward", *(PASSES[c] for c in PASSES if c in objective.reads())]


def takes(objective) -> list[str]:
    """The shapes of data that the recipe learns from, found by trying. `objective` is called for a fresh one."""
    if not objective().whole_groups:
        return ["prompts"]
    out = []
    for shape, labels in SHAPES.items():
        try:
            learns = rehearse(objective(), example(labels)).learns.all()
        except ValueError:
            continue
        out += [shape] if learns else []
    return out


def asks(objective: Objective) -> dict[str, str]:
    """What records must bring besides prompt, responses and labels: column -> how."""
    how = {"reward": "scores: {reward: ...} of each response, or reward_chosen and reward_rejected of a pair",
           "step_label": "meta: {steps: [...], step_labels: [...]} of each response, or prompt, completions and labels",
           "segment": "meta: {segments: [[text, number], ...]} of each response"}
    return {c: f"{COLUMNS[c].meaning}. Give it as {how.get(c, f'meta: {{{c}: ...}} of each response')}"
            for c in columns(objective.reads()) if objective.whole_groups or c != "reward"}


def plan(run: Run) -> dict[str, str]:
    """What a run is going to do, in the words of its settings."""
    objective, t, d = run.objective(), run.train, run.data
    changed = departures_of(run.recipe, run.set)
    how = [run.policy.dtype, *(["LoRA " + ", ".join(f"{k}={v}" for k, v in run.policy.lora.items())] if run.policy.lora
                               else []), *([f"{run.policy.quantize} bits"] if run.policy.quantize else [])]
    length = f"{t.steps:,} steps" if t.steps else f"{t.epochs:g} epoch{'s' * (t.epochs != 1)}"
    idle = [PASSES["logp_old"]] if run.rollout and at_once(run, objective) else []            # the loss's own
    out = {"recipe": f"{run.recipe}: {document(recipes.find(run.recipe)).summary}",
           "departures": "; ".join(f"{slot} {here} instead of {plain}" for slot, (here, plain) in changed.items()),
           "policy": f"{run.policy.name}, {', '.join(how)}", "reference": reference_of(run, objective),
           "data": f"{d.train}" + (f", held out {d.eval}" if d.eval else ""),
           "length": f"{length}, {t.groups_per_step} {'prompts' if run.rollout else 'groups'} per step, learning rate {t.lr:g} "
                     f"({t.schedule})",
           "rollout": rollout_of(run), "rewards": rewards_of(run),
           "each step": "; ".join([*(p for p in passes(objective) if p not in idle),
                                   f"in micro-batches {f'of {t.tokens:,} tokens' if t.tokens else 'that suit the device'}"]),
           "results": run.out}
    if not objective.bounded:
        out["careful"] = UNBOUNDED
    return {key: text for key, text in out.items() if text}


def rollout_of(run: Run) -> str:
    """The batch numbers of an on-policy run, resolved."""
    roll = run.rollout
    if roll is None:
        return ""
    if run.iterate:
        it = run.iterate
        return (f"{it.rounds} rounds of {f'{it.prompts:,}' if it.prompts else 'all'} prompts x {roll.k} responses, of which "
                f"{spelt(it.select)} is trained on against the {it.reference} policy"
                + (f", momentum {it.momentum:g}" if it.momentum else ""))
    samples, updates = run.train.groups_per_step * roll.k, update_count(run)
    how = f"temperature {roll.temperature:g}" + (f", top_p {roll.top_p:g}" if roll.top_p < 1 else "") \
        + (f", top_k {roll.top_k}" if roll.top_k else "")
    return (f"{run.train.groups_per_step} prompts x {roll.k} responses = {samples} samples per step, {updates} "
            f"update{'s' * (updates != 1)} of {roll.samples_per_update or samples} samples; up to {roll.max_new_tokens} "
            f"tokens, {how}, " + (f"read from {roll.recorded}" if roll.recorded else f"by {spelt(roll.sampler)}"))


def rewards_of(run: Run) -> str:
    specs = run.rollout.rewards if run.rollout else []
    return ", ".join(map(spelt, [specs] if isinstance(specs, (str, dict)) else specs))


def spelt(spec: str | Mapping) -> str:
    """'name' or {name: {argument: value}} in words.

    >>> spelt({"bleu": {"weight": 0.5}})
    'bleu (weight 0.5)'
    """
    if isinstance(spec, str):
        return spec
    (name, arguments), = spec.items()
    return name + (f" ({', '.join(f'{k} {words(v)}' for k, v in arguments.items())})" if arguments else "")


def reference_of(run: Run, objective: Objective) -> str:
    """What stands as the reference of this run, and why one is needed; '' where none is loaded."""
    if not frozen_models(objective.reads()):
        return ""
    adapters = run.policy.lora and not objective.reference.moves
    own = "the policy with its adapters off" if adapters else "a copy of the policy"
    moves = f", which follows it: {shown(objective.reference)}" if objective.reference.moves else ""
    columns = ", ".join(sorted(objective.reads() & REFERENCE))
    return f"{run.reference.name if run.reference else own}{moves}, for {columns}"


# --------------------------------------------------------------------------------------------------------------- pages
@dataclass(frozen=True)
class Page:
    """`tables` maps a heading to rows of cells."""
    title: str
    doc: Doc
    tables: dict[str, list[tuple[str, ...]]]


def recipe_page(name: str, departures: Mapping[str, object] = {}) -> Page:
    """A recipe, with the departures of a run file's `set` applied."""
    make = recipes.find(name)
    here = partial(assemble, name, dict(departures))
    own, plain, doc = here(), make(), document(make)
    arguments, told = inspect.signature(make).parameters, {}
    for thing in (*parts_of("labels").values(), *map(source, filter(None, _parts(plain))), make):
        told |= _spread(document(thing).arguments)            # the recipe has the last word
    rows = [(k, words(departures.get(k, p.default)) + (f" (recipe: {words(p.default)})" if k in departures else ""),
             told.get(k, "")) for k, p in arguments.items()]
    changed, idle = departures_of(name, departures), unread(own)
    filled = [(slot, text, equation(own, slot) + (f" [instead of {changed[slot][1]}]" if slot in changed else ""))
              for slot, text in slots(own).items() if text and slot not in idle]
    data = [("takes", "; ".join(takes(here)) or "groups of a special make, see above"),
            *([("per step", "at least two groups (train.groups_per_step)")] if "mismatched" in own.reads() else []),
            *((f"needs {c}", text) for c, text in asks(own).items()), *usual(name)]
    notes = dict(doc.notes)
    if not own.bounded:
        notes["Unbounded"] = UNBOUNDED
    if changed:
        note = "This is the recipe as published; the slots below say what departs."
        doc = replace(doc, prose=f"{doc.prose}\n\n{note}".strip())
    return Page(f"{name} (recipe)", doc, {
        "Symbols": symbols(f"{doc.equation} {doc.prose}"), "Arguments": rows, "Slots": filled,
        "Columns it reads": [(c, origin(c), COLUMNS[c].meaning) for c in sorted(own.reads())],
        "Models it loads": list(models(own).items()), "Every optimiser step runs": [(p,) for p in passes(own)],
        "Data": data, "Notes": list(notes.items())})


def usual(name: str) -> list[tuple[str, str]]:
    """What a run file of the recipe says without saying it: where responses are sampled, and in rounds.

    >>> usual("nash_ema")
    [('on its own samples', 'rollout.program: against_average (follow 0.1)')]
    """
    sampled = {"update": UPDATES.get(name), **{f"rollout.{k}": v for k, v in ROLLOUTS.get(name, {}).items()}}
    rounds = {f"iterate.{k}": v for k, v in ITERATIONS.get(name, {}).items()}
    told = {"on its own samples": sampled, "in rounds": rounds}
    return [(head, text) for head, settings in told.items()
            if (text := ", ".join(f"{k}: {spelt(v)}" for k, v in settings.items() if v))]


def departures_of(name: str, departures: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Slots that `departures` change -> (what fills them here, what the recipe has).

    >>> departures_of("dpo", {"ranking": "hinge"})
    {'ranking': ('hinge(delta=1)', 'logistic')}
    """
    here, plain = slots(assemble(name, dict(departures))), slots(recipes.find(name)())
    return {slot: (here[slot] or "nothing", plain[slot] or "nothing") for slot in here if here[slot] != plain[slot]}


def symbols(text: str) -> list[tuple[str, str]]:
    """The symbols in a text, and those in their meanings."""
    found = []
    for symbol, meaning in SYMBOLS.items():
        if re.search(rf"(?<![a-z]){symbol}(?![a-z])", text):
            found.append((symbol, meaning))
            text += f" {meaning}"
    return found


def unread(objective: Objective) -> set[str]:
    """Slots whose results nothing reads: a pointwise ranking has no use for margins, nor simpo for a reference."""
    made, seen = objective.made(), set()
    slots_of = {"margin": "margin", "labels": "labels"}
    queue = [*objective.loss_parts(), *objective.annotations.values()]
    if objective.whole_groups:
        queue += objective.unit_parts()
    else:
        slots_of = {"ratio": "log_ratio", "reward_at": "reward_at", "advantage": "response_advantage"}
        queue += [p for p in (*objective.step_parts(), *objective.shaping.values(), objective.keep, objective.normalise) if p]
    while queue:
        read = set(columns_read(queue.pop())) - seen
        seen |= read
        queue += [made[c] for c in read & set(made)]
    idle = {slot for slot, column in slots_of.items() if column not in seen}
    return idle if frozen_models(objective.reads()) else idle | {"reference"}


def equation(objective: Objective, slot: str) -> str:
    """The equations of what fills the slot, or its first line where there is none."""
    filling = getattr(objective, slot)
    parts = filling.values() if isinstance(filling, Mapping) else [filling]
    docs = [document(source(p.part if isinstance(p, (Term, Penalty)) else p)) for p in parts]
    return "; ".join(dict.fromkeys(" ".join((d.equation or d.summary).split()) for d in docs))


def _spread(arguments: dict[str, str]) -> dict[str, str]:
    """'low, high' -> the same text for both."""
    return {key: text for names, text in arguments.items() for key in names.split(", ")}


def part_page(slot: str, part) -> Page:
    """One part of a slot."""
    doc = document(part)
    told = _spread(doc.arguments)
    rows = [(k, "must be given" if v is inspect.Parameter.empty else words(v), told.get(k, ""))
            for k, v in defaults(part).items()]
    made = part(**{k: 1.0 for k, v in defaults(part).items() if v is inspect.Parameter.empty}) if inspect.isclass(part) else part
    reads = columns_read(made) if callable(made) and slot != "update" else []
    users = [n for n in recipes.__all__ if any(source(p) is part for p in _parts(recipes.find(n)()))]
    return Page(f"{part.__name__} (part of the slot {slot})", doc, {
        "Arguments": rows, "Columns it reads": [(c, origin(c), COLUMNS[c].meaning) for c in reads],
        "Recipes with it": [(", ".join(users),)] if users else [], "Notes": list(doc.notes.items())})


def _parts(o: Objective) -> list:
    filled = [getattr(o, slot) for slot in o.home]
    each = [p for f in filled for p in (f.values() if isinstance(f, Mapping) else [f])]
    return [q for p in each for q in ((p.part, p.reduce) if isinstance(p, (Term, Penalty)) else (p,))]


def column_page(name: str) -> Page:
    readers = [r for r in recipes.__all__ if name in recipes.find(r)().reads()]
    made = COLUMNS[name]
    doc = Doc(f"{made.meaning}.", "", "", {}, {})
    return Page(f"{name} (column)", doc, {"Facts": [("dimensions", f"({made.dims})"), ("made by", origin(name))],
                                          "Recipes that read it": [(", ".join(readers),)] if readers else []})


def parts_of(slot: str) -> dict[str, object]:
    """The parts of a slot by name, or an error with the nearest slot."""
    if slot not in HOMES:
        raise ValueError(f"no slot {slot!r}{nearest(slot, HOMES)}; slots: {', '.join(HOMES)}")
    homes = [import_module(home) for home in HOMES[slot]]
    return {name: vars(home)[name] for home in homes for name in sorted(home.__all__)}


def pages(name: str, departures: Mapping[str, object] = {}) -> list[Page]:
    """Everything called `name`: a recipe, parts, a column, a metric. Nothing is an error with the nearest name."""
    parts = [(slot, known[name]) for slot in HOMES if name in (known := parts_of(slot))]
    if departures and name not in recipes.__all__:
        raise ValueError(f"only recipes take departures, and {name!r} is not a recipe{nearest(name, recipes.__all__)}")
    found = [recipe_page(name, departures)] if name in recipes.__all__ else []
    found += [part_page(slot, part) for slot, part in parts]
    found += [column_page(name)] if name in COLUMNS else []
    metric = name.removeprefix("eval/")
    found += [Page(f"{name} (metric)", Doc(f"{METRICS[metric]}.", "", "", {}, {}), {})] if metric in METRICS else []
    if not found:
        known = [*recipes.__all__, *(p for slot in HOMES for p in parts_of(slot)), *COLUMNS, *METRICS]
        raise ValueError(f"nothing is called {name!r}{nearest(name, known)}; `prefopt list` shows all recipes, and "
                         f"`prefopt list --slot ranking` the parts of a slot")
    return found


def explain(name: str, departures: Mapping[str, object] = {}, *, width: int = 100) -> str:
    """Everything about a recipe (with departures), a part or a column, as text."""
    return rendered(pages(name, departures), width=width)


def rendered(found: Iterable[Page], *, width: int = 100) -> str:
    """Pages as text."""
    from rich.console import Console
    console = Console(file=StringIO(), width=width, no_color=True)
    show(found, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def show(found: Iterable[Page], console) -> None:
    """Print pages on a rich console."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text
    for n, page in enumerate(found):
        console.print(*[Text()] * (n > 0), Text(page.title, style="bold"), Text(page.doc.summary), sep="\n")
        for text in (page.doc.equation, page.doc.prose):
            if text:
                console.print(Padding(Text(text, style="green" if text is page.doc.equation else ""), (1, 0, 0, 2)))
        for heading, rows in page.tables.items():
            if rows:
                table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
                for place, _ in enumerate(rows[0]):
                    table.add_column(style="cyan" if place == 0 and len(rows[0]) > 1 else "", overflow="fold")
                for row in rows:
                    table.add_row(*(Text(cell) for cell in row))
                console.print(Text(f"\n{heading}", style="bold"), Padding(table, (0, 0, 0, 2)), sep="\n")


# ------------------------------------------------------------------------------------------------- tables and markdown
BEGIN, END = "<!-- recipes -->", "<!-- /recipes -->"
THEMES = ("pairs", "lists", "unpaired", "beyond", "reward_models", "on_policy", "games")   # modules of prefopt.recipes
BASES = {"dpo": PreferenceObjective, "grpo": PolicyObjective}                  # a table for each, of what differs from it
MORE = ("reference", "annotations", "providers", "shaping", "keep", "normalise", "accept", "correction", "weight",
        "selections", "reward_at")                            # rarely filled slots share a column of the table


def themes() -> dict[str, list[str]]:
    """What each module of recipes is about -> its recipes, in the order they are written."""
    homes = [import_module(f"prefopt.recipes.{theme}") for theme in THEMES]
    return {re.split(r"[.:](?= |$)", home.__doc__)[0]: [n for n, made in vars(home).items() if n in recipes.__all__
                                                       and made.__module__ == home.__name__] for home in homes}


def table(base: str = "dpo") -> dict[str, dict[str, str]]:
    """Recipe -> slot -> what fills it. All of the base, of the others of its kind what differs from it, '' elsewhere.

    >>> {slot: text for slot, text in table()["wpo"].items() if text}
    {'score': 'log_ratio(beta=0.01)', 'pair_weight': 'on_policy'}
    >>> {slot: text for slot, text in table("grpo")["gspo"].items() if text}
    {'ratio': 'sequence_token'}
    """
    plain = slots(recipes.find(base)(), brief=True)
    names = [base, *(n for names in themes().values() for n in names if n != base)]
    kind = [n for n in names if isinstance(recipes.find(n)(), BASES[base])]
    return {name: {slot: text if name == base or text != plain[slot] else "" for slot, text in
                   slots(recipes.find(name)(), brief=True).items()} for name in kind}


def markdown_table(link: str = "docs/methods.md") -> str:
    """Both tables as Markdown, a column per slot, between the comments that mark their place in README.md."""
    found = []
    for base, kind in BASES.items():
        single = [slot for slot in kind.home if slot not in MORE]
        rows = [[f"[{name}]({link}#{name})", *(filled[slot] for slot in single), more(filled)]
                for name, filled in table(base).items()]
        found.append(grid(["recipe", *(slot.replace("_", " ") for slot in single), "more"], rows))
    return BEGIN + "\n" + "\n\n".join(found) + "\n" + END


def more(filled: Mapping[str, str]) -> str:
    """The slots of MORE in one cell."""
    said = ("annotations", "providers", "selections")         # these name their columns themselves
    return "; ".join(filled[slot] if slot in said else f"{slot.replace('_', ' ')}: {filled[slot]}"
                     for slot in MORE if filled.get(slot))


def grid(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
                     for row in (header, ["---"] * len(header), *rows))


def methods_page() -> str:
    """docs/methods.md: every recipe with its equation, slots, columns and models, then the parts of every slot."""
    out = ["# Methods", "Written by `python -m prefopt.explain` from signatures and docstrings; `prefopt explain NAME` "
           "prints the same and more. A recipe fills slots with parts, and a run file changes any of them: "
           "`set: {beta: 0.5, ranking: hinge}`.", "## Symbols", grid(["symbol", "meaning"], SYMBOLS.items()),
           "## All recipes", "Empty cells are as in the first line of a table.",
           "\n".join(markdown_table(link="").split("\n")[1:-1])]
    for theme, names in themes().items():
        out += [f"## {theme}", *(text for name in names for text in _recipe_section(recipe_page(name)))]
    for slot in HOMES:
        out += [f"## Parts: {slot.replace('_', ' ')}", grid(["part", "what", "equation"], (
            (f"`{shown(part)}`" if inspect.isroutine(part) else f"`{name}`", (doc := document(part)).summary,
             " ".join(doc.equation.split())) for name, part in parts_of(slot).items()))]
    return "\n\n".join(out) + "\n"


def _recipe_section(page: Page) -> list[str]:
    cells = page.tables
    reads = ", ".join(f"`{row[0]}`" for row in cells["Columns it reads"])
    lines = [f"Reads {reads}.", f"Loads {', '.join(row[0] for row in cells['Models it loads'])}.",
             f"Takes {dict(cells['Data'])['takes']}.", *(f"{head}: {text}." for head, text in cells["Data"][1:]),
             *(f"{head}: {text}." for head, text in cells["Notes"])]
    return [f"### {page.title.split()[0]}", page.doc.summary, f"```text\n{page.doc.equation}\n```",
            *([page.doc.prose] if page.doc.prose else []),
            grid(["slot", "part", "equation"], [(a, f"`{b}`", c) for a, b, c in cells["Slots"]]),
            *([grid(["argument", "default", "meaning"], cells["Arguments"])] if cells["Arguments"] else []),
            "\n".join(f"- {line}" for line in lines)]


def refreshed(text: str) -> str:
    """README text with the table of recipes between its two comments written anew; without them, the text."""
    before, begin, rest = text.partition(BEGIN)
    return before + markdown_table() + rest.partition(END)[2] if begin and END in rest else text


def main() -> None:
    root = Path(__file__).parents[1]
    (root / "docs" / "methods.md").write_text(methods_page(), encoding="utf-8")
    if (root / "README.md").exists():
        readme = (root / "README.md").read_text(encoding="utf-8")
        (root / "README.md").write_text(refreshed(readme), encoding="utf-8")


if __name__ == "__main__":
    main()
