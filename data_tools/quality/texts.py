"""What one text shows by itself: broken characters, refusals, cut ends, personal data, its language."""
from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_tools.quality.words import Words, words

__all__ = ["LANGUAGES", "PATTERNS", "cleaned", "encoding", "language", "personal", "redacted", "refusal", "truncation"]


class Problem(NamedTuple):
    kind: str
    message: str
    sure: float
    repair: str


# ----------------------------------------------------------------------------------------------------------- characters
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
INVISIBLE = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\U000e0000-\U000e007f]")
LOST = re.compile("[\ufffd\ud800-\udfff]")
LEADS = "".join(bytes([b]).decode("cp1252", "replace") for b in range(0xC2, 0xF5))
TAILS = "".join({bytes([b]).decode("cp1252", "ignore") or chr(b) for b in range(0x80, 0xC0)})
MOJIBAKE = re.compile(f"[{LEADS}][{re.escape(TAILS)}]+")


def encoding(text: str) -> Iterator[Problem]:
    r"""Control characters, invisible ones, characters that an earlier step lost, and UTF-8 read as another encoding.

    >>> [p.kind for p in encoding("It\u00e2\u20ac\u2122s\x00 here")]
    ['control character', 'mojibake']
    """
    if found := CONTROL.search(text):
        yield Problem("control character", f"U+{ord(found[0]):04X} at character {found.start()}", 1.0, "clean")
    if text.isascii():
        return
    if found := INVISIBLE.search(text):
        yield Problem("invisible character", f"U+{ord(found[0]):04X} at character {found.start()}", 0.9, "clean")
    if found := LOST.search(text):
        yield Problem("lost character", f"U+{ord(found[0]):04X} at character {found.start()}: an earlier step could not read it; "
                                        "get the text from its source again", 1.0, "drop response")
    for found in MOJIBAKE.finditer(text):
        if (meant := unmixed(found[0])) != found[0]:
            yield Problem("mojibake", f"{found[0]!r} looks like UTF-8 read as Windows-1252: {meant!r}", 0.95, "clean")
            return


def unmixed(text: str) -> str:
    """UTF-8 that was read as Windows-1252, put right; any other text as it is."""
    try:
        return bytes(b for c in text for b in (c.encode("cp1252", "ignore") or c.encode("latin-1"))).decode()
    except UnicodeError:
        return text


def cleaned(text: str) -> str:
    r"""The text without control and invisible characters, its mojibake put right.

    >>> cleaned("caf\u00c3\u00a9 \u200bau lait")
    'café au lait'
    """
    return INVISIBLE.sub("", CONTROL.sub("", MOJIBAKE.sub(lambda found: unmixed(found[0]), text)))


# ------------------------------------------------------------------------------------------------------------- refusals
REFUSALS = (
    (0.95, re.compile(r"\b(?:i(?:'m| am)(?: (?:very|so|truly|really|deeply))?(?: sorry| afraid)|sorry|apologies|i apologi[sz]e)\b"
                      r"[^.!?\n]{0,60}?\b(?:i|we)(?: (?:simply|just|really|also))? "
                      r"(?:can(?:no|')t|can not|am (?:not able|unable)|'m (?:not able|unable)|won't|will not|must decline)\b",
                      re.I)),
    (0.95, re.compile(r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b[^.!?\n]{0,80}?"
                      r"\b(?:can(?:no|')t|can not|not able to|unable to|do(?:n't| not) have|not (?:appropriate|programmed))\b",
                      re.I)),
    (0.9, re.compile(r"^\W*(?:(?:i|we) (?:can(?:no|')t|can not|(?:am|are) (?:not able|unable) to|won't|will not|must decline to|"
                     r"(?:do(?:n't| not)) feel comfortable)|i'm (?:not able to|unable to|not comfortable)) "
                     r"(?:(?:really|actually|fully|directly|currently) )?(?:help|assist|provid|answer|compl|discuss|"
                     r"fulfil|comment|support|do|creat|writ|engag|generat|giv|shar|offer|promot)\w*", re.I)),
    (0.8, re.compile(r"\b(?:against (?:my|our) (?:policy|policies|guidelines|programming)|i must (?:respectfully )?decline)\b",
                     re.I)))


