"""The general shapes of preference data, which are those of TRL: record -> Group, and Group -> record."""
from __future__ import annotations

import json
from dataclasses import fields

from data_tools.fields import (
    PLACE,
    DataError,
    completion,
    conversation,
    divide,
    flag,
    listed,
    near,
    number,
    prompt,
    shorten,
    take,
    text,
)
from data_tools.labels import from_ranks, pairs, wins_of
from data_tools.records import Group, Message, Prompt, Response

JSON_COLUMN = "group_json"


# ------------------------------------------------------------------------------------------------------------- reading
def group(record: dict) -> Group:
    """A Group as JSON, without loss; responses may also be plain texts. Parquet has the JSON text in one column."""
    if JSON_COLUMN in record:
        record = json.loads(text(record[JSON_COLUMN], JSON_COLUMN))
    _only(record, Group, "a group")
    asked, answers, rest = take(record, "prompt", "responses")
    responses = []
    for answer in listed(answers, "responses"):
        answer = {"text": answer} if isinstance(answer, (str, list)) else answer
        completion(take(answer, "text")[0], "text")           # a check; what is read is what was written
        _only(answer, Response, "a response")
        responses.append(Response(**answer))
    prompt(asked)
    return Group(**{**rest, "prompt": asked, "responses": responses, "meta": dict(rest.get("meta", {}))})


def _only(record: dict, shape: type, name: str) -> None:
    known = [f.name for f in fields(shape)]
    for key in record:
        if key not in known:
            raise DataError("unknown key", f"{name} has no key {key!r}{near(key, known)} Known: {', '.join(known)}. "
                                           "Keys of your own belong in 'meta'")


def pair(record: dict) -> Group:
    """prompt, chosen, rejected: texts or messages (TRL's preference type). Other columns go to meta, and a column
    `NAME_chosen` with its `NAME_rejected` to the two responses. When a plain prompt stands beside whole conversations,
    the prompt is what these share, which must contain the plain one."""
    asked, chosen, rejected, rest = take(record, "prompt", "chosen", "rejected")
    if isinstance(asked, str) and isinstance(chosen, list):
        found = implicit({"chosen": chosen, "rejected": rejected, **rest})
        if asked not in [m.get("content") for m in found.prompt]:
            raise DataError("prompt not shared", f"'prompt' is {shorten(asked)}, but 'chosen' and 'rejected' share no "
                                                 "message with that content at their beginning")
        return found
    asked, answers = prompt(asked), [completion(chosen, "chosen"), completion(rejected, "rejected")]
    if asked and isinstance(asked, list) and all(a[:len(asked)] == asked for a in answers):
        answers = [completion(a[len(asked):], "chosen") for a in answers]
    return _paired(asked, answers, rest)


def implicit(record: dict) -> Group:
    r"""chosen, rejected which both begin with the prompt: messages, `\n\nHuman: ... \n\nAssistant: ...` transcripts
    (HH-RLHF), or raw texts."""
    chosen, rejected, rest = take(record, "chosen", "rejected")
    return _paired(*divide([chosen, rejected], ["chosen", "rejected"]), rest)


def _paired(asked, answers: list, rest: dict) -> Group:
    best, worst = (Response(a) for a in answers)
    for key in [k for k in rest if k.endswith("_chosen")] if rest else ():
        name = key.removesuffix("_chosen")
        if f"{name}_rejected" in rest:
            for response, side in ((best, "chosen"), (worst, "rejected")):
                value = rest.pop(f"{name}_{side}")
                numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
                (response.scores if numeric else response.meta)[name] = value
    return Group(asked, [best, worst], [1.0, 0.0], meta=rest)


def ranked(record: dict) -> Group:
    """prompt, responses or completions, and `ranks` (1 is best) or `scores` (higher is better; null is not known)."""
    texts, labels = ("responses" if "responses" in record else "completions",
                     "ranks" if "ranks" in record else "scores")
    asked, answers, values, rest = take(record, "prompt", texts, labels)
    answers = [completion(a, texts) for a in listed(answers, texts)]
    values = [v if v is None else number(v, labels) for v in listed(values, labels)]
    if len(answers) != len(values):
        raise DataError("label out of range", f"{texts!r} has {len(answers)} entries and {labels!r} has {len(values)}")
    if labels == "ranks":
        return Group(prompt(asked), [Response(a) for a in answers], from_ranks(values), meta=rest)
    scored = [Response(a, scores={} if v is None else {"score": v}) for a, v in zip(answers, values, strict=True)]
    return Group(prompt(asked), scored, values, meta=rest)


def unpaired(record: dict) -> Group:
    """prompt, completion, label: one response, good (true, relevance 1) or bad (false, relevance 0)."""
    asked, answer, label, rest = take(record, "prompt", "completion", "label")
    return Group(prompt(asked), [Response(completion(answer, "completion"))], [float(flag(label, "label"))], meta=rest)


def stepwise(record: dict) -> Group:
    """prompt, completions, labels: the steps of one response, each right or wrong (null: not known). The text joins
    the steps by newlines, relevance is 1 when no step is wrong; the response's meta has `steps` and `step_labels`."""
    asked, steps, labels, rest = take(record, "prompt", "completions", "labels")
    steps = [text(s, "completions") for s in listed(steps, "completions")]
    labels = [v if v is None else flag(v, "labels") for v in listed(labels, "labels")]
    if len(steps) != len(labels):
        raise DataError("label out of range", f"'completions' has {len(steps)} steps and 'labels' has {len(labels)}")
    response = Response("\n".join(steps), meta={"steps": steps, "step_labels": labels})
    return Group(prompt(asked), [response], [float(False not in labels)], meta=rest)


