"""Games: validation, equilibria against values known elsewhere, gaps, oracles, `prefopt play`."""
import json
import math

import numpy as np
import pytest
import torch
import yaml
from columns_for_tests import close, f64
from typer.testing import CliRunner

from data_tools.records import Group, Response
from prefopt.cli import app
from prefopt.games import exact, library, oracle, solve
from prefopt.games.game import Game, from_file
from prefopt.games.oracle import PreferenceOracle
from prefopt.games.play import iterations_shown
from prefopt.games.play import load as load_plan

SKEWED = {3: [3, 2, 1], 4: [4, 3, 2, 1]}
# game, reference, beta, the regularised equilibrium, to the digits of its source
KNOWN = [("rps", "skewed", 1.0, (.527264, .283277, .189459)), ("rps", "skewed", 0.1, (.393807, .270795, .335398)),
         ("weighted_rps", "uniform", 1.0, (.338643, .302488, .358869)),
         ("weighted_rps", "uniform", 0.1, (.212334, .261589, .526077)),
         ("rps_plus_dominated", "uniform", 0.1, (.327892, .327892, .327892, .016325)),
         ("rps_plus_dominated", "skewed", 0.1, (.378014, .284557, .331746, .005683)),
         ("bt3", "uniform", 0.1, (.891799, .089803, .018398)), ("rps", "uniform", 0.3, (1 / 3, 1 / 3, 1 / 3))]


def game(name: str, reference: str = "skewed") -> Game:
    found = getattr(library, name)()
    return found.with_reference(SKEWED[found.items]) if reference == "skewed" else found


# ------------------------------------------------------------------------------------------------------------ validation
@pytest.mark.parametrize("payoff, said", [
    ([[0.5, 0.7], [0.2, 0.5]], r"P\(0 beats 1\) = 0.7 and P\(1 beats 0\) = 0.2 do not sum to 1"),
    ([[0.5, 1.2], [-0.2, 0.5]], r"P\(0 beats 1\) = 1.2 is no probability"),
    ([[0.4, 0.7], [0.3, 0.5]], r"P\(0 beats 0\) = 0.4.*set the diagonal to 0.5"),
    ([[[0.5]], [[0.6]]], r"payoff of prompt 1: P\(0 beats 0\)"), ([[0.5, math.nan], [0.5, 0.5]], "is no probability"),
    ([[0.5, 0.5]], "a square matrix"), ([[0.5, 0.5], [0.5]], "a square table of numbers"), ([], "a square matrix"),
    ([["a", "b"], ["c", "d"]], "a square table of numbers")])
def test_bad_payoffs(payoff, said):
    with pytest.raises(ValueError, match=said):
        Game(payoff)


@pytest.mark.parametrize("reference, said", [([1, 0], "weight 1 is 0"), ([1, -1], "weight 1 is -1"), ([1, math.inf], "weight 1"),
                                             ([1, 2, 3], "each of 2 responses"), (["a", "b"], "a weight for each")])
def test_bad_references(reference, said):
    with pytest.raises(ValueError, match=said):
        Game([[0.5, 0.7], [0.3, 0.5]], reference)


def test_a_payoff_of_rounded_figures_is_made_antisymmetric():
    found = Game([[0.5, 0.3333333], [0.6666667, 0.5]]).payoff
    close(found + found.mT, torch.ones_like(found), 1e-15)


def test_from_file(tmp_path):
    path = tmp_path / "wins.csv"
    path.write_text(",dull,witty\ndull,0.5,0.2\nwitty,0.8,0.5\n")
    named = from_file(path)
    assert named.actions == ["dull", "witty"] and named.name == "wins"
    path.write_text("0.5,0.2\n0.8,0.5\n")
    assert from_file(path).actions == ["0", "1"] and torch.equal(from_file(path).payoff, named.payoff)
    path.write_text("dull,witty\n0.5,0.2\n0.8,0.5\n")
    assert from_file(path).actions == ["dull", "witty"]
    for text, said in (("0.5,0.2\n0.9,0.5\n", "wins.csv: payoff: P"), ("0.5,0.2\n0.8\n", "row 2 of the payoff"),
                       ("0.5,0.2\n0.8,x\n", "row 2 of the payoff"), ("", "wins.csv: payoff")):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            from_file(path)


