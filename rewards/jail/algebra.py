"""Asks math-verify, one line of JSON [reference, answer] at a time: in a process of its own, which can be killed."""
import json
import sys


def equal(*sides):
    from math_verify import parse, verify
    wanted, answer = (parse(f"${side}$", parsing_timeout=None) for side in sides)
    return bool(wanted and answer and verify(wanted, answer, timeout_seconds=None))


if __name__ == "__main__":
    equal("1", "1")
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(equal(*json.loads(line))), flush=True)
