"""Parts: pure functions whose positional parameters name the columns they read.

Keyword-only parameters are hyperparameters, bound in recipes with `functools.partial`. What a recipe needs, the
validation of YAML, the documentation and the tests are derived from these signatures, never declared twice. A part with
parameters is a `PartModule`; a part with memory has `state_dict` and `load_state_dict`. Three kinds, one protocol.
"""
from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from importlib import import_module
from typing import NewType, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from data_tools.columns import nearest

Part = Callable[..., Tensor]

# What a group part returns, read from its return annotation: this decides which terms its reduction weighs.
Pairs = NewType("Pairs", Tensor)                              # (B, K, K), one number for 'i beats j'
Rows = NewType("Rows", Tensor)                                # (B, K)
Lists = NewType("Lists", Tensor)                              # (B,)
Tokens = NewType("Tokens", Tensor)                            # (B, K, T)
KINDS = {"Pairs": Pairs, "Rows": Rows, "Lists": Lists, "Tokens": Tokens}


class PartModule(nn.Module):
    """A part with parameters. `setup` is told the size of the model's states once, before the first call."""

    @abstractmethod
    def setup(self, *, layers: int, width: int) -> None: ...

    def check_setup(self) -> None:
        if next(self.parameters(), None) is None:
            raise RuntimeError(f"{type(self).__name__} has no parameters yet: call module.setup(layers=..., width=...) for each "
                               f"of objective.modules() before the first loss")


@runtime_checkable
class Stateful(Protocol):
    """A part with memory: saved in checkpoints, put back after an evaluation."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> object: ...


def unwrap(part: Part) -> tuple[Callable, dict]:
    """The function that carries the signature, and the hyperparameters bound to it."""
    function, bound = (part.func, part.keywords) if isinstance(part, partial) else (part, {})
    if isinstance(function, nn.Module):
        return function.forward, bound
    return (function if inspect.isroutine(function) else function.__call__), bound


def name(part: Part) -> str:
    function = part.func if isinstance(part, partial) else part
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


@cache
def _parameters(function: Callable) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(function).parameters.values())


def parameters(function: Callable) -> tuple[inspect.Parameter, ...]:
    """The signature's parameters, read once for each function (reading signatures costs more than small tensors do)."""
    return _parameters(function.__func__)[1:] if inspect.ismethod(function) else _parameters(function)


def columns_read(part: Part) -> list[str]:
    """The positional parameters of a part, in order.

    >>> def clip(log_ratio, advantage, *, low=0.2): ...
    >>> columns_read(partial(clip, low=0.1))
    ['log_ratio', 'advantage']
    """
    function, bound = unwrap(part)
    return [p.name for p in parameters(function) if p.kind is not p.KEYWORD_ONLY and p.name not in bound]


def hyperparameters(part: Part) -> dict[str, object]:
    """Keyword-only parameters with the values in force (`inspect.Parameter.empty` where one must be given)."""
    function, bound = unwrap(part)
    return {p.name: bound.get(p.name, p.default) for p in parameters(function) if p.kind is p.KEYWORD_ONLY}


def kind(part: Part) -> str:
    """'Pairs', 'Rows', 'Lists' or 'Tokens', from the return annotation."""
    function, _ = unwrap(part)
    returns = inspect.get_annotations(function).get("return", "")
    returns = returns if isinstance(returns, str) else getattr(returns, "__name__", "")
    if returns not in KINDS:
        raise TypeError(f"part {name(part)!r} must say in its return annotation what it returns: "
                        f"-> Pairs (B, K, K), -> Rows (B, K), -> Lists (B) or -> Tokens (B, K, T)")
    return returns


def bind(part: Part, columns: Mapping[str, Tensor]) -> Tensor:
    """Call `part` with the columns that its positional parameters name.

    `columns` may make columns on demand. A column it does not know is an error that names the part and the nearest name.
    """
    arguments = []
    for column in columns_read(part):
        try:
            arguments.append(columns[column])
        except MissingColumn as missing:
            raise MissingColumn(f"{missing.args[0]}, which {name(part)} needs") from None
        except KeyError:
            raise MissingColumn(f"{name(part)} reads column {column!r}, which is not there"
                                f"{nearest(column, columns)}; columns: {', '.join(sorted(columns))}") from None
    return part(*arguments)


class MissingColumn(KeyError):
    def __str__(self) -> str:
        return self.args[0]


