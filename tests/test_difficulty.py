"""Difficulty: item response theory against quadrature of its own and in simulation, Glicko-2 against the published example."""
import copy
import csv
import doctest
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import expit, log_expit
from scipy.stats import norm, spearmanr
from typer.testing import CliRunner

from data_tools import difficulty, select
from data_tools.difficulty import WIDTH, Rating, glicko, glicko2, one_parameter, ratings, two_parameter
from data_tools.records import Group, Response
from prefopt import cli
from prefopt.rollout.orders import by_field

DATA = Path(__file__).parents[1].parent / "shared" / "data" / "alpaca_eval" / "preference_matrix.csv.gz"


def simulated(subjects, items, seed, *, spread=0.0, missing=0.2):
    """Responses with the truth behind them."""
    r = np.random.default_rng(seed)
    theta, b, log_a = r.normal(size=subjects), r.normal(size=items), spread * r.normal(size=items)
    y = (r.random((subjects, items)) < expit(np.exp(log_a) * (theta[:, None] - b))).astype(float)
    y[r.random(y.shape) < missing] = np.nan
    return y, theta, b, log_a


def objective(y, log_a, d, spread, *, n=None):
    """Minus log posterior of the items by adaptive quadrature over each subject's ability, in (log a, d = -a b)."""
    n = np.ones_like(y) if n is None else n
    total = 0.0
    for answers, times in zip(y, n, strict=True):
        def joint(x, answers=answers, times=times):
            z = np.exp(log_a) * x + d
            terms = np.where(np.isnan(answers), 0, times * (np.nan_to_num(answers) * log_expit(z)
                                                            + (1 - np.nan_to_num(answers)) * log_expit(-z)))
            return math.exp(terms.sum()) * norm.pdf(x)
        total -= math.log(quad(joint, -12, 12, epsabs=1e-13, limit=200)[0])
    prior = (d * np.exp(-log_a)) ** 2 / 2 + (log_a ** 2 / (2 * spread ** 2) + log_a if spread else 0)
    return total + prior.sum()


def test_doctests():
    found = doctest.testmod(difficulty)
    assert found.failed == 0 and found.attempted >= 8


# -------------------------------------------------------------------------------------------------- item response theory
@pytest.mark.parametrize("spread, shares", [(0.0, False), (0.5, False), (0.5, True)])
def test_the_fit_is_the_mode_and_its_errors_the_curvature_there(spread, shares):
    y, *_ = simulated(5, 2, 0, spread=spread)
    n = None
    if shares:                                                # shares of 3 answers
        n, y = np.full_like(y, 3.0), np.where(np.isnan(y), np.nan, (2 * y + 1) / 3)
    fit = two_parameter(y, counts=n, spread=spread) if spread else one_parameter(y, counts=n)
    d = -np.exp(fit.log_slope) * fit.difficulty
    best, step = objective(y, fit.log_slope, d, spread, n=n), 1e-3
    at = lambda i, da, dd: objective(y, fit.log_slope + da * np.eye(2)[i], d + dd * np.eye(2)[i], spread, n=n)
    for i in range(2):
        moves = [(0, step)] + ([(step, 0)] if spread else [])
        for da, dd in moves:
            up, down = at(i, da, dd), at(i, -da, -dd)
            assert up > best and down > best and abs(up - down) / (2 * step) < 1e-5               # a minimum
        dd2 = (at(i, 0, step) + at(i, 0, -step) - 2 * best) / step ** 2
        if not spread:
            assert fit.difficulty_error[i] == pytest.approx(dd2 ** -0.5, rel=1e-4)
            continue
        aa2 = (at(i, step, 0) + at(i, -step, 0) - 2 * best) / step ** 2
        ad = (at(i, step, step) - at(i, step, -step) - at(i, -step, step) + at(i, -step, -step)) / (4 * step ** 2)
        cov = np.linalg.inv([[aa2, ad], [ad, dd2]])
        slope = np.array([fit.difficulty[i] * -1, -np.exp(-fit.log_slope[i])])                   # of b = -d / a in (log a, d)
        assert fit.log_slope_error[i] == pytest.approx(cov[0, 0] ** 0.5, rel=1e-4)
        assert fit.difficulty_error[i] == pytest.approx((slope @ cov @ slope) ** 0.5, rel=1e-4)