def prompts(record: dict) -> Group:
    """prompt (or question) alone: no responses. Everything else goes to meta, such as the reference `answer`."""
    asked, rest = take(record, "question" if "prompt" not in record and "question" in record else "prompt")
    return Group(prompt(asked), [], meta=rest)


def demonstration(record: dict) -> Group:
    """prompt with completion (or response): one response without a label."""
    asked, answer, rest = take(record, "prompt", "completion" if "completion" in record else "response")
    return Group(prompt(asked), [Response(completion(answer, "completion"))], meta=rest)


def dialogue(record: dict) -> Group:
    """messages (or conversations) that end with the assistant's response, which has no label."""
    key = "messages" if "messages" in record else "conversations"
    turns, rest = take(record, key)
    asked, answer = conversation(turns, key)
    return Group(asked, [Response(answer)], meta=rest)


# ------------------------------------------------------------------------------------------------------------- writing
def group_record(group: Group) -> dict:
    """The group as JSON, without its place."""
    record = group.to_json()
    if PLACE in group.meta:
        record["meta"] = {key: value for key, value in record["meta"].items() if key != PLACE}
    return {key: value for key, value in record.items() if value != {}}


def to_trl(group: Group) -> dict:
    """The group in the columns of the TRL data type that fits: without responses `prompts`; one response `stepwise`,
    `unpaired` or, without a label, `demonstration`; two responses `pair`.

    Lists, ties, probe rows and rows with prompts of their own have no TRL column: an error says so. Tokens,
    log-probabilities and `weight` are left out; soft labels and grades are reduced to which is preferred.
    """
    if not group.responses:
        return prompt_record(group)
    if len(group.responses) > 1:
        return pair_record(group)
    if "step_labels" in group.responses[0].meta:
        return step_record(group)
    return demonstration_record(group) if group.relevance is None else unpaired_record(group)


def pair_record(group: Group) -> dict:
    _needs(group, 2, "lists become pairs with data_tools.labels.split")
    order = pairs(wins_of(group))
    if len(order) != 1:
        raise _unfit(group, "neither is preferred, and a pair needs a chosen one: filter ties and unlabelled groups "
                            "first")
    best, worst = (group.responses[i] for i in order[0])
    notes = [(f"{name}_{side}", value) for response, side in ((best, "chosen"), (worst, "rejected"))
             for name, value in _noted(response)]
    return _columns(group, notes, prompt=_asked(group), chosen=_answered(group, best),
                    rejected=_answered(group, worst))


def unpaired_record(group: Group) -> dict:
    _needs(group, 1, "lists become single responses with data_tools.labels.singles")
    label = {0.0: False, 1.0: True}.get((group.relevance or [None])[0])
    if label is None:
        raise _unfit(group, f"relevance {group.relevance} is not 1 (good) or 0 (bad)")
    return _single(group, prompt=_asked(group), completion=_answered(group, group.responses[0]), label=label)


def step_record(group: Group) -> dict:
    _needs(group, 1, "a stepwise record has the steps of one")
    steps, labels, _ = take(group.responses[0].meta, "steps", "step_labels")
    return _single(group, prompt=group.prompt, completions=steps, labels=labels)


def demonstration_record(group: Group) -> dict:
    _needs(group, 1, "a demonstration shows one")
    return _single(group, prompt=_asked(group), completion=_answered(group, group.responses[0]))


def prompt_record(group: Group) -> dict:
    _needs(group, 0, "drop the responses to write prompts alone")
    return _columns(group, [], prompt=group.prompt)


def _unfit(group: Group, why: str) -> DataError:
    return DataError("does not fit", f"a group of {len(group.responses)} responses: {why}", group.meta.get(PLACE, ""))


def _needs(group: Group, size: int, why: str) -> None:
    if len(group.responses) != size:
        raise _unfit(group, f"this format needs {size}, {why}")
    if any(r.prompt is not None or not r.train for r in group.responses):
        raise _unfit(group, "probe rows and rows with prompts of their own have no TRL column: drop them first")


def _noted(response: Response) -> list[tuple]:
    """What is known of a response, as (name, value)."""
    known = [*response.scores.items(), *response.meta.items()]
    return [(name, value) for name, value in known if name not in ("steps", "step_labels")]


def _columns(group: Group, notes: list[tuple], **columns) -> dict:
    """The record, with the group's meta and the notes as further columns."""
    record = dict(columns)
    for key, value in [*group.meta.items(), *notes]:
        if key in record:
            raise _unfit(group, f"two things are called {key!r} among its columns, meta, and the scores and meta of its "
                                "responses: rename one")
        if key != PLACE:
            record[key] = value
    return record


def _single(group: Group, **columns) -> dict:
    return _columns(group, _noted(group.responses[0]), **columns)


def _chat(group: Group) -> bool:
    return isinstance(group.prompt, list) or any(isinstance(r.text, list) for r in group.responses)


def _asked(group: Group) -> Prompt:
    wrap = _chat(group) and isinstance(group.prompt, str)
    return [{"role": "user", "content": group.prompt}] if wrap else group.prompt


def _answered(group: Group, response: Response) -> str | list[Message]:
    wrap = _chat(group) and isinstance(response.text, str)
    return [{"role": "assistant", "content": response.text}] if wrap else response.text
