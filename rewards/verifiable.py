"""Rewards that are checked instead of learned: final answers, mathematics, choices, formats, unit tests.

Each is a function of one row. What a response says wrongly, or says in no readable way, is 0: that is what the reward is for.
What the row lacks (a reference, tests) is an error. Sums, gates and tiers of them are `rewards.combine.weighted` and `tiers`.
"""
from __future__ import annotations

import ast
import contextlib
import json
import math
import re
import select
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from importlib.util import find_spec
from threading import Lock

from data_tools.columns import nearest
from rewards.base import ScoringError
from rewards.sandbox import JAIL, Limits, run, run_tests

__all__ = ["Checked", "boxed", "choice", "choice_share", "final_answer", "has_boxed", "is_json", "is_tool_call", "math_equal",
           "number", "pass_at_k", "passed_share", "program_of", "tagged", "tags_once", "unit_tests", "verify"]

# ------------------------------------------------------------------------------------------------------------- answers
NUMBER = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?"
IN_TEXT = re.compile(rf"(?<![\w.]){NUMBER}(?:\s*/\s*\d+)?%?")
FIRST = re.compile(rf"{IN_TEXT.pattern}(?![\w\\^]|\.\d)")
MIXED = re.compile(rf"({NUMBER})\s+(\d+)/(\d+)|({NUMBER})(?:/({NUMBER}))?")
SCIENTIFIC = re.compile(rf"({NUMBER})\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{{\s*)?([-+]?\d{{1,3}})(?:\s*\}})?")
SHORT = r"(?:[cmk]?m|[mk]?g|m?[lL]|km/h|mph|kph|hrs?|h|min|s|lbs?|oz|ft|in|yd|mi|pm|am|USD|EUR|GBP)"   # units that stand close
UNIT = re.compile(rf"(?<=[\d)}}%])(?:\s*{SHORT}|(?:\s+(?:per\s+)?(?:{SHORT}|[A-Za-z]{{3,}}))+)(?:\s*\^?[23])?$")
ANSWER_IS = re.compile(r"\banswer(?:\s+is|\s*[:=])[ \t:]*", re.IGNORECASE)
LONGEST = 1000                                               # characters of an answer; longer ones are nobody's answer


def boxed(text: str) -> list[str]:
    r"""What stands in each \boxed{...}, with its braces balanced.

    >>> boxed(r"so \boxed{\frac{1}{2}}, no, \boxed{3}")
    ['\\frac{1}{2}', '3']
    """
    out, opened = [], []
    for found in re.finditer(r"\\[{}]|\\f?boxed\s*\{|[{}]", text):
        if found[0].endswith("{") and len(found[0]) != 2:
            opened.append(found)
        elif found[0] == "}" and opened and (box := opened.pop())[0] != "{":
            out.append(text[box.end():found.start()])
    return out


def candidates(text: str) -> list[str]:
    r"""The answers of a text by its clearest sign: \boxed{x}, else '#### x', else 'the answer is x', else the last number.

    >>> candidates("The answer is 3.\n#### 4"), candidates("2 + 2 = 4, so it is 4.")
    (['4'], ['4'])
    """
    if found := boxed(text):
        return found
    if "####" in text:
        return [piece.strip().splitlines()[0] if piece.strip() else "" for piece in text.split("####")[1:]]
    if found := [text[m.end():m.end() + LONGEST].split("\n")[0] for m in ANSWER_IS.finditer(text)]:
        return [re.split(r"\.(?:\s|$)", piece)[0].strip(" *") for piece in found]
    return [m[0].strip() for m in IN_TEXT.finditer(text[-100 * LONGEST:].replace("$", ""))][-1:]


def plain(answer: str) -> str:
    r"""An answer without dressing: dollars, \left and \right, spaces, currency, units, its last full stop.

    >>> plain(r"$\left( \dfrac12, 3 \right)$."), plain(r"x = 1{,}200 \text{ cm}"), plain("€5")
    ('(\\frac{1}{2},3)', '1,200', '5')
    """
    for old, new in (("−", "-"), ("–", "-"), ("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\;", ""), ("\\ ", " "), ("~", " "),
                     ("\\left", ""), ("\\right", ""), ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\$", ""), ("$", ""),
                     ("€", ""), ("£", ""), ("\\%", "%"), ("^\\circ", ""), ("^{\\circ}", ""), ("°", ""), ("\\(", ""), ("\\)", ""),
                     ("\\[", ""), ("\\]", ""), ("**", "")):
        answer = answer.replace(old, new)
    answer = re.sub(r"(?<=[\d)}%])\s*\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}(?:\^\{?[23]\}?)?", "", answer)      # a unit
    answer = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"^\s*[A-Za-z]\w{0,9}\s*=(?!=)\s*", "", answer.strip()).rstrip(".").strip()
    return re.sub(r"\s*([,(){}\[\]=/])\s*", r"\1", UNIT.sub("", answer))


