"""The judge: runs the tests where the program is not. What the program defines is asked for over two pipes, as data.

The program may answer what it likes; it cannot reach the tests, what they expect, or the verdict.
"""
import ast
import builtins
import importlib
import json
import os
import sys

from rewards.jail.wire import decode, encode, send

SWALLOWED = {"StopIteration", "StopAsyncIteration"}          # would end a loop of the test as if all were well
LONGEST = 16 * 2**20                                         # bytes of an answer


class Gone(BaseException):
    """The program is not there any more."""


class Channel:
    def __init__(self):
        self.answer, self.ask = os.fdopen(3, "rb"), os.fdopen(4, "wb", 0)
        self.gone = False

    def __call__(self, **question):
        try:
            send(self.ask, question)
            reply = json.loads(self.answer.readline(LONGEST))
        except (OSError, ValueError):
            self.gone = True
            raise Gone from None
        if "raised" in reply:
            name, text = map(str, reply["raised"])
            kind = vars(builtins).get(name)
            fits = isinstance(kind, type) and issubclass(kind, Exception) and name not in SWALLOWED
            raise (kind if fits and not issubclass(kind, UnicodeError) else RuntimeError)(text)
        return decode(reply["value"], lambda number: Remote(self, number))


class Remote:
    """Something of the program's that is no data: a function, an object. It equals nothing but itself."""

    def __init__(self, channel, number):
        self._channel, self._number = channel, number

    def __call__(self, *arguments, **keywords):
        return self._channel(of=self._number, arguments=encode(arguments, handle), keywords=encode(keywords, handle))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._channel(of=self._number, name=name)


def handle(value):
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a {type(value).__name__} does not travel to the program: only numbers, texts and collections of them do")


def names(tree):
    """What a test reads and does not define; and of that, what it reads attributes of alone, as of a module."""
    read, own, whole, bases = set(), set(vars(builtins)), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else own).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, ast.alias):
            own.add((node.asname or node.name).split(".")[0])
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Name):
                (bases if isinstance(node, ast.Attribute) else whole).add(child.id)
    return read - own, bases - whole


def surroundings(tree, setup, entry_point, channel):
    """What the test can name: the setup's definitions, modules of the standard library, and from the program its entry point
    and whatever is still missing. What comes from the program cannot be trusted, so it comes last."""
    space = {"__name__": "tests"}
    exec(compile(setup, "setup", "exec"), space)
    missing, bases = names(tree)
    missing -= set(space)
    for name in missing & bases & sys.stdlib_module_names - {entry_point}:
        space[name] = importlib.import_module(name)
    for name in sorted(missing - set(space) - {"candidate"} | ({entry_point} if entry_point else set())):
        try:
            space[name] = channel(of=None, name=name)
        except AttributeError:
            raise NameError(f"the program does not define {name}") from None
    if entry_point:
        space["candidate"] = space[entry_point]
    return space


def judge(test, setup, entry_point, channel):
    """'' or why the test fails."""
    tree = ast.parse(test)
    try:
        channel(of=None, name="__name__")                    # a test that asks nothing does not pass without a program
        exec(compile(tree, "test", "exec"), surroundings(tree, setup, entry_point, channel))
    except Gone:
        return "gone"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "gone" if channel.gone else ""                    # a test may have swallowed it


def main():
    sys.set_int_max_str_digits(0)
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)             # what tests print is nobody's verdict
    request, channel = json.load(sys.stdin), Channel()
    exec(compile(request["setup"], "setup", "exec"), {"__name__": "tests"})
    print(json.dumps("ready"), file=verdicts, flush=True)    # from here on failures are the program's
    for test in request["tests"]:
        reason = judge(test, request["setup"], request["entry_point"], channel)
        print(json.dumps(reason), file=verdicts, flush=True)
        if channel.gone:
            break
