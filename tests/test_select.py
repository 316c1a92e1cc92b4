"""Rules of one group: pairs, grades, filters. Doctests hold the hand values."""
import copy
import doctest
import importlib
import inspect
import itertools
import math
import random
import re
from functools import partial
from pathlib import Path

import pytest

from data_tools import labels, rules_page, select
from data_tools.records import Group, Response
from data_tools.rules import again, draw, generator, shuffled
from data_tools.select.grades import answer

ROOT = Path(__file__).parents[1]
MODULES = ["rules", "rules_page", "select.pairs", "select.grades", "select.filters", "select.sampling", "select.whole",
           "select.committees", "difficulty"]
SETTINGS = {"thresholds": dict(good=0.5, bad=-0.5), "on_policy_margin": dict(policy="a", margin=0.1), "rejection": dict(n=2),
            "differential_information": dict(log_ratio="reward"), "ties": dict(within=0.1), "votes": dict(judges=["reward", "b"]),
            "at_least": dict(least=0), "pass_rate": dict(low=0.0, high=1.0), "between": dict(low=0),
            "multiwinner": dict(k=2, judges=["reward"])}
RULES = {name: partial(getattr(select, name), **SETTINGS.get(name, {})) for name in select.__all__
         if next(iter(inspect.signature(getattr(select, name)).parameters)) == "group"}
READS_SCORES = [name for name in RULES if name not in ("between", "distinct", "majority")]


def group(*values, texts=None, **meta):
    return Group("?", [Response(f"answer {v}" if texts is None else texts[k], scores={"reward": v})
                       for k, v in enumerate(values)], meta=meta)


def some(seed, size=5):
    r = random.Random(seed)
    return Group(f"prompt {seed}", [Response(f"answer {k}", scores={"reward": r.gauss(0, 1), "b": r.gauss(0, 1)},
                                             meta={"generator": "ab"[k % 2]}) for k in range(size)], meta={"difficulty": 0.5})


def texts(groups):
    return [[r.text for r in g.responses] for g in groups]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    found = doctest.testmod(importlib.import_module(f"data_tools.{name}"))
    assert found.failed == 0 and found.attempted >= 1


# ------------------------------------------------------------------------------------------------------ laws of every rule
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_pure_keeps_the_meta_and_gives_groups_that_can_be_written(name):
    for seed in range(5):
        given = some(seed)
        before = copy.deepcopy(given)
        found, again_ = RULES[name](given), RULES[name](given)
        assert given == before and found == again_
        for one in found:
            assert one.meta.items() >= before.meta.items() and one.prompt == before.prompt
            assert Group.from_json(one.to_json()) == one
            for label in (one.relevance, one.wins):
                assert label is None or len(label) == len(one.responses)


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_responses_does_not_matter(name):
    def seen(groups):                                         # texts of each group with their labels
        keep = name in ("rejection", "first_round", "tournament")
        rows = [[(r.text, g.relevance and g.relevance[k], g.wins and tuple(sorted(zip(texts([g])[0], g.wins[k], strict=True))))
                 for k, r in enumerate(g.responses)] for g in groups]
        return rows if keep else sorted(sorted(row, key=repr) for row in rows)
    for seed in range(8):
        given = some(seed)
        turned = copy.deepcopy(given)
        random.Random(seed).shuffle(turned.responses)
        assert seen(RULES[name](turned)) == seen(RULES[name](given))


@pytest.mark.parametrize("name", READS_SCORES)
def test_a_score_that_is_missing_or_not_finite_is_an_error(name):
    rule, read = RULES[name], "reward"
    absent = some(0)
    for r in absent.responses:
        r.scores["rewards"] = r.scores.pop(read)
    if name == "votes":
        absent.responses[0].scores.pop("b")
    with pytest.raises(KeyError, match="prompt 0.*no score 'reward', did you mean 'rewards'.*score them|no score 'reward'"):
        rule(absent)
    for value in (math.nan, math.inf, -math.inf):
        bad = some(0)
        bad.meta["place"] = "data.jsonl:7"
        bad.responses[2].scores[read] = value
        if name == "scored":
            assert [r.text for r in rule(bad)[0].responses] == ["answer 0", "answer 1", "answer 3", "answer 4"]
        else:
            with pytest.raises(ValueError, match=rf"data.jsonl:7: response 3 has the score reward = {value}.*`scored`"):
                rule(bad)


