"""The sandbox: what a program may do, what it may not, and that it cannot reach its verdict. Every attack is bounded."""
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards import sandbox
from rewards.sandbox import Limits, SandboxError, protections, run, run_tests

pytestmark = pytest.mark.skipif(protections()[0][0] == "missing", reason="no sandbox on this machine")
SHORT = Limits(seconds=0.5)
NAMESPACES = len(protections()) == 2 and protections()[1][0] == "ok"
boxed_only = pytest.mark.skipif(not NAMESPACES, reason="no namespaces on this machine")


def left_behind():
    """Processes of a box that are still there: their command line, or a user id that only boxes have."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line, owner = (entry / "cmdline").read_bytes(), entry.stat().st_uid
            except OSError:
                continue
            if line.endswith(b"main.py\0") or owner >= 2**30:
                found.append((entry.name, line))
    return found


def gone(seconds=5.0):
    until = time.monotonic() + seconds
    while left_behind() and time.monotonic() < until:          # other tests may have boxes open
        time.sleep(0.02)
    return not left_behind()


# ------------------------------------------------------------------------------------------------------------ programs
def test_output_exit_code_files_and_stdin():
    program = "import sys; print(open('a/b.txt').read() + sys.stdin.read()); sys.exit(3)"
    out = run(program, stdin="in é", files={"a/b.txt": "file "})
    assert (out.stdout, out.code, out.ok, out.signal) == ("file in é\n", 3, False, None)
    assert run("import os; os.kill(os.getpid(), 11)").signal == "SIGSEGV"
    assert run("").ok


def test_a_program_that_does_not_read_its_stdin_and_one_that_reads_a_lot():
    assert run("pass", stdin="x" * 10**6).ok
    assert run("import sys; print(len(sys.stdin.read()))", stdin="x" * 10**6).stdout == "1000000\n"


@pytest.mark.parametrize("name", ["/etc/x", "../x", "main.py", ""])
def test_files_lie_in_the_box(name):
    with pytest.raises(ValueError, match="inside the box"):
        run("pass", files={name: "x"})


def test_the_environment_is_clean(monkeypatch):
    monkeypatch.setenv("A_SECRET", "x")
    seen = run("import os, sys; print(sorted(os.environ), sys.flags.isolated, sys.flags.no_site, os.listdir())").stdout
    assert seen == "['HOME', 'LANG', 'PATH', 'TMPDIR'] 1 1 ['main.py']\n"


def test_runs_from_threads_at_once_do_not_meet():
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda n: run(f"open('x', 'a').write('{n}'); print(open('x').read())").stdout, range(12)))
    assert outs == [f"{n}\n" for n in range(12)]


# ------------------------------------------------------------------------------------------------------------- attacks
def test_time_is_up():
    for program in ("while True: pass", "import time; time.sleep(60)"):
        began = time.monotonic()
        out = run(program, limits=SHORT)
        assert out.timed_out and not out.ok and time.monotonic() - began < 20


def test_cpu_time_is_limited():
    assert run("while True: pass", limits=Limits(seconds=9, cpu=1)).signal == "SIGKILL"


def test_memory_is_limited():
    assert run("bytearray(10**10)").reason == "MemoryError"


def test_a_gigabyte_of_output_is_cut():
    out = run("import os\nwhile True: os.write(1, b'x' * 65536)")
    assert out.truncated and not out.ok and len(out.stdout) == Limits().output and out.seconds < 4


def test_a_large_file_is_cut():
    assert not run("f = open('x', 'wb')\nfor _ in range(100): f.write(bytes(10**6)); f.flush()").ok


@boxed_only
def test_the_directory_has_a_size():
    out = run("for n in range(100): open(f'x{n}', 'wb').write(bytes(10**6))", limits=Limits(disk=2**22))
    assert "No space left" in out.reason


def test_a_flood_of_processes_is_limited_and_leaves_nothing():
    flood = ("import os, time\nn = 0\ntry:\n  while n < 1000:\n    n += 1\n    if os.fork() == 0: time.sleep(50)\n"
             "except OSError:\n  print(n)")
    assert int(run(flood).stdout) <= Limits().processes
    assert gone()


def test_a_daemon_dies_with_its_program():
    daemon = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(60)\n  os._exit(0)"
    began = time.monotonic()
    assert run(daemon).ok and time.monotonic() - began < 20
    assert gone()


def test_nobody_outside_can_be_killed():
    victim = subprocess.Popen(["sleep", "30"])
    try:
        run(f"import os\nfor target in (-1, {os.getpid()}, {victim.pid}, os.getppid()):\n"
            "  try: os.kill(target, 9)\n  except OSError: pass")
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_nothing_is_written_outside(tmp_path):
    tmp_path.chmod(0o777)
    places = ["/usr/x", "/etc/x", "/x", str(Path(__file__).parent / "x"), sys.base_prefix + "/x", sys.prefix + "/x"]
    program = f"for place in {places!r}:\n  try: open(place, 'w'); print('wrote', place)\n  except OSError: pass"
    assert run(program).stdout == ""


@boxed_only
def test_what_everybody_may_write_is_not_there(tmp_path):
    tmp_path.chmod(0o777)
    assert "No such file" in run(f"open({str(tmp_path / 'x')!r}, 'w')").reason
    assert run("open('/tmp/x', 'w').write('own')").ok and not Path("/tmp/x").exists()


@boxed_only
def test_no_network_and_no_namespaces_of_its_own():
    assert "OSError" in run("import socket; socket.create_connection(('127.0.0.1', 22), 1)").reason
    assert run("import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))").stdout == "-1\n"           # a user namespace
    assert run("import os; print(os.path.exists('/proc/1'), os.path.exists('/home'))").stdout == "False False\n"


HOSTILE = ["import os\nwhile True: os.fork()", "import os; os._exit(0)", "bytearray(10**11)", "print('x' * 10**7)",
           "import os, time\nfor _ in range(3):\n  if os.fork() == 0:\n    os.setsid(); time.sleep(60)",
           "import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nif os.fork() == 0:\n  while True: pass",
           "import os\nwhile True:\n  try: os.kill(-1, 9)\n  except OSError: pass",
           "import threading\nwhile True: threading.Thread(target=lambda: None).start()",
           "import sys; sys.setrecursionlimit(10**9)\n"
           "def f(): f()\nf()", "import os\nos.close(1); os.close(2)\nwhile True: pass"]


@pytest.mark.parametrize("program", HOSTILE[5:])
def test_hostile_programs_end(program):
    began = time.monotonic()
    run(program, limits=Limits(seconds=0.3))
    assert time.monotonic() - began < 30
    assert gone()


@pytest.mark.slow
def test_a_hundred_hostile_programs_leave_no_process():
    for n in range(100):
        run(HOSTILE[n % len(HOSTILE)], limits=Limits(seconds=0.5))
    assert gone()


# --------------------------------------------------------------------------------------------------------------- tests
TESTS = ["assert f(1) == 2", "assert f(3) == 4", "assert f(-1) in [0] and f(0) != f(1)"]
CHEATS = {
    "leaves before the tests": "import os; os._exit(0)",
    "leaves in a test": "import os\ndef f(x): os._exit(0)",
    "leaves politely": "import sys\ndef f(x): sys.exit(0)",
    "raises SystemExit at once": "raise SystemExit(0)",
    "an == that agrees": "class A:\n  __eq__ = __ne__ = lambda s, o: True\n  __hash__ = object.__hash__\ndef f(x): return A()",
    "an int whose == agrees": "class A(int):\n  __eq__ = __ne__ = lambda s, o: True\ndef f(x): return A(7)",
    "a list whose == agrees": "class A(list):\n  __eq__ = __ne__ = lambda s, o: True\ndef f(x): return A()",
    "prints the verdict": "print('\"\"\\n' * 9, flush=True)\ndef f(x): print('\"\"'); print('\"ready\"')",
    "writes it to every descriptor": "import os\nfor n in range(3, 200):\n  try: os.write(n, b'\"ready\"\\n\"\"\\n\"\"\\n')\n"
                                     "  except OSError: pass\ndef f(x): return 0",
    "answers nonsense": "import os\ndef f(x):\n  os.write(4, b'{\"value\": {\"handle\": [1]}}\\n[]\\nx\\n')",
    "answers without end": "import os\ndef f(x):\n  while True: os.write(4, b'[' * 65536)",
    "patches builtins": "import builtins as b\nb.AssertionError = StopIteration\nb.all = lambda *a: True\ndef f(x): return 0",
    "patches its driver": "import sys, json\njson.loads = lambda *a: {}\n"
                          "sys.modules['rewards.jail.program'].encode = lambda *a: True\ndef f(x): return 0",
    "reads the tests": "import os\ntry:\n  text = ''.join(open(n).read() for n in os.listdir())\nexcept OSError:\n  text = ''\n"
                       "def f(x): return {1: 2, -1: 0, 0: 1}[x] if 'f(%d) ==' % 1 in text else None",
    "kills the judge": "import os\ndef f(x):\n  for p in (-1, os.getppid()): os.kill(p, 9)",
    "loops": "def f(x):\n  while True: pass",
    "never starts": "import time; time.sleep(60)",
    "is no Python": "def f(x: return",
    "defines nothing": ""}


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_cheat_passes(cheat):
    verdicts = list(run_tests(CHEATS[cheat], TESTS[:1] + TESTS[2:], limits=Limits(seconds=0.4)))
    assert [v.passed for v in verdicts] == [False, False]
    assert all(v.reason for v in verdicts)


def test_right_and_wrong_programs():
    assert all(v.passed for v in run_tests("def f(x): return x + 1", TESTS))
    assert [v.passed for v in run_tests("def f(x): return 2", TESTS)] == [True, False, False]


def test_exceptions_and_iteration_are_not_what_the_program_says():
    stop = "def f(x): raise StopIteration"
    assert not next(run_tests(stop, ["assert all(map(f, [1, 2]))"])).passed
    raising = "try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    assert False"
    assert next(run_tests("def f(x): raise KeyError(x)", [raising])).passed
    swallow = "try:\n    f(1)\nexcept BaseException:\n    pass"
    assert not next(run_tests("import os\ndef f(x): os._exit(0)", [swallow])).passed


def test_helpers_are_not_taken_from_the_program():
    fake = "class math:\n  isclose = lambda *a, **k: True\ndef close(a, b): return True\ndef f(x): return 0"
    assert not next(run_tests(fake, ["assert math.isclose(f(1), 2)"])).passed
    assert not next(run_tests(fake, ["assert close(f(1), 2)"], setup="def close(a, b): return abs(a - b) < 1")).passed


def test_a_test_after_a_death_still_counts():
    program = "import os\ndef f(x):\n  if x == 1: os._exit(0)\n  return x + 1"
    verdicts = run_tests(program, ["assert f(2) == 3", "assert f(1) == 2", "assert f(3) == 4"])
    assert [v.passed for v in verdicts] == [True, False, True]


@pytest.mark.parametrize("value", ["(1, [2.5, None], {'a': {1, 2}})", "frozenset({1})", "b'a'", "1j", "range(3)", "10**5000",
                                   "'é\\n'", "{(1, 2): [True]}", "-0.0", "float('inf')"])
def test_data_comes_back_as_it_is(value):
    assert next(run_tests(f"def f(): return {value}", [f"assert f() == {value} and type(f()) is type({value})"])).passed


def test_subclasses_iterators_objects_and_functions():
    program = ("import collections\ndef f(): return collections.Counter('aab')\ndef g(): return (x for x in 'ab')\n"
               "class Stack:\n  def __init__(self, *x): self.x = list(x)\n  def pop(self): return self.x.pop()\n"
               "def top(stack): return stack.x[-1]")
    tests = ["assert f() == {'a': 2, 'b': 1}", "assert list(g()) == ['a', 'b']",
             "s = Stack(1, 2)\nassert top(s) == 2 and s.pop() == 2 and s.x == [1]",
             "assert Stack() == Stack()", "f(lambda: 1)"]
    verdicts = list(run_tests(program, tests))
    assert [v.passed for v in verdicts] == [True, True, True, False, False]
    assert "does not travel" in verdicts[-1].reason


def test_a_test_that_asks_nothing_needs_a_program_too():
    assert not next(run_tests("def f(x: return", ["assert True"])).passed
    assert next(run_tests("def sum(a, b): return 6", ["assert sum(10, 15) == 6"], entry_point="sum")).passed


def test_what_is_wrong_with_the_tests_is_an_error():
    for nothing in ("", "def check(candidate):\n    assert candidate(1) == 2"):
        with pytest.raises(ValueError, match="test 1 runs nothing"):
            run_tests("x = 1", [nothing])
    with pytest.raises(ValueError, match="test 2 is no Python"):
        run_tests("x = 1", ["assert x", "assert ("])
    with pytest.raises(ValueError, match="setup of the tests does not run: ModuleNotFoundError"):
        list(run_tests("x = 1", ["assert x"], setup="import no_such_module"))


# --------------------------------------------------------------------------------------------------------- protections
def test_without_protection_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox, "trials", lambda: {"root": "unshare: Operation not permitted", "uid": "Permission denied"})
    with pytest.raises(SandboxError, match="not run here.*unshare: Operation not permitted.*Start as root"):
        run("print(1)")
    assert protections()[0][0] == "missing"


def test_without_namespaces_the_doctor_warns(monkeypatch):
    monkeypatch.setattr(sandbox, "trials", lambda: {"root": "unshare: Operation not permitted", "uid": ""})
    assert protections()[1][0] == "warning" and "network" in protections()[1][1]


@pytest.mark.skipif(os.getuid() != 0 or not Path("/usr/bin/python3").exists(), reason="needs root and a readable interpreter")
def test_the_mode_without_namespaces(monkeypatch):
    monkeypatch.setattr(sandbox, "mode", lambda: "uid")
    monkeypatch.setattr(sandbox, "PYTHON", "/usr/bin/python3")
    before = set(Path("/tmp").glob("box-*"))
    assert run("import os; print(os.getuid() >= 2**30)").stdout == "True\n"
    assert "Permission denied" in run("open('/usr/x', 'w')").reason
    for program in HOSTILE[:1] + HOSTILE[4:7]:
        run(program, limits=Limits(seconds=0.3))
    for _ in range(3):
        assert [v.passed for v in run_tests("def f(x): return x + 1", TESTS[:1] + ["assert f(1) == 1"])] == [True, False]
    assert gone() and set(Path("/tmp").glob("box-*")) <= before
