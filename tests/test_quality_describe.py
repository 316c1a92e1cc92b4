"""Cards, pages and labels of a person: numbers by hand, samples that do not depend on order, texts that stay texts."""
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_tools.fields import DataError
from data_tools.formats import dump, load
from data_tools.quality.describe import card, describe, histogram, topics_of, write
from data_tools.quality.findings import Finding, flagged
from data_tools.quality.page import bars, render
from data_tools.quality.sampling import Sample, maker, outcome
from data_tools.quality.view import apply_labels, even, payload, read_labels, view
from data_tools.quality.words import identity
from data_tools.records import Group, Response

DATA = Path(__file__).parents[1].parent / "shared" / "data"
HOSTILE = "<script>alert('x')</script></pre><img src=x onerror=alert(1)> {{ 7 * 7 }} | `a` ]] --> \ud800 \x1b[2J"


def made(text, model, **scores):
    return Response(text, scores=scores, meta={"model": model})


GROUPS = [Group("one", [made("aaaa", "big", r=2.0, s=1.0), made("bb", "small", r=1.0, s=2.0)], [1.0, 0.0]),
          Group("two", [made("c", "small", r=3.0, s=0.0), made("d", "big", r=1.0, s=0.0)], [1.0, 0.0]),
          Group("three", [made("e", "big", r=1.0, s=5.0), made("f", "small", r=None, s=4.0), made("g", "small", r=0.0, s=3.0)],
                wins=[[0.5, 0.9, 0.5], [0.1, 0.5, None], [0.5, None, 0.5]]),
          Group("four", [Response("h")])]


def about(number: int, kind: str, message: str, **more) -> Finding:
    return Finding(kind, message, group=number, id=identity(GROUPS[number - 1]), **more)


@pytest.mark.parametrize("use", [describe, view, lambda groups, findings: list(flagged(groups, findings))])
def test_findings_of_other_data_are_refused(use):
    """Group 1 is another one since then."""
    with pytest.raises(DataError, match="group 1: the check found 'refusal' in another text of this number"):
        use(GROUPS[1:], findings=[about(1, "refusal", "a")])


# ------------------------------------------------------------------------------------------------------------- numbers
def test_models_and_agreement_by_hand():
    report = describe(iter(GROUPS))
    assert report["models"] == {"big": {"responses": 3, "characters": 6, "compared": 3, "won": 2},
                                "small": {"responses": 4, "characters": 5, "compared": 3, "won": 1}}
    found = report["agreement"][0]
    assert found["names"] == ["labels", "r", "s"]
    share = np.array(found["share"], dtype=float)
    assert share[0, 1] == share[1, 0] == 1.0                   # groups one and two; of three, r compares only the tied pair
    assert share[0, 2] == 1 / 2                                # one against, two tied by s, three (1 over 2) for
    assert share[1, 2] == 1 / 2                                # one against, three (1 over 3) for
    assert report["margins"]["labels"]["series"][""] == [2] and sum(report["margins"]["r"]["series"][""]) == 3
    assert report["scores"]["r"]["of"] == 6 and report["scores"]["r"]["middle"] == {"big": 1.0, "small": 1.0}
    assert report["total"] == 4 and report["sections"]["size"]["responses"] == 8


def test_agreement_of_annotators():
    groups = [Group("p", [Response("a"), Response("b")], meta={"votes": v}) for v in ([1, 1, 0], [0, 1, 0], [1, 1, 1])]
    found = describe(groups)["agreement"][0]
    assert found["names"] == ["annotator 1", "annotator 2", "annotator 3"]
    assert found["share"] == [[None, 2 / 3, 2 / 3], [2 / 3, None, 1 / 3], [2 / 3, 1 / 3, None]]


def test_histograms():
    found = histogram({"a": [0.0, 1.0, 1.0], "b": [3.0]})
    assert found["edges"] == [-0.5, 0.5, 1.5, 2.5, 3.5] and found["series"] == {"a": [1, 2, 0, 0], "b": [0, 0, 0, 1]}
    wide = np.random.default_rng(0).normal(size=5000)
    counts = histogram({"": [*wide, 1e9]})
    assert sum(counts["series"][""]) == 5001 and counts["edges"][-1] < 4 and len(counts["series"][""]) == 40
    assert histogram({})["edges"] == [] and sum(histogram({"": [2.0, 2.0]})["series"][""]) == 2
    many = histogram({str(n): [0.0] * (n + 1) for n in range(12)})
    assert len(many["series"]) == 8 and "0" not in many["series"]


def test_topics_come_apart():
    rng = random.Random(0)
    themes = [["soup", "oven", "butter", "salt", "recipe", "dough"], ["python", "loop", "function", "array", "compiler", "bug"]]
    texts = [" ".join(rng.choices(words, k=8)) for words in themes for _ in range(60)]
    found = topics_of(texts, 2, 0)
    assert [round(t["share"], 1) for t in found] == [0.5, 0.5]
    assert sorted(set(t["words"]) == set(w) for t in found for w in themes) == [False, False, True, True]
    assert topics_of(["a"] * 100, 5, 0) == [] and topics_of([f"word{n}" for n in range(50)], 5, 0) == []


