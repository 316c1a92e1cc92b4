"""Themis: does a reward model that asks a calculator and a calendar beat the same model without them?

    python -m cookbook.themis.study [--toy]
"""
from __future__ import annotations

import random
import re
import tempfile
from collections import Counter
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

from cookbook import tiny
from cookbook.rewards.hh.encoder import paired
from data_tools import load
from data_tools.records import Group, Response
from rewards import tool_augmented
from rewards.base import Reward, Row, rows_of
from rewards.tool_augmented import MARKS, answered, prepare, question, trace
from rewards.tools import Tools, calculator, calendar

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "themis"
PIECE = r" ?[A-Za-z]+|\d{1,2}|#+|<<|>>| ?[^\sA-Za-z\d]|\s"
SAME, ASKED = "Same as the answer", "Is it right?"
ARMS = "tools", "no tools"
CALENDAR, ARITHMETIC = "real calendar", "real arithmetic"
WRONG, HOLD, NONE = PARTS = [f"{ARITHMETIC}, {part}" for part in ("wrong equation", "equations hold", "no equation")]
BOTH = f"{ARITHMETIC}, some equation"
LEVEL = 0.975                                                 # of intervals: two sets to be ahead on, calendar and arithmetic
TOOLS = Tools([calculator.TOOL, *calendar.TOOLS])


# ------------------------------------------------------------------------------------------------------------ problems
def some_day(rng: random.Random) -> date:
    return date(2000, 1, 1) + timedelta(rng.randrange(8766))


def off(number: int, rng: random.Random) -> int:
    """Another number: near, or anywhere up to 6000 above."""
    return abs(number + rng.choice([-1, 1]) * rng.randint(1, 99)) if rng.random() < 0.5 else number + 1 + rng.randrange(6000)


def difference(rng: random.Random) -> tuple:
    """Right answer, wrong answer, call, input, as all problems."""
    one, other = some_day(rng), some_day(rng)
    right = abs((one - other).days)
    told = (f"The difference between {one} and {other} is {n}" for n in (right, off(right, rng)))
    return *told, "Calendar.day_difference", f"{one}, {other}"


def weekday(rng: random.Random) -> tuple:
    day = some_day(rng)
    right = day.weekday()
    told = (f"{day} is {calendar.DAYS[n]}" for n in (right, (right + rng.randint(1, 6)) % 7))
    return *told, "Calendar.week_day", str(day)


def target(rng: random.Random) -> tuple:
    day, days = some_day(rng), rng.randint(1, 400)
    right = day + timedelta(days)
    wrong = some_day(rng) if rng.random() < 0.5 else right + timedelta(rng.choice([-1, 1]) * rng.randint(1, 30))
    told = (f"The day after {day} {days} days is {d}" for d in (right, wrong))
    return *told, "Calendar.target_day", f"{day}, {days}"


def arithmetic(rng: random.Random) -> tuple:
    """Equations that go on with the last result; in the wrong answer one result is off, and later ones follow from it."""
    steps = [(rng.choice("+-*"), rng.randint(2, 99)) for _ in range(rng.randint(1, 4))]
    start, late = rng.randint(2, 99), rng.randrange(len(steps))

    def worked(error: int) -> str:
        value, equations = start, []
        for n, (sign, number) in enumerate(steps):
            left = f"{value}{sign}{number}"
            value = int(calculator.value(left)) + error * (n == late)
            equations.append((left, value))
        return written(equations)

    return worked(0), worked(rng.choice([-10, -1, 1, 10])), "calculator", SAME


def written(equations: list[tuple]) -> str:
    """
    >>> written([("2*62", "124"), ("70+124", "194")])
    '<<2*62=124>>, <<70+124=194>>'
    """
    return ", ".join(f"<<{left}={result}>>" for left, result in equations)


KINDS = {"difference": difference, "weekday": weekday, "target": target, "arithmetic": arithmetic}


def pair(right: str, wrong: str, action: str, given: str, tools: bool) -> Group:
    """A right and a wrong answer, with traces or without. Observations come from the real tool, and the verdict says what they
    show, which is not the label: an answer whose equations hold is called right.

    >>> for response in pair("<<2+2=4>>", "<<2*2=4>>", "calculator", SAME, tools=True).responses:
    ...     print(response.text.splitlines()[-1])
    <start_work> Work: The answer is right.
    <start_work> Work: The answer is right.
    """
    responses = []
    for answer in (right, wrong):
        seen, said = TOOLS.call(action, answer if given == SAME else given).text, answer.split()[-1:]
        holds = seen == "The calculation process is correct." if action == "calculator" else [seen] == said
        compared = "" if action == "calculator" else f"{seen} is {said[0]}. "
        told = trace({"Thought": "I need to check it.", "Action": action, "Action Input": given, "Observation": seen},
                     f"{compared}The answer is {'right' if holds else 'wrong'}.")
        responses.append(answered(answer, told if tools else ()))
    return Group(question(ASKED), responses, [1.0, 0.0])


