"""Values as JSON between the judge and the program. Only data travels: an object with an `==` of its own does not.

Numbers, texts, None and lists are themselves; anything else is {kind: content}. What is no data is given to `keep`, which
returns the number that it is known by.
"""
import collections.abc
import json


def encode(value, keep):
    """Subclasses travel as what they extend: a Counter is a dict on the other side, a named tuple a tuple."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(v, keep) for v in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(v, keep) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, keep), encode(v, keep)] for k, v in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, (collections.abc.Iterator, collections.abc.KeysView, collections.abc.ValuesView,
                          collections.abc.ItemsView)):
        return {"iterator": [encode(v, keep) for v in value]}
    return {"handle": keep(value)}


def decode(data, known):
    if isinstance(data, list):
        return [decode(v, known) for v in data]
    if not isinstance(data, dict):
        return data
    (kind, content), = data.items()
    return MAKERS[kind]([decode(v, known) for v in content] if isinstance(content, list) else content) \
        if kind != "handle" else known(content)


MAKERS = {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict, "bytes": bytes.fromhex, "iterator": iter,
          "complex": lambda parts: complex(*parts), "range": lambda parts: range(*parts)}


def send(stream, message):
    stream.write(json.dumps(message).encode() + b"\n")
