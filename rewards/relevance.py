"""Regularised relevance reward (R3): relevance to the query or to a reference, times a length incentive, times a factor
against repetition. No preference data and no reward model, only a text encoder.

An encoder is any callable that turns N texts into an (N, D) matrix, dense or sparse, and has `settings()`.
"""
from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence

import numpy as np

from data_tools.columns import nearest
from data_tools.fields import shorten
from rewards.base import MissingField, Row, ScoringError, final_text, rows_of, user_text

__all__ = ["R3", "Dense", "Tfidf", "clean", "constrained", "length_incentive", "linear", "open_ended", "relevance",
           "repetition", "tokens"]

STOPS = ("\n\n\n\n", "\n\n--", "\n\n____")
TYPES = ("OPENENDED", "CONSTRAINED")


# -------------------------------------------------------------------------------------------------------- pure functions
def clean(text: str, *, roles: Sequence[str] = ("Human:", "Assistant:")) -> str:
    r"""The text up to the first role prefix, run of four line breaks, or ruler, without blanks at its ends.

    roles       prefixes of the chat template that a model may run on into

    >>> clean(" Yes.\n\n--\nno ")
    'Yes.'
    """
    cut = re.split("|".join(map(re.escape, (*roles, *STOPS))), text.strip("\n "), maxsplit=1)[0]
    return cut.strip("\n ")


def tokens(text: str) -> list[str]:
    r"""Words and runs of punctuation: \w+|[^\w\s]+.

    >>> tokens("Well... it's 3.5")
    ['Well', '...', 'it', "'", 's', '3', '.', '5']
    """
    return re.findall(r"\w+|[^\w\s]+", text)


def length_incentive(words: Sequence[str]) -> float:
    """LI = tokens / 100.

    >>> length_incentive("a b c a b c a b c".split())
    0.09
    """
    return len(words) / 100


def repetition(words: Sequence[str]) -> float:
    """RP = distinct trigrams / trigrams, overlapping and case-sensitive.

    Edge        fewer than three tokens: 1
    Relations   a text written twice has about half the factor and twice the length incentive

    >>> repetition("a b c a b c a b c".split()) == 3 / 7
    True
    """
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def relevance(left, right) -> np.ndarray:
    """REL = <E(a), E(b)> of each row of two matrices, unnormalised.

    >>> relevance(np.array([[1., 2.]]), np.array([[3., 1.]])).tolist()
    [5.0]
    """
    product = left.multiply(right) if hasattr(left, "multiply") else left * right
    return np.asarray(product.sum(axis=1), dtype=float).ravel()


def linear(value: float, *, span: float = 3.5, top: int = 512) -> float:
    """lin(v) = (v / span) (top / 100): maps [0, span] to [0, top / 100] and goes on linearly beyond.

    span        the relevance that counts as full: 3.5 for the unnormalised Contriever, 1 for an encoder of unit vectors
    top         the longest response in tokens; 512

    >>> linear(3.5)
    5.12
    """
    return value / span * (top / 100)


def open_ended(length: float, rel: float, factor: float) -> float:
    """R = LI REL RP, with the relevance of the response to the query.

    Edge        an empty response has LI = 0, hence R = 0; negative relevance is a negative reward, which repetition shrinks
    """
    return length * rel * factor


def constrained(rel: float, factor: float, *, span: float = 3.5, top: int = 512) -> float:
    """R = lin(REL) RP, with the relevance of the response to the reference: no length incentive.

    >>> constrained(3.5, 0.5)
    2.56
    """
    return linear(rel, span=span, top=top) * factor


# -------------------------------------------------------------------------------------------------------------- encoders
class Tfidf:
    """TF-IDF vectors (scikit-learn) fitted on a corpus: the encoder that needs no model.

    Rows have length 1 and no negative entries, so relevance lies in [0, 1]: `span` is 1. A text without any known word is
    the zero vector.

    corpus      the texts to fit on, or a file of groups, whose prompts and responses are taken
    """
    span = 1.0

    def __init__(self, corpus: Sequence[str] | str, *, sublinear: bool = True, min_df: int = 1):
        from sklearn.feature_extraction.text import TfidfVectorizer
        texts = of_file(corpus) if isinstance(corpus, str) else list(corpus)
        self.vectorizer = TfidfVectorizer(sublinear_tf=sublinear, min_df=min_df)
        try:
            self.vectorizer.fit(texts)
        except ValueError as error:
            raise ValueError(f"cannot fit TF-IDF on the corpus of {len(texts)} texts: {error}. Give texts with words, or a "
                             f"lower min_df than {min_df}") from None

    def settings(self) -> dict:
        learned = json.dumps([sorted(self.vectorizer.vocabulary_), self.vectorizer.idf_.tolist(),
                              self.vectorizer.sublinear_tf])
        return {"encoder": "tfidf", "fingerprint": hashlib.sha256(learned.encode()).hexdigest()[:16]}

    def __call__(self, texts: Sequence[str]):
        return self.vectorizer.transform(texts)


def of_file(path: str) -> list[str]:
    """Prompts and responses of a file of groups."""
    from data_tools.formats import load
    groups = list(load(path))
    return [user_text(g.prompt) for g in groups] + [final_text(row.response.text) for row in rows_of(groups)]