def test_abilities_are_the_mean_and_spread_of_their_posterior():
    y, *_ = simulated(5, 4, 1)
    fit = one_parameter(y)
    for s, answers in enumerate(y):
        seen = ~np.isnan(answers)

        def joint(x, seen=seen, answers=answers):
            z = x - fit.difficulty[seen]
            return math.exp((answers[seen] * log_expit(z) + (1 - answers[seen]) * log_expit(-z)).sum()) * norm.pdf(x)
        z0, z1, z2 = (quad(lambda x, k=k: x ** k * joint(x), -12, 12, epsabs=1e-13)[0] for k in range(3))
        assert fit.ability[s] == pytest.approx(z1 / z0, abs=1e-7)
        assert fit.ability_error[s] == pytest.approx(math.sqrt(z2 / z0 - (z1 / z0) ** 2), rel=1e-5)


@pytest.mark.parametrize("subjects, items, spread", [(200, 100, 0.0), (200, 100, 0.5), (400, 20, 0.5), (50, 50, 0.0)])
def test_known_abilities_and_difficulties_are_within_their_intervals(subjects, items, spread):
    """95 % intervals, counted over five simulations with a fifth of the answers missing; how close the estimates come."""
    hits, close = [], []
    for seed in range(5):
        y, theta, b, log_a = simulated(subjects, items, seed, spread=spread)
        fit = two_parameter(y) if spread else one_parameter(y)
        hits.append([np.mean(abs(fit.ability - theta) < WIDTH * fit.ability_error),
                     np.mean(abs(fit.difficulty - b) < WIDTH * fit.difficulty_error),
                     np.mean(abs(fit.log_slope - log_a) <= WIDTH * fit.log_slope_error)])
        close.append([spearmanr(fit.ability, theta)[0], spearmanr(fit.difficulty, b)[0]])
    ability, item, slope = np.mean(hits, axis=0)
    assert 0.91 < ability < 0.98 and 0.90 < item < 0.99 and slope > 0.90
    if subjects == 200:
        assert np.mean(close, axis=0)[1] >= 0.95


def test_the_number_of_solvers_decides_difficulty_under_1pl():
    y, *_ = simulated(40, 8, 3, missing=0)
    y[:, 1] = np.random.default_rng(0).permutation(y[:, 0])                                    # other solvers, as many
    fit = one_parameter(y)
    assert fit.difficulty[1] == pytest.approx(fit.difficulty[0], abs=1e-5)
    solvers = y.sum(0)
    assert all((fit.difficulty[i] < fit.difficulty[j]) == (solvers[i] > solvers[j])
               for i in range(8) for j in range(8) if solvers[i] != solvers[j])
    assert abs(two_parameter(y).difficulty[1] - two_parameter(y).difficulty[0]) > 1e-2


def test_2pl_with_slopes_that_hardly_differ_is_1pl():
    y, *_ = simulated(30, 10, 4)
    one, two = one_parameter(y), two_parameter(y, spread=1e-4)
    assert np.allclose(two.difficulty, one.difficulty, atol=1e-3) and np.allclose(two.difficulty_error, one.difficulty_error,
                                                                                 rtol=1e-3)
    assert (one.log_slope == 0).all() and (one.log_slope_error == 0).all()


def test_items_of_no_information_are_finite_and_unanswered_ones_have_the_prior():
    y = np.array([[1, 0, np.nan, 1], [1, 0, np.nan, 0], [1, 0, np.nan, np.nan]])
    y = np.vstack([y, np.full(4, np.nan)])                                                    # a subject without answers
    for fit in (one_parameter(y), two_parameter(y)):
        assert all(np.isfinite(x).all() for x in fit)
        assert fit.difficulty[0] < -0.5 and fit.difficulty[1] > 0.5
        assert fit.difficulty[2] == pytest.approx(0, abs=1e-4)
        assert fit.ability[3] == pytest.approx(0, abs=1e-9) and fit.ability_error[3] == pytest.approx(1, rel=1e-6)
    assert one_parameter(y).difficulty_error[2] == pytest.approx(1, rel=1e-6)


def test_an_item_asked_twice_is_an_answer_that_counts_twice():
    y, *_ = simulated(20, 5, 5, missing=0)
    counts = np.ones_like(y)
    counts[:, 0] = 4
    assert one_parameter(y, counts=counts).difficulty_error[0] < 0.7 * one_parameter(y).difficulty_error[0]


@pytest.mark.parametrize("y, said", [
    ([[0.5, 1.5]], "found 1.5 of subject 0 on item 1"), ([1.0, 0.0], r"\(subjects, items\), found \(2,\)"), ([[]], "found"),
    ([[math.inf, 0.0]], "found inf of subject 0 on item 0")])
