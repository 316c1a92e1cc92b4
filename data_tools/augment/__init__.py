"""New groups and rows from old ones. What a rule makes keeps the meta of its source, and with it the source's split.

A rule takes a `group`, a `shard` (a list, for what asks a model: `generate` takes prompts and returns a text for each) or all
`groups`. What it could not make is a copy of the group that says why under "failed" in its meta; the group itself goes on. A
pipeline sets these copies apart and reports them.
"""
from data_tools.augment.choices import inverted, multiple_choice
from data_tools.augment.levels import mapl
from data_tools.augment.questions import paraphrases, reformulated, reformulated_by_template
from data_tools.augment.rows import degrees, random_degrees, rationales
from data_tools.augment.safety import attacks, lookalike_pairs, safety_pairs

__all__ = ["attacks", "degrees", "inverted", "lookalike_pairs", "mapl", "multiple_choice", "paraphrases", "random_degrees",
           "rationales", "reformulated", "reformulated_by_template", "safety_pairs"]