def problems(seed: int, n: int) -> list[tuple]:
    """n problems of each kind."""
    rng = random.Random(seed)
    return [KINDS[kind](rng) for _ in range(n) for kind in KINDS]


def sets(n: int, real: int | None) -> dict[str, list[tuple]]:
    """Held-out problems of each kind and, where they are, those of the corpus, or the first of them."""
    rng = random.Random(99)
    out = {kind: [KINDS[kind](rng) for _ in range(n)] for kind in KINDS}
    if DATA.is_dir():
        found = [spelt(group) for group in load(DATA / "calendar.jsonl.gz")]
        out[CALENDAR] = [problem for problem in found if problem[0] != problem[1]]
        out |= {part: [] for part in PARTS}
        for problem in map(bare, load(DATA / "calculator.jsonl.gz")):
            incorrect = "incorrect" in TOOLS.call("calculator", problem[1]).text
            out[WRONG if incorrect else HOLD if problem[1] else NONE].append(problem)
    return {name: problems[:real] if name.startswith("real") else problems for name, problems in out.items()}


def spelt(group: Group) -> tuple:
    """Wednesday as others spell it: in the samples only wrong answers say Wendesday."""
    actions = group.responses[0].meta["actions"]
    return *(r.text.replace("Wendesday", "Wednesday") for r in group.responses), actions["Action"], actions["Action Input"]


def bare(group: Group) -> tuple:
    """The equations of worked answers, without the prose, which a model of these few words cannot read."""
    return *(written(calculator.steps("".join(re.findall("<<.*?>>", r.text)))) for r in group.responses), "calculator", SAME


