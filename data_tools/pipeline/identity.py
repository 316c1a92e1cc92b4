"""What decides the output of a stage, as digests: settings, code, and the content of files and folders that settings name."""
from __future__ import annotations

import ast
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from glob import glob, has_magic
from hashlib import blake2b, file_digest
from importlib import import_module
from importlib.util import find_spec, resolve_name
from pathlib import Path


def digest(*things) -> str:
    """Thirty-two hexadecimal digits of anything that JSON holds."""
    said = json.dumps(things, sort_keys=True, ensure_ascii=True, default=str)
    return blake2b(said.encode(), digest_size=16).hexdigest()


@cache
def parsed(module: str) -> tuple[str, frozenset[str]]:
    """The digest of a module's code without comments, docstrings and layout, so that words about it change nothing; and the
    modules of its own package that it imports."""
    found = import_module(module)
    tree = ast.parse(Path(inspect.getsourcefile(found)).read_bytes())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = resolve_name("." * node.level + (node.module or ""), found.__package__)
            names |= {home, *(f"{home}.{alias.name}" for alias in node.names)}
    own = frozenset(n for n in names if n.partition(".")[0] == module.partition(".")[0] and n != module and is_module(n))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:]
    return digest(ast.dump(tree)), own


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:                               # a name in a module
        return False


def code(module: str) -> str:
    """The digest of a module's code."""
    return parsed(module)[0]


def imported(module: str) -> str:
    """The digest of the code of a module, and of all of its own package that it needs."""
    known, new = set(), {module}
    while new:
        known |= new
        new = {name for one in new for name in parsed(one)[1]} - known
    return digest({name: code(name) for name in sorted(known)})


def content(source: str) -> str:
    """The digest of a file, of all files of a folder with their names, or of those that fit a pattern."""
    if has_magic(source):
        found = [Path(p) for p in glob(source, recursive=True)]
    else:
        found = [Path(source)] if Path(source).is_file() else list(Path(source).rglob("*"))
    held = []
    for path in sorted(p for p in found if p.is_file()):
        with open(path, "rb") as file:
            held.append((os.path.relpath(path, source), file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()))
    return digest(held)


def texts(settings) -> Iterator[str]:
    """All texts in settings, however deep."""
    if isinstance(settings, str):
        yield settings
    elif isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from texts(key)
            yield from texts(value)
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            yield from texts(value)


def named(settings) -> dict[str, str]:
    """What settings name beyond themselves: files and folders (with a / in their names, or of a model) with their content,
    `module:name` with the module's code."""
    found = {}
    for text in sorted(set(texts(settings))):
        module, _, attribute = text.partition(":")
        if os.path.isfile(text) or os.path.isdir(text) and (os.sep in text and Path(text).name not in ("", "..") or model(text)):
            found[text] = content(text)
        elif attribute.isidentifier() and module.replace(".", "").isidentifier():
            with suppress(ImportError, OSError, TypeError):   # words with a colon between them
                found[text] = code(module)
    return found


def model(folder: str) -> bool:
    """Whether it holds a model, as a folder of weights or of a run."""
    return any(Path(folder, *inside, name).exists() for inside in ((), ("model",))
               for name in ("config.json", "adapter_config.json"))


def identity(function: Callable, settings: Mapping) -> dict:
    """Everything that decides what a stage makes of its input, as JSON. A class with `identity()` says itself what else does: it
    asks models, and an answer is not worth less because something around the asking changed."""
    asks = hasattr(function, "identity")
    return {"settings": dict(settings), "code": (code if asks else imported)(function.__module__), "named": named(settings),
            "own": function(**settings).identity() if asks else {}}
