"""R3 and persona faithfulness against their cards."""
import math
import random
import re

import numpy as np
import pytest

from data_tools.records import Group, Response
from rewards.base import ScoringError, rows_of, score, values_of
from rewards.persona import APC, apc, delta_apc, satisfied
from rewards.relevance import (
    R3,
    Tfidf,
    clean,
    constrained,
    length_incentive,
    linear,
    open_ended,
    relevance,
    repetition,
    tokens,
)


def words_of_rows(*rows, **settings):
    """R3 rewards of (prompt, response, fields)."""
    groups = [Group(prompt, [Response(text)], meta=fields) for prompt, text, fields in rows]
    return R3(**settings)(rows_of(groups))


def count(texts):
    """An encoder by hand: how often a, b and c occur; unnormalised."""
    return np.array([[t.count(x) for x in "abc"] for t in texts], dtype=float)


count.settings = lambda: {"encoder": "count"}
OPEN, CLOSED = {"query_type": "OPENENDED"}, {"query_type": "CONSTRAINED", "reference": "aab"}


# -------------------------------------------------------------------------------------------------------- pure functions
def test_hand_values_of_the_card():
    words = tokens("a b c a b c a b c")
    assert repetition(words) == 3 / 7 and length_incentive(words) == 0.09
    assert linear(3.5) == 5.12 and constrained(3.5, 1.0) == 5.12 and linear(0.0) == 0.0
    assert linear(7.0) == 10.24 and linear(-3.5) == -5.12                   # no clipping
    assert open_ended(0.09, 2.0, 3 / 7) == pytest.approx(0.09 * 2 * 3 / 7, rel=1e-15)


@pytest.mark.parametrize("text", ["", "a", "a b"])
def test_fewer_than_three_tokens_do_not_repeat(text):
    assert repetition(tokens(text)) == 1.0


def test_trigrams_against_a_row_loop():
    r = random.Random(0)
    for _ in range(50):
        words = r.choices("abAB", k=r.randint(3, 30))
        seen = []
        for i in range(len(words) - 2):
            if words[i:i + 3] not in seen:
                seen.append(words[i:i + 3])
        assert repetition(words) == len(seen) / (len(words) - 2)


def test_a_text_twice_has_twice_the_length_and_half_the_factor():
    text = " ".join(f"w{i}" for i in range(300))
    once, twice = tokens(text), tokens(text + " " + text)
    assert length_incentive(twice) == 2 * length_incentive(once)
    assert repetition(twice) == 300 / 598                       # 298 distinct and 2 across the seam, of 598


@pytest.mark.parametrize("text, left", [
    ("\n yes \n", "yes"), ("yes\n\n\n\nno", "yes"), ("yes\n\n--no", "yes"), ("yes\n\n____", "yes"), ("yes\n\n___", "yes\n\n___"),
    ("yes Human: no", "yes"), ("Assistant: yes", ""), ("a\n\n--b\n\n\n\nc", "a"), ("\tyes", "\tyes"), ("", "")])
def test_clean(text, left):
    assert clean(text) == left


def test_roles_are_plain_text_not_patterns():
    assert clean("a [x] b (user) c", roles=("(user)",)) == "a [x] b"


def test_tokens_against_the_pattern_of_the_card():
    text = "Well... it's 3.5%—ok_1!"
    assert tokens(text) == re.compile(r"\w+|[^\w\s]+").findall(text) == \
        ["Well", "...", "it", "'", "s", "3", ".", "5", "%—", "ok_1", "!"]


# ------------------------------------------------------------------------------------------------------------ the reward
def test_forms_by_query_type():
    open_, closed = words_of_rows(("ab", "a b b", OPEN), ("zz", "a b b", CLOSED), encoder=count, span=3.5)
    assert open_ == pytest.approx(0.03 * 3, rel=1e-12)                      # <(1,1,0), (1,2,0)> = 3
    assert closed == pytest.approx(4 / 3.5 * 5.12, rel=1e-12)               # <(2,1,0), (1,2,0)> = 4, no length


def test_switches():
    row_open, row_closed = ("ab", "a b b a b b", OPEN), ("ab", "a b b a b b", CLOSED)
    factor, rel, ref = 3 / 4, 6.0, 8.0
    def value(row, **settings):
        return pytest.approx(words_of_rows(row, encoder=count, span=3.5, **settings)[0], rel=1e-12)
    assert value(row_open) == 0.06 * rel * factor and value(row_closed) == ref / 3.5 * 5.12 * factor
    assert value(row_open, by_length=False) == rel * factor and value(row_closed, by_length=False) == ref / 3.5 * 5.12 * factor
    assert value(row_open, by_repetition=False) == 0.06 * rel and value(row_closed, by_repetition=False) == ref / 3.5 * 5.12
    assert value(row_closed, branching=False) == 0.06 * rel * factor
    for row in (row_open, row_closed):                                      # without relevance branching has no effect
        assert words_of_rows(row, by_relevance=False)[0] == pytest.approx(0.06 * factor, rel=1e-12)