def test_what_is_no_response_matrix(y, said):
    for fit in (one_parameter, two_parameter, glicko):
        with pytest.raises(ValueError, match=said):
            fit(y)


def test_other_errors():
    with pytest.raises(ValueError, match="0 is one_parameter"):
        two_parameter([[1.0]], spread=0)
    with pytest.raises(ValueError, match="fit a sample of the items"):
        one_parameter(np.zeros((1, 100_000)))


# -------------------------------------------------------------------------------------------------------------- Glicko-2
def test_the_published_example():
    """Glickman's note: 1500/200/0.06 beats 1400/30, loses to 1550/100 and 1700/300, tau 0.5 -> 1464.06, 151.52, 0.05999."""
    found = glicko2(Rating(1500, 200, 0.06), [(Rating(1400, 30), 1), (Rating(1550, 100), 0), (Rating(1700, 300), 0)], tau=0.5)
    assert found.rating == pytest.approx(1464.05067, abs=1e-4)
    assert found.deviation == pytest.approx(151.51652, abs=1e-4)
    assert found.volatility == pytest.approx(0.05999598, abs=1e-8)


def test_a_big_surprise_raises_volatility_and_solves_its_equation():
    """The other branch, Delta^2 > phi^2 + v; the root of f of the note, checked where it was found."""
    before, games = Rating(1500, 50, 0.06), [(Rating(2100, 30), 1)] * 6
    after = glicko2(before, games)
    phi, g = 50 / 173.7178, 1 / math.sqrt(1 + 3 * (30 / 173.7178 / math.pi) ** 2)
    e = 1 / (1 + math.exp(g * 600 / 173.7178))
    v, delta = 1 / (6 * g * g * e * (1 - e)), (1 - e) / (g * e * (1 - e))
    assert delta ** 2 > phi ** 2 + v and after.volatility > 0.06
    x = math.log(after.volatility ** 2)
    f = math.exp(x) * (delta ** 2 - phi ** 2 - v - math.exp(x)) / (2 * (phi ** 2 + v + math.exp(x)) ** 2)
    assert f == pytest.approx((x - math.log(0.06 ** 2)) / 0.25, abs=1e-5)


def test_without_games_the_deviation_alone_grows():
    found = glicko2(Rating(1600, 100, 0.06), [])
    assert found == Rating(1600, 173.7178 * math.hypot(100 / 173.7178, 0.06), 0.06)


def test_opponents_far_away_are_no_trouble():
    for score in (0, 1):
        assert all(math.isfinite(x) for x in glicko2(Rating(), [(Rating(r), score) for r in (-20_000, 30_000)]))


def test_a_period_is_played_on_the_ratings_before_it():
    games = [("a", "b", 1.0), ("b", "c", 1.0), ("c", "a", 0.5)]
    found = ratings([games])
    assert found == ratings([games[::-1]])                                                    # order within it is nothing
    assert found["a"] == glicko2(Rating(), [(Rating(), 1.0), (Rating(), 0.5)])
    then = ratings([games, [("a", "b", 0.0)]])
    assert then["a"] == glicko2(found["a"], [(found["b"], 0.0)]) and then["c"] == glicko2(found["c"], [])


def test_a_matrix_is_a_tournament_of_items_and_subjects():
    y = np.array([[1.0, 0.0, np.nan], [1.0, 0.5, np.nan]])
    subjects, items = glicko(y)
    assert items[0] == glicko2(Rating(), [(Rating(), 0.0)] * 2) and items[2] == Rating()
    assert items[1] == glicko2(Rating(), [(Rating(), 1.0), (Rating(), 0.5)])
    assert subjects[0] == glicko2(Rating(), [(Rating(), 1.0), (Rating(), 0.0)])
    counted = glicko(y[:1], counts=np.full((1, 3), 2.0))[1]
    assert counted[0] == glicko2(Rating(), [(Rating(), 0.0)] * 2)
    assert glicko(y, periods=2)[1][0] == glicko2(glicko(y[:1])[1][0], [(Rating(), 0.0)])


def test_ratings_find_the_order_of_difficulty():
    y, _, b, _ = simulated(60, 40, 6)
    assert spearmanr([r.rating for r in glicko(y, periods=6)[1]], b)[0] > 0.9


# ----------------------------------------------------------------------------------------------------------------- groups
def answered(y, names="abcdefgh"):
    return [Group(f"prompt {i}", [Response("x", scores={"right": y[s, i]}, meta={"generator": names[s]})
                                  for s in range(len(y)) if not np.isnan(y[s, i])]) for i in range(y.shape[1])]


