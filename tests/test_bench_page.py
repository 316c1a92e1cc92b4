"""The bench over sets and models, its page, and the page of tokens."""
import json
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_tools.formats import load
from data_tools.records import Group, Response
from rewards import page, tokens_page
from rewards.base import ScoringError
from rewards.bench import baselines, bench, tfidf_logistic, verdicts, write

DATA = Path(__file__).parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the data subsets are not beside the repository")
HOSTILE = "<script>alert('x')</script> \"quoted\" & {{ 7 * 7 }} </style></pre><img src=x onerror=alert(1)> \ud800"


def pair(good, bad, prompt="?", **meta):
    return Group(prompt, [Response(good), Response(bad)], [1.0, 0.0], meta=meta)


def plain_groups(n=24):
    return [pair("good " * (k % 5 + 1), "bad " * (k % 3 + 1), f"question {k}", kind=("even", "odd")[k % 2]) for k in range(n)]


def honest(text):
    return text.count("good") - text.count("bad")


@dataclass
class Judge:
    """Prefers `good`, and what it sees first by `bias` in its logit."""
    bias: float = 0.0
    name: str = "judge"

    def settings(self):
        return {"bias": self.bias}

    def compare(self, groups):
        assert all(g.relevance is None and g.wins is None for g in groups), "a comparison sees labels"
        found = []
        for group in groups:
            s = [honest(r.text) for r in group.responses]
            first = lambda i, j, s=s: 1 / (1 + math.exp(-(s[i] - s[j] + self.bias)))
            found.append([[0.5 if i == j else first(i, j) if i < j else 1 - first(j, i) for j in range(len(s))]
                          for i in range(len(s))])
        return found


class Page(HTMLParser):
    """Every tag and attribute of a page, and whether all tags are closed in order."""
    VOID = {"meta", "br", "input", "path", "line", "polyline", "i"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.attributes, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    handle_startendtag = lambda self, tag, attrs: (self.tags.append(tag), self.attributes.extend(attrs))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_page(text, scripts):
    page = Page(text)
    assert page.open == [] and page.tags.count("script") == scripts
    assert not {"img", "iframe", "link", "object"} & set(page.tags)
    assert not [a for a in page.attributes if a[0].startswith("on") or a[0] in ("src", "href")]
    assert "http://" not in text and "https://" not in text and "default-src 'none'" in text
    return page


# --------------------------------------------------------------------------------------------------------------- bench
def test_a_right_model_beats_the_baselines_and_the_report_is_json():
    report = bench({"honest": honest, "judge": Judge()}, {"a": plain_groups(), "b": plain_groups(10)}, train=plain_groups(),
                   slices=["kind"])
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report["models"]) == {"honest", "judge", "baseline: longer", "baseline: random", "baseline: TF-IDF"}
    share = {name: found["accuracy"] for name, found in report["overall"].items()}
    assert share["honest"] == share["judge"] == share["baseline: TF-IDF"] == 1 and share["baseline: longer"] < 1
    kinds = report["sets"]["a"]["models"]["honest"]["slices"]["kind"]
    assert list(kinds) == ["even", "odd"] and kinds["even"]["pairs"] == 12
    assert report["models"]["judge"] == {"kind": "comparison", "settings": {"bias": 0.0}}
    assert report["sets"]["a"]["models"]["honest"]["errors"] == []
    longer = report["sets"]["a"]["models"]["baseline: longer"]
    assert len(longer["errors"]) == longer["accuracy"]["pairs"] - longer["accuracy"]["right"]
    assert all("honest" not in e["also_wrong"] for e in longer["errors"])


def test_scores_wins_and_stored_keys_go_one_way():
    groups = plain_groups()
    for g in groups:
        for r in g.responses:
            r.scores["stored"] = float(honest(r.text))
    by = {name: verdicts(model, groups) for name, model in (("function", honest), ("key", "stored"), ("wins", Judge()))}
    for found in by.values():
        assert np.allclose([m[0, 1] for m in found.margins], [m[0, 1] for m in by["function"].margins], rtol=1e-6)
    assert by["function"].order is None and by["wins"].order.reverse is not None
    assert verdicts(Judge(), groups, swap=False).order.reverse is None