def refusal(text: str) -> Iterator[Problem]:
    """A response that declines in its first 300 characters.

    >>> [p.sure for p in refusal("I'm sorry, but I can't help with that.")], list(refusal("I can't believe it!"))
    ([0.95], [])
    """
    head = text[:300].replace("\u2019", "'")
    for sure, pattern in REFUSALS:
        if found := pattern.search(head):
            yield Problem("refusal", f"the response declines: {found[0][:60]!r}", sure, "")
            return


# ------------------------------------------------------------------------------------------------------------- cut ends
ENDS = re.compile(r"""[.!?:;…。！？]["'”’)\]}*_`]*$|[`)\]}>|*"”’]$|\d[\d.,%€$£°]*$|\$$|[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f]$|#\w+$|\\boxed|https?://\S+$""")
OPEN = re.compile(r"(?:[,-]|\b(?:an?|the|and|or|but|of|to|in|for|with|from|by|as|at|that|which|is|are|was|were|because|if|than|"
                  r"his|her|their|its|your|my|our|very))$", re.I)
ITEM = re.compile(r"[#|>*•-]|    |\d+[.)]")


def truncation(text: str) -> Iterator[Problem]:
    """A response that a limit seems to have cut: an open code block; or a last line without an end that is eight words long or
    more, or four and its last word asks for another, or an item of a list whose other items have ends.

    >>> [p.sure for p in truncation("The reason is simple, and it is that we have found the")]
    [0.95]
    >>> list(truncation("Bread, milk, and eggs")), list(truncation("That is why it works."))
    ([], [])
    """
    text = text.rstrip()
    if text.count("```") % 2:
        yield Problem("truncated", "a code block is opened and never closed", 0.95, "drop response")
        return
    *before, last = text.split("\n")
    said, item = last.split(), ITEM.match(last)
    if not said or ENDS.search(last[-80:]):
        return
    hanging = len(last) >= 30 and len(said) >= 4 and OPEN.search(last)
    if item and not hanging:
        ended = [bool(ENDS.search(other[-80:])) for other in before if ITEM.match(other)]
        sure = 0.8 if len(ended) > 1 and all(ended) else 0.0
    else:
        sure = 0.95 if hanging else 0.6 if len(said) >= 8 else 0.0
    if sure:
        yield Problem("truncated", f"the last line ends in {' '.join(said[-4:])!r}", sure, "drop response")