# ------------------------------------------------------------------------------------------------------------- equilibria
@pytest.mark.parametrize("name, reference, beta, expected", KNOWN)
def test_known_regularised_equilibria(name, reference, beta, expected):
    here = game(name, reference)
    found = solve.equilibrium(here, beta)
    close(found[0], f64(expected), 1e-6)
    assert float(solve.residual(here, found.log(), beta)) < 1e-12
    assert abs(float(solve.regularised_gap(here, found, beta))) < 1e-12


@pytest.mark.parametrize("seed, beta", [(0, 1.0), (1, 0.1), (2, 0.03)])
def test_equilibria_against_the_extragradient_recursion(seed, beta):
    """The solver shares nothing with the recursion whose limit is the same policy."""
    here = library.random(items=7, seed=seed)
    P, ref, theta = here.payoff[0].numpy(), here.reference[0].numpy(), np.zeros(7)
    for _ in range(6000):
        theta = exact.egpo(theta, P, ref, beta=beta, eta=min(0.5, 0.9 / (1 + beta)))
    close(solve.equilibrium(here, beta)[0], torch.from_numpy(exact.policy(theta)), 1e-12)


def test_limits_of_the_equilibrium():
    """A heavy KL stays at the reference, a light one goes to the equilibrium without; linear payoffs are rewards."""
    here = game("weighted_rps")
    close(solve.equilibrium(here, 1e6), here.reference, 1e-6)
    close(solve.equilibrium(here, 1e-5), solve.nash(here), 1e-4)
    r, c, beta = f64([0.3, -0.2, 0.1]), 0.4, 0.05
    linear = Game(0.5 + c * (r[:, None] - r), SKEWED[3])
    close(solve.equilibrium(linear, beta), (linear.reference.log() + c * r / beta).softmax(-1), 1e-12)


@pytest.mark.parametrize("name, expected", [("rps", (1 / 3,) * 3), ("weighted_rps", (.125, .375, .5)), ("bt3", (1, 0, 0)),
                                            ("rps_plus_dominated", (1 / 3, 1 / 3, 1 / 3, 0)), ("five_cycle", (.2,) * 5)])
def test_known_equilibria_without_a_kl(name, expected):
    here = getattr(library, name)()
    found = solve.nash(here)
    close(found[0], f64(expected), 1e-12)
    assert abs(float(solve.duality_gap(here, found))) < 1e-12


def test_general_cycle():
    """P - 1/2 = [[0, a, -b], [-a, 0, c], [b, -c, 0]] has the equilibrium (c, b, a) / (a + b + c)."""
    close(solve.nash(library.cycle(a=0.1, b=0.2, c=0.3))[0], f64([3, 2, 1]) / 6, 1e-12)


def test_gaps_by_hand():
    """weighted_rps, uniform policy: q = (1.6, 1.2, 1.7)/3, so the gap is 2 (1.7/3) - 1 = 2/15, and exploitability half of it."""
    here, uniform = library.weighted_rps(), torch.full((3,), 1 / 3, dtype=torch.float64)
    close(solve.win_rates(here, uniform)[0], f64([1.6, 1.2, 1.7]) / 3, 1e-15)
    close(solve.duality_gap(here, uniform)[0], f64(2 / 15), 1e-15)
    close(solve.exploitability(here, uniform)[0], f64(1 / 15), 1e-15)