def test_a_judge_with_a_favourite_place_gains_nothing_from_files_that_have_the_preferred_response_first():
    tied = [pair("same " * (k + 1), "same  " * (k + 1), f"q{k}") for k in range(300)]
    found = bench({"first": Judge(bias=5.0)}, {"ties": tied})["sets"]["ties"]["models"]["first"]
    assert abs(found["accuracy"]["share"] - 0.5) < 3 * math.sqrt(0.25 / 300)            # it is a coin: three standard errors
    assert found["position"]["bias"] > 0.49 and found["position"]["consistency"]["share"] == 0
    assert abs(bench({"fair": Judge()}, {"a": plain_groups()})["sets"]["a"]["models"]["fair"]["position"]["bias"]) < 1e-9


def test_a_model_that_fails_is_marked_and_counted():
    def fragile(text):
        if "good good good" in text:
            raise RuntimeError("too good")
        return honest(text)

    found = bench({"fragile": fragile}, {"a": plain_groups(20)})["sets"]["a"]["models"]["fragile"]
    failing = sum(k % 5 >= 2 for k in range(20))
    assert found["accuracy"]["unscored"] == found["unscored"]["responses"] == failing and found["accuracy"]["share"] == 1
    assert found["accuracy"]["of_all"] == (20 - failing) / 20 and "too good" in found["unscored"]["reasons"][0]


@pytest.mark.parametrize("wins, reason", [
    ([[0.5, 0.9], [0.3, 0.5]], "is off 1 by 0.2"), ([[0.5]], "shape"), ([[0.5, 1.5], [-0.5, 0.5]], "outside 0 to 1"),
    ("no", "no matrix")])
def test_matrices_that_are_no_comparison_are_marked(wins, reason):
    class Broken(Judge):
        def compare(self, groups):
            return [wins for _ in groups]

    found = verdicts(Broken(), plain_groups(2))
    assert np.isnan(found.margins[0]).all() and len(found.reasons) == 2 and reason in found.reasons[0]


def test_one_group_that_breaks_a_comparison_leaves_the_others():
    class Picky(Judge):
        def compare(self, groups):
            if any("question 3" in str(g.prompt) for g in groups):
                raise RuntimeError("not that one")
            return super().compare(groups)

    found = verdicts(Picky(), plain_groups(6))
    assert [bool(np.isnan(m[0, 1])) for m in found.margins] == [False] * 3 + [True] + [False] * 2
    assert len(found.reasons) == 1 and "not that one" in found.reasons[0]

    class Short(Judge):
        def compare(self, groups):
            return super().compare(groups)[:-1]

    with pytest.raises(ScoringError, match="1 matrices for 2 groups"):
        verdicts(Short(), plain_groups(2))


def test_a_name_without_scores_and_a_set_without_labels_are_errors():
    with pytest.raises(ValueError, match="no response has the score 'x'"):
        bench({"mine": "x"}, {"a": plain_groups()})
    with pytest.raises(ValueError, match="the set 'a' has 1 groups and no pair with a preferred response"):
        bench({}, {"a": [Group("?", [Response("a"), Response("b")])]})
    for settings in ({"slices": ["kinds"]}, {"paraphrase": "kinds"}):
        with pytest.raises(ValueError, match="'kinds', which nothing in any set has, did you mean 'kind'"):
            bench({}, {"a": plain_groups()}, **settings)
    with pytest.raises(ValueError, match="gold names 'kind'"):
        bench({}, {"a": plain_groups()}, gold="kind")
    with pytest.raises(ValueError, match="at least two preferred pairs"):
        tfidf_logistic([])


