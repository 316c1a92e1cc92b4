"""Which training pairs mislead a reward model: leaving out, steps, planted flips; from the command line, by models and words."""
import doctest
import random
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from data_tools.formats import dump, load
from data_tools.labels import flip
from data_tools.pipeline.config import make
from data_tools.pipeline.driver import build
from data_tools.quality import findings, noise
from data_tools.quality import influence as module
from data_tools.quality.influence import bradley_terry, differences, gradient_dot, influence, ranked, self_influence
from data_tools.records import Group, Response
from prefopt import cli, doctor
from rewards import trained
from rewards.base import rows_of

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("an", "er", "iol", "ust")]


def test_doctests():
    assert doctest.testmod(module).failed == 0


# ---------------------------------------------------------------------------------------------------------- by numbers
@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=5)
    d = rng.normal(size=(300, 5))
    d *= np.where(rng.random(300) < 1 / (1 + np.exp(-d @ truth)), 1, -1)[:, None]
    query = rng.normal(size=(50, 5))
    return d, query * np.sign(query @ truth)[:, None]


def test_bradley_terry_is_the_minimum(head):
    d, _ = head
    w = bradley_terry(d, ridge=2.0)
    slope = -d.T @ (1 / (1 + np.exp(d @ w))) + 2.0 * w
    assert np.abs(slope).max() < 1e-4


def test_influence_is_leaving_out(head):
    d, query = head
    w, loss = bradley_terry(d), lambda w: np.logaddexp(0, -query @ w).mean()
    predicted = influence(d, query, w)[:60]
    actual = np.array([loss(w) - loss(bradley_terry(np.delete(d, n, 0))) for n in range(60)])
    slope = predicted @ actual / (predicted @ predicted)
    assert np.corrcoef(predicted, actual)[0, 1] > 0.99 and 0.9 < slope < 1.1


def test_gradient_dot_is_a_step(head):
    d, query = head
    w, loss = np.full(5, 0.2), lambda w: np.logaddexp(0, -query @ w).mean()
    h = 1e-5
    for n, found in enumerate(gradient_dot(d, query, w)[:10]):
        step = h * d[n] / (1 + np.exp(d[n] @ w))               # minus the gradient of the pair's loss
        assert (loss(w + step) - loss(w - step)) / (2 * h) == pytest.approx(found, rel=1e-6)


def test_influence_with_much_damping_is_the_gradient_dot(head):
    d, query = head
    w = bradley_terry(d)
    assert influence(d, query, w, ridge=1e9) * 1e9 == pytest.approx(gradient_dot(d, query, w), rel=1e-5)


def test_diagnostics_find_flips():
    """The card's claim: of 10 % flips the top fifth has at least 60 %, by harm to a clean set, own influence and plain loss."""
    rng = np.random.default_rng(1)
    truth, d = rng.normal(size=8), rng.normal(size=(1000, 8))
    d *= np.sign(d @ truth)[:, None]
    flipped = rng.random(1000) < 0.1
    d[flipped] *= -1
    clean = rng.normal(size=(200, 8))
    clean *= np.sign(clean @ truth)[:, None]
    w = bradley_terry(d)
    for score in (influence(d, clean, w), self_influence(d, w), -(d @ w)):
        assert flipped[np.argsort(-score)[:200]].sum() / flipped.sum() >= 0.6


def test_self_influence_is_that_of_the_own_loss(head):
    d, _ = head
    w = bradley_terry(d)
    own = [-influence(d, d[n:n + 1], w)[n] for n in range(5)]
    assert self_influence(d, w)[:5] == pytest.approx(own, rel=1e-9) and (self_influence(d, w) >= 0).all()