def test_both_forms_of_the_regularised_gap():
    """J(BR, pi) - J(pi, BR) from the payoffs themselves."""
    here, beta, pi = game("weighted_rps"), 0.3, f64([0.2, 0.5, 0.3])
    P, ref, best = here.payoff[0], here.reference[0], solve.best_response(here, f64([0.2, 0.5, 0.3]), 0.3)[0]

    def J(one, other):
        return one @ P @ other - beta * solve.kl(one, ref) + beta * solve.kl(other, ref)

    close(J(best, pi) + J(pi, best), f64(1.0), 1e-14)
    close(solve.regularised_gap(here, pi, beta)[0], J(best, pi) - J(pi, best), 1e-14)
    others = torch.rand(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert all(J(o / o.sum(), pi) <= J(best, pi) for o in others)


def test_more_items_than_the_solvers_take():
    here = Game(torch.full((513, 513), 0.5))
    for solver in (solve.nash, lambda g: solve.equilibrium(g, 0.1)):
        with pytest.raises(ValueError, match="takes up to 512 responses, found 513.*samples: 100"):
            solver(here)
    with pytest.raises(ValueError, match="beta must be a number greater than 0, found 0.*nash"):
        solve.equilibrium(library.rps(), 0.0)


# ---------------------------------------------------------------------------------------------------------------- oracles
def group(*texts, opponents=1, prompt="x") -> Group:
    mine = len(texts) - opponents
    return Group(prompt, [Response(t, train=n < mine) for n, t in enumerate(texts)], meta={"place": "file:3"})


def test_oracle_of_a_game():
    """Rock and scissors against paper: rock loses, scissors wins; the probe has no reward of its own."""
    scored, = oracle.from_game(library.rps())([group("rock", "scissors", "paper")])
    assert scored.wins == [[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]
    assert [r.scores for r in scored.responses] == [{"reward": 0.0}, {"reward": 1.0}, {}]


def test_whom_rewards_are_taken_against():
    """rock against scissors wins, against paper loses: 1/2 among others; of everyone, itself with 1/2, the same mean."""
    make = lambda against: oracle.from_game(library.weighted_rps(), against=against)
    rewards = lambda against: [r.scores["reward"] for r in make(against)([group("0", "1", "2", opponents=0)])[0].responses]
    assert rewards(oracle.others) == pytest.approx([(.9 + .2) / 2, (.1 + .6) / 2, (.8 + .4) / 2])
    assert rewards(oracle.everyone) == pytest.approx([(.5 + .9 + .2) / 3, (.1 + .5 + .6) / 3, (.8 + .4 + .5) / 3])


def test_mean_scores_sum_to_zero():
    """Log-odds are antisymmetric; with Bradley-Terry they are centred rewards."""
    of_length = oracle.bradley_terry(lambda prompt, text: float(len(text)), against=oracle.everyone, reward=oracle.mean_score)
    scored, = of_length([group("a", "bbb", "cc", opponents=0)])
    assert [r.scores["reward"] for r in scored.responses] == pytest.approx([-1.0, 1.0, 0.0], abs=1e-12)


def test_oracle_is_antisymmetric_whatever_answers():
    calls = []

    def judge(prompt, one, other):                            # prefers what it reads first, and longer texts
        calls.append((one, other))
        return min(1.0, 0.6 + 0.1 * (len(one) - len(other)))

    scored, = oracle.from_callable(judge)([group("aa", "b", "bbb")])
    wins = np.array(scored.wins)
    assert np.allclose(wins + wins.T, 1) and wins[0, 1] == pytest.approx(0.5 + 0.1)
    assert {("aa", "b"), ("b", "aa")} <= set(calls)


def test_oracle_with_unknown_answers():
    """One order is enough, none is None, and a response without a known comparison has no reward."""
    answers = [[None, 0.75, None], [None, None, 0.25], [None, None, None]]
    scored, = PreferenceOracle(lambda groups: [answers])([group("a", "b", "c")])
    assert scored.wins == [[None, 0.75, None], [0.25, None, 0.25], [None, 0.75, None]]
    assert [r.scores for r in scored.responses] == [{}, {"reward": 0.25}, {}]


def test_oracle_of_a_comparison():
    class Model:
        name = "gpm"

        def settings(self):
            return {"path": "here"}

        def compare(self, groups):
            return [[[0.5, 0.9], [0.1, 0.5]] for _ in groups]

    made = oracle.from_comparison(Model())
    assert (made.name, made.settings()) == ("gpm", {"path": "here", "against": "opponents", "reward": "mean_win"})
    scored, = made([group("a", "b")])
    assert scored.responses[0].scores == {"reward": 0.9}


@pytest.mark.parametrize("answers, said", [
    ([[[0.5, 1.2], [0.0, 0.5]]], r"file:3: the oracle 'oracle' says that response 1 beats response 2 with 1.2.*in \[0, 1\]"),
    ([[[0.5, math.nan], [0.0, 0.5]]], "with nan"), ([[[0.5, -3], [0.0, 0.5]]], "with -3"),
    ([[[0.5, 0.5]]], "2 x 2 numbers"), ([], "answered 0 of 1 groups")])
def test_oracle_refuses(answers, said):
    with pytest.raises(ValueError, match=said):
        PreferenceOracle(lambda groups: answers)([group("a", "b")])


def test_missing_opponents():
    with pytest.raises(ValueError, match="file:3 has no opponent among its 3 responses.*train False.*against=others"):
        oracle.from_game(library.rps())([group("rock", "rock", "paper", opponents=0)])
    with pytest.raises(ValueError, match="a single response that trains"):
        oracle.from_game(library.rps(), against=oracle.others)([group("rock", "paper")])
    with pytest.raises(ValueError, match="no action 'stone'.*actions: rock"):
        oracle.from_game(library.rps())([group("stone", "paper")])


def test_oracle_scores_an_on_policy_source():
    """The source's groups carry wins and rewards, and become relevance and wins of a batch, the probe in none of them."""
    from small_tokenizers import fast

    from data_tools.collate import collate
    from prefopt.rollout.sources import OnPolicy, Rollouts

    def sample(groups, keys, version):
        for g in groups:
            g.responses = [Response("rock"), Response("scissors"), Response("paper", train=False)]
        return groups

    source = OnPolicy([Group("play", [])], sample, oracle.from_game(library.rps()))
    tokenizer = fast()
    batch, _ = next(iter(Rollouts(source, lambda groups: collate(groups, tokenizer), 1, prompts=1, labels=True)))
    assert batch["reward"].tolist()[:2] == batch["relevance"].tolist()[:2] == [0.0, 1.0]
    assert batch["relevance"].isnan().tolist() == [False, False, True] and batch["train"].tolist() == [True, True, False]
    assert batch["wins"][0].tolist() == [[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]


# ------------------------------------------------------------------------------------------------------------------- play
def write(folder, **plan):
    path = folder / "game.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_play_prints_and_writes(tmp_path):
    path = write(tmp_path, game="rps", reference=[3, 2, 1], iterations=12, algorithms=["egpo", {"omd": {"eta": 0.25}}])
    out = cli("play", path, "-o", tmp_path / "page.html", "--json", tmp_path / "all.json")
    assert out.exit_code == 0, out.output
    assert "egpo" in out.output and "omd eta=0.25" in " ".join(out.output.split()) and "exploitability" in out.output
    found = json.loads((tmp_path / "all.json").read_text())
    assert len(found["algorithms"]["egpo"]["gap"]) == 13 and found["beta"] == 0.1
    theta, P, ref = np.log(np.array([3, 2, 1]) / 6), library.rps().payoff[0].numpy(), np.array([3, 2, 1]) / 6
    for policies in found["algorithms"]["egpo"]["policies"]:
        assert np.allclose(policies[0], exact.policy(theta), atol=1e-12)
        theta = exact.egpo(theta, P, ref, beta=0.1, eta=0.5)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<polyline") >= 8 and "scissors" in page and "src=" not in page and "http" not in page.split("</style>")[1]


def test_play_prints_json_alone(tmp_path):
    out = cli("play", write(tmp_path, payoff=[[0.5, 0.8], [0.2, 0.5]], iterations=2, algorithms=["egpo"]), "--json", "-")
    assert json.loads(out.stdout)["actions"] == ["0", "1"]


def test_page_of_two_prompts_and_hostile_names(tmp_path):
    payoff = [[[0.5, 0.9], [0.1, 0.5]], [[0.5, 0.2], [0.8, 0.5]]]
    path = write(tmp_path, payoff=payoff, actions=["<b>a</b>", "b"], iterations=3, algorithms=["egpo"])
    assert cli("play", path, "-o", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert "<b>a</b>" not in page and "&lt;b&gt;a" in page and "On the simplex" not in page and "of prompt 2" in page


def test_play_of_a_csv_beside_the_game_file(tmp_path):
    (tmp_path / "wins.csv").write_text("0.5,0.2\n0.8,0.5\n")
    out = cli("play", write(tmp_path, payoff="wins.csv", iterations=2, algorithms=["egpo"], samples=3, verdicts=True))
    assert out.exit_code == 0, out.output


def test_a_game_too_large_to_solve_is_drawn(tmp_path):
    """What the error advises works: samples, without an equilibrium to compare with."""
    plan = dict(game={"random": {"items": 513}}, iterations=2, algorithms=["egpo"])
    assert "samples: 100" in " ".join(cli("play", write(tmp_path, **plan)).stderr.split())
    out = cli("play", write(tmp_path, **plan, samples=2), "-o", tmp_path / "page.html", "--json", tmp_path / "all.json")
    assert out.exit_code == 0, out.output
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["nash"] is None and len(found["algorithms"]["egpo"]["gap"]) == 3
    assert "distance" not in (tmp_path / "page.html").read_text().split("</style>")[1]


@pytest.mark.parametrize("plan, said", [
    (dict(game="rsp"), "no part 'rsp', did you mean 'rps'"), (dict(), "give either `game`"),
    (dict(game="rps", payoff=[[0.5]]), "give either `game`"), (dict(game="rps", itertions=3), "did you mean 'iterations'"),
    (dict(game="rps", algorithms=["egop"]), "did you mean 'egpo'"),
    (dict(game="rps", algorithms=[{"egpo": {"lr": 1}}]), "'egpo' has no argument 'lr'"),
    (dict(game="rps", algorithms=[{"egpo": {"eta": -1}}]), "eta must be a number greater than 0"),
    (dict(game="rps", algorithms=["egpo", "egpo"]), "named twice"), (dict(game="rps", beta=0), "beta: .*greater than 0"),
    (dict(game="rps", iterations=0), "iterations: "), (dict(game="rps", verdicts=True), "set samples"),
    (dict(payoff=[[0.5, 0.7], [0.2, 0.5]]), r"P\(0 beats 1\) = 0.7"), (dict(game="rps", start=[1, 0, 0]), "weight 1 is 0"),
    (dict(payoff=torch.full((65, 65), 0.5).tolist()), "summing over all pairs takes up to 64 responses, found 65.*samples"),
    (dict(payoff="missing.csv"), "no payoff file"), (dict(game="rps", actions=["a"]), "3 different names")])
def test_bad_game_files(tmp_path, plan, said):
    path = write(tmp_path, **plan) if plan else tmp_path / "game.yaml"
    path.write_text("{beta: 0.1}") if not plan else None
    out = cli("play", path)
    assert out.exit_code == 2
    with pytest.raises(ValueError, match=said):
        from prefopt.games.play import run
        run(load_plan(path))


@pytest.mark.parametrize("text, said", [("- a", "holds keys"), ("a: [", "not valid YAML")])
def test_files_that_are_no_games(tmp_path, text, said):
    (tmp_path / "game.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_plan(tmp_path / "game.yaml")
    with pytest.raises(ValueError, match="no game file"):
        load_plan(tmp_path / "other.yaml")


def test_iterations_shown():
    assert iterations_shown(1) == [0, 1] and iterations_shown(100) == [0, 1, 2, 5, 10, 20, 50, 100]