def number(answer: str, *, percent: bool = False) -> Fraction | None:
    r"""The number that an answer is, exactly; None where it is none.

    percent     50% is 1/2, and not 50

    >>> [str(number(a)) for a in ("1,234.50", r"-\frac{3}{4}", "2 1/2", "3e2", r"1.5 \times 10^{3}", "12 apples", "x")]
    ['2469/2', '-3/4', '5/2', '300', '1500', '12', 'None']
    """
    answer = plain(answer[:LONGEST])
    share = answer.endswith("%")
    answer = answer.rstrip("%").strip()
    answer = re.sub(r"(?<=\d)\\frac\{", r" \\frac{", answer)                                            # 2\frac{1}{2}
    answer = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", answer)
    try:
        if found := SCIENTIFIC.fullmatch(answer):
            value = exact(found[1]) * Fraction(10) ** int(found[2])
        elif found := MIXED.fullmatch(answer):
            whole, top, bottom, alone, under = found.groups()
            if whole is None:
                value = exact(alone) / (exact(under) if under else 1)
            else:
                value = exact(whole) + (-1 if whole.startswith("-") else 1) * Fraction(int(top), int(bottom))
        else:
            return None
    except (ValueError, ZeroDivisionError):
        return None
    return value / 100 if share and percent else value


