"""A rule of the pipeline that only this data needs."""
from __future__ import annotations

from dataclasses import replace

from data_tools.records import Group


def prepared(group: Group) -> list[Group]:
    r"""The worked solution becomes the field `reference`, which both rewards read, its answer behind #### as elsewhere in GSM8K;
    the published marks become notes, for labels are what the pipeline makes.

    >>> from data_tools.records import Response
    >>> made, = prepared(Group("2 + 2?", [Response("A: 4")], [1.0], meta={"answer": "Two and two.\nA: 4"}))
    >>> made.relevance, made.meta, made.responses[0].meta
    (None, {'reference': 'Two and two.\n#### 4', 'query_type': 'CONSTRAINED'}, {'published': 1.0})
    """
    meta = dict(group.meta)
    meta |= {"reference": meta.pop("answer").replace("\nA: ", "\n#### "), "query_type": "CONSTRAINED"}
    responses = [replace(r, meta={**r.meta, "published": mark}) for r, mark in zip(group.responses, group.relevance, strict=True)]
    return [replace(group, responses=responses, relevance=None, meta=meta)]