@pytest.mark.parametrize("name", [n for n in READS_SCORES if n not in ("scored", "at_least", "filtration", "rejection")])
def test_equal_scores_make_no_pair_and_no_list(name):
    equal = Group("?", [Response(t, scores={"reward": 1.0, "b": 1.0}, meta={"generator": "a"}) for t in "xyz"])
    found = RULES[name](equal)
    if name in ("degree", "ties", "votes"):
        assert [w for g in found for row in g.wins for w in row] == [0.5] * 9
    elif name == "differential_information":                  # a pair of random responses, always the reference's over it
        assert len(found) == 1 and found[0].meta["margin"] == 0
    elif name == "pass_rate":
        assert found[0].meta["pass_rate"] == 1.0
    elif name == "multiwinner":
        assert texts(found) == [["x", "y"]]
    else:
        assert found == []


def test_one_response_or_none():
    for name, rule in RULES.items():
        if name in ("rejection", "multiwinner"):
            with pytest.raises(ValueError, match="cannot"):
                rule(some(0, size=1))
            continue
        if name in ("pass_rate",):
            with pytest.raises(ValueError, match="no responses"):
                rule(some(0, size=0))
            continue
        for size in (0, 1):
            found = rule(some(0, size=size))
            pairs = "paired" in inspect.getsource(rule.func)
            assert all(len(g.responses) <= size for g in found) and not (pairs and found)


# ------------------------------------------------------------------------------------------------------------------ pairs
PAIRS = ["best_worst", "best_random", "best_mean", "all_pairs", "adjacent", "first_round", "tournament"]


def test_two_responses_make_the_same_pair_by_every_rule():
    rules = [RULES[n] for n in PAIRS] + [partial(select.thresholds, good=3, bad=2),
                                         partial(select.on_policy_margin, policy="a", margin=0.0)]
    two = group(2.0, 3.0)
    for r in two.responses:
        r.meta["generator"] = "a"
    for rule in rules:
        one, = rule(two)
        assert texts([one]) == [["answer 3.0", "answer 2.0"]] and one.relevance == [1.0, 0.0] and one.wins is None
        assert (one.meta["margin"], one.meta["ranks"]) == (1.0, [1, 2])


def test_every_pair_agrees_with_its_scores_and_says_margin_and_ranks():
    for seed, name in itertools.product(range(20), PAIRS):
        given = some(seed, size=6)
        values = {r.text: r.scores["reward"] for r in given.responses}
        order = sorted(values, key=values.get, reverse=True)
        for one in RULES[name](given):
            a, b = (r.text for r in one.responses)
            assert values[a] > values[b] and one.meta["margin"] == values[a] - values[b] and one.meta["rule"] == name
            assert one.meta["ranks"] == [order.index(a) + 1, order.index(b) + 1]


def test_all_pairs_equals_a_double_loop_and_contains_the_others():
    given = some(3, size=7)
    found = [tuple(t) for t in texts(select.all_pairs(given, margin=0.4))]
    loop = [(a.text, b.text) for a in given.responses for b in given.responses
            if a.scores["reward"] - b.scores["reward"] >= 0.4]
    assert sorted(found) == sorted(loop)
    everything = select.all_pairs(given)
    assert len(everything) == 7 * 6 // 2
    margins = [g.meta["margin"] for g in everything]
    assert margins == sorted(margins, reverse=True)
    assert texts(select.all_pairs(given, most=1)) == texts(select.best_worst(given)) == texts(everything[:1])
    for name in PAIRS:
        assert all(t in texts(everything) for t in texts(RULES[name](given)))


def test_caps_on_pairs():
    given = some(5, size=6)
    found = select.all_pairs(given, each=2)
    counts = [sum(t in pair for pair in texts(found)) for t in (r.text for r in given.responses)]
    assert max(counts) == 2 and len(found) >= 5
    assert texts(select.all_pairs(given, each=1)) == [
        [a.text, b.text] for a, b in zip(*(sorted(given.responses, key=lambda r: s * r.scores["reward"])[:3] for s in (-1, 1)),
                                         strict=True)]
    with pytest.raises(ValueError, match="most should be at least 1"):
        select.all_pairs(given, most=0)


def test_margins_add_up_along_the_ranking():
    given = some(8, size=6)
    steps, whole = select.adjacent(given), select.best_worst(given)
    assert len(steps) == 5 and math.fsum(g.meta["margin"] for g in steps) == pytest.approx(whole[0].meta["margin"], rel=1e-12)
    assert texts(select.adjacent(group(1.0, 1.0, 2.0))) == [["answer 2.0", "answer 1.0"]]


def test_the_margin_is_met_exactly():
    assert len(select.best_worst(group(1.0, 3.0), margin=2.0)) == 1 and select.best_worst(group(1.0, 3.0), margin=2.01) == []


def test_equal_texts_are_no_pair():
    assert select.best_worst(group(1.0, 2.0, texts=["same", "same"])) == []
    assert len(select.all_pairs(group(1.0, 2.0, 3.0, texts=["same", "same", "other"]))) == 2


