"""Which prompt a record comes from, and the split that this puts it in."""
from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from hashlib import blake2b

from data_tools.describe import content
from data_tools.fields import PLACE
from data_tools.records import Group, Prompt

PROMPT_ID, SPLIT, COPY = "prompt_id", "split", "copy"         # keys of Group.meta


def normalised(prompt: Prompt) -> str:
    """What a prompt says: without system turns, letter case, forms of the same character, and differences in space.

    >>> normalised([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why\\n Ｎot?"}])
    'why not?'
    """
    said = prompt if isinstance(prompt, str) else content([m for m in prompt if m.get("role") != "system"])
    return " ".join(unicodedata.normalize("NFKC", said).casefold().split())


def prompt_id(prompt: Prompt) -> str:
    """Sixteen hexadecimal digits of what the prompt says."""
    return blake2b(normalised(prompt).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def split_of(name: str, shares: Mapping[str, float]) -> str:
    """The split of a prompt: each of `shares` has that share of all prompts, `train` has the others. Nothing but the prompt
    decides, so that another seed, other data or another build puts it into the same split.

    >>> [split_of(prompt_id(p), {"test": 0.5}) for p in "abcd"]
    ['test', 'train', 'test', 'test']
    """
    place = int(blake2b(f"split {name}".encode(), digest_size=8).hexdigest(), 16) / 2**64
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return "train"


def marked(group: Group, copies: int, split: Mapping[str, float] | str) -> Group:
    """The group with its source prompt and split in meta. A prompt id that is there already stays: it names the source of a
    record that another build made from it.

    copies      equal prompts that came before; told apart, so that they are sampled apart
    split       shares, or the field of the record that names its split
    """
    name = group.meta.get(PROMPT_ID) or prompt_id(group.prompt)
    if isinstance(split, str) and not isinstance(group.meta.get(split), str):
        raise ValueError(f"{group.meta.get(PLACE, 'a record')}: the pipeline takes the split from the field {split!r}, which "
                         f"holds {group.meta.get(split)!r}; fields: {', '.join(group.meta) or 'none'}")
    where = group.meta[split] if isinstance(split, str) else split_of(name, split)
    group.meta |= {PROMPT_ID: name, SPLIT: where} | ({COPY: copies} if copies else {})
    return group