def exact(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


@dataclass(frozen=True)
class Checked:
    """Whether an answer is right, what was taken for the answer, by which rule it was decided, and why it is wrong."""
    correct: bool
    extracted: str
    method: str
    reason: str = ""
    multiple: bool = False


def gold(reference: object) -> str:
    """The reference's answer; of a worked solution (GSM8K) what stands behind its ####."""
    text = "" if reference is None else str(reference)
    if not text.strip() or (not isinstance(reference, (str, int, float)) or isinstance(reference, bool)):
        raise ScoringError(f"the reference is {reference!r}: it should be a number or a text that holds the right answer")
    return (candidates(text)[-1] if "####" in text or "\\boxed" in text else text).strip()


def close(a: Fraction, b: Fraction, absolute: float, relative: float) -> bool:
    return abs(a - b) <= max(Fraction(absolute), Fraction(relative) * abs(a))


def final_answer(text, reference, *, absolute: float = 1e-6, relative: float = 1e-6, percent: bool = False) -> float:
    """1 if the final number of a response is the reference's.

    r = 1[|x - g| <= max(absolute, relative |g|)],   exact rationals

    absolute, relative   tolerances; for a reference rounded to 2 decimals absolute=0.005
    percent     50% is 1/2
    Edge        the answer is the last \\boxed{}, else the last ####, else the last 'answer is', else the last number;
                no number is 0; a reference that is none is an error
    Relations   `math_equal` also compares what is no number
    Reference   Cobbe et al., GSM8K, arXiv:2110.14168

    >>> final_answer("16 - 3 - 4 = 9, and 9 * 2 = $18.", "#### 18"), final_answer("no idea", 18)
    (1.0, 0.0)
    """
    wanted = number(gold(reference), percent=percent)
    if wanted is None:
        raise ScoringError(f"the reference {gold(reference)[:100]!r} is no number: use math_equal, which compares other answers")
    found = candidates(text)[-1:]
    value = number(found[0], percent=percent) if found else None
    if value is None and found and (inside := FIRST.search(plain(found[0]))):                    # 'the answer is 5, not 6'
        value = number(inside[0], percent=percent)
    return float(value is not None and close(wanted, value, absolute, relative))


def math_equal(text, reference, *, absolute: float = 1e-6, relative: float = 1e-6, percent: bool = False,
               seconds: float = 5.0) -> float:
    r"""1 if the answer of a response is mathematically the reference.

    r = 1[answer = reference]: the same text, else the same number, tuple, interval or set, else the package math-verify

    seconds     for math-verify, which runs in a process of its own; longer is not equal
    Edge        without math-verify, numbers, fractions, percents and tuples, intervals and sets of them are compared; what it
                would have to decide (roots, symbols) is an error then, not a 0
    Relations   `verify` says how it was decided
    Reference   huggingface/Math-Verify

    >>> math_equal(r"so it is \boxed{\frac{1}{2}}", "0.5"), math_equal(r"\boxed{(2,1)}", "(1,2)"), math_equal("4", r"\{4\}")
    (1.0, 0.0, 0.0)
    """
    return float(verify(reference, text, absolute=absolute, relative=relative, percent=percent, seconds=seconds).correct)


def verify(reference, text: str, *, absolute: float = 1e-6, relative: float = 1e-6, percent: bool = False,
           seconds: float = 5.0) -> Checked:
    r"""The answer of a text against the reference. In a chain a = b = 101 the last side answers.

    >>> verify(r"\{1, 2\}", r"\boxed{\{2, 1\}}")
    Checked(correct=True, extracted='\\{2, 1\\}', method='elements', reason='', multiple=False)
    """
    wanted, found = plain(gold(reference)), candidates(text)
    if not found or len(found[-1]) > LONGEST:
        return Checked(False, "", "none", "no answer" if not found else "the answer is too long")
    raw, answer, multiple = found[-1], plain(found[-1]), len(found) > 1
    if "=" in answer and "=" not in wanted:
        answer = plain(answer.rsplit("=", 1)[1])
    same = partial(equal, absolute=absolute, relative=relative, percent=percent)
    left, right = elements(wanted), elements(answer)
    if wanted and answer == wanted:
        return Checked(True, raw, "text", "", multiple)
    if left and not right and "," in answer and left[0] == "()":
        right = ("()", answer.split(","))                     # '1,2' is a pair where the reference is one
    if (left or right) and not (left and right):
        return Checked(False, raw, "elements", f"{answer!r} and {wanted!r} are not the same kind of thing", multiple)
    if left and right:
        decided = collections_equal(left, right, same)
    else:
        decided = same(wanted, answer)
    if decided is None:
        try:
            decided, method = algebra()(wanted, answer, seconds), "math-verify"
        except ModuleNotFoundError as missing:
            raise ScoringError(f"it takes algebra to compare {answer[:100]!r} with {wanted[:100]!r}, and {missing}") from None
    else:
        method = "elements" if left else "number"
    return Checked(bool(decided), raw, method, "" if decided else f"{answer!r} is not {wanted!r}", multiple)


def equal(wanted: str, answer: str, *, absolute: float, relative: float, percent: bool) -> bool | None:
    """None where it takes algebra to know."""
    a, b = number(wanted, percent=percent), number(answer, percent=percent)
    if a is not None and b is not None:
        return close(a, b, absolute, relative)
    if wanted == answer:
        return True
    words = [re.fullmatch(r"[A-Za-z ]{2,}", side) is not None for side in (wanted, answer)]
    if any(words):
        return wanted.casefold() == answer.casefold()
    return None if answer else False


def elements(answer: str) -> tuple[str, list[str]] | None:
    r"""The brackets and the members of a tuple, interval or set.

    >>> elements("(1,2]"), elements(r"\{1,2\}"), elements("(1+2)")
    (('(]', ['1', '2']), ('{}', ['1', '2']), None)
    """
    if found := re.fullmatch(r"\\\{(.*)\\\}", answer):
        return "{}", members(found[1])
    if (found := re.fullmatch(r"([(\[])(.*)([)\]])", answer)) and len(members(found[2])) > 1:
        return found[1] + found[3], members(found[2])
    return None


def members(inside: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    out, depth = [""], 0
    for letter in inside:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            out.append("")
        else:
            out[-1] += letter
    return out


def collections_equal(left: tuple, right: tuple, same) -> bool | None:
    """Member by member; sets in any order. None where a member takes algebra."""
    (brackets, wanted), (others, found) = left, right
    if brackets != others or len(wanted) != len(found):
        return False
    if brackets == "{}":
        rest, unknown = list(found), False
        for member in wanted:
            answers = [same(member, other) for other in rest]
            unknown |= True not in answers and None in answers
            if True in answers:
                rest.pop(answers.index(True))
        return None if unknown else not rest
    answers = [same(a, b) for a, b in zip(wanted, found, strict=True)]
    return False if False in answers else None if None in answers else True


# ------------------------------------------------------------------------------------------------------------- algebra
@cache
def algebra() -> Algebra:
    return Algebra()


class Algebra:
    """math-verify in a process that can be killed: some powers never come back."""

    def __init__(self):
        if find_spec("math_verify") is None:
            raise ModuleNotFoundError("math-verify is not installed: pip install 'math-verify[antlr4_13_2]'")
        self.process, self.lock = None, Lock()

    def __call__(self, wanted: str, answer: str, seconds: float) -> bool:
        """Whether they are equal; not within the time is no."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen([sys.executable, str(JAIL / "algebra.py")], stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
                weakref.finalize(self, self.process.kill)
                if self.answer(60.0) != "ready":
                    raise ScoringError("math-verify does not start: try `python -c 'import math_verify'`")
            self.process.stdin.write(json.dumps([wanted, answer]).encode() + b"\n")
            self.process.stdin.flush()
            return self.answer(seconds) is True

    def answer(self, seconds: float) -> object:
        """The next line; without one in time, or at its end, the process goes."""
        if select.select([self.process.stdout], [], [], seconds)[0] and (line := self.process.stdout.readline()):
            return json.loads(line)
        self.process.kill()
        self.process.communicate()
        return None


# ------------------------------------------------------------------------------------------------------------- choices
def chosen(text: str, letters: str) -> set[str]:
    """The letters that a response settles on: the last \\boxed{B}, else 'answer is B', else '(B)', else a line 'B' or 'B. ...'.

    >>> sorted(chosen("(A) is tempting. Answer: B and D", "ABCD")), chosen("A dog barks.", "ABCD")
    (['B', 'D'], set())
    """
    one = rf"\(?[{letters}]\)?(?![\w'])"
    several = re.compile(rf"[\s*:]*({one}(?:\s*(?:,|and|&|/|;)\s*(?:and\s+)?{one})*)")
    pieces = boxed(text)[-1:] or [text[m.end():m.end() + LONGEST] for m in ANSWER_IS.finditer(text)][-1:]
    if not pieces:
        pieces = re.findall(rf"\([{letters}]\)", text)[-1:] or [
            m[1] for m in re.finditer(rf"^[ \t*]*([{letters}])(?:[.):*]|[ \t]*$)", text, re.MULTILINE)][-1:]
    found = several.match(pieces[0]) if pieces else None
    return set(re.findall(rf"[{letters}](?!\w)", found[1])) if found else set()


def choices(text: str, reference: object, letters: str) -> tuple[set[str], set[str]]:
    right = set(re.findall(r"[A-Za-z]+", str(reference).upper()))
    if not right or not right <= set(letters):
        raise ScoringError(f"the reference {reference!r} should be one or several of the letters {', '.join(letters)}")
    return chosen(text, letters), right


def choice(text, reference, *, letters: str = "ABCDE") -> float:
    """1 if a response chooses exactly the right options.

    r = 1[P = S]

    letters     the options there are
    Edge        no readable choice is 0; a reference that is none of the letters is an error
    Relations   `choice_share` gives part of it for some of the right options

    >>> choice("It is (C)... no, the answer is (B).", "B"), choice("Answer: A, B", "B")
    (1.0, 0.0)
    """
    picked, right = choices(text, reference, letters)
    return float(picked == right)


def choice_share(text, reference, *, letters: str = "ABCDE") -> float:
    """The share of the right options that a response chooses, if it chooses no wrong one.

    r = |P| / |S| if P is a subset of S, else 0

    letters     the options there are
    Edge        no readable choice is 0; capital and small letters of the reference are alike
    Relations   one right option: `choice`
    Departs     the official code tries symbolic equality first, which takes letters for variables
    Reference   TW-GRPO, longmalongma/TW-GRPO

    >>> choice_share("Answer: A", "A,C"), choice_share("Answer: A, B", "A,C"), choice_share("Answer: C and A", "A,C")
    (0.5, 0.0, 1.0)
    """
    picked, right = choices(text, reference, letters)
    return len(picked) / len(right) if picked <= right else 0.0


# ------------------------------------------------------------------------------------------------------------- formats
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def with_opening(text: str, prefilled: bool) -> str:
    return f"<think>{text}" if prefilled else text


def tagged(text, *, prefilled_open: bool = False) -> float:
    """1 if a response is one <think>...</think> and then one <answer>...</answer>, with nothing else around them.

    r = 1[each tag once, in this order, only white space outside, an answer that is not empty]

    prefilled_open   the prompt already ends in <think>
    Edge        tags in a code fence count like any other; linear time
    Relations   1 here is 1 in `tags_once`
    Reference   DeepSeek-R1, arXiv:2501.12948

    >>> tagged("<think>hm</think>\\n<answer>4</answer>"), tagged("<think>hm</think> 4")
    (1.0, 0.0)
    """
    text = with_opening(text, prefilled_open)
    if any(text.count(tag) != 1 for tag in TAGS):
        return 0.0
    before, rest = text.split(TAGS[0])
    _, _, rest = rest.partition(TAGS[1])
    between, _, rest = rest.partition(TAGS[2])
    answer, closed, after = rest.partition(TAGS[3])
    return float(bool(closed and answer.strip()) and not (before + between + after).strip())


def tags_once(text, *, prefilled_open: bool = False) -> float:
    """A quarter for each of <think>, </think>, <answer>, </answer> that stands in a response exactly once.

    r = sum_tag 1[count = 1] / 4

    prefilled_open   the prompt already ends in <think>
    Edge        order and what stands between do not matter
    Relations   `tagged` is strict
    Reference   open-r1, tag count reward

    >>> tags_once("<think>hm</think> 4")
    0.5
    """
    text = with_opening(text, prefilled_open)
    return sum(text.count(tag) == 1 for tag in TAGS) / len(TAGS)


def has_boxed(text) -> float:
    r"""1 if a response has an answer in \boxed{...} that is not empty.

    >>> has_boxed(r"\boxed{4}"), has_boxed(r"\boxed{ }")
    (1.0, 0.0)
    """
    return float(any(inside.strip() for inside in boxed(text)))


def fenced(text: str) -> list[str]:
    """What stands in the fences ```...``` of a text; a last one that is not closed counts."""
    return [piece.partition("\n")[2] for piece in re.split(r"^[ \t]*```", text, flags=re.MULTILINE)[1::2]]


def json_of(text: str) -> object:
    """The JSON of a text or of its last fence; ValueError where there is none."""
    return json.loads((fenced(text) or [text])[-1])


def is_json(text) -> float:
    """1 if a response, or its last code block, is JSON.

    >>> is_json('{"a": 1}'), is_json("a")
    (1.0, 0.0)
    """
    try:
        json_of(text)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def is_tool_call(text) -> float:
    """1 if a response calls a tool: JSON with a `name` and `arguments`, bare, in a code block or in <tool_call>.

    >>> is_tool_call('<tool_call>{"name": "calculator", "arguments": {"input": "1+1"}}</tool_call>'), is_tool_call("1+1")
    (1.0, 0.0)
    """
    _, opening, rest = text.rpartition("<tool_call>")
    try:
        call = json_of(rest.partition("</tool_call>")[0] if opening else text)
    except (ValueError, RecursionError):
        return 0.0
    return float(isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict))


# ---------------------------------------------------------------------------------------------------------- unit tests
def program_of(text: str) -> str:
    """The last code block of a response, else all of it.

    >>> program_of("Try\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    return (fenced(text) or [text])[-1]


AS_JSON = """
def as_json(x):
    if isinstance(x, (list, tuple)):
        return [as_json(y) for y in x]
    return {str(k): as_json(v) for k, v in x.items()} if isinstance(x, dict) else x
"""
SHAPES = {
    ("test", "entry_point"): "HumanEval, MBPP: a `check(candidate)`, with the `prompt`",
    ("test_list",): "MBPP: asserts, with `test_setup_code`",
    ("inputs", "outputs"): "what is read and printed; with `fn_name`, arguments and results"}


def results(text: str, tests: object, limits: Limits):
    """Whether each test passes, in order."""
    program = program_of(text)
    if isinstance(tests, str):
        tests = [tests]
    if isinstance(tests, Mapping):
        shape = next((keys for keys in SHAPES if all(tests.get(key) for key in keys)), None)
        if shape is None:
            near = nearest(next(iter(tests), ""), sum(SHAPES, ()))
            raise ScoringError(f"tests with the keys {', '.join(map(str, tests)) or 'none'} are not known{near}. Write a list of "
                               "asserts, or a record with "
                               + "; or ".join(f"{' and '.join(keys)} ({what})" for keys, what in SHAPES.items()))
        if shape == ("inputs", "outputs"):
            yield from examples(program, tests, limits)
            return
        if shape == ("test", "entry_point"):
            name, prompt = tests["entry_point"].strip(), tests.get("prompt", "")
            program = program if defines(program, name) else prompt + program
            checks = run_tests(program, [f"{tests['test']}\ncheck(candidate)"], entry_point=name, setup=standing(prompt),
                               limits=limits)
        else:
            checks = run_tests(program, tests["test_list"], setup=tests.get("test_setup_code", ""), limits=limits)
    elif isinstance(tests, Sequence) and tests and all(isinstance(test, str) for test in tests):
        checks = run_tests(program, tests, limits=limits)
    else:
        raise ScoringError(f"tests are a list of asserts or a record of tests, found {str(tests)[:100]!r}")
    yield from (verdict.passed for verdict in checks)


def examples(program: str, tests: Mapping, limits: Limits):
    inputs, outputs = tests["inputs"], tests["outputs"]
    if len(inputs) != len(outputs):
        raise ScoringError(f"tests have {len(inputs)} inputs and {len(outputs)} outputs")
    if tests.get("fn_name"):
        lines = [f"assert as_json(candidate(*{list(given)!r})) == as_json({wanted!r})"
                 for given, wanted in zip(inputs, outputs, strict=True)]
        checks = run_tests(program, lines, entry_point=tests["fn_name"], setup=AS_JSON, limits=limits)
        yield from (verdict.passed for verdict in checks)
        return
    for given, wanted in zip(inputs, outputs, strict=True):
        outcome = run(program, stdin=given, limits=limits)
        yield outcome.ok and lines_of(outcome.stdout) == lines_of(wanted)


def lines_of(text: str) -> list[str]:
    """Lines without the white space at their ends and at the end of the text."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def standing(prompt: str) -> str:
    """The definitions of a prompt: its last function may have no body yet."""
    for text in (prompt, f"{prompt}\n    pass\n"):
        with contextlib.suppress(SyntaxError):
            ast.parse(text)
            return text
    return ""


def defines(program: str, name: str) -> bool:
    try:
        found = ast.walk(ast.parse(program))
        return any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name for node in found)
    except (SyntaxError, ValueError, RecursionError):
        return f"def {name}" in program


def unit_tests(text, tests, *, seconds: float = 5.0, memory: int = 512 * 2**20) -> float:
    """1 if a program passes all of its tests, run in the sandbox.

    r = 1[every test passes]

    seconds     of one start of the program
    memory      bytes of each of its processes
    Edge        the program is the last code block, else all of the text; one that is no Python is 0; it stops at the first
                failure. `tests` are a list of asserts, or a record of HumanEval, MBPP or of inputs and outputs
    Relations   `passed_share` counts them
    Departs     the program cannot reach the verdict: see `rewards.sandbox.run_tests`
    Reference   Chen et al., HumanEval, arXiv:2107.03374

    >>> unit_tests("```python\\ndef double(x):\\n    return 2 * x\\n```", ["assert double(2) == 4"])
    1.0
    """
    return float(all(results(text, tests, Limits(seconds=seconds, cpu=math.ceil(seconds), memory=memory))))


def passed_share(text, tests, *, seconds: float = 5.0, memory: int = 512 * 2**20) -> float:
    """The share of its tests that a program passes, run in the sandbox.

    r = passed / tests

    seconds     of one start of the program; it is started again after a test that it does not survive
    memory      bytes of each of its processes
    Edge        a `check(candidate)` is one test
    Relations   `unit_tests` wants all of them

    >>> passed_share("def double(x): return 2 * x", ["assert double(2) == 4", "assert double(2) == 5"])
    0.5
    """
    passed = list(results(text, tests, Limits(seconds=seconds, cpu=math.ceil(seconds), memory=memory)))
    return sum(passed) / len(passed)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that one of k samples passes, from n of which some do, without bias.

    pass@k = 1 - prod_{i = n - c + 1}^{n} (1 - k / i);   1 if n - c < k

    Relations   k = 1 is c / n, k = n is 1[c > 0]
    Reference   Chen et al., HumanEval, arXiv:2107.03374, eq. 1

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2)
    (0.25, 0.5)
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= correct <= n and 1 <= k <= n, found n={n}, correct={correct}, k={k}")
    return 1.0 if n - correct < k else 1.0 - math.prod(1 - k / i for i in range(n - correct + 1, n + 1))
