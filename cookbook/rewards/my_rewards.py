"""Rewards of one's own: a function of a row, and a judge that is any function from messages to text."""
from rewards.judge import PairJudge, verdicts


def politeness(text, *, words=("please", "welcome", "gladly", "thank", "of course")):
    """How many polite words a response has. `text` names what the reward reads, `words` is a setting."""
    return sum(text.lower().count(word) for word in words)


def longer(messages):
    """A judge that prefers what is longer, in place of a language model: it reads a prompt and ends with a verdict."""
    asked = messages[-1]["content"]
    a, b = (asked.split(f"<response_{name}>\n")[1].split(f"\n</response_{name}>")[0] for name in "ab")
    return f"The first has {len(a)} characters, the second {len(b)}. [[{'A' if len(a) > len(b) else 'B'}]]"


judge = PairJudge(verdicts(longer), model={"judge": "longer"})
