"""Tools that a model calls in its text: each is a function from text to text.

What a model gets wrong (a name, an argument) goes back to it as an observation and is counted; a service that cannot be reached
ends the run, as in `rewards.base.Unreachable`. `standard()` has those that need neither a corpus nor a service.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from data_tools.columns import nearest

__all__ = ["Observation", "Tool", "ToolError", "Tools", "parse", "standard"]


class ToolError(ValueError):
    """What is wrong with a call, in words for the model."""


@dataclass(frozen=True)
class Observation:
    text: str
    ok: bool = True


@dataclass(frozen=True)
class Tool:
    """A function text -> text, which raises ToolError on an input outside its `grammar`."""
    name: str
    description: str
    grammar: str
    function: Callable[[str], str]


@dataclass
class Tools:
    """Tools by name. `counts` says how many calls went well, were malformed, or named no tool."""
    tools: Iterable[Tool]
    longest: int = 2000                                       # characters of an input and of an observation
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.tools = {tool.name: tool for tool in self.tools}

    def call(self, action: str, text: str) -> Observation:
        """What a tool answers. Whatever the model wrote, this is an observation.

        >>> tools = standard()
        >>> tools.call("calculator", "(1 + 2) * 3").text, tools.call("calculater", "1").text[:58]
        ('9', "There is no tool 'calculater', did you mean 'calculator'? ")
        >>> dict(tools.counts)
        {'ok': 1, 'unknown': 1}
        """
        tool = self.tools.get(action.strip())
        if tool is None:
            self.counts["unknown"] += 1
            return Observation(f"There is no tool {action.strip()[:100]!r}{nearest(action.strip()[:100], self.tools) or '.'} "
                               f"Tools: {', '.join(self.tools)}.", False)
        try:
            if len(text) > self.longest:
                raise ToolError(f"the input has {len(text)} characters, {self.longest} are allowed")
            answer = tool.function(text.strip())
        except ToolError as error:
            self.counts["malformed"] += 1
            return Observation(f"{tool.name} cannot use this input: {error}. It takes {tool.grammar}.", False)
        self.counts["ok"] += 1
        return Observation(answer[:self.longest])

    def describe(self) -> str:
        """For a prompt: a line for each tool."""
        return "\n".join(f"{tool.name}: {tool.description} Input: {tool.grammar}." for tool in self.tools.values())


CALL = re.compile(r"^Action:(.*)\n+Action Input:((?:.*\n?(?!Observation:|Thought:|Action:))*)", re.MULTILINE)


def parse(text: str) -> tuple[str, str] | None:
    """The last call in a trace: the lines 'Action: ...' and 'Action Input: ...'.

    >>> parse("Thought: I add.\\nAction: calculator\\nAction Input: 1 + 2\\n"), parse("Thought: no.\\nFinished.")
    (('calculator', '1 + 2'), None)
    """
    calls = CALL.findall(text)
    return (calls[-1][0].strip(), calls[-1][1].strip()) if calls else None


def standard() -> Tools:
    from rewards.tools import calculator, calendar, python
    return Tools([calculator.TOOL, *calendar.TOOLS, python.TOOL])
