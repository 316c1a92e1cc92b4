"""Search in a local corpus: TF-IDF of scikit-learn over titles and texts."""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from rewards.tools import Tool, ToolError

__all__ = ["Corpus", "search", "wiki_search"]


class Corpus:
    """Documents with a `text` and maybe a `title`: a file of JSON lines, or mappings."""

    def __init__(self, documents: str | Path | Iterable[Mapping]):
        from sklearn.feature_extraction.text import TfidfVectorizer
        self.documents = list(read(Path(documents)) if isinstance(documents, (str, Path)) else documents)
        texts = [f"{d.get('title', '')} {d['text']}" for d in self.documents]
        self.vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english")
        try:
            self.matrix = self.vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ValueError(f"the corpus of {len(texts)} documents cannot be searched: {error}") from None

    def find(self, query: str, top: int = 1) -> list[Mapping]:
        """The documents nearest to a query, best first; none that shares no word with it."""
        scores = (self.matrix @ self.vectorizer.transform([query]).T).toarray().ravel()
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:top]
        return [self.documents[i] for i in best if scores[i] > 0]


def read(path: Path) -> Iterable[Mapping]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                document = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: no JSON: {error}") from None
            if not isinstance(document, dict) or not isinstance(document.get("text"), str):
                raise ValueError(f"{path}:{number}: a document has a 'text' and maybe a 'title', found {line.strip()[:100]!r}")
            yield document


def shown(document: Mapping, longest: int) -> str:
    title = document.get("title")
    return f"{title} | {document['text'][:longest]}" if title else document["text"][:longest]


def searching(corpus: Corpus, top: int, longest: int):
    def answer(query: str) -> str:
        if not query:
            raise ToolError("there is nothing to search for")
        return "\n".join(shown(d, longest) for d in corpus.find(query, top)) or "No document has a word of this."
    return answer


def wiki_search(corpus: Corpus, *, longest: int = 600) -> Tool:
    """The best document for a query, as 'title | text'.

    >>> corpus = Corpus([{"title": "Fox", "text": "A fox is red."}, {"title": "Sky", "text": "The sky is blue."}])
    >>> wiki_search(corpus).function("which animal is red"), wiki_search(corpus).function("xyz")
    ('Fox | A fox is red.', 'No document has a word of this.')
    """
    return Tool("wiki_search", "Finds the article that fits best.", "what to search for", searching(corpus, 1, longest))


def search(corpus: Corpus, *, top: int = 3, longest: int = 300) -> Tool:
    """The best documents for a query, a line for each."""
    return Tool("search", "Finds the texts that fit best.", "what to search for", searching(corpus, top, longest))