def test_factors_are_logged_raw():
    reward = R3(count, span=3.5, by_repetition=False)
    found, = reward.factors(rows_of([Group("a", [Response("a b c a b c a b c")], meta=OPEN)]))
    assert found == {"length": 0.09, "repetition": 3 / 7, "relevance": 3.0, "reward": pytest.approx(0.27)}


def test_edges():
    empty, = words_of_rows(("ab", "", OPEN), encoder=count, span=1)
    assert empty == 0.0
    backward = lambda texts: np.array([[-1.0] if t == "q" else [1.0] for t in texts])
    short, looping = words_of_rows(("q", "a b c d", OPEN), ("q", "a a a a", OPEN), encoder=backward, span=1)
    assert short < looping < 0                                              # repetition shrinks a negative reward


def test_relevance_sees_the_raw_response_and_length_the_clean_one():
    found, = R3(count, span=1).factors(rows_of([Group("c", [Response("a b\n\n--\nc c")], meta=OPEN)]))
    assert found["relevance"] == 2.0 and found["length"] == 0.02


@pytest.mark.parametrize("fields, message", [
    ({}, "query_type"), ({"query_type": "OPENEND"}, "did you mean 'OPENENDED'"), ({"query_type": "CONSTRAINED"}, "'reference'")])
def test_rows_without_a_label_are_errors_of_their_own(fields, message):
    rows = rows_of([Group("a", [Response("a")], meta=fields), Group("a", [Response("a")], meta=OPEN)])
    wrong, right = values_of(R3(count, span=1), rows, "mark")
    assert message in str(wrong) and right == 0.01
    assert R3(count, branching=False)(rows) == [0.01, 0.01]


def test_an_encoder_is_asked_for():
    with pytest.raises(ValueError, match="give corpus="):
        R3()
    with pytest.raises(ValueError, match="needs span="):
        R3(count)
    with pytest.raises(ImportError, match="pip install"):
        R3(model="no/model")


# ----------------------------------------------------------------------------------------------------------------- TF-IDF
CORPUS = ["the red fox jumps", "the blue sky", "a fox in the snow", "rain and snow fall"]


def test_tfidf_lies_in_the_unit_range_and_knows_itself():
    encoder = Tfidf(CORPUS)
    found = encoder(CORPUS)
    assert relevance(found, found) == pytest.approx(np.ones(4), abs=1e-12)
    cross = relevance(found[[0, 0, 1]], found[[2, 3, 3]])
    assert 0 < cross[0] < 1 and cross[1] == cross[2] == 0.0
    assert relevance(found, found).tolist() == pytest.approx(relevance(found.toarray(), found.toarray()).tolist(), abs=1e-15)
    assert encoder.settings() == Tfidf(CORPUS).settings() != Tfidf(CORPUS[:3]).settings()


def test_span_one_makes_the_best_constrained_reward_the_top():
    found, = words_of_rows(("q", "red fox", {"query_type": "CONSTRAINED", "reference": "red fox"}), corpus=CORPUS, top=512)
    assert found == pytest.approx(5.12, rel=1e-12)


def test_a_corpus_may_be_a_file(tmp_path):
    from data_tools.formats import dump
    dump([Group("red fox", [Response("blue sky")])], tmp_path / "c.jsonl")
    assert sorted(Tfidf(str(tmp_path / "c.jsonl")).vectorizer.vocabulary_) == ["blue", "fox", "red", "sky"]


def test_best_of_n_on_bare_relevance_copies_and_on_r3_it_does_not():
    """The claim small: relevance alone picks the copied query, length alone the long off-topic text, the product a long
    text on the topic without loops."""
    query = "why do leaves turn red in autumn"
    on = "leaves hold green dye in summer . in autumn the tree stops making it , so yellow and red dyes that were there show . " \
         "cold nights turn leaves red sooner"
    texts = {"copy": query, "off": " ".join(f"word{i}" for i in range(60)), "loop": (query + " ") * 3, "on": on}
    group = Group(query, [Response(t) for t in texts.values()], meta=OPEN)
    encoder = Tfidf([query, on, *CORPUS])
    def best(**settings):
        return max(zip(R3(encoder, **settings)(rows_of([group])), texts, strict=True))[1]
    bare = R3(encoder, by_length=False, by_repetition=False)(rows_of([group]))
    assert bare[0] == pytest.approx(max(bare), rel=1e-12)
    long_only = R3(by_relevance=False, by_repetition=False)(rows_of([group]))
    assert max(zip(long_only, texts, strict=True))[1] == "off"
    assert best() == "on"


