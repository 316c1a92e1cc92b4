"""Themis: does a reward model that asks a calculator and a calendar beat the same model without them?

    python -m cookbook.themis.study [--toy]
"""
from __future__ import annotations

import random
import re
import tempfile
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

from cookbook import tiny
from data_tools import load
from data_tools.records import Group, Response
from rewards import tool_augmented
from rewards.base import Row, rows_of
from rewards.tool_augmented import MARKS, answered, prepare, question, trace
from rewards.tools import Tools, calculator, calendar

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "themis"
PIECE = r" ?[A-Za-z]+|\d{1,2}|#+|<<|>>| ?[^\sA-Za-z\d]|\s"
SAME, ASKED = "Same as the answer", "Is it right?"
TOOLS = Tools([calculator.TOOL, *calendar.TOOLS])


# ------------------------------------------------------------------------------------------------------------ problems
def some_day(rng: random.Random) -> date:
    return date(2000, 1, 1) + timedelta(rng.randrange(8766))


def off(number: int, rng: random.Random) -> int:
    """Another number: near, or anywhere up to 6000 above."""
    return abs(number + rng.choice([-1, 1]) * rng.randint(1, 99)) if rng.random() < 0.5 else number + 1 + rng.randrange(6000)


def difference(rng: random.Random) -> tuple:
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


def pair(rng: random.Random, kind: str, tools: bool) -> Group:
    """A right and a wrong answer, with traces whose observations come from the real tool, or without traces."""
    right, wrong, action, given = KINDS[kind](rng)
    responses = []
    for answer, verdict in ((right, "right"), (wrong, "wrong")):
        seen = TOOLS.call(action, answer if given == SAME else given).text
        compared = "" if kind == "arithmetic" else f"{seen} is {answer.split()[-1]}. "
        told = trace({"Thought": "I need to check it.", "Action": action, "Action Input": given, "Observation": seen},
                     f"{compared}The answer is {verdict}.")
        responses.append(answered(answer, told if tools else ()))
    return Group(question(ASKED), responses, [1.0, 0.0])


def problems(seed: int, n: int, tools: bool) -> list[Group]:
    """n pairs of each kind in random order; the same pairs with and without traces."""
    rng = random.Random(seed)
    made = [pair(rng, kind, tools) for _ in range(n) for kind in KINDS]
    return random.Random(seed).sample(made, len(made))


# ------------------------------------------------------------------------------------------------------------ backbone
def tokenizer() -> PreTrainedTokenizerFast:
    """Words of the problems, pairs of digits, and signs; any other word is unknown."""
    texts = [text for g in problems(0, 300, True) for r in g.responses for text in (g.prompt, r.text)]
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
def right(reward, groups: list[Group]) -> np.ndarray:
    """1 where the better answer gets more, 1/2 for a tie."""
    scores = np.array(reward(rows_of(groups))).reshape(-1, 2)
    return (1 + np.sign(scores[:, 0] - scores[:, 1])) / 2


def sets(n: int) -> dict[str, list[Group]]:
    """Held-out problems of each kind and, where they are, the samples of the corpus."""
    rng = random.Random(99)
    out = {kind: [graded(*KINDS[kind](rng)[:2]) for _ in range(n)] for kind in KINDS}
    if DATA.is_dir():
        out["real calendar"] = [spelt(group) for group in load(DATA / "calendar.jsonl.gz")]
        out["real arithmetic"] = [g for g in map(bare, load(DATA / "calculator.jsonl.gz")) if all(r.text for r in g.responses)]
        out["real arithmetic, wrong equation"] = [g for g in out["real arithmetic"] if "incorrect" in TOOLS.call(
            "calculator", g.responses[1].text).text]
    return out


def graded(right: str, wrong: str) -> Group:
    return Group(ASKED, [Response(right), Response(wrong)], [1.0, 0.0])


