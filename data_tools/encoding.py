"""Groups -> token ids: chat templates, tokenisation in batches, truncation, masks. No torch."""
from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data_tools.columns import COLUMNS, nearest
from data_tools.fields import PLACE, DataError, listed, shorten
from data_tools.records import Group, Message, Prompt, Response

LONG_PROMPT = ("keep_end", "keep_start", "drop", "error")
LONG_RESPONSE = ("keep_start", "drop", "error")
GIVEN_BY = ("augment", "sampler", "source", "user")                    # makers whose columns are read from Response.meta
CHUNK = 1 << 20                                               # characters per call of a fast tokenizer, bounds memory


# ------------------------------------------------------------------------------------------------------------ settings
@dataclass(frozen=True)
class Encoding:
    """How text becomes tokens. Limits are in tokens; None is no limit.

    max_prompt     longest prompt; `long_prompt` says what happens to a longer one: keep_end and keep_start cut it (the
                   BOS stays), drop leaves the group out and counts it, error stops
    max_response   longest response, EOS included; `long_response`: keep_start cuts it and its EOS with it, drop, error
    max_length     longest prompt + response. After the two limits above it is the response that gives way; a group
                   whose prompt leaves no room is dropped and counted
    add_eos        end responses to plain-text prompts with EOS, unless they end so already. In conversations the chat
                   template ends the turn
    system         system message of conversations that do not bring one
    chat_template  used in place of the tokenizer's own
    template_settings  further variables of the template, such as {"enable_thinking": False}
    aspects        names of scores that make the column `rewards`, a label per aspect; NaN where a response lacks one

    >>> Encoding(max_prompt=512, long_prompt="tail")
    Traceback (most recent call last):
    ValueError: long_prompt should be one of keep_end, keep_start, drop, error, found 'tail'
    """
    max_prompt: int | None = None
    max_response: int | None = None
    max_length: int | None = None
    long_prompt: str = "keep_end"
    long_response: str = "keep_start"
    add_eos: bool = True
    system: str | None = None
    chat_template: str | None = None
    template_settings: Mapping = field(default_factory=dict)
    aspects: Sequence[str] = ()

    def __post_init__(self):
        for name, least in (("max_prompt", 1), ("max_response", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} should be a number of tokens, at least {least}, or None, found {value!r}")
        for name, known in (("long_prompt", LONG_PROMPT), ("long_response", LONG_RESPONSE)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} should be one of {', '.join(known)}, found {value!r}{nearest(value, known)}")
        if None not in (self.max_prompt, self.max_length) and self.max_prompt >= self.max_length:
            raise ValueError(f"max_prompt={self.max_prompt} leaves no room for a response within "
                             f"max_length={self.max_length}: lower max_prompt or raise max_length")


@dataclass
class Counts:
    """What encoding did to the groups that it read. `notes` maps what happened to [how often, where first]."""
    read: int = 0
    kept: int = 0
    rows: int = 0
    tokens: int = 0                                           # of prompts and responses, the prompt once per row
    notes: dict[str, list] = field(default_factory=dict)

    def note(self, what: str, place: str) -> None:
        self.notes.setdefault(what, [0, place])[0] += 1

    def warn(self) -> None:
        """A warning when anything was dropped, cut or replaced."""
        if self.notes:
            warnings.warn(str(self), stacklevel=3)

    def __str__(self) -> str:
        notes = "".join(f"; {what}: {n} (first: {place})" for what, (n, place) in self.notes.items())
        return f"{self.read} groups read, {self.kept} kept with {self.rows} rows and {self.tokens} tokens{notes}"


# ------------------------------------------------------------------------------------------------------------- results
class EncodedRow(NamedTuple):
    """A response in token ids. `prompt` None is the group's; `mask` None trains every token. `columns` holds numbers
    (columns N) and arrays with one value per response token (columns N T)."""
    tokens: np.ndarray
    prompt: np.ndarray | None = None
    mask: np.ndarray | None = None
    train: bool = True
    columns: Mapping[str, float | np.ndarray] = {}


class EncodedGroup(NamedTuple):
    """A group in token ids; labels as arrays (K) and (K, K) with NaN for what is not known."""
    prompt: np.ndarray
    rows: Sequence[EncodedRow]
    relevance: np.ndarray | None = None
    wins: np.ndarray | None = None
    weight: float = 1.0
    place: str = ""

    @property
    def length(self) -> int:
        """Tokens of all rows, the prompt once per row: what the group costs in a padded batch without the padding."""
        return sum(len(row.tokens) + len(self.prompt if row.prompt is None else row.prompt) for row in self.rows)


class Dropped(Exception):
    """The group cannot be used; the message says why."""


# ------------------------------------------------------------------------------------------------------------ spelling
@dataclass(frozen=True)
class Spelling:
    """Text to ids with one tokenizer: what it puts in front of a text, and how a text that continues another is cut."""
    tokenizer: object
    bos: tuple[int, ...]
    spaced: bool                                              # a space is put in front of every text (SentencePiece)

    @classmethod
    def of(cls, tokenizer) -> Spelling:
        """Found by encoding a letter. The plain call also resets truncation and padding that an earlier call left."""
        whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
        start = next((i for i in range(len(whole)) if whole[i:i + len(bare)] == bare), 0)
        line, joined = tokenizer(["\n", "\na"], add_special_tokens=False)["input_ids"]
        return cls(tokenizer, tuple(whole[:start]), joined[len(line):] != bare)

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of texts, no special tokens added."""
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            return [arrayed(one) for one in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        fast = self.tokenizer.backend_tokenizer.encode_batch_fast

        def found() -> list[np.ndarray]:
            return [arrayed(one.ids) for part in _chunks(texts) for one in fast(part, add_special_tokens=False)]
        with ThreadPoolExecutor(1) as beside:                 # its heap is fresh, and not in pieces since the imports
            return beside.submit(found).result()

    def starts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        return dict(zip(texts, self.ids(texts), strict=True))

    def follows(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Ids of texts that continue another text: the space that SentencePiece puts in front is kept out by encoding
        them behind a character that does not join with them."""
        found: dict[str, np.ndarray] = {}
        for anchor in ("\n", ".", "a") if self.spaced else ():
            left = [text for text in texts if text not in found]
            before, *ids = self.ids([anchor, *(anchor + text for text in left)])
            found.update((text, i[len(before):]) for text, i in zip(left, ids, strict=True)
                         if begins(i, before))
        return self.starts([text for text in texts if text not in found]) | found

    def begun(self, ids: np.ndarray) -> np.ndarray:
        """ids behind one BOS, if this tokenizer begins texts with one."""
        return ids if begins(ids, self.bos) else np.concatenate([arrayed(self.bos), ids])

    def head(self, ids: np.ndarray) -> int:
        """How many ids at the beginning are BOS, which truncation keeps."""
        bos = self.bos or (self.tokenizer.bos_token_id,)
        return len(bos) if begins(ids, bos) else 0


def arrayed(ids: Sequence[int]) -> np.ndarray:
    return np.fromiter(ids, np.int32, len(ids))


def begins(ids: np.ndarray, others: Sequence[int]) -> bool:
    return ids[:len(others)].tolist() == list(others)


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    start = size = 0
    for end, text in enumerate(texts):
        size += len(text)
        if size > CHUNK:
            yield texts[start:end + 1]
            start, size = end + 1, 0
    if start < len(texts):
        yield texts[start:]


def pad_token(tokenizer) -> int:
    """The padding id: the tokenizer's, else EOS, else 0. Padding is masked by `attend`, so that any id does."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


# ------------------------------------------------------------------------------------------------------------- drafts
class Draft(NamedTuple):
    """A group in text: prompts as (text, whether it wants BOS), responses as pieces (text, whether it trains), None
    where the tokens are given; `ends` says which responses want EOS."""
    group: Group
    place: str
    prompt: tuple[str, bool]
    prompts: list[tuple[str, bool] | None]
    pieces: list[list[tuple[str, bool]] | None]
    ends: list[bool]


@dataclass(frozen=True)
class Chat:
    """Conversations rendered by the chat template."""
    tokenizer: object
    encoding: Encoding

    def render(self, messages: list[Message], tools, *, asks: bool) -> str:
        """The text of messages; `asks` adds the beginning of the assistant's turn."""
        if self.tokenizer.chat_template is None and self.encoding.chat_template is None:
            raise DataError("no chat template", "the prompt is a conversation but the tokenizer has no chat template: "
                            "take the tokenizer of a chat model, give Encoding(chat_template=...) (in a run file "
                            "data.encoding: {chat_template: ...}), or write prompts "
                            "and responses as plain text")
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.encoding.chat_template, add_generation_prompt=asks,
                tokenize=False, **self.encoding.template_settings)
        except Exception as error:                            # jinja2 raises whatever the template raises
            raise DataError("refused by the chat template", f"the chat template cannot render the roles "
                            f"{', '.join(str(m.get('role')) for m in messages)}: {error}") from error

    def opening(self, prompt: list[Message]) -> list[Message]:
        """The prompt, behind the system message of the settings if it has none."""
        if self.encoding.system is None or prompt and prompt[0]["role"] == "system":
            return prompt
        return [{"role": "system", "content": self.encoding.system}, *prompt]

    def turns(self, prompt: list[Message], shown: str, answer: list[Message], tools) -> list[tuple[str, bool]] | None:
        """The text that `answer` adds to the prompt, in pieces; True marks what the assistant says.

        None where the template does not render an answer behind the prompt as it was rendered alone, `shown`.
        """
        pieces = []
        for n, message in enumerate(answer):
            if message["role"] == "assistant":
                before = self.render(prompt + answer[:n], tools, asks=True) if n else shown
                after = self.render(prompt + answer[:n + 1], tools, asks=False)
                if not (before.startswith(shown) and after.startswith(before)):
                    return None
                pieces += [(before[len(shown):], False), (after[len(before):], True)]
                shown = after
        if answer[-1]["role"] != "assistant":
            whole = self.render(prompt + answer, tools, asks=False)
            if not whole.startswith(shown):
                return None
            pieces.append((whole[len(shown):], False))
        return [(text, trains) for text, trains in pieces if text]