# ------------------------------------------------------------------------------------------------------------ backbone
def tokenizer() -> PreTrainedTokenizerFast:
    """Words of the problems, pairs of digits, and signs; any other word is unknown."""
    texts = [text for p in problems(0, 300) for g in [pair(*p, True)] for r in g.responses for text in (g.prompt, r.text)]
    pieces = {piece for text in texts for piece in re.findall(PIECE, re.sub("|".join(MARKS), "", text))}
    pieces |= {str(n) for n in range(10)} | {f"{n:02d}" for n in range(100)} | set("./()%$")
    vocabulary = {piece: n for n, piece in enumerate(["<pad>", "<unk>", "<eos>", *sorted(pieces)])}
    backend = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split(Regex(PIECE), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def copies(rng: random.Random, words: PreTrainedTokenizerFast) -> tuple[torch.Tensor, int]:
    """64 rows of random tokens that come twice, and how many at the end can be known."""
    n = rng.randint(8, 16)
    some = torch.randint(3, len(words), (64, n + rng.randint(0, 15)))
    return torch.cat([some, some[:, :n]], 1), n - 1


def comparisons(rng: random.Random, words: PreTrainedTokenizerFast) -> tuple[torch.Tensor, int]:
    """64 rows that say, after random tokens, whether two numbers, dates or days are the same; the last token can be known."""
    texts = []
    for _ in range(64):
        thing = rng.choice([lambda: str(rng.randrange(10 ** rng.randint(1, 4))), lambda: str(some_day(rng)),
                            lambda: rng.choice(calendar.DAYS)])
        one, same = thing(), rng.random() < 0.5
        other = one if same else thing()
        if not same and one.isdigit() and rng.random() < 0.5:
            other = str(off(int(one), rng))
        texts.append(f" Work: {one} is {other}. The answer is {'right' if one == other else 'wrong'}")
    rows = words(texts, padding=True, padding_side="left", return_tensors="pt")["input_ids"]
    return torch.cat([torch.randint(3, len(words), (64, rng.choice([0, 0, 10, 40]))), rows], 1), 1


def backbone(folder: Path, steps: int) -> str:
    """A language model that has learned to copy and to compare, and has seen no question, answer or trace."""
    torch.manual_seed(0)
    words, rng = tokenizer(), random.Random(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, eos_token_id=2, bos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = get_scheduler("warmup_stable_decay", optimizer, num_warmup_steps=30, num_training_steps=steps,
                             scheduler_specific_kwargs={"num_decay_steps": int(0.3 * steps), "decay_type": "linear"})
    for step in range(steps):
        rows, known = (copies, comparisons)[step % 2](rng, words)
        logits = model(input_ids=rows, attention_mask=(rows != 0).long()).logits[:, -known - 1:-1]
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, -known:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder / "plain")
    words.save_pretrained(folder / "plain")
    prepare(str(folder / "plain"), folder / "backbone")
    return str(folder / "backbone")


# ---------------------------------------------------------------------------------------------------------------- runs
def trained(folder: Path, start: str, arm: str, known: list[tuple], seed: int) -> tool_augmented.ToolAugmented:
    """A reward trained on those problems once, with traces or without."""
    folder.mkdir()
    data = tiny.write(folder / "train.jsonl", [pair(*problem, arm == "tools") for problem in known])
    tiny.run(folder / "run", Path(start), "tool_augmented", {"beta": 0.0, "omega": 2.0},
             {"train": data, "encoding": {"add_eos": True}},
             {"lr": 4e-3, "groups_per_step": 16, "steps": len(known) // 16, "seed": seed, "modules": {"lr": 1e-2}})
    return tool_augmented.load(str(folder / "run"), tools=lambda row: TOOLS, max_new_tokens=48)


def margins(reward: Reward, asked: list[tuple]) -> np.ndarray:
    """What the right answer gets above the wrong one."""
    groups = [Group(ASKED, [Response(right), Response(wrong)], [1.0, 0.0]) for right, wrong, *_ in asked]
    right, wrong = np.array(reward(rows_of(groups))).reshape(-1, 2).T
    return right - wrong


def without(reward: tool_augmented.ToolAugmented, rows: list[Row]) -> list[float]:
    """The bare answers graded by a model that was trained on bare answers."""
    return reward.reader([tool_augmented.draft(row, ()) for row in rows])


def study(folder: Path, start: str, settings: dict, seed: int) -> dict:
    """Margins of all problems with tools and without, each from a model that trained on the real ones of the other folds, and
    what became of the calls."""
    asked, folds = sets(settings["held_out"], settings["real"]), settings["folds"]
    out, calls = {arm: {name: np.full(len(some), np.nan) for name, some in asked.items()} for arm in ARMS}, Counter()
    for fold in range(folds):
        known = problems(1 + seed, settings["synthetic"]) + settings["repeats"] * [
            p for name, some in asked.items() if name.startswith("real") for n, p in enumerate(some) if n % folds != fold]
        random.Random(seed).shuffle(known)
        for arm in ARMS:
            reward = trained(folder / f"{arm}-{seed}-{fold}", start, arm, known, seed)
            for name, some in asked.items():
                out[arm][name][fold::folds] = margins(reward if arm == "tools" else partial(without, reward), some[fold::folds])
            calls += reward.counts
    return {"margins": {arm: joined(found) for arm, found in out.items()}, "calls": dict(calls)}


def joined(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the parts of real arithmetic together too, where they are."""
    if WRONG not in found:
        return found
    return found | {BOTH: np.concatenate([found[part] for part in PARTS[:2]]),
                    ARITHMETIC: np.concatenate([found[part] for part in PARTS])}


def table(found: list[dict], longer: dict[str, np.ndarray]) -> dict[str, dict]:
    """Of each set the share of pairs in the right order, by the longer answer (1/2 for a tie), by each arm and seed, and by the
    mean margin over seeds with tools against without."""
    out = {}
    for name, length in longer.items():
        tools, plain = (np.stack([one["margins"][arm][name] for one in found]) for arm in ARMS)
        out[name] = {"longer": float((1 + np.sign(length)).mean() / 2), "tools": (tools > 0).mean(1).tolist(),
                     "no tools": (plain > 0).mean(1).tolist(), "over seeds": paired(tools.mean(0), plain.mean(0), level=LEVEL)}
    return out


def claims(seeds: list[dict], found: dict[str, dict], toy: bool) -> dict[str, bool]:
    """What holds. All real arithmetic is measured and makes no claim: the arms are level there."""
    if toy:
        return {"both arms grade all pairs": all(np.isfinite(some).all() for one in seeds for arm in ARMS
                                                 for some in one["margins"][arm].values())}
    out = {f"{name}: tools on beats tools off, {LEVEL:.1%} interval over pairs": found[name]["over seeds"]["interval"][0] > 0
           for name in ("weekday", "arithmetic", CALENDAR, WRONG) if name in found}
    return out | {f"{name}: at least 95 % of held-out synthetic pairs with tools": np.mean(found[name]["tools"]) >= 0.95
                  for name in ("weekday", "arithmetic")}


def main() -> int:
    options = tiny.options("themis", __doc__)
    settings = \
        {"seeds": 1, "backbone": 40, "synthetic": 10, "repeats": 1, "folds": 2, "held_out": 2, "real": 2} if options.toy else \
        {"seeds": 3, "backbone": 1100, "synthetic": 700, "repeats": 4, "folds": 5, "held_out": 50, "real": None}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        start = backbone(Path(folder), settings["backbone"])
        found = tiny.over_seeds(partial(study, Path(folder), start, settings), settings["seeds"])
    asked = sets(settings["held_out"], settings["real"])
    lengths = {name: np.array([len(right) - len(wrong) for right, wrong, *_ in some]) for name, some in asked.items()}
    rows = table(found, joined(lengths))
    for name, it in rows.items():
        over = it["over seeds"]
        print(f"{name:>31} {over['pairs']:4} pairs, the longer answer {it['longer']:.3f}",
              *(f"  {arm} {tiny.shown(it[arm], 3)}" for arm in ARMS),
              f"  over seeds {over['share']:.3f} against {over['floor']:.3f}, gain {over['gain']:+.3f} "
              f"[{over['interval'][0]:+.3f}, {over['interval'][1]:+.3f}], {over['won']} won, {over['lost']} lost")
    print("calls", [one["calls"] for one in found])
    return tiny.conclude(options.out, {"settings": settings, "sets": rows, "calls": [one["calls"] for one in found]},
                         claims(found, rows, options.toy))


if __name__ == "__main__":
    raise SystemExit(main())