def test_warnings_come_first_and_are_counted():
    found = [about(1, "refusal", "a"), about(1, "refusal", "b"), about(3, "refusal", "c"), Finding("length bias", "d"),
             about(2, "email", "e")]
    warned = describe(GROUPS, findings=found)["warnings"]
    assert [(w["kind"], w["count"], w["groups"], w["share"]) for w in warned] == [
        ("length bias", 1, 1, 0.25), ("refusal", 3, 2, 0.5), ("email", 1, 1, 0.25)]
    text = card(describe(GROUPS, findings=found))
    assert text.index("length bias") < text.index("refusal") < text.index("## Size")


def test_nothing_to_describe(tmp_path):
    report = describe([])
    write(report, tmp_path / "out")
    assert "0 groups" in (tmp_path / "out" / "index.html").read_text()


# ---------------------------------------------------------------------------------------------------------------- card
def test_card_is_what_the_hub_reads():
    text = card(describe([Group(f"what is the name of that {n}", g.responses, g.relevance) for n, g in enumerate(GROUPS[:2])],
                         title="My pairs"), metadata={"license": "mit"})
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "mit" and head["pretty_name"] == "My pairs" and head["size_categories"] == ["n<1K"]
    assert head["language"] == ["en"] and "| big | 2 | 50% | 2 |" in text and text.split("---\n")[2].startswith("# My pairs")


def test_card_keeps_texts_in_their_place():
    groups = [Group(HOSTILE, [made("x", HOSTILE), made("y", "b")], [1.0, 0.0])] * 2
    text = card(describe(groups, title=HOSTILE, findings=[Finding("k", HOSTILE)]))
    body = text.split("---\n", 2)[2]
    assert "<script" not in body and "<img" not in body
    assert all(line.count("|") - line.count("\\|") in (0, 3, 5) for line in body.splitlines())
    assert yaml.safe_load(text.split("---\n")[1])["pretty_name"] == HOSTILE


# -------------------------------------------------------------------------------------------------------------- samples
def test_outcome():
    assert [outcome(g, []) for g in GROUPS] == ["preferred: big", "preferred: small", "preferred: big", "unlabelled"]
    assert outcome(GROUPS[0], [Finding("email", "m")]) == "flag: email"
    assert outcome(Group("p", [Response("a"), Response("b")], [1.0, 1.0]), []) == "tied"
    assert outcome(Group("p", [Response("a")], [1.0]), []) == "labelled" and maker(Response("a", meta={"generator": "g"})) == "g"


def many(count):
    return [Group(f"prompt {n}", [made(f"a{n}", f"m{n % 3 if n < 95 else 3}"), made("b", "z")], [1.0, 0.0]) for n in range(count)]


def test_samples_depend_on_content_alone():
    groups = many(100)
    there, back = Sample(4, outcome), Sample(4, outcome)
    for n, g in enumerate(groups):
        there.see(n, g, [])
    for n, g in reversed(list(enumerate(groups))):
        back.see(n, g, [])
    assert there.groups() == back.groups() and Counter(name for name, *_ in there.groups()) == dict.fromkeys(
        (f"preferred: m{k}" for k in range(4)), 4)
    assert there.counts == {"preferred: m0": 32, "preferred: m1": 32, "preferred: m2": 31, "preferred: m3": 5}


def test_samples_are_bounded():
    sample = Sample(1, lambda g, flags: g.prompt)
    for n, g in enumerate(many(100)):
        sample.see(n, g, [])
    assert len(sample.heaps) == 41 and sample.counts["others"] == 60


def test_view_takes_all_or_an_even_share():
    assert len(view(many(100))["groups"]) == 100
    found = view(many(100), sample=40)
    strata = Counter(g["stratum"] for g in found["groups"])
    assert found["total"] == 100 and strata == {"preferred: m0": 11, "preferred: m1": 11, "preferred: m2": 11, "preferred: m3": 5}
    assert [g["n"] for g in found["groups"]] == sorted(g["n"] for g in found["groups"])
    assert even([5, 5], 1) == 1


def test_payload():
    found = payload("s", 3, GROUPS[2], [Finding("k", "m", 0.5, response=2)])
    assert found["margin"] == pytest.approx(0.8) and found["relevance"] == [None] * 3 and found["id"] == identity(GROUPS[2])
    assert found["flags"] == [{"kind": "k", "message": "m", "sure": 0.5, "response": 2}]
    chat = payload("s", 1, Group([{"role": "user", "content": "a" * 20_000}], []), [])
    assert chat["prompt"].startswith("user: aaa") and "[... 8,006 more characters]" in chat["prompt"] and chat["margin"] is None


def test_flagged():
    found = list(flagged(GROUPS[:2], [about(2, "k", "m", sure=0.5, response=1), Finding("w", "m")]))
    assert [g.meta["flags"] for g in found] == [[], [{"kind": "k", "message": "m", "sure": 0.5, "response": 1}]]


