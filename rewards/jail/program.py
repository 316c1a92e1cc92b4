"""The program's side of a test: loads the program and answers what the judge asks. It never sees a test's expectation."""
import json
import os
import sys
import types

from rewards.jail.wire import decode, encode, send


def main():
    sys.set_int_max_str_digits(0)
    ask, answer = os.fdopen(3, "rb"), os.fdopen(4, "wb", 0)
    module = sys.modules["program"] = types.ModuleType("program")
    with open("program.py", encoding="utf-8") as file:
        exec(compile(file.read(), "program.py", "exec"), vars(module))
    known = []

    def keep(value):
        known.append(value)
        return len(known) - 1

    def serve(of, name=None, arguments=None, keywords=None):
        thing = module if of is None else known[of]
        if arguments is not None:
            return thing(*decode(arguments, known.__getitem__), **decode(keywords, known.__getitem__))
        return getattr(thing, name)

    for line in ask:
        try:
            reply = {"value": encode(serve(**json.loads(line)), keep)}
        except Exception as error:
            reply = {"raised": [type(error).__name__, str(error)[:500]]}
        send(answer, reply)
