"""Preference pairs of steps, found by tree search: a stage of a data pipeline.

A node is a response so far. In each round every tree goes down to a leaf (PUCT), the leaf gets children by sampling next steps,
and what the children are worth goes back up. All trees of a shard are searched side by side, so that samplers and rewards see
batches.

    - search: {sampler: {transformers: {model: my/model}}, rewards: [final_answer]}         MCTS-DPO
    - search:                                                  iterative reinforced fine-tuning for tool use
        {sampler: ..., rewards: ['prefopt.rollout.search:call_match'], backup: mean, pairs: {at_every_node: {margin: 0.3}}}
"""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from data_tools.records import Group, Response
from prefopt import parts
from prefopt.rollout.base import noise
from prefopt.rollout.generate import Asked, key

__all__ = ["Node", "Pair", "Search", "along_the_path", "at_every_node", "call_match", "certainty", "gain", "grown", "mean",
           "prior"]


# ------------------------------------------------------------------------------------------------------------- the search
@dataclass(eq=False)
class Node:
    """A response so far.

    state       what `expand` and `evaluate` know it by
    prior       how likely the policy finds the step, p
    value       v, the outcome of completions, or another estimate
    q           what a search has found it worth; `further`, V, is what its children add
    """
    state: object
    prior: float = 1.0
    ended: bool = False
    depth: int = 0
    value: float = 0.0
    q: float = 0.0
    further: float = 0.0
    visits: int = 0
    children: list[Node] = field(default_factory=list)


Backup = Callable[[list[Node], list[Node]], None]             # the path from the root to a leaf, the leaf's new children


def grown(roots: Sequence[Node], expand: Callable[[list[Node]], list[list[Node]]],
          evaluate: Callable[[list[Node]], Sequence[float]], *, backup: Backup, iterations: int = 64, depth: int = 3,
          explore: float = 1.0) -> None:
    """Search all trees for so many rounds.

    argmax_c Q_c + explore p_c sqrt(N) / (1 + N_c)

    expand      leaves -> the children of each; equal ones should be one
    evaluate    nodes -> values
    depth       steps of the deepest node
    """
    for root, value in zip(roots, evaluate(list(roots)), strict=True):
        root.value = value
    for _ in range(iterations):
        paths = [descent(root, explore) for root in roots]
        leaves = [path[-1] for path in paths if not path[-1].ended and path[-1].depth < depth]
        for leaf, children in zip(leaves, expand(leaves) if leaves else [], strict=True):
            leaf.children = [replace(child, depth=leaf.depth + 1) for child in children]
            leaf.ended = not children
        new = [child for leaf in leaves for child in leaf.children]
        for child, value in zip(new, evaluate(new) if new else [], strict=True):
            child.value = value
        for path in paths:
            backup(path, path[-1].children)                   # a leaf had none before


def descent(root: Node, explore: float) -> list[Node]:
    """From the root to a leaf, by PUCT."""
    path = [root]
    while path[-1].children:
        scale = explore * math.sqrt(path[-1].visits)
        path.append(max(path[-1].children, key=lambda c: c.q + scale * c.prior / (1 + c.visits)))
    return path


def gain(path: list[Node], new: list[Node], *, gamma: float = 1.0) -> None:
    """What a step adds, and what the best of its successors add to that.

    Q_c = v_c - v_parent + gamma V_c,   V = sum_c max(1, N_c) Q_c / sum_c max(1, N_c),   N += 1 along the path

    gamma       1: Q is the mean value of the leaves below, less the parent's
    Edge        no children: V = 0
    Relations   all visits 0: V is the mean of Q
    Departs     the released code counts the root twice in each round
    Reference   Xie et al., arXiv:2405.00451; YuxiXie/MCTS-DPO mcts.py
    """
    for child in new:
        child.q = path[-1].further + child.value - path[-1].value
    for place in range(len(path) - 1, -1, -1):
        node = path[place]
        if node.children:
            weights = [max(1, c.visits) for c in node.children]
            node.further = sum(w * c.q for w, c in zip(weights, node.children, strict=True)) / sum(weights)
        if place:
            node.q = node.value - path[place - 1].value + gamma * node.further
        node.visits += 1


