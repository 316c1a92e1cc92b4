"""Runs code that a model wrote, and tests it, in a box that is thrown away. Linux only.

Isolation against accidents and against programs that cheat. It is no fortress: a hole in the kernel is a hole in the box.

What holds, by mode (`protections` says which one this machine allows):

everywhere   a process, session and user id of its own; limits on CPU time, wall time, memory, processes, file size and open
             files; output read up to a cap; a clean environment; an isolated interpreter (-I -S: the standard library
             alone); every descendant killed at the end, also those that left the session
namespaces   (modes "root" and "user") no network, no view of other processes, a root directory that shows the interpreter and
             the system's libraries, read-only, and one writable directory of limited size in memory

What does not: memory is limited for each process, so a box may use `processes * (memory + 32 * file_size) + disk`; the program
may read the system's libraries and see the host's kernel, clock and number of cores. In mode "uid", where the kernel grants no
namespaces, it may also use the network, read what everybody may read and write where everybody may write (/tmp).
"""
from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath

__all__ = ["Limits", "Outcome", "SandboxError", "Verdict", "protections", "run", "run_tests"]

JAIL = Path(__file__).parent / "jail"
PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
MB = 2**20


class SandboxError(RuntimeError):
    """There is no protection to be had, or the box broke: never the program's fault."""