def spelt(group: Group) -> Group:
    """Wednesday as others spell it: in the samples only wrong answers say Wendesday."""
    return graded(*(r.text.replace("Wendesday", "Wednesday") for r in group.responses))


def bare(group: Group) -> Group:
    """The equations of worked answers, without the prose, which a model of these few words cannot read."""
    return graded(*(written(calculator.steps("".join(re.findall("<<.*?>>", r.text)))) for r in group.responses))


def study(folder: Path, start: str, steps: int, held_out: int, seed: int) -> dict:
    """Share of pairs in the right order, for each set, with tools and without; what became of the calls; a trace."""
    asked, out = sets(held_out), {}
    for arm in ("tools", "no tools"):
        run = folder / f"run-{arm}-{seed}"
        data = tiny.write(folder / f"{arm}-{seed}.jsonl", problems(1 + seed, 4 * steps, arm == "tools"))
        tiny.run(run, Path(start), "tool_augmented", {"beta": 0.0, "omega": 2.0}, {"train": data, "encoding": {"add_eos": True}},
                 {"lr": 4e-3, "groups_per_step": 16, "steps": steps, "seed": seed, "modules": {"lr": 1e-2}})
        reward = tool_augmented.load(str(run), tools=lambda row: TOOLS, max_new_tokens=48)
        out[arm] = {name: float(right(reward if arm == "tools" else partial(without, reward), groups).mean())
                    for name, groups in asked.items()}
        if arm == "tools":
            out["calls"] = dict(reward.counts)
            out["trace"] = asked["weekday"][0].responses[1].meta["trace"]
    return out


def without(reward: tool_augmented.ToolAugmented, rows: list[Row]) -> list[float]:
    """The bare answers graded by a model that was trained on bare answers."""
    return reward.reader([tool_augmented.draft(row, ()) for row in rows])


def claims(found: list[dict], toy: bool) -> dict[str, bool]:
    def of(arm: str, name: str) -> list[float]:
        return [one[arm][name] for one in found]

    def ahead(name: str) -> bool:
        mean, half = tiny.interval([a - b for a, b in zip(of("tools", name), of("no tools", name), strict=True)])
        return mean - half > 0

    if toy:
        return {"both arms grade all pairs": all(0 <= x <= 1 for one in found for arm in ("tools", "no tools")
                                                 for x in one[arm].values())}
    out = {f"{name}: tools on beats tools off, 95 % interval of the difference over seeds": ahead(name)
           for name in ("weekday", "arithmetic", "real calendar", "real arithmetic, wrong equation") if name in found[0]["tools"]}
    return out | {f"{name}: at least 95 % of held-out synthetic pairs with tools": np.mean(of("tools", name)) >= 0.95
                  for name in ("weekday", "arithmetic")}


def main() -> int:
    options = tiny.options("themis", __doc__)
    settings = {"seeds": 1, "backbone": 40, "steps": 10, "held_out": 2} if options.toy else \
        {"seeds": 3, "backbone": 1100, "steps": 250, "held_out": 50}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        start = backbone(Path(folder), settings["backbone"])
        found = tiny.over_seeds(partial(study, Path(folder), start, settings["steps"], settings["held_out"]), settings["seeds"])
    asked = sets(settings["held_out"])
    pairs = {name: len(groups) for name, groups in asked.items()}
    longer = {name: float(right(lambda rows: [len(row.text) for row in rows], groups).mean()) for name, groups in asked.items()}
    for name, n in pairs.items():
        print(f"{name:>32} {n:4} pairs, the longer answer {longer[name]:.3f}",
              *(f"  {arm} {tiny.shown([one[arm][name] for one in found], 3)}" for arm in ("tools", "no tools")))
    print("calls", [one["calls"] for one in found])
    results = {"settings": settings, "pairs": pairs, "longer": longer, "seeds": found}
    return tiny.conclude(options.out, results, claims(found, options.toy))


if __name__ == "__main__":
    raise SystemExit(main())