# ----------------------------------------------------------------------------------------------------------- from texts
@pytest.fixture
def place(tmp_path, monkeypatch):
    """Pairs whose better response has the better words, a fifth of them turned round; trusted ones; a reward model."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    worth = {w: rng.gauss(0, 1) for w in WORDS}
    pairs = []
    while len(pairs) < 400:
        said = [" ".join(rng.choices(WORDS, k=20)) for _ in range(2)]
        values = [sum(worth[w] for w in text.split()) for text in said]
        if abs(values[0] - values[1]) > 5:
            pairs.append(Group(" ".join(rng.choices(WORDS, k=8)), [Response(t) for t in said], values))
    dump(pairs[300:], "clean.jsonl")
    dump([*flip(pairs[:300], rate=0.2, seed=1), Group("which?", [Response("this"), Response("that")])], "pairs.jsonl")
    return tmp_path


def flipped(found) -> list[bool]:
    groups = list(load("pairs.jsonl"))
    return [groups[f.group - 1].meta["flipped"] for f in found if f.group]


def test_planted_flips_rank_high(place):
    """Of 20 % flips, the fifth that is listed holds at least 70 %: by harm to trusted pairs, own influence, and loss."""
    groups, trusted = load("pairs.jsonl"), load("clean.jsonl")
    for by in module.RANKINGS:
        summary, *found = ranked(groups, queries=trusted, by=by, most=60)
        assert summary.kind == "ranking" and len(found) == 60 and "of the 300 groups" in summary.message
        assert {f.kind for f in found} == {by.replace("_", " ")}
        assert sum(flipped(found)) / sum(g.meta.get("flipped", False) for g in groups) >= 0.7, by


def test_the_ranking_is_that_of_the_numbers(place):
    """Each value against the function on the features, the order, and how many do less harm."""
    groups, trusted = list(load("pairs.jsonl")), list(load("clean.jsonl"))
    features = module.word_features(groups, size=16)
    d, q = differences(groups, features), differences(trusted, features)
    assert d.shape == (300, 16) and q.shape == (100, 16)
    w = bradley_terry(d, ridge=2.0)
    harm = influence(d, q, w, ridge=2.0)
    _, *found = ranked(groups, queries=trusted, features=features, ridge=2.0, most=1000)
    assert [f.group for f in found] == [int(k) + 1 for k in np.argsort(-harm) if harm[k] > 0]
    assert [f.message.split()[-1] for f in found] == [f"{v:+.3g}" for v in sorted(harm, reverse=True) if v > 0]
    assert [f.sure for f in found] == [round(1 - n / 300, 3) for n in range(len(found))]
    turned = [Group(g.prompt, g.responses[::-1], g.relevance and g.relevance[::-1]) for g in groups]
    assert np.abs(differences(turned, features) - d).max() == 0


def test_few_pairs_have_few_directions(place):
    """Two pairs, of which one is the queries' enemy."""
    good, bad = [Response("fan ban"), Response("dust ban")], [Response("dust gan"), Response("fan gan")]
    groups = [Group("a", good, [1.0, 0.0]), Group("b", bad, [1.0, 0.0])]
    _, worst = ranked(groups, queries=groups[:1])
    assert (worst.group, worst.sure) == (2, 1.0)


def test_all_word_directions_are_the_word_model(place):
    """With as many directions as pairs the margins are those of a fit on the words themselves."""
    from scipy.special import expit
    groups = list(load("pairs.jsonl"))[:40]
    d = differences(groups, module.word_features(groups, size=40))
    order = [(0, 1) if g.relevance[0] > g.relevance[1] else (1, 0) for g in groups]
    texts = [g.responses[o[side]].text for side in (0, 1) for g, o in zip(groups, order, strict=True)]
    found = noise.tallied(texts)
    found = noise.weighed(found, noise.rarity(found))
    plain = (found[:40] - found[40:]).toarray()
    plain = plain[:, np.abs(plain).sum(0) > 0]
    assert d @ d.T == pytest.approx(plain @ plain.T, abs=1e-5)
    w = bradley_terry(plain)
    assert d @ bradley_terry(d) == pytest.approx(plain @ w, abs=1e-4) and np.abs(w - plain.T @ expit(-plain @ w)).max() < 1e-3


# ------------------------------------------------------------------------------------------------------- a trained model
@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A reward model of random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification
    folder = tmp_path_factory.mktemp("model") / "rm"
    vocabulary = ["<pad>", "<eos>", "?", *WORDS]
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    Qwen2ForSequenceClassification(Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_labels=1, pad_token_id=0)).save_pretrained(folder)
    return folder


def test_a_score_is_the_weight_times_the_state(place, model):
    from safetensors.torch import load_file
    reader = trained.load(str(model))
    rows = rows_of(list(load("clean.jsonl"))[:9])
    weight = load_file(model / "model.safetensors")["score.weight"].double().numpy()
    assert (reader.states(rows) @ weight[0]).tolist() == pytest.approx(reader(rows), abs=1e-5)
    assert trained.features(str(model))([(rows[3].group, 1)]) == pytest.approx(reader.states([rows[3]]), abs=1e-6)