@pytest.mark.parametrize("rule, fit", [
    (select.by_irt, lambda y: one_parameter(y).difficulty), (select.by_irt_2pl, lambda y: two_parameter(y).difficulty),
    (select.by_glicko, lambda y: [r.rating for r in glicko(y)[1]])])
def test_difficulty_as_a_column_and_a_curriculum(rule, fit):
    y, *_ = simulated(8, 12, 7)
    groups = answered(y)
    before = copy.deepcopy(groups)
    found = list(rule(groups, score="right"))
    assert groups == before and [g.prompt for g in found] == [g.prompt for g in groups]
    want = np.array(fit(y))
    assert [g.meta["difficulty"] for g in found] == pytest.approx(want, abs=1e-6)
    assert all(g.meta["difficulty_low"] < g.meta["difficulty"] < g.meta["difficulty_high"] for g in found)
    easy_first = by_field(field="difficulty")(found, 0, 0)
    assert want[easy_first].tolist() == sorted(want)
    assert len([g for one in found for g in select.between(one, low=np.median(want))]) == 6


def test_several_answers_of_one_model_count_as_several():
    groups = [Group(str(i), [Response("", scores={"reward": float(k < i)}, meta={"generator": "m"}) for k in range(4)])
              for i in range(5)]
    y, n, names = difficulty.response_matrix(groups, score="reward", subject="generator")
    assert y.tolist() == [[0.0, 0.25, 0.5, 0.75, 1.0]] and n.tolist() == [[4.0] * 5] and names == ["m"]
    found = [g.meta["difficulty"] for g in select.by_irt(groups)]
    assert found == sorted(found, reverse=True)


def test_errors_of_groups():
    groups = answered(simulated(3, 4, 0)[0])
    with pytest.raises(KeyError, match="no score 'reward'"):
        select.by_irt(groups)
    with pytest.raises(KeyError, match="has no 'model' in its meta"):
        select.by_glicko(groups, score="right", subject="model")
    with pytest.raises(TypeError, match="reads the groups twice"):
        select.by_irt(iter(groups))
    with pytest.raises(ValueError, match="no responses to learn difficulty from"):
        select.by_irt([Group("?", [])])
    groups[1].responses[0].scores["right"] = 7.0
    with pytest.raises(ValueError, match="threshold or rescale"):
        select.by_irt(groups, score="right")


@pytest.mark.skipif(not DATA.exists(), reason="the shared data are not here")
def test_difficulty_of_alpaca_eval_holds_for_other_models():
    """Fitted on half of the models, against the other half's mean preference for each prompt."""
    with gzip.open(DATA, "rt") as stream:
        p = np.array([[float(x) if x else np.nan for x in row[1:]] for row in list(csv.reader(stream))[1:]])
    r, found = np.random.default_rng(0), []
    for _ in range(2):
        order = r.permutation(len(p))
        fitted, target = p[order[:14]], -np.nanmean(p[order[14:]], axis=0)
        won = np.where(np.isnan(fitted), np.nan, fitted > 0.5)
        found.append([spearmanr(x, target)[0] for x in (one_parameter(fitted).difficulty, one_parameter(won).difficulty,
                                                        [r.rating for r in glicko(won)[1]])])
    soft, hard, rated = np.mean(found, axis=0)
    assert soft > 0.6 and hard > 0.55 and rated > 0.55 and soft > hard