class Dense:
    """A sentence-transformers model (an optional package). Unit vectors unless `normalise=False`; then say the span of
    relevance yourself (3.5 for Contriever)."""

    def __init__(self, model: str, *, normalise: bool = True, device: str | None = None, batch: int = 32):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ImportError(f"the encoder {model!r} needs the package sentence-transformers (pip install "
                              "sentence-transformers); without it, use rewards.relevance.Tfidf") from None
        self.model, self.name, self.normalise, self.batch = SentenceTransformer(model, device=device), model, normalise, batch
        for module in self.model:                             # as the paper does: what came last matters most
            if getattr(module, "tokenizer", None) is not None:
                module.tokenizer.truncation_side = "left"
        self.span = 1.0 if normalise else None

    def settings(self) -> dict:
        return {"encoder": self.name, "normalise": self.normalise}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.encode(list(texts), normalize_embeddings=self.normalise, batch_size=self.batch)


# ---------------------------------------------------------------------------------------------------------------- reward
class R3:
    """Regularised relevance as a reward of many rows.

    R = LI REL(query) RP if the row's `query_type` is OPENENDED, lin(REL(reference)) RP if it is CONSTRAINED

    encoder     texts -> matrix; or `corpus`, on which a `Tfidf` is fitted; or `model`, the name of a `Dense`
    span        the relevance that counts as full; that of the encoder (1 for unit vectors)
    top         512
    by_relevance, by_length, by_repetition   off: the factor is 1. Without relevance every row takes the open-ended form
    branching   off: every row takes the open-ended form with its query, and needs no `query_type`

    Edge        an empty response: 0 where open-ended; RP 1 and the relevance of the empty text where constrained
    Relations   a product, so each factor alone can be hacked and their product much less
    Departs     the paper's encoder is Contriever, unnormalised, span 3.5; the query here is the last user turn
    Reference   Kim & Seo, arXiv:2402.03469; naver-ai/rethinking-proxy-reward

    >>> from data_tools.records import Group, Response
    >>> group = Group("red fox", [Response("red fox")], meta={"query_type": "OPENENDED"})
    >>> round(R3(corpus=["red fox", "blue sky"])(rows_of([group]))[0], 12)              # LI 0.02, REL 1, RP 1
    0.02
    """
    name = "r3"

    def __init__(self, encoder: Callable | None = None, *, corpus: Sequence[str] | str | None = None, model: str | None = None,
                 span: float | None = None, top: int = 512, by_relevance: bool = True, by_length: bool = True,
                 by_repetition: bool = True, branching: bool = True, roles: Sequence[str] = ("Human:", "Assistant:")):
        if by_relevance and sum(x is not None for x in (encoder, corpus, model)) != 1:
            raise ValueError("r3 compares texts through one encoder: give corpus= (texts or a file of groups to fit TF-IDF on), "
                             "or model= (a sentence-transformers model), or encoder= (a callable, texts -> matrix)")
        if by_relevance and encoder is None:
            encoder = Tfidf(corpus) if corpus is not None else Dense(model, normalise=span is None)
        span = span or getattr(encoder, "span", None) or (None if by_relevance and branching else 1.0)
        if span is None:
            raise ValueError("r3 needs span=, the relevance that counts as full: 1 for unit vectors, 3.5 for Contriever")
        self.encoder, self.span, self.top, self.roles = encoder, span, top, tuple(roles)
        self.by_relevance, self.by_length, self.by_repetition, self.branching = by_relevance, by_length, by_repetition, branching

    def settings(self) -> dict:
        own = {k: v for k, v in vars(self).items() if k != "encoder"}
        return {**own, "roles": list(self.roles), **(self.encoder.settings() if self.by_relevance else {})}

    def reads(self) -> list[str]:
        return ["prompt", "text", "query_type", "reference"]

    def __call__(self, rows: Sequence[Row]) -> list[float | ScoringError]:
        factors = self.factors(rows)
        return [f if isinstance(f, ScoringError) else f["reward"] for f in factors]

    def factors(self, rows: Sequence[Row]) -> list[dict | ScoringError]:
        """LI, RP, REL and the reward of each row, to be looked at."""
        kinds = [self.kind(row) for row in rows]
        against = ["" if isinstance(kind, ScoringError) else row.fields()["reference"] if kind == "CONSTRAINED" else row.prompt
                   for row, kind in zip(rows, kinds, strict=True)]
        rel = relevance(self.encoder(against), self.encoder([r.text for r in rows])) if self.by_relevance and rows \
            else np.ones(len(rows))
        return [kind if isinstance(kind, ScoringError) else self.one(row.text, kind, float(value))
                for row, kind, value in zip(rows, kinds, rel, strict=True)]

    def kind(self, row: Row) -> str | ScoringError:
        """Which form the row takes, or why it has none."""
        if not (self.branching and self.by_relevance):
            return "OPENENDED"
        fields = row.fields()
        found = fields.get("query_type")
        if found not in TYPES:
            return MissingField(f"r3 reads the field 'query_type', {' or '.join(TYPES)}, found {shorten(found)}"
                                f"{nearest(str(found), TYPES)}; label the rows, or set branching=False")
        if found == "CONSTRAINED" and not isinstance(fields.get("reference"), str):
            return MissingField(f"r3 reads the field 'reference' of a CONSTRAINED row, a text, found "
                                f"{shorten(fields.get('reference'))}")
        return found

    def one(self, text: str, kind: str, rel: float) -> dict:
        words = tokens(clean(text, roles=self.roles))
        length, factor = length_incentive(words), repetition(words)
        used = factor if self.by_repetition else 1.0
        reward = constrained(rel, used, span=self.span, top=self.top) if kind == "CONSTRAINED" else \
            open_ended(length if self.by_length else 1.0, rel, used)
        return {"length": length, "repetition": factor, "relevance": rel, "reward": reward}