class Columns(Mapping):
    """Columns of a batch, and those that `providers` make from them on first use."""

    def __init__(self, base: Mapping[str, Tensor], providers: Mapping[str, Part]):
        self.base, self.providers, self.made, self.open = base, providers, {}, []

    def __getitem__(self, key: str) -> Tensor:
        if key in self.made:
            return self.made[key]
        if key in self.base:
            return self.base[key]
        if key in self.open:
            raise MissingColumn(f"column {key!r} is made from itself: {' <- '.join([*self.open, key])}")
        if key not in self.providers:
            raise KeyError(key)
        self.open.append(key)
        try:
            self.made[key] = bind(self.providers[key], self)
        finally:
            self.open.pop()
        return self.made[key]

    def __contains__(self, key: object) -> bool:
        return key in self.base or key in self.providers

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self.base), **dict.fromkeys(self.providers)})

    def __len__(self) -> int:
        return len(set(self.base) | set(self.providers))


def needs(parts: Iterable[Part], made: Mapping[str, Part]) -> set[str]:
    """Columns that must come from outside: those read by `parts`, with the columns in `made` followed to their own."""
    out, seen, queue = set(), set(), [c for p in parts for c in columns_read(p)]
    while queue:
        column = queue.pop()
        if column in made and column not in seen:
            queue += columns_read(made[column])
        elif column not in made:
            out.add(column)
        seen.add(column)
    return out


# ------------------------------------------------------------------------------------------------- parts and YAML
def find(spec: str, module: str) -> Part:
    """'hinge' in the slot's module, or 'my.module:function' anywhere that can be imported."""
    if ":" in spec:
        home, attribute = spec.split(":", 1)
        try:
            found = import_module(home)
        except ImportError as error:
            raise ValueError(f"cannot import {home!r} for part {spec!r}: {error}") from None
        if attribute not in vars(found):
            raise ValueError(f"{home} has no {attribute!r}{nearest(attribute, vars(found))}")
        return vars(found)[attribute]
    home = import_module(module)
    if spec not in home.__all__:
        raise ValueError(f"{module} has no part {spec!r}{nearest(spec, home.__all__)}; "
                         f"parts: {', '.join(home.__all__)}")
    return vars(home)[spec]


def from_spec(spec: object, module: str) -> Part | None:
    """A part from YAML: null, a name, or {name: {hyperparameter: value}}. Checked against the signature.

    >>> from_spec({"hinge": {}}, "prefopt.pairwise").__name__
    'hinge'
    """
    if spec is None:
        return None
    if isinstance(spec, Mapping):
        if len(spec) != 1:
            raise ValueError(f"a part is written as 'name' or {{name: {{argument: value}}}}, found {dict(spec)!r}")
        (part_name, arguments), = spec.items()
    else:
        part_name, arguments = spec, None
    if not isinstance(part_name, str):
        raise ValueError(f"the name of a part is a string, found {part_name!r}")
    part = find(part_name, module)
    asked = {p.name: p.default for p in inspect.signature(part).parameters.values()} if inspect.isclass(part) else \
        hyperparameters(part)
    missing = [k for k, v in asked.items() if v is inspect.Parameter.empty and k not in (arguments or {})]
    if missing:
        raise ValueError(f"part {part_name!r} needs {', '.join(missing)}: write {{{part_name}: {{{missing[0]}: ...}}}}")
    if inspect.isclass(part):
        return part(**checked(part_name, part, arguments or {}))
    return partial(part, **checked(part_name, part, arguments)) if arguments else part


def checked(part_name: str, part: Part, arguments: Mapping) -> dict:
    """The arguments, or an error that names the wrong one and the nearest that the signature has."""
    allowed = list(inspect.signature(part).parameters) if inspect.isclass(part) else list(hyperparameters(part))
    for argument, value in arguments.items():
        if argument not in allowed:
            raise ValueError(f"part {part_name!r} has no argument {argument!r}{nearest(argument, allowed)}; "
                             f"arguments: {', '.join(allowed) or 'none'}")
        if isinstance(value, str) and "e" in value.lower() and is_number(value):
            raise ValueError(f"argument {argument!r} of {part_name!r} is the text {value!r}: YAML reads 1e-3 as text, "
                             f"write 1.0e-3")
    return dict(arguments)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def to_spec(part: Part | None) -> object:
    """The inverse of `from_spec`: what to write in YAML. Parts of prefopt by name, others as 'module:name'."""
    if part is None:
        return None
    function = part.func if isinstance(part, partial) else part
    if not inspect.isroutine(function):
        return {_path(type(function)): dict(function.spec())}
    bound = dict(part.keywords) if isinstance(part, partial) else {}
    return {_path(function): bound} if bound else _path(function)


def _path(thing) -> str:
    return thing.__name__ if thing.__module__.startswith("prefopt.") else f"{thing.__module__}:{thing.__name__}"


def finite(what: str, value: Tensor) -> Tensor:
    """value, or an error that says which part made it not finite."""
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(f"{what} is not finite ({int((~torch.isfinite(value)).sum())} of {value.numel()} values)")
    return value