def test_lists_have_ranking_best_of_n_and_cycles():
    def listed(k):
        texts = ["good " * n + "x " * (k + n) for n in (0, 1, 2, 3)]
        return Group(f"q{k}", [Response(t, scores={"gold": -float(n)}) for n, t in enumerate(texts)], [0.0, 1.0, 2.0, 3.0])

    groups = [listed(k) for k in range(8)]
    report = bench({"honest": honest, "judge": Judge()}, {"lists": groups})["sets"]["lists"]["models"]
    assert report["honest"]["lists"]["kendall"]["mean"] == 1
    assert report["honest"]["lists"]["ndcg"]["mean"] == pytest.approx(1, rel=1e-12)
    assert [c["n"] for c in report["honest"]["best_of_n"]["curve"]] == [1, 2, 4]
    assert report["judge"]["best_of_n"]["curve"][-1]["gold"]["mean"] == 3 and report["judge"]["cycles"]["right"] == 0
    by_gold = bench({"honest": honest}, {"lists": groups}, gold="gold")["sets"]["lists"]["models"]["honest"]["best_of_n"]
    assert by_gold["regret"]["mean"] == 3                      # what is best by score is worst by that gold


def test_paraphrases_are_linked_by_a_key():
    groups = [pair("good", "bad", f"wording {w} of {k}", same=k) for k in range(6) for w in (0, 1)]
    moody = lambda prompt, text: honest(text) * (-1 if "wording 1 of 3" in prompt else 1)
    found = bench({"moody": moody}, {"a": groups}, paraphrase="same")["sets"]["a"]["models"]["moody"]["paraphrase"]
    assert (found["pairs"], found["agree"]["right"]) == (6, 5)
    odd = [pair("good", "bad", same=1), Group("?", [Response(t) for t in "abc"], [1.0, 0.0, 0.0], meta={"same": 1})]
    with pytest.raises(ValueError, match="share a value of 'same'"):
        bench({}, {"a": odd}, paraphrase="same")


def test_rewardbench_is_recognised_by_its_subsets():
    first = [pair("good", "bad", f"question of {s}", subset=s) for s in ("hep-go", "math-prm", "llmbar-natural", "donotanswer")]
    found = bench({"honest": honest}, {"rb": first})["sets"]["rb"]["models"]["honest"]["rewardbench"]
    assert found["version"] == 1 and found["score"] == 0.75 and found["sections"]["Chat"] == 0
    def best_of(subset, good, bad, **meta):
        return Group("?", [Response(t) for t in (*good, *bad)], [1.0] * len(good) + [0.0] * len(bad),
                     meta={"subset": subset, "num_correct": len(good), **meta})

    second = [best_of("Math", ["good"], ["bad", "good", "bad"], id="1"), best_of("Ties", ["good", "good"], ["bad"], id="tied:1"),
              best_of("Ties", ["good"], ["bad"], id="ref:1")]
    found = bench({"honest": honest}, {"rb": second})["sets"]["rb"]["models"]["honest"]["rewardbench"]
    assert found["version"] == 2 and found["domains"] == pytest.approx({"Math": 0.5, "Ties": 1.01})


def test_baselines_depend_on_the_seed_and_the_texts_alone():
    draws = [verdicts(baselines(seed=seed)["baseline: random"], groups).scores[0].tolist()
             for seed, groups in ((0, plain_groups(1)), (0, plain_groups(5)), (1, plain_groups(1)))]
    assert draws[0] == draws[1] != draws[2]


@real
def test_tfidf_reaches_its_known_floor_on_real_pairs():
    model = tfidf_logistic(load(DATA / "hh_rlhf_harmless/train.jsonl.gz"))
    groups = list(load(DATA / "hh_rlhf_harmless/test.jsonl.gz"))
    right = np.mean([m[0, 1] > 0 for m in verdicts(model, groups).margins])
    assert right > 0.58                                        # 64.7 % on 812 pairs, of which these are 300: 2.4 standard errors