# ------------------------------------------------------------------------------------------------------ files and tables
def command(*arguments):
    result = CliRunner().invoke(cli.app, ["data", "difficulty", *map(str, arguments)], env={"COLUMNS": "100"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def lines(name) -> list[str]:
    return Path(name).read_text().splitlines()


@pytest.fixture
def matrix(tmp_path, monkeypatch):
    """Six models, five items, and one answer that is missing; as a file, and as numbers."""
    monkeypatch.chdir(tmp_path)
    y = simulated(6, 5, 3, missing=0)[0]
    y[2, 1] = np.nan
    rows = [["model", *(f"i{k}" for k in range(5))], *([f"m{s}", *("" if np.isnan(v) else v for v in y[s])] for s in range(6))]
    with open("y.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    with open("turned.csv", "w", newline="") as file:
        csv.writer(file).writerows(zip(*rows, strict=True))
    return y


@pytest.mark.parametrize("by, able, hard", [
    ("irt", lambda y: one_parameter(y)[:2], lambda y: one_parameter(y)[2:4]),
    ("irt_2pl", lambda y: two_parameter(y)[:2], lambda y: two_parameter(y)[2:4]),
    ("glicko", *(lambda y, side=side: [[r[k] for r in glicko(y)[side]] for k in (0, 1)] for side in (0, 1)))])
def test_the_table_of_a_matrix_is_that_of_the_functions(matrix, by, able, hard):
    code, said = command("y.csv", "--by", by, "-o", "t.jsonl", "--show", "1")
    assert code == 0 and "6 subjects from" in said and "5 items from" in said and "the table is t.jsonl" in said
    rows = [json.loads(line) for line in lines("t.jsonl")]
    for kind, (values, errors), names in (("subject", able(matrix), [f"m{k}" for k in range(6)]),
                                          ("item", hard(matrix), [f"i{k}" for k in range(5)])):
        own = [row for row in rows if row["kind"] == kind]
        assert [r["name"] for r in own] == [names[k] for k in np.argsort(-np.array(values), kind="stable")]
        for name, value, error in zip(names, values, errors, strict=True):
            row = next(r for r in own if r["name"] == name)
            assert (row["estimate"], row["low"], row["high"]) == pytest.approx(
                (value, value - 1.959964 * error, value + 1.959964 * error), rel=1e-5)
            assert ("slope" in row) == (by == "irt_2pl" and kind == "item")
    second = next(r for r in rows if r["name"] == "m2")
    assert second["answers"] == 4 and second["share"] == pytest.approx(np.nanmean(matrix[2]))
    assert command("turned.csv", "--by", by, "--transpose", "-o", "u.jsonl")[0] == 0
    assert Path("t.jsonl").read_text() == Path("u.jsonl").read_text()
    assert command("y.csv", "--by", by)[0] == 0
    again = list(csv.DictReader(lines("difficulty.csv")))
    assert [(r["name"], float(r["high"])) for r in again] == [(r["name"], r["high"]) for r in rows]


def test_slopes_have_intervals_of_their_logarithm(matrix):
    command("y.csv", "--by", "irt_2pl", "-o", "t.jsonl")
    row = next(r for r in map(json.loads, lines("t.jsonl")) if r["name"] == "i3")
    fit = two_parameter(matrix)
    assert [math.log(row[key]) for key in ("slope_low", "slope", "slope_high")] == pytest.approx(
        [fit.log_slope[3] + k * 1.959964 * fit.log_slope_error[3] for k in (-1, 0, 1)], rel=1e-5)


def test_the_table_of_games_is_that_of_the_ratings(tmp_path, monkeypatch):
    """Two periods, whatever their order in the file; the published example is one of them."""
    monkeypatch.chdir(tmp_path)
    games = [("a", "b", 1.0, 2), ("a", "c", 0.5, 1), ("b", "c", 0.0, 1)]
    with open("games.csv", "w", newline="") as file:
        csv.writer(file).writerows([("player", "opponent", "score", "period"), *games])
    code, said = command("games.csv")
    want = ratings([[("a", "c", 0.5), ("b", "c", 0.0)], [("a", "b", 1.0)]])
    found = {r["name"]: r for r in csv.DictReader(lines("difficulty.csv"))}
    assert code == 0 and "3 players from" in said and {k: float(r["estimate"]) for k, r in found.items()} == {
        name: pytest.approx(r.rating, rel=1e-12) for name, r in want.items()}
    assert (found["a"]["kind"], found["a"]["answers"], float(found["a"]["share"])) == ("player", "2", 0.75)
    assert "games have players and no items" in command("games.csv", "--by", "irt")[1]


@pytest.mark.parametrize("text, said", [
    ("model,a\nm,2\n", "y.csv:2: a is '2', and should be a number from 0 to 1"),
    ("model,a\nm,yes\n", "y.csv:2: a is 'yes', and should be a number from 0 to 1"),
    ("model,a\nm,1\nm,0\n", "y.csv:3: the name 'm' (column 'model') comes twice"),
    ("model\nm\n", "y.csv holds no numbers"), ("", "y.csv holds no numbers"),
    ("player,opponent,score\na,b,\n", "y.csv:2: the game has no score"),
    ("player,opponent,score,period\na,b,1,one\n", "y.csv:2: period is 'one', and should be a number"),
    ("model,a\nm,1,0\n", "does not have the 2 cells of the header")])
def test_files_that_hold_neither(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "y.csv").write_text(text)
    code, found = command("y.csv")
    assert code == 2 and said in found and not (tmp_path / "difficulty.csv").exists()


def test_a_method_that_there_is_not(matrix):
    assert "found 'irt2', did you mean" in command("y.csv", "--by", "irt2")[1]