def test_a_model_without_such_a_head(place):
    with pytest.raises(ValueError, match="has no head that grades whole responses"):
        start = doctor.tiny(place / "tiny")
        trained.features(start, recipe="dpo", reference=start)([])


# ---------------------------------------------------------------------------------------------------- the command line
def prefopt(*arguments):
    result = CliRunner().invoke(cli.app, ["data", *map(str, arguments)], env={"COLUMNS": "100"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def test_the_command_ranks_and_its_findings_are_mended(place):
    """By the words: as the function, flips first; turned back by `fix` and shown by `view`."""
    code, said = prefopt("influence", "pairs.jsonl", "--queries", "clean.jsonl", "--most", "40")
    assert code == 0 and "of the 300 groups" in said and "all findings are in influence.jsonl" in said
    found = list(findings.load("influence.jsonl"))
    assert found == list(ranked(load("pairs.jsonl"), queries=load("clean.jsonl"), most=40))
    assert sum(flipped(found)) >= 30
    code, said = prefopt("fix", "pairs.jsonl", "mended.jsonl", "--findings", "influence.jsonl", "--repair", "influence=flip",
                         "--sure", "0.9")
    assert code == 0 and "flip: 31 groups" in said            # 1 - 30 / 300 is the last one
    before, after = (list(load(name)) for name in ("pairs.jsonl", "mended.jsonl"))
    turned = {n for n, (a, b) in enumerate(zip(before, after, strict=True), 1) if a.relevance != b.relevance}
    assert turned == {f.group for f in found[1:32]}
    code, said = prefopt("view", "pairs.jsonl", "--findings", "influence.jsonl", "-o", "view.html")
    assert code == 0 and "changes the mean loss of the queries by" in Path("view.html").read_text()


def test_the_command_with_a_model(place, model):
    """Without queries the ranking is by loss; a pipeline's stage writes the same, and `fix` is given it."""
    code, said = prefopt("influence", "pairs.jsonl", "--model", model, "-o", "loss.jsonl", "--most", 9)
    assert code == 0 and "a head on 16 features" in said and "loss: 9 (repair: drop)" in said
    features = trained.features(str(model))
    d = differences(load("pairs.jsonl"), features)
    loss = np.logaddexp(0, -d @ bradley_terry(d))
    _, *found = findings.load("loss.jsonl")
    assert [f.group for f in found] == (np.argsort(-loss)[:9] + 1).tolist()
    assert [f.message for f in found] == [f"its loss is {v:.3g}" for v in sorted(loss, reverse=True)[:9]]
    plan = {"source": "pairs.jsonl", "out": "out", "cache": "cache", "stages": [
        {"influence": {"model": str(model), "most": 9}}, {"fix": {"repairs": {"loss": "drop"}, "sure": 0}}]}
    steps = build(make(plan)).steps
    assert list(findings.load("out/findings.jsonl"))[1:] == found and steps[2].groups == [301, 292]


def test_mistakes(place, model):
    assert "did you mean 'influence'" in prefopt("influence", "pairs.jsonl", "--by", "influenc")[1]
    assert "name these (queries), or rank by loss" in prefopt("influence", "pairs.jsonl", "--by", "gradient_dot")[1]
    dump([Group("q", [Response("a"), Response("b")])], "bare.jsonl")
    code, said = prefopt("influence", "pairs.jsonl", "--queries", "bare.jsonl")
    assert code == 2 and "no group has a preferred response" in said
    assert "no group has a preferred response" in prefopt("influence", "bare.jsonl")[1]
    dump([Group("q", [Response("a"), Response("b")], [1.0, 0.0])], "strange.jsonl")
    assert "no two responses of the 1 groups share a word" in prefopt("influence", "strange.jsonl")[1]
    assert "ridge should be above 0" in prefopt("influence", "pairs.jsonl", "--ridge", 0)[1]
    with pytest.raises(TypeError, match="reads the groups twice"):
        ranked(iter([]))
    assert "holds no model" in prefopt("influence", "pairs.jsonl", "--model", str(place))[1]