@dataclass(frozen=True)
class Limits:
    """seconds of wall time and of CPU time; bytes of memory, of a file, of the directory, of each output; processes."""
    seconds: float = 5.0
    cpu: int = 5
    memory: int = 512 * MB
    processes: int = 8
    file_size: int = 16 * MB
    disk: int = 64 * MB
    output: int = 64 * 1024

    def of_process(self) -> dict[str, int]:
        """As the operating system counts them."""
        return {"CPU": self.cpu, "AS": self.memory, "NPROC": self.processes, "FSIZE": self.file_size, "NOFILE": 32, "CORE": 0,
                "MSGQUEUE": 0, "MEMLOCK": 0}


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit code, or the signal that ended it; neither where the time or the output ran out."""
    code: int | None
    signal: str | None
    stdout: str
    stderr: str
    truncated: bool
    timed_out: bool
    seconds: float

    @property
    def ok(self) -> bool:
        return self.code == 0 and not self.truncated and not self.timed_out

    @property
    def reason(self) -> str:
        """Why it is not ok, in a few words.

        >>> Outcome(1, None, "", "Traceback ...\\nValueError: bad", False, False, 0.1).reason
        'ValueError: bad'
        """
        if self.timed_out:
            return f"no end within {self.seconds:.3g} seconds"
        if self.truncated:
            return "too much output"
        if self.signal:
            return f"killed by {self.signal}"
        last = self.stderr.strip().splitlines()[-1:] or [f"exit code {self.code}"]
        return "" if self.ok else last[0]


def run(code: str, *, stdin: str = "", files: Mapping[str, str] | None = None, limits: Limits = Limits()) -> Outcome:
    """Run a Python program in the box; `files` lie in its directory.

    >>> run("print(6 * 7)").stdout
    '42\\n'
    """
    return Running(code, stdin, files or {}, limits, mode()).outcome()


class Running:
    """A launched box. `channel` are two file descriptors (to read, to write) that the program finds as 3 and 4."""

    def __init__(self, code: str, stdin: str, files: Mapping[str, str], limits: Limits, mode: str,
                 channel: Sequence[int] = ()):
        for name in files:
            place = PurePosixPath(name)
            if place.is_absolute() or ".." in place.parts or name in ("", ".", "main.py") or "\0" in name:
                raise ValueError(f"files are named by a path inside the box's directory (and not main.py), found {name!r}")
        request = {**asdict(limits), "mode": mode, "stdin": stdin, "files": {**files, "main.py": code},
                   "limits": limits.of_process(), "see": [sys.base_prefix], "channel": list(channel),
                   "command": [PYTHON, "-I", "-S", "-B", "-X", "utf8", "main.py"]}
        self.process = subprocess.Popen([PYTHON, "-I", "-S", "-B", str(JAIL / "launcher.py")], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=channel,
                                        start_new_session=True, env={}, cwd="/")
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode())
            self.process.stdin.close()
        self.process.stdin = None
        self.patience = limits.seconds + 30

    def outcome(self) -> Outcome:
        """Wait for the end. Whatever happens meanwhile, nothing of the box is left behind."""
        try:
            out, err = self.process.communicate(timeout=self.patience)
        except BaseException:
            self.end()
            raise
        try:
            reply = json.loads(out)
        except ValueError:
            raise SandboxError(f"the sandbox's launcher failed: {err.decode(errors='replace')[-500:]}") from None
        if "broken" in reply:
            raise SandboxError(f"the sandbox cannot start a program: {reply['broken']}")
        status = reply.pop("status")
        died = status is not None and status < 0
        return Outcome(code=None if died else status, signal=signal.Signals(-status).name if died else None, **reply)

    def end(self) -> None:
        """Stop the program, whose outcome nobody asks for. The launcher leaves when the box is gone."""
        self.process.terminate()
        self.process.communicate()


# --------------------------------------------------------------------------------------------------------- protections
@cache
def trials() -> dict[str, str]:
    """The modes that this user may try, best first, with what went wrong in each ('' is the one that works)."""
    if not sys.platform.startswith("linux"):
        return {}
    root = os.getuid() == 0
    nested = root and Path("/proc/self/uid_map").read_text().split() != ["0", "0", str(2**32 - 1)]
    out = {}
    for name in [*["root"] * root, *["user"] * (nested or not root), *["uid"] * root]:
        try:
            found = Running("print(6 * 7)", "", {}, Limits(seconds=20), name).outcome()
            out[name] = "" if found.stdout == "42\n" else found.reason
        except SandboxError as error:
            out[name] = str(error)
        if not out[name]:
            break
    return out


def mode() -> str:
    """The mode that works here, or an error: hostile code is not run without protection."""
    tried = trials()
    for name, problem in tried.items():
        if not problem:
            return name
    raise SandboxError("code that a model wrote is not run here: neither namespaces nor an unprivileged user id can be had ("
                       + ("; ".join(f"{name}: {problem}" for name, problem in tried.items()) or f"no Linux: {sys.platform}")
                       + "). Start as root, or allow user namespaces (sysctl user.max_user_namespaces, "
                         "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns; in a container "
                         "--cap-add SYS_ADMIN or a seccomp profile with unshare)")


def protections() -> list[tuple[str, str]]:
    """(level, text) for `prefopt doctor`: which protections are active. Levels: ok, warning, missing."""
    try:
        found = mode()
    except SandboxError as error:
        return [("missing", str(error))]
    limits = Limits()
    lines = [("ok", f"limits of each program: {limits.seconds:g} s, {limits.memory // MB} MB and {limits.processes} processes, "
                    f"{limits.disk // MB} MB of files; all its processes are killed at the end")]
    if found == "uid":
        return [*lines, ("warning", "an unprivileged user id, but no namespaces: programs may use the network, and read what "
                                    f"everybody may read and write to /tmp ({trials()['root']})")]
    owner = "a user id that nobody else has" if found == "root" else "this user's id, in a user namespace"
    return [*lines, ("ok", f"namespaces: no network, no other processes, nothing writable but its own directory; {owner}")]


# --------------------------------------------------------------------------------------------------------------- tests
START = "import os, sys; sys.path.insert(0, os.getcwd()); from rewards.jail.{0} import main; main()"
DEFINITIONS = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reason: str = ""


def run_tests(program: str, tests: Sequence[str], *, entry_point: str | None = None, setup: str = "",
              limits: Limits = Limits()) -> Iterator[Verdict]:
    """A verdict for each test, in order; a test passes when it runs to its end.

    tests        Python: `assert f(1) == 2`, or any lines. `candidate` is the program's `entry_point`
    setup        trusted code that runs before each test (imports, helpers). What tests name and neither they nor the setup
                 define is the program's, but for builtins and modules of the standard library: a function that is called
                 `sum` has to be the `entry_point`
    limits       of one start of the program. It is started again after a test that it does not survive; who stops to
                 iterate stops that, and `all(v.passed for v in ...)` does at the first failure

    The tests run in a box of their own, the program in another. The program gets arguments and returns data: it knows neither
    the tests nor what they expect, and an object with an `==` that always agrees arrives as something that equals nothing. So
    a test cannot see what a call does to its arguments, and cannot pass a function of its own.

    >>> [v.passed for v in run_tests("def double(x): return 2 * x", ["assert double(2) == 4", "assert double(2) == 5"])]
    [True, False]
    """
    for number, test in enumerate(["", *tests]):
        try:
            lines = ast.parse(test if number else setup).body
            if number and all(isinstance(line, DEFINITIONS) for line in lines):
                raise ValueError(f"test {number} runs nothing, so that every program would pass it: {test[:200]!r}. Call what it "
                                 "defines, as in check(candidate)")
        except SyntaxError as error:
            raise ValueError(f"{f'test {number}' if number else 'the setup of the tests'} is no Python: {error}: "
                             f"{(test if number else setup)[:200]!r}") from None
    return _verdicts(program, tests, entry_point, setup, limits)


def _verdicts(program: str, tests: Sequence[str], entry_point: str | None, setup: str, limits: Limits) -> Iterator[Verdict]:
    while tests:
        found = _session(program, tests, entry_point, setup, limits)
        yield from found
        tests = tests[len(found):]


def _session(program: str, tests: Sequence[str], entry_point: str | None, setup: str, limits: Limits) -> list[Verdict]:
    """Verdicts of the tests up to and with the first that the program does not survive."""
    parts = {name: {f"rewards/jail/{part}.py": (JAIL / f"{part}.py").read_text() for part in ("wire", name)}
             for name in ("program", "judge")}
    request = json.dumps({"tests": list(tests), "setup": setup, "entry_point": entry_point})
    asked, ask = os.pipe()
    answered, answer = os.pipe()
    boxes = []
    try:
        try:
            boxes.append(Running(START.format("program"), "", {**parts["program"], "program.py": program}, limits, mode(),
                                 (asked, answer)))
            boxes.append(Running(START.format("judge"), request, parts["judge"],
                                 replace(limits, seconds=limits.seconds + 5, output=16 * MB), mode(), (answered, ask)))
        finally:
            for end in (asked, ask, answered, answer):
                os.close(end)
        judge = boxes.pop().outcome()
        ready, *reasons = [json.loads(line) for line in judge.stdout.splitlines()] or [""]
        if not ready:
            raise ValueError(f"the setup of the tests does not run: {judge.reason}")
        survived = [Verdict(not reason, reason) for reason in reasons if reason != "gone"]
        if judge.ok and len(survived) == len(tests):
            return survived
        if "gone" in reasons:
            ended = boxes.pop().outcome()
            return [*survived, Verdict(False, ended.reason or "the program ends before the test does")]
        return [*survived, Verdict(False, f"the test does not end: {judge.reason}")]
    finally:
        for box in boxes:
            box.end()
