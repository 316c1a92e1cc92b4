"""Persona faithfulness: the active-passive-constraint score (APC) of a response, given what is true of a character.

A statement of the persona that the query is about should be entailed by the response, any other should not be
contradicted. Both judgements come from models that are passed in.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

from data_tools.fields import shorten
from rewards.base import MissingField, Row, ScoringError

__all__ = ["APC", "PairClassifier", "apc", "delta_apc", "satisfied"]

Pairs = Sequence[tuple[str, str]]


def satisfied(relevant: float, entailed: float, contradicted: float) -> float:
    """How well one statement is kept: g e + (1 - g)(1 - c).

    >>> satisfied(0.5, 0.6, 0.2)
    0.7
    """
    return relevant * entailed + (1 - relevant) * (1 - contradicted)


def apc(relevant: Sequence[float], entailed: Sequence[float], contradicted: Sequence[float]) -> float:
    """Active-passive-constraint score: the expected number of statements that are kept.

    APC = sum_i g_i e_i + (1 - g_i)(1 - c_i)

    Edge        no statements: 0
    Relations   in [0, n]; `data_tools.labels.apart(scores, margin=0.2)` makes the paper's preference pairs
    Reference   Peng & Shang, arXiv:2405.07726

    >>> apc([1.0, 0.0], [0.9, 0.1], [0.0, 0.3])
    1.6
    """
    return sum((satisfied(*one) for one in zip(relevant, entailed, contradicted, strict=True)), 0.0)


def delta_apc(relevant: Sequence[float], entailed: Sequence[float], contradicted: Sequence[float]) -> float:
    """APC less that of a response about nothing (all neutral), for personas of different size.

    dAPC = APC - sum_i (1 - g_i) = sum_i g_i e_i - (1 - g_i) c_i

    Edge        all neutral, or no statements: 0
    Relations   in [-n, n]; for one query it ranks responses as `apc` does
    Reference   Peng & Shang, arXiv:2405.07726

    >>> round(delta_apc([0.5], [0.6], [0.2]), 12)
    0.2
    """
    return sum((g * e - (1 - g) * c for g, e, c in zip(relevant, entailed, contradicted, strict=True)), 0.0)


class APC:
    """Persona faithfulness as a reward. A row's field `statements` lists what is true of the character.

    entailment  pairs (statement, response) -> (contradicted, neutral, entailed) each; sums to 1
    relevance   pairs (statement, query) -> P(the query is about the statement) each
    delta       `delta_apc` (on), or `apc`

    Both models see all pairs of all rows at once; a name instead of a model loads a `PairClassifier`.

    Edge        no statements: 0; a row without the field is an error
    Departs     the authors' discriminators also read the character's name, and the query beside the response
    Reference   Peng & Shang, arXiv:2405.07726
    """
    name = "apc"

    def __init__(self, entailment: Callable[[Pairs], Sequence] | str, relevance: Callable[[Pairs], Sequence] | str, *,
                 delta: bool = True):
        self.entailment = PairClassifier(entailment, ("contradict", "neutral", "entail")) if isinstance(entailment, str) \
            else entailment
        self.relevance = PairClassifier(relevance, ("yes",)) if isinstance(relevance, str) else relevance
        self.by = delta_apc if delta else apc

    def settings(self) -> dict:
        return {"by": self.by.__name__, **{k: getattr(m, "name", getattr(m, "__qualname__", type(m).__qualname__))
                                           for k, m in (("entailment", self.entailment), ("relevance", self.relevance))}}

    def reads(self) -> list[str]:
        return ["prompt", "text", "statements"]

    def __call__(self, rows: Sequence[Row]) -> list[float | ScoringError]:
        found = [statements_of(row) for row in rows]
        pairs = [(row, s) for row, statements in zip(rows, found, strict=True)
                 if not isinstance(statements, ScoringError) for s in statements]
        relevant = [float(only(p)) for p in self.relevance([(s, row.prompt) for row, s in pairs])] if pairs else []
        judged = [probabilities(p) for p in self.entailment([(s, row.text) for row, s in pairs])] if pairs else []
        terms = iter(list(zip(relevant, judged, strict=True)))
        return [s if isinstance(s, ScoringError) else self.total([next(terms) for _ in s]) for s in found]

    def total(self, terms: list) -> float:
        return self.by([g for g, _ in terms], [p[2] for _, p in terms], [p[0] for _, p in terms])


def statements_of(row: Row) -> list[str] | MissingField:
    found = row.fields().get("statements")
    if isinstance(found, list) and all(isinstance(s, str) for s in found):
        return found
    return MissingField(f"apc reads the field 'statements', a list of texts, found {shorten(found)}")


def only(value) -> float:
    return value if isinstance(value, (int, float)) else value[-1]


def probabilities(triple) -> tuple[float, float, float]:
    contradicted, neutral, entailed = (float(p) for p in triple)
    if min(contradicted, neutral, entailed) < 0 or abs(contradicted + neutral + entailed - 1) > 1e-3:
        raise ScoringError(f"an entailment model returns (contradicted, neutral, entailed), probabilities that sum to 1; "
                           f"found {shorten(triple)}")
    return contradicted, neutral, entailed


class PairClassifier:
    """A transformers sequence classifier of text pairs, as probabilities of some of its labels.

    labels      the beginnings of the label names wanted, in order; each must fit exactly one of the model's labels
    """

    def __init__(self, model: str, labels: Sequence[str], *, device: str = "cpu", tokens: int = 8192):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        self.name, self.tokens = model, tokens
        self.model = AutoModelForSequenceClassification.from_pretrained(model).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        names = {i: str(name).lower() for i, name in self.model.config.id2label.items()}
        fits = [[i for i, name in names.items() if name.startswith(label)] for label in labels]
        if any(len(f) != 1 for f in fits):
            raise ValueError(f"{model}: its labels {', '.join(names.values())} do not tell which is which of "
                             f"{', '.join(labels)}: name them in id2label of its config.json")
        self.columns = [f[0] for f in fits]

    def __call__(self, pairs: Pairs) -> list[list[float]]:
        import torch

        from rewards.cached import by_length
        encoded = [self.tokenizer(a, b, truncation=True) for a, b in pairs]
        out: list = [None] * len(pairs)
        with torch.no_grad():
            for batch in by_length([len(e["input_ids"]) for e in encoded], self.tokens):
                inputs = self.tokenizer.pad([encoded[i] for i in batch], return_tensors="pt").to(self.model.device)
                found = self.model(**inputs).logits.float().softmax(-1)[:, self.columns].tolist()
                for i, row in zip(batch, found, strict=True):
                    out[i] = row
        return out