@real
def test_real_sets_give_the_known_shares_of_longer_responses():
    sets = {name: list(load(DATA / file)) for name, file in {
        "helpful": "hh_rlhf_helpful/test.jsonl.gz", "llmbar": "llmbar/adv_neighbor.jsonl.gz",
        "pandalm": "pandalm/testset_3annotators.jsonl.gz", "webgpt": "webgpt_graded/train.jsonl.gz"}.items()}
    report = bench({}, sets, slices=["cmp_key"], errors=2)
    longer = lambda name: report["sets"][name]["models"]["baseline: longer"]
    known = 0.569                                              # the data's own note, on the 852 pairs that hold these 350
    assert abs(longer("helpful")["accuracy"]["share"] - known) < 3 * math.sqrt(known * (1 - known) / 350)
    assert longer("llmbar")["accuracy"]["share"] < 0.4         # adversarial: the longer one is mostly the worse
    assert report["sets"]["webgpt"]["tied_labels"] == sum(g.relevance[0] == g.relevance[1] for g in sets["webgpt"])
    assert longer("pandalm")["length"]["longer_preferred"] == 1


# ---------------------------------------------------------------------------------------------------------------- page
def test_the_page_escapes_everything_and_needs_nothing_from_outside(tmp_path):
    groups = [pair(HOSTILE + "bad " * k, HOSTILE + "good", HOSTILE, place=HOSTILE, part=HOSTILE) for k in range(6)]
    three = [Group(HOSTILE, [Response(HOSTILE + "good " * k) for k in range(4)], [0.0, 1.0, 2.0, 3.0], meta={"part": "x"})] * 3

    def fails(text):
        raise ValueError(HOSTILE)

    report = bench({HOSTILE: honest, "judge": Judge(), "fails": fails}, {HOSTILE: groups, "lists": three}, slices=["part"])
    written = write(report, tmp_path / "out")
    assert [p.name for p in written] == ["bench.json", "bench.html"] and json.loads(written[0].read_text()) == report
    text = written[1].read_text(encoding="utf-8")
    page = check_page(text, scripts=1)
    assert HOSTILE.replace("\ud800", "?") in "".join(page.text) and "<script>alert" not in text
    assert page.tags.count("table") >= 8 and page.tags.count("caption") == page.tags.count("table")
    assert page.tags.count("article") == sum(len(m["errors"]) for s in report["sets"].values() for m in s["models"].values())
    assert "nan" not in re.findall(r'(?:points|x1|y1|transform)="[^"]*nan', text)


def test_the_page_says_what_the_report_says(tmp_path):
    report = bench({"honest": honest}, {"a": plain_groups(8), "b": plain_groups(9)}, slices=["kind"])
    text = write(report, tmp_path)[1].read_text()
    words = "".join(Page(text).text)
    for found in report["overall"].values():
        assert f"{100 * found['accuracy']:.1f}" in words
    for title in ("Accuracy", "Over all sets", "Set by set", "Percent right by kind", "Most confidently wrong"):
        assert title in words
    assert "Lists and robustness" not in words and "RewardBench" not in words           # nothing to say about them


def test_a_page_of_nothing_scored_still_opens(tmp_path):
    def fails(text):
        raise ValueError("no")

    report = bench({"fails": fails}, {"a": plain_groups(3)})
    assert "fails" not in report["overall"]
    assert "3 unscored" in "".join(check_page(write(report, tmp_path)[1].read_text(), scripts=1).text)


def test_the_overall_column_says_how_many_sets_it_is_over(tmp_path):
    def fails_on_b(kind):
        if kind == "b":
            raise ValueError("no")
        return 1.0

    report = bench({"half": fails_on_b}, {k: [pair("good", "bad", kind=k)] for k in "ab"})
    assert report["overall"]["half"]["sets"] == 1
    assert "1 of 2 sets" in "".join(Page(write(report, tmp_path)[1].read_text()).text)