def test_best_random_takes_each_of_the_worse_ones_equally_often():
    from scipy.stats import chisquare
    counts = {f"answer {v}": 0 for v in (0.0, 1.0, 2.0)}
    for n in range(1200):
        given = group(3.0, 0.0, 1.0, 2.0, 2.9)
        given.prompt = str(n)
        pair, = select.best_random(given, margin=1.0)
        counts[pair.responses[1].text] += 1
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_best_mean():
    assert texts(select.best_mean(group(10.0, 4.0, 0.0)))[0][1] == "answer 4.0"                              # mean 4.67
    assert texts(select.best_mean(group(4.0, 3.0, 1.0, 0.0)))[0][1] == "answer 1.0"                          # 2: 1 and 3 as near
    assert texts(select.best_mean(group(10.0, 9.0, 9.0, 0.0), margin=2))[0][1] == "answer 0.0"


def test_teachers_are_not_compared_with_each_other():
    given = some(2, size=6)
    own = {r.text for r in given.responses if r.meta["generator"] == "a"}
    found = select.on_policy_margin(given, policy="a", margin=0.2)
    every = select.all_pairs(given, margin=0.2)
    assert texts(found) == [t for t in texts(every) if own & set(t)] and len(found) < len(every)
    with pytest.raises(KeyError, match="has no 'generatr' in its meta, did you mean 'generator'"):
        select.on_policy_margin(given, policy="a", source="generatr")


def test_thresholds_are_checked():
    with pytest.raises(ValueError, match="good should be higher than bad"):
        select.thresholds(group(1.0, 0.0), good=0.5, bad=0.5)
    assert select.thresholds(group(0.0, 0.4), good=0.5, bad=0.1) == []


def test_labels_of_before_give_way_and_the_weight_stays():
    given = Group("?", [Response("a", scores={"reward": 0.0}), Response("b", scores={"reward": 1.0})],
                  wins=[[0.5, 0.9], [0.1, 0.5]], weight=2.0)
    pair, = select.best_worst(given)
    assert pair.wins is None and pair.relevance == [1.0, 0.0] and pair.weight == 2.0


# ----------------------------------------------------------------------------------------------------------------- grades
def test_grades_of_one_level_each_are_the_ranking():
    given = group(0.0, 4.0, 1.0, 3.0, 2.0)
    assert select.graded(given, levels=5)[0].relevance == select.ranking(given)[0].relevance == [0.0, 4.0, 1.0, 3.0, 2.0]


def test_grades_in_a_given_range_are_alike_for_all_groups():
    assert select.graded(group(2.0, 7.0, 11.0, -3.0), low=0, high=10, levels=10)[0].relevance == [2.0, 7.0, 9.0, 0.0]
    assert select.graded(group(2.1, 2.2), low=0, high=10, levels=10) == []
    for settings in (dict(levels=1), dict(low=2, high=1)):
        with pytest.raises(ValueError, match="grades need"):
            select.graded(group(1.0, 2.0), **settings)


def test_degrees_of_preference_become_ties_as_temperature_falls():
    given = some(1)
    values = [r.scores["reward"] for r in given.responses]
    assert select.degree(given)[0].wins == labels.soft(values)
    assert select.degree(given, temperature=1e-9)[0].wins == select.ties(given, within=0)[0].wins == labels.hard(values)
    with pytest.raises(ValueError, match="within should be 0 or more"):
        select.ties(given, within=-1)
    with pytest.raises(ValueError, match="within should be 0 or more"):
        select.ties(given, within=math.nan)


def test_votes_do_not_see_scales():
    given, scaled = some(4), some(4)
    for r in scaled.responses:
        r.scores["b"] = math.exp(3 * r.scores["b"])
    assert select.votes(given, judges=["reward", "b"])[0].wins == select.votes(scaled, judges=["reward", "b"])[0].wins


@pytest.mark.parametrize("text, found", [
    ("A: 1,234.50", "1234.5"), ("-3", "-3"), ("3.0 then 2e5", "5"), ("100", "100"), ("0.10", "0.1"), ("so 7.", "7"), ("", None),
    ("-0", "0"), ("1,,2", "12")])
def test_answers_of_numbers(text, found):
    assert answer(text) == found


def test_majority():
    def said(*answers, **settings):
        return select.majority(Group("?", [Response(a) for a in answers]), **settings)
    assert said("4", "5") == said("a", "b") == said() == []                                              # no majority
    assert said("4", "4", "5", "6", least=0.51) == [] and said("4", "4", "5", "6", least=0.5)[0].meta["majority"] == 0.5
    found, = said("A: x", "(b)", "(B)", "(b)", pattern=r"\((.)\)")
    assert found.relevance == [0.0, 1.0, 0.0, 1.0] and found.meta["answer"] == "b"
    assert said("4", "4")[0].relevance == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------- filters