# -------------------------------------------------------------------------------------------------------- personal data
class Pattern(NamedTuple):
    found: re.Pattern
    sure: float


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of a card number.

    >>> luhn("4539578763621486"), luhn("4539578763621487")
    (True, False)
    """
    numbers = [int(d) for d in digits if d.isdigit()][::-1]
    return sum(numbers[::2]) % 10 == -sum(sum(divmod(2 * d, 10)) for d in numbers[1::2]) % 10


PATTERNS = {
    "email": Pattern(re.compile(r"\b[\w.+-]{1,64}@(?!(?:example|test|domain|email|company)\.)[\w-]{1,63}(?:\.[\w-]{1,63}){0,4}"
                                r"\.[a-z]{2,18}\b", re.I), 0.95),
    "phone": Pattern(re.compile(r"(?<![\w.$€£+-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)[ .-]?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])|"
                                r"(?<![\w.])\+\d{1,3}[ .-]?\d{2,4}(?:[ .-]?\d{2,4}){2,4}(?!\w)"), 0.8),
    "card": Pattern(re.compile(r"(?<![\w.-])(?:4\d{3}|5[1-5]\d\d|6011|3[47]\d\d)(?:[ -]?\d{4}){2}[ -]?\d{3,4}"
                               r"(?![\w.-]?\d)"), 0.95),
    "social security number": Pattern(re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])"), 0.9),
    "iban": Pattern(re.compile(r"\b[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b"), 0.9),
    "ip address": Pattern(re.compile(r"(?<![\w.])(?!(?:0|10|127|192\.168|255)\.)(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}"
                                     r"(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.]?\d)"), 0.6),
    "secret key": Pattern(re.compile(r"\b(?:sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}|"
                                     r"hf_[A-Za-z0-9]{30,})|-----BEGIN [A-Z ]*PRIVATE KEY-----"), 0.95)}
DIGITS = re.compile(r"\d[\d .()-]{5,}\d")
KEYS = re.compile(r"sk-|gh[pousr]_|AKIA|hf_|PRIVATE KEY|[A-Z]{2}\d\d ?[A-Z]")


def personal(text: str) -> Iterator[Problem]:
    """E-mail addresses, telephone, card and account numbers, addresses of machines, keys: the first of each.

    >>> [(p.kind, p.repair) for p in personal("write to jo.smith@posteo.net or 555-867-5309")]
    [('email', 'redact'), ('phone', 'redact')]
    """
    for name, found in _found(text):
        yield Problem(name, f"{name} at character {found.start()}", PATTERNS[name].sure, "redact")


def _found(text: str) -> Iterator[tuple[str, re.Match]]:
    some = {"email"} if "@" in text else set()
    some |= {"phone", "card", "social security number", "ip address", "iban"} if DIGITS.search(text) else set()
    some |= {"secret key", "iban"} if KEYS.search(text) else set()
    for name in PATTERNS:
        if name in some:
            for found in PATTERNS[name].found.finditer(text):
                if name != "card" or luhn(found[0]):
                    yield name, found
                    break


def redacted(text: str) -> str:
    """The text with every such datum replaced by its name in brackets.

    >>> redacted("write to jo.smith@posteo.net")
    'write to [email]'
    """
    for name, pattern in PATTERNS.items():
        text = pattern.found.sub(lambda m, name=name: m[0] if name == "card" and not luhn(m[0]) else f"[{name}]", text)
    return text


# ------------------------------------------------------------------------------------------------------------ languages
LANGUAGES = {
    "en": "the and of to in is that it for was on are with as you this be have at not but they by from or had",
    "de": "der die und das ist nicht ein eine zu den mit von auf für sich dem des im auch es ich sie wie wir oder",
    "fr": "le la les des et est une un du dans que qui pour pas sur au avec ce il elle ne nous vous plus sont",
    "es": "el los las y es en que un una por con para del se no su al como más pero sus lo está son fue",
    "it": "il gli di e è che un una per con non del della sono le si nel anche più ma come alla dei ha questo",
    "pt": "o os as e é em que um uma por com para do da não se na no como mais mas foi ao são dos",
    "nl": "de het een en van is dat niet op te zijn voor met die aan ook er maar om als bij wordt naar ik je"}
SCRIPTS = {"ru": (0x400, 0x530), "el": (0x370, 0x400), "he": (0x590, 0x600), "ar": (0x600, 0x700), "hi": (0x900, 0x980),
           "th": (0xE00, 0xE80), "ja": (0x3040, 0x3100), "zh": (0x4E00, 0xA000), "ko": (0xAC00, 0xD7B0)}
SHARED = {word for word in " ".join(LANGUAGES.values()).split()
          if sum(word in said.split() for said in LANGUAGES.values()) > 1}
TABLE = {int(n): k for k, said in enumerate(LANGUAGES.values())
         for n in words([w for w in said.split() if w not in SHARED]).number}


def language(texts: list[str], found: Words) -> tuple[np.ndarray, list[str]]:
    """(texts, languages) evidence, and the languages' names: how many of a text's words are frequent words of one language
    and no other listed one, and how many characters are of a script that few languages use. The languages are a small list
    (`LANGUAGES`, `SCRIPTS`), and a short text has little evidence.

    >>> texts = ["what is the name of that", "wie ist das und nicht die"]
    >>> evidence, names = language(texts, words(texts))
    >>> [names[k] for k in evidence.argmax(1)]
    ['en', 'de']
    """
    names = [*LANGUAGES, *SCRIPTS]
    evidence = np.zeros((len(texts), len(names)), int)
    keys = np.array(sorted(TABLE), np.uint64)
    at = np.minimum(np.searchsorted(keys, found.number), len(keys) - 1)
    hit = keys[at] == found.number
    tongue = np.array([TABLE[int(k)] for k in keys])[at[hit]]
    np.add.at(evidence, (found.text[hit], tongue), 1)
    for n, text in enumerate(texts):
        if not text.isascii():
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
            evidence[n, len(LANGUAGES):] = [((codes >= low) & (codes < high)).sum() for low, high in SCRIPTS.values()]
    evidence[:, names.index("zh")] *= evidence[:, names.index("ja")] == 0         # kana beside Chinese characters is Japanese
    evidence[:, names.index("ja")] *= 2
    return evidence, names