# ---------------------------------------------------------------------------------------------------------------- pages
def test_page_escapes_everything():
    groups = [Group(HOSTILE, [made(HOSTILE, HOSTILE, **{HOSTILE: 1.0}), made("y", "b", **{HOSTILE: 0.0})], [1.0, 0.0],
                    meta={"place": HOSTILE})] * 30
    found = [Finding(HOSTILE, HOSTILE, group=1, id=identity(groups[0])), Finding("w", HOSTILE)]
    report = describe(groups, title=HOSTILE, findings=found)
    page = render(report)
    assert "<img" not in page and "<script>alert" not in page and page.count("<script") == 2 and page.count("</script>") == 2
    assert "{{ 7 * 7 }}" in page


def test_page_is_one_file_without_network():
    page = render(describe(GROUPS))
    assert "http" not in page.replace("http-equiv", "") and "src=" not in page and "default-src 'none'" in page
    assert "script-src &#39;sha256-" in page


def test_bars():
    svg = bars({"edges": [0.0, 1.0, 2.0], "series": {"a": [1, 3], "<b>": [0, 0]}}, "<l>")
    assert svg.count("<polyline") == 2 and "&lt;l&gt;" in svg and "nan" not in svg


# --------------------------------------------------------------------------------------------------------------- labels
def test_labels_come_back(tmp_path):
    groups = many(5)
    lines = [{"id": identity(groups[1]), "group": 2, "place": "", "relevance": [0, 1]}, {"id": identity(groups[3]), "drop": True},
             {"id": identity(groups[4]), "relevance": [5, 5]}, {"id": identity(groups[4]), "relevance": [0, 0]}]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = list(apply_labels(groups, path))
    assert [g.prompt for g in found] == ["prompt 0", "prompt 1", "prompt 2", "prompt 4"]
    assert [g.relevance for g in found] == [[1.0, 0.0], [0, 1], [1.0, 0.0], [0, 0]]
    assert [g.meta.get("relabelled", False) for g in found] == [False, True, False, True] and groups[1].relevance == [1.0, 0.0]
    wins = Group("w", [Response("a"), Response("b")], wins=[[0.5, 1.0], [0.0, 0.5]])
    assert next(apply_labels([wins], [{"id": identity(wins), "relevance": [0, 1]}])).wins is None


def test_labels_survive_a_file(tmp_path):
    """What the page names a group by is the same after writing and reading."""
    dump(GROUPS, tmp_path / "a.jsonl")
    assert [identity(g) for g in load(str(tmp_path / "a.jsonl"))] == [identity(g) for g in GROUPS]


def test_labels_that_do_not_fit(tmp_path):
    groups = many(2)
    with pytest.raises(DataError, match="1 of 2 labels belong to no group, for example that of gone.jsonl:7"):
        list(apply_labels(groups, [{"id": identity(groups[0]), "relevance": [1, 0]},
                                   {"id": "0" * 16, "place": "gone.jsonl:7", "relevance": [1, 0]}]))
    with pytest.raises(DataError, match="3 grades for 2 responses"):
        list(apply_labels(groups, [{"id": identity(groups[0]), "relevance": [1, 0, 0]}]))
    for line in ("{", '{"id": 3, "relevance": [1]}', '{"relevance": [1]}', '{"id": "a"}', "[]",
                 '{"id": "a", "relevance": ["x"]}'):
        (tmp_path / "l.jsonl").write_text(line + "\n")
        with pytest.raises(DataError, match="l.jsonl:1: this line is no label"):
            list(read_labels(tmp_path / "l.jsonl"))


@pytest.mark.skipif(not DATA.is_dir(), reason="the data subsets are not beside the repository")
def test_real_data(tmp_path):
    report = describe(load(str(DATA / "pandalm" / "*.gz")), title="PandaLM")
    write(report, tmp_path)
    assert report["models"]["llama-7b"]["won"] / report["models"]["llama-7b"]["compared"] > 0.7
    assert [t["names"] for t in report["agreement"]] == [["annotator 1", "annotator 2", "annotator 3"]]
    assert len(report["topics"]) == 3 and (tmp_path / "README.md").stat().st_size > 1000


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    said = lambda count: " ".join(rng.choices(["soup", "oven", "butter", "salt", "dough", "bread", "herbs"], k=count)) + "."
    groups = [Group(said(9), [Response(said(20)), Response(said(20))], [1.0, 0.0]) for _ in range(60)]
    groups += [groups[0], Group(groups[1].prompt, [Response(r.text + " Yes.") for r in groups[1].responses], [1.0, 0.0]),
               Group(said(40), [Response("caf\u00c3\u00a9. " + said(20)), Response(said(20))], [1.0, 0.0])]
    dump(groups, "pairs.jsonl")
    dump(groups[-1:], "test.jsonl")
    Path("labels.jsonl").write_text(json.dumps({"id": identity(groups[5]), "relevance": [0, 1]}) + "\n")
    text = (Path(__file__).parents[1] / "docs" / "data_quality.md").read_text(encoding="utf-8")
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert len(list(load("clean.jsonl"))) < 63 and Path("card/index.html").exists() and Path("view.html").exists()
    assert sum(g.meta.get("relabelled", False) for g in names["relabelled"]) == 1