def test_many_models_have_marks_of_their_own_and_rows_that_say_nothing_are_left_out():
    assert len({page.marker(0, 0, n) for n in range(32)}) == 32
    found = page.table("", ["model", "a", "b"], [("x", [page.cell("1"), page.NOTHING]), ("y", [page.NOTHING] * 2)])
    assert "x</th>" in found and "y</th>" not in found and ">b</th>" not in found


def test_the_axis_of_the_overall_column_holds_every_interval():
    """From .58 and .71: 40 to 80 %, so .6 stands in the middle; chance is a quarter of the way."""
    report = bench({"mine": honest}, {"set": plain_groups()})
    report["overall"] = {name: {"sets": 1, "accuracy": 0.6, "interval": [0.58, 0.71]} for name in report["overall"]}
    text = page.render(report)
    assert "40 to 80 %" in text and 'translate(70.0 11.0)' in text and 'class="guide" x1="37.0"' in text


def test_rewardbench_has_a_table(tmp_path):
    report = bench({"honest": honest}, {"rb": [pair("good", "bad", subset="hep-go")]})
    words = "".join(Page(write(report, tmp_path)[1].read_text()).text)
    assert "RewardBench 1, percent" in words and "Chat Hard" in words


# -------------------------------------------------------------------------------------------------------------- tokens
def test_tokens_are_coloured_by_sign_and_size():
    text = tokens_page.render([{"prompt": "p", "tokens": ["a", "b", "c", "d"], "rewards": [1.0, -0.5, 0.0, None]}])
    check_page(text, scripts=0)
    found = re.findall(r'<span class="(\w*)" style="([^"]*)" title="([^"]*)">(\w)</span>', text)
    assert [(side, title, token) for side, _, title, token in found] == [
        ("up", "1", "a"), ("down", "-0.5", "b"), ("", "0", "c"), ("unknown", "not known", "d")]
    strength = [float(style.split("/ ")[1].rstrip(")")) if style else 0.0 for _, style, _, _ in found]
    assert strength[0] == 0.6 and 0.29 < strength[1] < 0.32 and strength[2:] == [0, 0]
    assert "rewards not known: 1" in text


def test_steps_stand_in_blocks_and_every_token_is_there():
    steps = [{"start": 1, "end": 2, "reward": 0.9, "label": True}, {"start": 3, "end": 4, "reward": math.nan, "label": False}]
    text = tokens_page.render([{"tokens": list("vwxyz"), "steps": steps, "title": "T"}], centre=0.5)
    words = "".join(check_page(text, scripts=0).text)
    assert "step 1, 0.9, labelled right" in words and "step 2, not known, labelled wrong" in words
    assert re.findall(r'<div class="text">(\w)</div>', text) == list("vwxyz")


def test_tokens_escape_what_is_hostile():
    text = tokens_page.render([{"prompt": HOSTILE, "tokens": [HOSTILE, "\n"], "rewards": [1.0, 2.0], "title": HOSTILE}],
                              title=HOSTILE)
    page = check_page(text, scripts=0)
    assert "".join(page.text).count("<script>alert") >= 5 and "\u21b5\n" in "".join(page.text)


@pytest.mark.parametrize("record, message", [
    ({"tokens": ["a"], "rewards": [1.0, 2.0]}, "1 tokens and 2 rewards"), ({"tokens": ["a"]}, "'rewards' or 'steps'"),
    ({"tokens": ["a"], "reward": [1.0]}, "'reward', did you mean 'rewards'"),
    ({"tokens": ["a", "b"], "steps": [{"start": 0, "end": 2, "reward": 1}, {"start": 1, "end": 2, "reward": 1}]},
     "step 2 of record 1"),
    ({"tokens": ["a"], "steps": [{"start": 0, "end": 9, "reward": 1}]}, "goes from 0 to 9")])
def test_records_of_tokens_that_do_not_fit(record, message):
    with pytest.raises(ValueError, match=message):
        tokens_page.render([record])


def test_tokens_without_any_reward_are_a_page():
    assert "not known" in tokens_page.render([{"tokens": ["a"], "rewards": [None]}])
    check_page(tokens_page.render([]), scripts=0)