def mean(path: list[Node], new: list[Node]) -> None:
    """The mean outcome of all that was simulated below: Q = sum of outcomes / N. An ended leaf has its outcome again.

    Reference   common practice of UCT; reconstructed for arXiv:2501.09766
    """
    outcomes = [child.value for child in new] or [path[-1].value]
    for child in new:
        child.q, child.visits = child.value, 1
    for node in path:
        node.q = (node.q * node.visits + sum(outcomes)) / (node.visits + len(outcomes))
        node.visits += len(outcomes)


def prior(logp: Sequence[float]) -> float:
    """p = exp(sum logp / n^1.25), less unfair to long steps than the probability itself.

    >>> prior([]), prior([-2.0])
    (1.0, 0.1353352832366127)
    """
    return math.exp(sum(logp) / max(1, len(logp)) ** 1.25)


# ------------------------------------------------------------------------------------------------------------- its pairs
class Pair(NamedTuple):
    """`sure` is P(better preferred to worse)."""
    parent: Node
    better: Node
    worse: Node
    sure: float


def along_the_path(root: Node) -> Iterator[Pair]:
    """At each depth of the most visited path its next node over the least visited sibling, as sure as their visits say. Q breaks
    ties; siblings that are equal in both make no pair.

    Departs     one search from the first step, where the published one searches again at each step of the path
    Reference   Xie et al., arXiv:2405.00451
    """
    node = root
    while node.children:
        ranked = sorted(node.children, key=lambda c: (c.visits, c.q))
        worse, better = ranked[0], ranked[-1]
        if (better.visits, better.q) > (worse.visits, worse.q):
            yield Pair(node, better, worse, certainty(better.visits, worse.visits))
        node = better


def at_every_node(root: Node, *, margin: float = 0.2, visits: int = 2) -> Iterator[Pair]:
    """Wherever the best and the worst child by Q are `margin` apart, of those that were seen `visits` times.

    margin, visits   0.2, 2
    Edge             children of equal Q: no pair
    Reference        arXiv:2501.09766, reconstructed from its abstract
    """
    seen = [c for c in root.children if c.visits >= visits]
    if seen:
        worse, better = min(seen, key=lambda c: c.q), max(seen, key=lambda c: c.q)
        if better.q > worse.q and better.q - worse.q >= margin:
            yield Pair(root, better, worse, 1.0)
    for child in root.children:
        yield from at_every_node(child, margin=margin, visits=visits)


def certainty(better: int, worse: int) -> float:
    """P(better preferred) by visits: 1 - a, a = min(1 - c, 1/2), c = 1 / (1 + N_worse / max(1, N_better)).

    Edge        the worse one never visited: 1, plain DPO; as often: 1/2, no preference

    >>> certainty(3, 1), certainty(5, 0), certainty(2, 4)
    (0.75, 1.0, 0.5)
    """
    return 1 - min(1 - 1 / (1 + worse / max(1, better)), 0.5)