def test_scored_drops_what_could_not_be_scored_and_nothing_else():
    given = Group("?", [Response("a", scores={"reward": 1.0}), Response("b", meta={"unscored": {"reward": "timed out"}}),
                        Response("c", scores={"reward": math.nan}), Response("d", scores={"reward": 0.0})],
                  relevance=[3.0, 2.0, 1.0, 0.0])
    found, = select.scored(given)
    assert texts([found]) == [["a", "d"]] and found.relevance == [3.0, 0.0]
    with pytest.raises(ValueError, match="response 2 could not be scored by 'reward': timed out.*`scored` first"):
        select.best_worst(given)
    given.responses[1].meta.clear()
    with pytest.raises(KeyError, match="no score 'reward'"):
        select.scored(given)
    with pytest.raises(KeyError, match="did you mean 'reward'"):
        select.scored(given, score="rewrd")
    assert select.scored(Group("?", [Response("c", scores={"reward": math.inf})])) == []


def test_wins_follow_the_responses_that_stay():
    given = Group("?", [Response(t, scores={"reward": float(t == "b")}) for t in "abab"],
                  wins=[[0.5, 0.1, 0.2, 0.3], [0.9, 0.5, 0.4, 0.6], [0.8, 0.6, 0.5, 0.7], [0.7, 0.4, 0.3, 0.5]])
    assert select.distinct(given)[0].wins == [[0.5, 0.1], [0.9, 0.5]]
    assert select.at_least(given, least=1)[0].wins == [[0.5, 0.6], [0.4, 0.5]]


def test_distinct_compares_messages_as_a_whole():
    turns = [[{"role": "assistant", "content": "a"}], [{"content": "a", "role": "assistant"}], "a"]
    assert len(select.distinct(Group("?", [Response(t) for t in turns]))[0].responses) == 2


def test_pass_rate_keeps_a_band():
    binary = [group(*map(float, bits), texts=["a", "b", "c", "d"]) for bits in itertools.product((0, 1), repeat=4)]
    found = [g for one in binary for g in select.pass_rate(one, low=0.25, high=0.5)]
    assert len(found) == 4 + 6 and {g.meta["pass_rate"] for g in found} == {0.25, 0.5}
    assert len([g for one in binary for g in select.spread(one)]) == 14
    for low, high in ((0.5, 0.2), (-0.1, 1), (0, 1.1)):
        with pytest.raises(ValueError, match="a share lies in"):
            select.pass_rate(binary[0], low=low, high=high)


def test_between_reads_a_number():
    given = group(1.0, difficulty=0.5, place="x.jsonl:3")
    assert select.between(given, low=0.5) == select.between(given, high=0.5) == [given] and select.between(given, low=0.6) == []
    for meta, said in (({"dificulty": 1.0}, "x:1: its meta has no 'difficulty', did you mean 'dificulty'"),
                       ({"difficulty": "hard"}, "difficulty = 'hard'"), ({"difficulty": math.nan}, "no finite number")):
        with pytest.raises(ValueError, match=said):
            select.between(group(1.0, place="x:1", **meta))


# ----------------------------------------------------------------------------------------------------------------- chance
def test_chance_depends_on_seed_rule_and_content():
    assert generator(0, "a", "x").random() == generator(0, "a", "x").random()
    assert len({generator(s, r, x).random() for s in (0, 1) for r in "ab" for x in "xy"}) == 8
    assert draw(some(0), 0, "a") != draw(some(1), 0, "a") and 0 <= draw(some(0), 0, "a") < 1
    orders = {tuple(shuffled(some(seed, size=3), 0, "a")[0]) for seed in range(60)}
    assert len(orders) == 6


def test_an_iterator_cannot_be_read_again():
    with pytest.raises(TypeError, match="give a list, or what data_tools.load returns"):
        again(iter([]))


# ------------------------------------------------------------------------------------------------------------------- page
def test_the_page_of_rules_is_up_to_date():
    assert (ROOT / "docs" / "data_rules.md").read_text(encoding="utf-8") == rules_page.page()


@pytest.mark.parametrize("name", select.__all__)
def test_every_setting_is_explained(name):
    function = getattr(select, name)
    lines = re.findall(r"^(\w+(?:, \w+)*) {2,}\S", inspect.getdoc(function), re.MULTILINE)
    explained = [name for line in lines for name in line.split(", ")]
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and p.name not in ("score",):
            assert p.name in explained, p.name