# --------------------------------------------------------------------------------------------------------------- persona
def test_apc_of_the_card():
    assert apc([0.5], [0.6], [0.2]) == 0.7 and delta_apc([0.5], [0.6], [0.2]) == pytest.approx(0.2, abs=1e-15)
    assert apc([], [], []) == delta_apc([], [], []) == 0.0
    assert satisfied(1, 1, 0) == satisfied(0, 0, 0) == 1 and satisfied(1, 0, 1) == satisfied(0, 1, 1) == 0


def test_apc_relations():
    r = random.Random(1)
    for _ in range(30):
        n = r.randint(1, 6)
        g, c = [r.random() for _ in range(n)], [r.random() / 2 for _ in range(n)]
        e = [r.random() * (1 - x) for x in c]
        assert delta_apc(g, e, c) == pytest.approx(apc(g, e, c) - sum(1 - x for x in g), abs=1e-12)
        assert apc(g, e, c) == pytest.approx(sum(map(satisfied, g, e, c)), abs=1e-12)
        assert delta_apc(g, [0] * n, [0] * n) == 0 and -n <= delta_apc(g, e, c) <= n
    assert delta_apc([0, 0], [0, 0], [1, 1]) == -2 and delta_apc([1, 1], [1, 1], [0, 0]) == 2


def rules(pairs):
    """Entailment by rule: 'x is 3' against a text that says 'x is ...'."""
    out = []
    for statement, text in pairs:
        subject, value = statement.split(" is ")
        said = re.search(rf"{subject} is (\w+)", text)
        out.append((0, 1, 0) if not said else (0, 0, 1) if said[1] == value else (1, 0, 0))
    return out


def about(pairs):
    return [float(s.split(" is ")[0] in q) for s, q in pairs]


def test_apc_as_a_reward():
    persona = ["hair is red", "home is mars", "pet is cat"]
    group = Group("what about your hair", [Response(t) for t in ("hair is red", "hair is blue", "hm", "hair is red, pet is dog")],
                  meta={"statements": persona})
    score([group], [APC(rules, about)])
    assert [r.scores["apc"] for r in group.responses] == [1.0, 0.0, 0.0, 0.0]
    score([group], {"plain": APC(rules, about, delta=False)})
    assert [r.scores["plain"] for r in group.responses] == [3.0, 2.0, 2.0, 2.0]
    none = Group("q", [Response("a")], meta={"statements": []})
    assert APC(rules, about)(rows_of([none])) == [0.0]


def test_apc_refuses_bad_rows_and_models():
    group = Group("q", [Response("a")], meta={"statements": "hair is red"})
    with pytest.raises(ScoringError, match="'statements', a list of texts"):
        score([group], [APC(rules, about)])
    group.meta["statements"] = ["hair is red"]
    with pytest.raises(ScoringError, match="sum to 1"):
        score([group], [APC(lambda pairs: [(0.5, 0.5, 0.5)] * len(pairs), about)])


def test_a_classifier_of_pairs_maps_labels_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    from tiny_models import tokenizer as words
    from transformers import BertConfig, BertForSequenceClassification

    from rewards.persona import PairClassifier
    tokenizer = words()
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                        id2label={0: "entailment", 1: "neutral", 2: "contradiction"}, num_labels=3)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pairs = [("w1 w2", "w3"), ("w4", "w5 w6 w7 w8"), ("w1", "w1")]
    found = PairClassifier(str(tmp_path), ("contradict", "neutral", "entail"))(pairs)
    model = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    for pair, triple in zip(pairs, found, strict=True):
        with torch.no_grad():
            entailed, neutral, contradicted = model(**tokenizer(*pair, return_tensors="pt")).logits[0].softmax(-1).tolist()
        assert triple == pytest.approx([contradicted, neutral, entailed], abs=1e-6) and math.isclose(sum(triple), 1, rel_tol=1e-6)
    with pytest.raises(ValueError, match="do not tell which is which"):
        PairClassifier(str(tmp_path), ("yes",))
