"""Python in the sandbox: what a program prints, or how its tests end."""
from __future__ import annotations

from collections.abc import Sequence

from rewards.sandbox import Limits, run, run_tests
from rewards.tools import Tool, ToolError
from rewards.verifiable import program_of

__all__ = ["TOOL", "python", "testing"]

LIMITS = Limits(output=2000)


def python(text: str, *, limits: Limits = LIMITS) -> str:
    """What a program prints; its last error where it fails.

    >>> python("print(6 * 7)"), python("1 / 0")
    ('42', 'ZeroDivisionError: division by zero')
    """
    if not text:
        raise ToolError("there is no program")
    outcome = run(program_of(text), limits=limits)
    return "\n".join(part for part in (outcome.stdout.strip(), outcome.reason) if part) or "It prints nothing."


def tested(text: str, *, tests: Sequence[str], limits: Limits = LIMITS) -> str:
    """
    >>> tested("def f(x): return x", tests=["assert f(1) == 1", "assert f(1) == 2"])
    'The pass rate is 0.5. Failed reason: AssertionError'
    """
    verdicts = list(run_tests(program_of(text), tests, limits=limits))
    reasons = dict.fromkeys(v.reason.rstrip(": ") for v in verdicts if not v.passed)
    rate = sum(v.passed for v in verdicts) / len(verdicts)
    said = " All test cases passed." if rate == 1 else " All test cases failed." if rate == 0 else ""
    return f"The pass rate is {rate}.{said}" + (f" Failed reason: {'; '.join(reasons)}" if reasons else "")


def testing(tests: Sequence[str], *, answer: str = "", limits: Limits = LIMITS) -> Tool:
    """`code_run` for a question with tests. The input 'Same as the answer' stands for `answer`."""
    def code_run(text: str) -> str:
        return tested(answer if text.rstrip(".") == "Same as the answer" else text, tests=tests, limits=limits)
    return Tool("code_run", "Runs the tests of a question on a program.", "a Python program, or: Same as the answer", code_run)


TOOL = Tool("python", "Runs a Python program in a sandbox and shows what it prints.", "a Python program", python)
