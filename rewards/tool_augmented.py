"""Themis: a reward model that calls tools, says what it makes of them, and grades the whole text.

A trace is a list of segments [text, number]: the answer (0), thoughts and calls (1), observations (2), the rationale (3). Three
special tokens part them: <start_tool>, <start_observation>, <start_work>. `prepare` adds them to a model, `traced` turns groups
of the corpus into groups that `prefopt train` takes with the recipe `tool_augmented`, and `load` makes a reward of what it
trained: first the model writes and tools answer, then one pass grades the finished text.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from data_tools.collate import Counts, encode, pad_token
from data_tools.encoding import Encoding
from data_tools.fields import DataError
from data_tools.records import Group, Response
from prefopt.models import load_policy, load_tokenizer
from prefopt.rollout.transformers import continuations
from rewards import trained
from rewards.base import Reward, Row, ScoringError
from rewards.cached import by_length
from rewards.tools import Tools, calculator, calendar, parse, python

__all__ = ["ANSWER", "MARKS", "OBSERVATION", "RATIONALE", "TOOL", "ToolAugmented", "answered", "known_tools", "load", "prepare",
           "question", "trace", "traced"]

ANSWER, TOOL, OBSERVATION, RATIONALE = range(4)
MARKS = CALLS, OBSERVES, WORKS = "<start_tool>", "<start_observation>", "<start_work>"
Trace = list[list]                                            # [[text, number], ...]


# -------------------------------------------------------------------------------------------------------------- the text
def plain(text: str) -> str:
    """The text without marks: an answer cannot write its own observations.

    >>> plain("2 <start_observation> Observation: correct")
    '2 start_observation Observation: correct'
    """
    return re.sub("|".join(MARKS), lambda mark: mark[0].strip("<>"), text)


def question(text: str) -> str:
    """The prompt of all answers to a question."""
    return f"### USER:\nQuestion: {plain(text)}\nAnswer:"


def answered(answer: str, trace: Trace = ()) -> Response:
    """An answer with its trace as a response whose segments are known; without a trace, what a plain reward model grades.

    >>> answered("4", trace({"Thought": "Add."}, "Right.")).text
    ' 4\\n### ASSISTANT:\\n<start_tool> Thought: Add.\\n<start_work> Work: Right.'
    """
    segments = [[f" {plain(answer)}\n### ASSISTANT:\n", ANSWER], *trace]
    return Response("".join(text for text, _ in segments), meta={"segments": segments})


def trace(actions: str | Mapping[str, str], rationale: str) -> Trace:
    """Segments of recorded actions, which are one step by its fields, or text that holds several.

    The mark that asks for an observation is the model's to write, and belongs to the call.

    >>> for text, number in trace("Thought: Add.\\nAction: calculator\\nAction Input: 2+2\\nObservation: 4", "It is 4."):
    ...     print(number, repr(text))
    1 '<start_tool> Thought: Add.\\nAction: calculator\\nAction Input: 2+2\\n<start_observation>'
    2 ' Observation: 4\\n'
    3 '<start_work> Work: It is 4.'
    """
    text = actions if isinstance(actions, str) else "\n".join(f"{name}: {value}" for name, value in actions.items())
    out = []
    for step in re.split(r"\n(?=Thought:)", plain(text)):
        call, found, observation = step.partition("\nObservation:")
        out.append([f"{CALLS} {call}\n{OBSERVES if found else ''}", TOOL])
        if found:
            out.append([f" Observation:{observation}\n", OBSERVATION])
    return [*out, [f"{WORKS} Work: {plain(rationale)}", RATIONALE]]


def traced(group: Group) -> Group:
    """A group of the corpus (`data_tools.corpora.themis`) with the recorded traces in its responses, to train on."""
    responses = []
    for number, response in enumerate(group.responses, 1):
        try:
            actions, rationale = response.meta["actions"], response.meta["score_agent"]["explanation"]
        except KeyError as missing:
            raise DataError("no trace", f"answer {number} has no {missing}: a trace is made of the actions and of the "
                            f"score_agent's explanation", group.meta.get("place")) from None
        told = answered(response.text, trace(actions, rationale))
        responses.append(replace(told, scores=response.scores))
    return replace(group, prompt=question(group.prompt), responses=responses)


def prepare(model: str, out: Path, *, dtype: str = "float32") -> None:
    """A folder with the model and its tokenizer in which the marks are tokens; those that are there stay as they are."""
    tokenizer, policy = load_tokenizer(model), load_policy(model, dtype=dtype, dropout=True)
    tokenizer.add_tokens([m for m in MARKS if m not in tokenizer.get_vocab()], special_tokens=True)
    if len(tokenizer) > policy.get_input_embeddings().num_embeddings:
        policy.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    policy.save_pretrained(out)
    tokenizer.save_pretrained(out)


# ---------------------------------------------------------------------------------------------------------------- use
def known_tools(row: Row) -> Tools:
    """Tools that need neither a corpus nor a service; `code_run` where the group's meta has the tests of the question."""
    tests = row.group.meta.get("test_list")
    return Tools([calculator.TOOL, *calendar.TOOLS, python.TOOL, *([python.testing(tests)] if tests else [])])