def _draft(group: Group, place: str, chat: Chat, counts: Counts) -> Draft:
    """The texts of a group."""
    _check(group)
    tools = group.meta.get("tools")
    tools = None if tools is None else listed(tools, "tools")

    def opened(prompt: Prompt) -> tuple[str, bool]:
        if not isinstance(prompt, str):
            return chat.render(chat.opening(prompt), tools, asks=True), False
        if chat.encoding.system is not None:
            raise DataError("plain prompt", "Encoding(system=...) needs conversations, but the prompt is plain text: "
                            "write it as [{'role': 'user', 'content': ...}], or leave the system message out")
        return prompt, True

    def answered(response: Response, shown: str) -> tuple[list[tuple[str, bool]] | None, bool]:
        prompt, text = group.prompt if response.prompt is None else response.prompt, response.text
        if response.tokens is not None:
            return None, False
        if isinstance(prompt, str):
            if not isinstance(text, str):
                raise DataError("plain prompt", "the response is a list of messages but the prompt is plain text: "
                                "write the prompt as [{'role': 'user', 'content': ...}]")
            return cut(response, [(text, True)]), True
        answer = [{"role": "assistant", "content": text}] if isinstance(text, str) else text
        if not answer or answer[0]["role"] != "assistant":
            raise DataError("wrong role", "a response should begin with an assistant message, found "
                            f"{shorten(answer[0]['role'] if answer else answer)}")
        pieces = chat.turns(chat.opening(prompt), shown, answer, tools)
        if pieces is not None:
            return cut(response, pieces), False
        if len(answer) > 1 or not isinstance(answer[0].get("content"), str):
            raise DataError("rewriting chat template", "the chat template changes earlier turns when later ones "
                            "follow, so the tokens of the turns of this response are not known: give a template that "
                            "only appends with Encoding(chat_template=...), such as those of trl.chat_template_utils")
        counts.note("answers the chat template does not append to the prompt, taken as their text and EOS", place)
        return cut(response, [(answer[0]["content"], True)]), True

    prompt = opened(group.prompt)
    prompts = [prompt if r.prompt is None else opened(r.prompt) for r in group.responses]
    pieces, ends = zip(*(answered(r, p[0]) for r, p in zip(group.responses, prompts, strict=True)), strict=True)
    return Draft(group, place, prompt, [None if p == prompt else p for p in prompts], list(pieces), list(ends))