# --------------------------------------------------------------------------------------------------------------- the stage
class Search:
    """Pairs of steps. The two responses of a pair share their steps so far, which do not train.

    sampler     of tokens: {transformers: {model: ...}} or {vllm: {model: ...}}
    rewards     of whole responses, as in the stage `score`; the outcome is their sum
    backup      `gain` (MCTS-DPO) or `mean`
    pairs       `along_the_path` (MCTS-DPO), which makes soft wins, or `at_every_node` (iterative reinforced fine-tuning)
    iterations  rounds of search for each prompt
    branch      steps that are sampled at a node; equal ones are one
    depth       steps of a response at most
    step        tokens of a step at most
    ends        strings that end a step
    longest     tokens of a response at most
    temperature of steps, and of the completions that are scored
    explore     weight of the prior in the search
    """

    def __init__(self, *, sampler: Mapping, rewards: object, backup: str | Mapping = "gain",
                 pairs: str | Mapping = "along_the_path", iterations: int = 64, branch: int = 2, depth: int = 3, step: int = 128,
                 ends: Sequence[str] = ("\n",), longest: int = 512, temperature: float = 1.0, explore: float = 1.0,
                 seed: int = 0):
        policy = {"sampler": sampler, "temperature": temperature, "max_new_tokens": longest, "tokens": True}
        self.asked = Asked("search", policy, seed)
        self.backup, self.pairs = (parts.from_spec(spec, __name__) for spec in (backup, pairs))
        self.rewards, self.iterations, self.branch, self.depth, self.step = rewards, iterations, branch, depth, step
        self.ends, self.longest, self.temperature, self.explore, self.seed = tuple(ends), longest, temperature, explore, seed
        self.score = None

    def identity(self) -> dict:
        return self.asked.identity() | parts.find("rewards.stage:Score", "")(rewards=self.rewards).identity()

    def __call__(self, shard: list[Group]) -> list[Group]:
        self.score = self.score or parts.find("rewards.online:Scorer", "")(self.rewards)
        roots = [Node((group, Response("", tokens=[], logp=[]))) for group in shard]
        grown(roots, self.expand, self.evaluate, backup=self.backup, iterations=self.iterations, depth=self.depth,
              explore=self.explore)
        return [self.paired(*pair) for root in roots for pair in self.pairs(root)]

    def continued(self, nodes: Sequence[Node], n: int, limits: Sequence[int], what: str, **more) -> list[list[Response]]:
        """n continuations of each node. Their noise has the name of the prompt and of the steps so far."""
        states = [node.state for node in nodes]
        keys = [noise(what, key(group), *response.tokens) for group, response in states]
        found = self.asked.sampler([group.prompt for group, _ in states], n=n, prefixes=[r.tokens for _, r in states],
                                   keys=keys, max_new_tokens=limits, temperature=self.temperature, seed=self.seed, **more)
        return [group.responses for group in found]

    def room(self, node: Node) -> int:
        return self.longest - len(node.state[1].tokens)

    def expand(self, leaves: list[Node]) -> list[list[Node]]:
        """The next steps of each."""
        limits, out = [min(self.step, self.room(leaf)) for leaf in leaves], []
        for leaf, responses in zip(leaves, self.continued(leaves, self.branch, limits, "step", stop=self.ends), strict=True):
            group, before = leaf.state
            steps = {tuple(r.tokens): r for r in responses}
            out.append([Node((group, r), prior(r.logp[len(before.tokens):]),
                             r.meta["stopped"] == "eos" or len(r.tokens) >= self.longest) for r in steps.values()])
        return out

    def evaluate(self, nodes: list[Node]) -> list[float]:
        """The outcome of one completion of each."""
        whole = [node.state[1] for node in nodes]
        going = [i for i, node in enumerate(nodes) if not node.ended]
        if going:
            some = [nodes[i] for i in going]
            for i, (response,) in zip(going, self.continued(some, 1, [self.room(n) for n in some], "rest"), strict=True):
                whole[i] = response
        scored = self.score([replace(group, responses=[replace(r, scores={}, meta=dict(r.meta))], meta=dict(group.meta))
                             for (group, _), r in zip((node.state for node in nodes), whole, strict=True)])
        return [group.responses[0].scores["reward"] for group in scored]

    def paired(self, parent: Node, better: Node, worse: Node, sure: float) -> Group:
        group, before = parent.state
        rows = [self.asked.noted(replace(c.state[1], scores={"q": c.q, "visits": float(c.visits)}), self.temperature, None)
                for c in (better, worse)]
        return replace(group, responses=rows, relevance=None, wins=[[0.5, sure], [1 - sure, 0.5]],
                       meta={**group.meta, "depth": parent.depth, "shared_tokens": len(before.tokens)})

    def close(self) -> None:
        self.asked.close()
        if self.score is not None:
            self.score.close()


def call_match(text, reference) -> float:
    """A reward of the last tool call of a text, a JSON object {"name", "arguments"}: 1 for the reference's name and arguments,
    1/2 for its name alone, else 0. Arguments are compared as JSON values, whatever the order of their keys.

    reference   such an object, as JSON or in text

    >>> call_match('Call {"arguments": {"b": 2, "a": 1.0}, "name": "add"}', {"name": "add", "arguments": {"a": 1, "b": 2}})
    1.0
    >>> call_match('{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {"a": 1}}'), call_match("-", {"name": "add"})
    (0.5, 0.0)
    """
    wanted = reference if isinstance(reference, Mapping) else last_call(reference)
    if not wanted or "name" not in wanted:
        raise ValueError(f"the reference {str(reference)[:60]!r} is no tool call: write {{'name': ..., 'arguments': {{...}}}}")
    made = last_call(text)
    if not made or made["name"] != wanted["name"]:
        return 0.0
    return 1.0 if made.get("arguments", {}) == wanted.get("arguments", {}) else 0.5


def last_call(text: str) -> dict | None:
    """The last JSON object with a name in a text."""
    decoder, last, at = json.JSONDecoder(), None, text.find("{")
    while at >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            at += 1
        else:
            last = value if "name" in value else last
        at = text.find("{", at)
    return last