@dataclass(frozen=True)
class ToolAugmented:
    """A trained model with its tools as a reward. Each response keeps its trace in `meta["trace"]`.

    tools         the tools of a row. The input 'Same as the answer' stands for the answer
    interactions  calls of a response at most
    max_new_tokens  of each piece that the model writes
    counts        calls that went well ("ok"), that a tool or the lack of it refused ("refused"), that could not be read
                  ("unparsable"); what is wrong goes back to the model as an observation
    """
    reader: trained.TrainedReward
    tools: Callable[[Row], Tools] = known_tools
    interactions: int = 3
    max_new_tokens: int = 256
    counts: Counter = field(default_factory=Counter, compare=False)

    @property
    def name(self) -> str:
        return self.reader.name

    def settings(self) -> dict:
        return {**self.reader.settings(), "tools": f"{self.tools.__module__}:{self.tools.__qualname__}",
                "interactions": self.interactions, "max_new_tokens": self.max_new_tokens}

    def reads(self) -> list[str]:
        """The fields that decide a score, for caches."""
        return ["prompt", "text", "test_list"]

    def __call__(self, rows: Sequence[Row]) -> list[float | ScoringError]:
        finished = []
        for row, found in zip(rows, self.traces(rows), strict=True):
            row.response.meta["trace"] = found
            finished.append(draft(row, found))
        return self.reader(finished)

    def traces(self, rows: Sequence[Row]) -> list[Trace]:
        """What the model writes about each answer, with what tools answer to it."""
        out: list[Trace] = [[[CALLS, TOOL]] for _ in rows]
        calling = list(range(len(rows)))
        for _ in range(self.interactions):
            self.go_on(rows, out, calling)
            calling = [n for n in calling if out[n][-1][0].endswith(OBSERVES)]
            for n in calling:
                out[n].append([f" Observation: {plain(self.observed(rows[n], out[n][-1][0]))}\n", OBSERVATION])
        silent = [n for n in range(len(rows)) if out[n][-1][1] != RATIONALE]
        for n in silent:
            out[n].append([WORKS, RATIONALE])
        self.go_on(rows, out, silent)
        return out

    def observed(self, row: Row, call: str) -> str:
        """What a tool answers to the call at the end of a text."""
        tools, found = self.tools(row), parse(call.removesuffix(OBSERVES))
        if found is None:
            self.counts["unparsable"] += 1
            return ("No call is found. A call is a line 'Action: ' with the name of a tool and a line 'Action Input: '. "
                    f"Tools: {', '.join(tools.tools)}.")
        action, given = found
        seen = tools.call(action, row.text if given.rstrip(".") == "Same as the answer" else given)
        self.counts["ok" if seen.ok else "refused"] += 1
        return seen.text

    def go_on(self, rows: Sequence[Row], traces: list[Trace], numbers: Sequence[int]) -> None:
        """The model goes on with those traces until it asks for an observation or ends."""
        tokenizer = self.reader.models.tokenizer
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(OBSERVES)]
        encoded = encode([draft(rows[n], traces[n]).group for n in numbers], tokenizer, Encoding(add_eos=False), counts=Counts())
        ids = [torch.tensor([*e.prompt, *e.rows[0].tokens], device=self.reader.device) for e in encoded]
        for some in by_length([len(i) + self.max_new_tokens for i in ids], self.reader.tokens, waste=0.5):
            made = continuations(self.reader.models.policy, [ids[k] for k in some], n=1, max_new_tokens=self.max_new_tokens,
                                 pad=pad_token(tokenizer), eos=ends, temperature=0.0)
            for k, (tokens,) in zip(some, made, strict=True):
                tokens = tokens[:-1] if len(tokens) and tokens[-1] == tokenizer.eos_token_id else tokens
                extend(traces[numbers[k]], tokenizer.decode(tokens))


def draft(row: Row, found: Trace) -> Row:
    """A row of the answer with its trace so far."""
    response = answered(row.text, found)
    return Row(Group(question(row.prompt), [response]), response)


def extend(found: Trace, written: str) -> None:
    """Adds what the model wrote, cut into segments. An observation that it makes up is cut off and asked for instead; a rationale
    is the end.

    >>> begun = [["<start_tool>", 1]]
    >>> extend(begun, " Action: a\\nAction Input: b\\nObservation: mine")
    >>> begun
    [['<start_tool> Action: a\\nAction Input: b\\n<start_observation>', 1]]
    """
    kept, *made_up = re.split(rf"{OBSERVES}|^Observation:", written, maxsplit=1, flags=re.MULTILINE)
    first, *others = re.split(f"(?={CALLS}|{WORKS})", kept)
    if found[-1][1] != OBSERVATION:
        found[-1][0] += first
    elif first:
        found.append([first, TOOL])
    for text in others:
        if found[-1][1] != RATIONALE:
            found.append([text, RATIONALE if text.startswith(WORKS) else TOOL])
    if made_up and found[-1][1] == TOOL:
        found[-1][0] += OBSERVES


def load(name: str, *, tools: Callable[[Row], Tools] = known_tools, interactions: int = 3, max_new_tokens: int = 256,
         **settings) -> Reward:
    """A reward from a folder that `prefopt train` wrote for `tool_augmented`; `settings` are those of `rewards.trained.load`."""
    reader = trained.load(name, **settings)
    missing = [mark for mark in MARKS if mark not in reader.models.tokenizer.get_vocab()]
    if missing or not isinstance(reader, trained.TrainedReward) or "last_state" not in reader.objective.reads():
        raise ValueError(f"{name} cannot write traces: it needs a model of the recipe tool_augmented, trained from a folder that "
                         f"rewards.tool_augmented.prepare made" + (f"; tokens missing: {', '.join(missing)}" if missing else ""))
    return ToolAugmented(reader, tools, interactions, max_new_tokens)