def segments(response: Response) -> list[tuple[str, float | None]]:
    """The text of a response in pieces with a number each, which are encoded one by one so that their ends are tokens'.

    `meta["steps"]` are joined by newlines, their numbers are `meta["step_labels"]` (column step_label, at the last token
    of a step); `meta["segments"]` are [text, number] and follow one another (column segment, at every token).
    """
    if "segments" in response.meta:
        return [(text, float(number)) for text, number in response.meta["segments"]]
    steps = response.meta.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        return []                                             # a field of another meaning
    marks = response.meta.get("step_labels", [None] * len(steps))
    if len(marks) != len(steps):
        raise DataError("wrong label", f"the response has {len(steps)} steps and {len(marks)} step_labels")
    texts = [step + "\n" * (n < len(steps)) for n, step in enumerate(steps, 1)]
    if "" in texts:
        raise DataError("empty step", f"step {texts.index('') + 1} of the response is empty: leave it out, with its label")
    return [(text, None if mark is None else float(mark)) for text, mark in zip(texts, marks, strict=True)]


def cut(response: Response, pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The pieces cut at the ends of the response's segments; what a template puts around them goes to the outer ones."""
    parts = [text for text, _ in segments(response)]
    if not parts:
        return pieces
    if not isinstance(response.text, str):
        raise DataError("wrong steps", "the response is a conversation, and steps (or segments) are parts of one text")
    (whole, trains), = pieces
    before, found, after = whole.partition("".join(parts))
    if not found:
        raise DataError("wrong steps", f"the steps (or segments) of the response are not its text: they begin with "
                                       f"{shorten(parts[0])}, the text with {shorten(response.text)}")
    parts[0], parts[-1] = before + parts[0], parts[-1] + after
    return [(text, trains) for text in parts]


def _check(group: Group) -> None:
    size = len(group.responses)
    if not size:
        raise DataError("no responses", "the group has no responses to encode: prompts alone are for sampling")
    if group.relevance is not None and len(group.relevance) != size:
        raise DataError("wrong label", f"relevance has {len(group.relevance)} grades for {size} responses")
    if group.wins is not None and [len(row) for row in group.wins] != [size] * size:
        raise DataError("wrong label", f"wins should be {size} rows of {size} numbers for {size} responses")
    if not 0 <= group.weight < float("inf"):
        raise DataError("wrong label", f"weight should be a number from 0, found {group.weight!r}")


# ------------------------------------------------------------------------------------------------------------ encoding
def encode(groups: Iterable[Group], tokenizer, encoding: Encoding = Encoding(), *,
           counts: Counts | None = None) -> list[EncodedGroup]:
    """Groups in token ids. Prompts and responses are encoded apart, each distinct text once per call.

    A plain prompt is its text behind the tokenizer's BOS (once), a plain response its text and EOS. A prompt that is a
    list of messages is rendered with the beginning of the assistant's turn; the response is what the template appends
    for the answer, or the answer's text and EOS where the template does not append (counted). In a response of several
    messages only what the assistant says trains. `Group.meta["tools"]` (a list, or JSON text) goes to the template.
    Responses with `tokens` are taken as they are, with `logp` as column logp_rollout and `meta["mask"]` (1 trains) if
    given; numbers of `Response.meta` that are columns of the table become columns, and so does `scores["reward"]`.

    The first token of a row never trains, as nothing comes before it. Groups are dropped by the policies of `encoding`,
    and when a response has no token that trains. What was dropped, cut or replaced is added to `counts`; without
    `counts`, it is a warning. Data that cannot be used at all is a `DataError` that says where it is.
    """
    known = Counts() if counts is None else counts
    spelling, chat = Spelling.of(tokenizer), Chat(tokenizer, encoding)
    given = {n: c.dims for n, c in COLUMNS.items()
             if c.maker in GIVEN_BY and c.dims in ("N", "N T") and n != "train"}
    drafts = []
    for group in groups:
        known.read += 1
        place = group.meta.get(PLACE) or f"group {known.read}"
        with _located(place):
            drafts.append(_draft(group, place, chat, known))
    starts = spelling.starts(list(dict.fromkeys(p[0] for d in drafts for p in (d.prompt, *d.prompts) if p)))
    follows = spelling.follows(list(dict.fromkeys(t for d in drafts for p in d.pieces if p for t, _ in p)))
    if encoding.add_eos and tokenizer.eos_token_id is None and any(any(d.ends) for d in drafts):
        raise ValueError("the tokenizer has no end-of-sequence token, so that a model would never learn to stop: set "
                         "tokenizer.eos_token, or Encoding(add_eos=False) where the text ends responses itself")
    eos = tokenizer.eos_token_id if encoding.add_eos else None
    finish = _Finish(spelling, encoding, eos, starts, follows, given)
    out = []
    for draft in drafts:
        try:
            with _located(draft.place):
                group, cuts = finish(draft)
        except Dropped as reason:
            known.note(f"groups dropped, {reason}", draft.place)
            continue
        for cut in cuts:
            known.note(cut, draft.place)
        known.kept, known.rows, known.tokens = known.kept + 1, known.rows + len(group.rows), known.tokens + group.length
        out.append(group)
    if counts is None:
        known.warn()
    return out


@contextmanager
def _located(place: str):
    """Adds the place to a DataError that has none."""
    try:
        yield
    except DataError as error:
        error.place = error.place or place
        raise


@dataclass(frozen=True)
class _Finish:
    """Draft -> (EncodedGroup, what was cut), with the ids of all texts at hand."""
    spelling: Spelling
    encoding: Encoding
    eos: int | None
    starts: Mapping[str, np.ndarray]
    follows: Mapping[str, np.ndarray]
    given: Mapping[str, str]

    def __call__(self, draft: Draft) -> tuple[EncodedGroup, list[str]]:
        cuts: list[str] = []
        prompt, group = self.prompt(draft.prompt, cuts), draft.group
        rows = []
        for response, own, pieces, ends in zip(group.responses, draft.prompts, draft.pieces, draft.ends, strict=True):
            own = own and self.prompt(own, cuts)
            tokens, mask, columns = self.taken(response) if pieces is None else self.spelt(response, pieces, ends)
            rows.append(self.limited(response, prompt if own is None else own, EncodedRow(
                tokens, own, mask, bool(response.train), columns), cuts))
        numbers = [None if x is None else np.array(x, np.float32) for x in (group.relevance, group.wins)]
        return EncodedGroup(prompt, rows, *numbers, float(group.weight), draft.place), cuts

    def prompt(self, text: tuple[str, bool], cuts: list[str]) -> np.ndarray:
        ids, limit, policy = self.starts[text[0]], self.encoding.max_prompt, self.encoding.long_prompt
        ids = self.spelling.begun(ids) if text[1] else ids
        if limit is not None and len(ids) > limit:
            found = f"prompt longer than max_prompt={limit}"
            if policy == "error":
                raise DataError("too long", f"{found}: it has {len(ids)} tokens")
            if policy == "drop":
                raise Dropped(found)
            cuts.append(f"prompts cut to max_prompt={limit}, {policy}")
            head = min(self.spelling.head(ids), limit)
            ids = ids[:limit] if policy == "keep_start" else np.concatenate([ids[:head], ids[len(ids) - limit + head:]])
        return ids

    def spelt(self, response: Response, pieces, ends: bool):
        """Tokens, mask and columns of a response given as text."""
        if response.logp is not None or "mask" in response.meta:
            raise DataError("no tokens", "logp and meta['mask'] hold one value per token and need Response.tokens")
        ids = [self.follows[text] for text, _ in pieces]
        flat = ids[0] if len(ids) == 1 else np.concatenate([arrayed(()), *ids])
        if ends and self.eos is not None and not begins(flat[-1:], [self.eos]):
            flat = np.append(flat, np.int32(self.eos))
        mask = None if all(trains for _, trains in pieces) else \
            np.repeat([trains for _, trains in pieces], [len(i) for i in ids])
        columns, marks = self.columns(response, len(flat)), segments(response)
        if marks and len(marks) == len(ids):
            sizes = [len(i) for i in ids[:-1]]
            sizes.append(len(flat) - sum(sizes))
            values = np.array([np.nan if m is None else m for _, m in marks], np.float32)
            if "segments" in response.meta:
                columns["segment"] = values.repeat(sizes)
            else:
                columns["step_label"] = np.full(len(flat), np.nan, np.float32)
                columns["step_label"][np.cumsum(sizes) - 1] = values
        return flat, mask, columns

    def taken(self, response: Response):
        """Tokens, mask and columns of a response given as tokens."""
        tokens = np.array(response.tokens)
        if len(tokens) and (tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.min() < 0):
            raise DataError("wrong tokens", f"tokens should be a list of ids from 0, found {shorten(response.tokens)}")
        columns = self.columns(response, len(tokens))
        if response.logp is not None:
            columns["logp_rollout"] = _per_token(response.logp, len(tokens), "logp")
        mask = response.meta.get("mask")
        return (tokens.astype(np.int32), None if mask is None else _per_token(mask, len(tokens), "mask").astype(bool),
                columns)

    def columns(self, response: Response, size: int) -> dict[str, float | np.ndarray]:
        found = {name: value for name, value in response.meta.items() if name in self.given}
        for name, value in found.items():
            if self.given[name] == "N T":
                found[name] = _per_token(value, size, name)
            elif not isinstance(value, (int, float)):
                raise DataError("wrong column", f"Response.meta[{name!r}] is the column '{COLUMNS[name].meaning}' and "
                                f"should be a number, found {shorten(value)}: mend it, or name it otherwise")
        if "reward" in response.scores:
            found["reward"] = float(response.scores["reward"])
        if self.encoding.aspects:
            missing = [a for a in self.encoding.aspects if a not in response.scores]
            if response.scores and len(missing) == len(self.encoding.aspects):
                raise DataError("no aspect", f"none of the aspects {', '.join(missing)} is among the scores of a response"
                                             f"{nearest(missing[0], response.scores)}; scores: {', '.join(response.scores)}")
            found["rewards"] = np.array([response.scores.get(a, np.nan) for a in self.encoding.aspects], np.float32)
        return found

    def limited(self, response: Response, prompt: np.ndarray, row: EncodedRow, cuts: list[str]) -> EncodedRow:
        """The row within max_response and max_length, with at least one token that trains if the row trains."""
        settings, room = self.encoding, len(row.tokens)
        if settings.max_length is not None:
            room = settings.max_length - len(prompt)
            if room < 1:
                raise Dropped(f"a prompt leaves no room for a response within max_length={settings.max_length} "
                              "(see max_prompt)")
        limit = room if settings.max_response is None else min(room, settings.max_response)
        if len(row.tokens) > limit:
            name = "max_response" if limit == settings.max_response else "max_length"
            name = f"{name}={getattr(settings, name)}"
            if settings.long_response == "error":
                raise DataError("too long", f"a response of {len(row.tokens)} tokens is longer than {name} allows")
            if settings.long_response == "drop":
                raise Dropped(f"a response longer than {name} allows")
            cuts.append(f"responses cut to {name}")
            columns = {k: v[:limit] if isinstance(v, np.ndarray) else v for k, v in row.columns.items()}
            mask = None if row.mask is None else row.mask[:limit]
            row = row._replace(tokens=row.tokens[:limit], mask=mask, columns=columns)
        if not len(prompt) and len(row.tokens):
            row = row._replace(mask=np.ones(len(row.tokens), bool) if row.mask is None else row.mask)
            row.mask[0] = False
        if row.train and not (len(row.tokens) if row.mask is None else row.mask.any()):
            raise Dropped("a response without a token that trains")
        return row


def _per_token(values, size: int, name: str) -> np.ndarray:
    array = np.asarray(values, np.float32)
    if array.shape != (size,):
        raise DataError("wrong length", f"{name} should hold one number for each of the {size} tokens of the response, "
                                        f"found shape {array.shape}")
    return array
