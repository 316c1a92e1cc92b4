"""Learning in games: objectives and update rules on tables against updates in policy space, fixed points against the solver."""
import dataclasses
import gc

import numpy as np
import pytest
import torch
from columns_for_tests import close, f64, gradient_of, step, value_of

from data_tools import Batch
from prefopt import recipes
from prefopt.games import algorithms, exact, library, solve, study
from prefopt.games.game import Game
from prefopt.games.tabular import Algorithm, Draws, Table, mixture, play, reference, uniform
from prefopt.parts import from_spec, to_spec
from prefopt.references import Extrapolated, Moving
from prefopt.update import extragradient, look_ahead, plain

game = study.skewed


def numbers(here: Game) -> tuple[np.ndarray, np.ndarray]:
    return here.payoff[0].numpy(), here.reference[0].numpy()


def trajectory(update, theta, iterations: int) -> torch.Tensor:
    """Log-probabilities of an update in policy space, from theta on."""
    found = [theta]
    for _ in range(iterations):
        found.append(update(found[-1]))
    return torch.from_numpy(np.stack(found)).log_softmax(-1)


def last_gap(here: Game, logp: torch.Tensor, beta: float) -> float:
    return float(solve.regularised_gap(here, logp[-1].exp(), beta))


# ------------------------------------------------------------------------------ the losses follow the updates in policy space
@pytest.mark.parametrize("beta", [0.1, 0.01])
@pytest.mark.parametrize("name", ["rps", "weighted_rps", "rps_plus_dominated", "five_cycle"])
@pytest.mark.parametrize("algorithm", ["omd", "egpo", "nash_md"])
def test_gradient_steps_are_mirror_descent(algorithm, name, beta):
    here = game(name)
    P, ref = numbers(here)
    found = play(here, getattr(algorithms, algorithm)(here, beta=beta, eta=0.5), iterations=30)
    exactly = trajectory(lambda x: getattr(exact, algorithm)(x, P, ref, beta=beta, eta=0.5), np.log(ref), 30)
    close(found[:, 0], exactly, 1e-12)


def test_decaying_steps_are_those_of_nash_md():
    here = game("weighted_rps")
    P, ref = numbers(here)
    times = iter(range(100))

    def update(theta):
        c = 2 / (next(times) + 2)
        return exact.nash_md(theta, P, ref, beta=0.1, eta=c / 0.1)

    found = play(here, algorithms.nash_md_decaying(here, beta=0.1), iterations=30)
    close(found[:, 0], trajectory(update, np.log(ref), 30), 1e-12)


@pytest.mark.parametrize("algorithm", ["egpo", "nash_md"])
def test_prompts_do_not_mix(algorithm):
    """Two games in one batch go as each of them alone."""
    both = library.random(items=4, prompts=2, seed=1)
    found = play(both, getattr(algorithms, algorithm)(both, beta=0.2), iterations=10)
    for x in range(2):
        alone = Game(both.payoff[x], both.reference[x])
        close(found[:, x], play(alone, getattr(algorithms, algorithm)(alone, beta=0.2), iterations=10)[:, 0], 1e-12)


def test_start_away_from_the_reference():
    here, start = game("rps"), f64([[0.1, 0.1, 0.8]])
    P, ref = numbers(here)
    found = play(here, algorithms.egpo(here), iterations=10, start=start)
    close(found[:, 0], trajectory(lambda x: exact.egpo(x, P, ref, beta=0.1, eta=0.5), start[0].log().numpy(), 10), 1e-12)


def test_a_moving_reference_starts_where_the_policy_does():
    here, start = game("weighted_rps"), f64([[0.1, 0.1, 0.8]])
    P, _ = numbers(here)
    exactly = trajectory(lambda x: exact.mwu(x, P, eta=0.5), start[0].log().numpy(), 3)
    close(play(here, algorithms.dno(here, eta=0.5), iterations=3, start=start)[:, 0], exactly, 1e-8)


def test_inpo_solved_is_mirror_descent():
    """The population minimiser: log pi = (1 - eta beta) log pi_old + eta beta log ref + eta P pi_old."""
    for name, beta, eta in (("weighted_rps", 0.1, 0.5), ("rps", 0.4, 1.0), ("rps_plus_dominated", 0.2, 0.5)):
        here = game(name)
        P, ref = numbers(here)
        exactly = trajectory(lambda x, b=beta, e=eta, P=P, ref=ref: exact.omd(x, P, ref, beta=b, eta=e), np.log(ref), 8)
        close(play(here, algorithms.inpo(here, beta=beta, eta=eta), iterations=8)[:, 0], exactly, 1e-8)


def test_dno_solved_is_multiplicative_weights():
    for name in ("bt3", "weighted_rps"):
        here = game(name)
        P, ref = numbers(here)
        exactly = trajectory(lambda x, P=P: exact.mwu(x, P, eta=0.5), np.log(ref), 8)
        close(play(here, algorithms.dno(here, eta=0.5), iterations=8)[:, 0], exactly, 1e-8)


def test_sppo_solved_is_multiplicative_weights_up_to_log_z():
    """1/2 stands for log Z / eta, which by Hoeffding it is within eta / 8; the order of changes is that of win rates."""
    here = game("weighted_rps")
    P, ref = numbers(here)
    pi, q = here.reference[0], here.payoff[0] @ here.reference[0]
    for eta in (1.0, 0.1):
        log_z = float((pi.log() + eta * q).logsumexp(0))
        assert abs(log_z - eta / 2) <= eta ** 2 / 8
        change = (play(here, algorithms.sppo(here, eta=eta), iterations=1).diff(dim=0))[0, 0]
        assert torch.equal(change.argsort(), q.argsort())
        weights = torch.from_numpy(exact.mwu(np.log(ref), P, eta=eta)).log_softmax(-1) - pi.log()
        assert float((change - weights).abs().max()) < eta ** 2 / 8


def test_gpo_solved_is_multiplicative_weights_on_scores():
    """The score game is antisymmetric: mean 0, so that log Z is of second order; halving eta quarters what is left."""
    here = game("weighted_rps")
    S, pi = torch.logit(here.payoff[0]), here.reference[0]
    off = []
    for eta in (0.1, 0.05):
        change = play(here, algorithms.gpo(here, eta=eta), iterations=1).diff(dim=0)[0, 0]
        off.append(float((change - eta * S @ pi).abs().max()))
    assert off[0] < 0.1 ** 2 and 0.22 < off[1] / off[0] < 0.28


def test_gpo_offline_on_pairs_of_the_reference():
    """Weighted least squares with antisymmetric goals: log pi - log ref = S ref / beta + const."""
    here, beta = game("weighted_rps"), 0.7
    made = Algorithm(recipes.gpo_offline(beta=beta), first=reference, second=reference, steps=0)
    solved = play(here, made, iterations=1)[-1, 0]
    goal = here.reference[0].log() + torch.logit(here.payoff[0]) @ here.reference[0] / beta
    close(solved, goal.log_softmax(-1), 1e-8)


def test_accelerated_by_hand():
    """A fixed reward: log-odds of the solutions per unit of reward are 1, 2 + a, 3 + 2a + a^2, ...; a = 0.3 and 0.9."""
    here = Game(library.bradley_terry(rewards=(1.0, 0.0)).payoff)
    for alpha, gaps in ((0.3, (1, 2.3, 3.69, 5.107, 6.5321)), (0.9, (1, 2.9, 5.61, 9.049))):
        found = play(here, algorithms.apo_accel(here, eta=1.0, alpha=alpha), iterations=len(gaps))[:, 0]
        solved = (found[:-1, 0] - found[:-1, 1]) + 1.0        # each iteration solves for one unit more than it starts from
        close(solved, f64(gaps), 1e-6)
    slow = play(here, algorithms.iterative_dpo(here, eta=1.0), iterations=4)[:, 0]
    close(slow[:, 0] - slow[:, 1], f64([0, 1, 2, 3, 4]), 1e-6)
    close(slow, play(here, algorithms.apo_accel(here, eta=1.0, alpha=0.0), iterations=4)[:, 0], 1e-6)


def test_momentum_without_a_kl_diverges_faster():
    here = library.rps().with_reference([0.5, 0.3, 0.2])
    last = lambda alpha: play(here, algorithms.apo_accel(here, eta=0.1, alpha=alpha), iterations=30)[-1].exp()
    gap = {alpha: float(solve.duality_gap(here, last(alpha))) for alpha in (0.0, 0.5)}
    assert gap[0.5] > gap[0.0] + 0.1 > gap[0.0] > 0.2


# ------------------------------------------------------------------------------------------------------------ fixed points
def stationary(here: Game, algorithm: Algorithm, logp: torch.Tensor) -> float:
    """The largest component of the loss's gradient at a policy."""
    table = Table(here, algorithm, start=logp.exp())
    table.averaged = logp.clone().expand_as(table.averaged).clone()
    table.renew()
    table()
    return float(table.theta.grad.abs().max())


@pytest.mark.parametrize("name", ["weighted_rps", "rps_plus_dominated", "five_cycle"])
@pytest.mark.parametrize("algorithm", ["egpo", "omd", "online_ipo", "nash_ema"])
def test_the_equilibrium_is_stationary(algorithm, name):
    here = game(name)
    made = getattr(algorithms, algorithm)(here, beta=0.1)
    assert stationary(here, made, solve.equilibrium(here, 0.1).log()) < 1e-10
    assert stationary(here, made, here.reference.log()) > 1e-3


@pytest.mark.parametrize("algorithm", ["ipo_md", "nash_md_pg"])
def test_a_mixture_moves_the_fixed_point(algorithm):
    """c = 1/8 is stationary at softmax(log ref + P mix / beta), c = 0 at the equilibrium; they are apart."""
    here, make = game("weighted_rps"), getattr(algorithms, algorithm)
    biased = study.biased(here, 0.1, 0.125)
    assert stationary(here, make(here, c=0.125), biased.log()) < 1e-10
    assert stationary(here, make(here, c=0.0), solve.equilibrium(here, 0.1).log()) < 1e-10
    assert float((biased - solve.equilibrium(here, 0.1)).abs().max()) > 0.02


def test_constant_steps_of_nash_md_leave_a_bias():
    """The fixed point of eta beta = c is that of the mixture, and its error is linear in c."""
    here = game("weighted_rps")
    last = play(here, algorithms.nash_md(here, beta=0.1, eta=0.5), iterations=400)[-1, 0].exp()
    close(last, study.biased(here, 0.1, 0.05), 1e-8)
    bias = [float((study.biased(here, 0.1, c) - solve.equilibrium(here, 0.1)[0]).abs().max()) for c in (0.02, 0.01, 0.005)]
    assert 1.95 < bias[0] / bias[1] < 2.05 and 1.98 < bias[1] / bias[2] < 2.02


@pytest.mark.parametrize("algorithm, settings", [("online_ipo", {}), ("nash_md_pg", {"c": 0.0}), ("nash_ema", {"follow": 0.5})])
def test_gradient_descent_reaches_the_equilibrium(algorithm, settings):
    here = game("weighted_rps")
    found = play(here, getattr(algorithms, algorithm)(here, beta=0.3, **settings), iterations=200)[-1].exp()
    close(found, solve.equilibrium(here, 0.3), 1e-7)


def test_online_ipo_is_policy_gradient_in_self_play():
    """The gradient of online IPO is 4 / beta times that of the regularised win rate, so that their paths are the same."""
    here = game("rps_plus_dominated")
    paths = [play(here, made, iterations=25) for made in (algorithms.online_ipo(here), algorithms.nash_md_pg(here, c=0.0))]
    close(*paths, 1e-12)


@pytest.mark.slow
def test_adam_leaves_the_equilibrium():
    """Momentum and shrinking second moments: within 1e-9 of it after 1250 steps, away from it after 3000."""
    here = game("weighted_rps")
    made = dataclasses.replace(algorithms.nash_md_pg(here, c=0.0), optimizer=torch.optim.Adam, rate=lambda t: 0.01)
    distance = solve.kl(solve.equilibrium(here, 0.1), play(here, made, iterations=3000).exp())[:, 0]
    assert float(distance[1250]) < 1e-9 and float(distance[2500:].max()) > 1e-3


@pytest.mark.slow
def test_sampled_policy_gradient_comes_close():
    """Nash-MD-PG, c = 1/8, 64 groups a step, Adam at 0.01, 2000 steps: a gap below 0.02."""
    here = library.weighted_rps().with_reference([0.5, 0.3, 0.2])
    made = dataclasses.replace(algorithms.nash_md_pg(here), optimizer=torch.optim.Adam, rate=lambda t: 0.01)
    assert last_gap(here, play(here, made, iterations=2000, samples=64), 0.1) < 0.02


def test_online_dpo_on_bradley_terry_is_the_optimal_policy():
    """softmax(log ref + r / beta) is stationary whatever the responses' distribution; off by a little it is not."""
    here, beta = game("bt3"), 0.5
    best = here.reference.log() + f64([2.0, 1.0, 0.0]) / beta
    for made in (algorithms.online_dpo(here, beta=beta), algorithms.xpo(here, beta=beta, alpha=0.0)):
        assert stationary(here, made, best.log_softmax(-1)) < 1e-12
        assert stationary(here, made, (1.1 * best).log_softmax(-1)) > 1e-4


# ---------------------------------------------------------------------------------------------------- claims of the methods
# game, beta: updates of mirror descent, Nash-MD and EGPO until the gap is below 1e-6, None where it never is in 4000
RACES = {("rps", 0.1): (149, None, 97), ("weighted_rps", 0.1): (124, None, 112), ("rps", 0.01): (None, None, 468),
         ("weighted_rps", 0.01): (2310, 1745, 1031), ("rps_plus_dominated", 0.01): (None, None, 557)}


def race(algorithm: str, here: Game, beta: float) -> torch.Tensor:
    return solve.regularised_gap(here, study.path(here, algorithm, 4000, beta=beta, eta=0.5)[:, None], beta)[:, 0]


@pytest.mark.parametrize("name, beta", RACES)
def test_order_of_the_algorithms(name, beta):
    """The updates of EGPO, mirror descent and Nash-MD with a constant step until the gap is 1e-6, from the card."""
    here = game(name)
    gaps = [race(a, here, beta) for a in ("omd", "nash_md", "egpo")]
    first = tuple(map(study.first_below, gaps))
    assert first == RACES[name, beta]
    assert float(gaps[1][-1]) > 2e-5 and float(gaps[2][-1]) < 1e-6          # the floor of a bias, or a cycle; no floor
    if first[0] is None:
        assert float(gaps[0][-1]) > 0.1 and float(gaps[1][-1]) > 0.1


@pytest.mark.parametrize("name", ["rps", "weighted_rps", "rps_plus_dominated"])
def test_the_last_iterate_converges_linearly(name):
    """By the losses: log KL from the equilibrium falls on a line, at least as fast as (1 - eta beta)^t, to below 1e-6."""
    here, beta, eta = game(name), 0.1, 0.8
    logp = play(here, algorithms.egpo(here, beta=beta, eta=eta), iterations=160)
    distance = solve.kl(solve.equilibrium(here, beta), logp.exp())[:, 0]
    t, y = np.arange(20, 140), distance[20:140].log().numpy()
    slope, level = np.polyfit(t, y, 1)
    assert slope < np.log(1 - eta * beta) and np.abs(y - (slope * t + level)).max() < 1.0
    assert last_gap(here, logp, beta) < 1e-6 and float(distance[-1]) < 1e-6


def test_rates_are_those_of_the_theory():
    """Fitted slopes of log KL are below log(1 - eta beta) on every game, and near it: extragradient wastes little."""
    for _, eta, theory, measured in study.rates(etas=(0.5, 0.8)):
        assert 3.5 * theory < measured < theory, (eta, theory, measured)


def test_decaying_nash_md_keeps_its_bound():
    """KL(pi* || pi_T) <= 8 / (beta^2 (T + 1)) at every T, and below 1e-6 after 3000 steps."""
    here, beta = game("rps_plus_dominated"), 0.1
    P, ref = numbers(here)
    times = iter(range(4000))
    logp = trajectory(lambda x: exact.nash_md(x, P, ref, beta=beta, eta=2 / beta / (next(times) + 2)), np.log(ref), 3000)
    distance = solve.kl(solve.equilibrium(here, beta), logp.exp())
    assert bool((distance[1:] <= 8 / beta ** 2 / (torch.arange(1, 3001) + 1)).all()) and float(distance[-1]) < 1e-6


@pytest.mark.slow
def test_random_games():
    """Ten random games of ten responses, beta 0.01, the authors' rate: EGPO solves all of them, mirror descent does not."""
    rng, beta, done = np.random.default_rng(0), 0.01, {"egpo": [], "omd": []}
    for _ in range(10):
        upper = np.triu(rng.random((10, 10)), 1)
        here = Game(upper + np.tril(1 - upper.T, -1) + np.eye(10) / 2, np.exp(rng.standard_normal(10)))
        P, ref = numbers(here)
        for name, gaps in done.items():
            theta = np.log(ref)
            for _ in range(5000):
                theta = getattr(exact, name)(theta, P, ref, beta=beta, eta=4 * 0.02 / 10 / beta)
            gaps.append(float(solve.regularised_gap(here, torch.from_numpy(exact.policy(theta)), beta)))
    assert max(done["egpo"]) < 1e-6 < 0.1 < max(done["omd"])


def test_without_a_kl_only_averages_converge():
    """Rock, paper, scissors, eta 0.3: multiplicative weights spiral out, their average does not; extragradient converges."""
    P, ref, start = library.rps().payoff[0].numpy(), np.ones(3) / 3, np.log([0.5, 0.3, 0.2])
    gap = lambda policy: float(solve.duality_gap(library.rps(), policy))
    weights = trajectory(lambda x: exact.mwu(x, P, eta=0.3), start, 2000).exp()
    assert gap(weights[-1]) > 0.9 and gap(weights.mean(0)) < 0.02
    assert gap(trajectory(lambda x: exact.egpo(x, P, ref, beta=0.0, eta=0.3), start, 2000)[-1].exp()) < 1e-3


@pytest.mark.parametrize("algorithm", ["egpo", "omd"])
def test_noisy_oracles_leave_a_neighbourhood(algorithm):
    """64 pairs and verdicts of 0 or 1 per iteration: the last gaps stay far below the first."""
    here, beta = game("rps"), 0.5
    logp = play(here, getattr(algorithms, algorithm)(here, beta=beta, eta=0.1), iterations=120, samples=64, verdicts=True)
    gap = solve.regularised_gap(here, logp.exp(), beta)[:, 0]
    assert float(gap[-50:].mean()) < 0.2 * float(gap[0])


@pytest.mark.slow
def test_noise_does_not_undo_the_extragradient():
    """The last gaps of EGPO are not above those of mirror descent by 10 %, and fall with the variance of the samples."""
    gap = {(name, count): g for name, count, g in study.noise((30, 300), iterations=400)}
    for count in (30, 300):
        assert gap["egpo", count] < 1.1 * gap["omd", count]
    assert 0.05 < gap["egpo", 300] / gap["egpo", 30] < 0.2


def test_better_every_iteration_where_nothing_cycles():
    """DNO on Bradley-Terry: the win rate against the first policy rises with every iteration."""
    here = game("bt3")
    pi = play(here, algorithms.dno(here, eta=1.0), iterations=10)[:, 0].exp()
    rate = pi @ here.payoff[0] @ here.reference[0]
    assert bool((rate.diff() > 0).all()) and float(rate[0]) == pytest.approx(0.5)


# ----------------------------------------------------------------------------------------- expectations, and what is sampled
@pytest.mark.parametrize("algorithm", ["egpo", "online_ipo", "nash_md_pg", "sppo", "xpo"])
@pytest.mark.parametrize("verdicts", [False, True])
def test_samples_have_the_gradient_of_the_sum(algorithm, verdicts):
    """The mean gradient over many draws is that over all pairs with their probabilities, within five standard errors."""
    here = game("weighted_rps")
    made, start = getattr(algorithms, algorithm)(here), f64([[0.2, 0.5, 0.3]])
    summed = Table(here, made, start=start)
    summed.renew()
    summed()
    table, found = Table(here, made, start=start, draws=Draws(400, verdicts, torch.Generator().manual_seed(0))), []
    for _ in range(60):
        table.renew()
        table()
        found.append(table.theta.grad[0].clone())
    found = torch.stack(found)
    error = found.std(0) / 60 ** 0.5
    assert bool(((found.mean(0) - summed.theta.grad[0]).abs() < 5 * error).all())


def test_scores_are_no_verdicts():
    with pytest.raises(ValueError, match="no log-odds"):
        play(game("rps"), algorithms.gpo(game("rps")), iterations=1, samples=3, verdicts=True)


def test_opponents_are_probe_rows():
    """Drawn groups end in an opponent that is in no term: changing its log-probability changes nothing."""
    here = game("rps")
    table = Table(here, algorithms.egpo(here), draws=Draws(5, False, torch.Generator().manual_seed(0)))
    table.renew()
    assert table.batch["train"].tolist() == [True, True, False] * 5 and table.batch["reward"].isnan().sum() == 5
    logp = torch.randn(15, 1, dtype=torch.float64, requires_grad=True)
    table.algorithm.objective.loss(table.batch.with_columns(logp=logp)).value.backward()
    assert not logp.grad[2::3].any() and logp.grad.any()
    x, y = table.rows
    against = here.payoff[0][y.view(5, 3)[:, :2], y.view(5, 3)[:, 2:]]
    assert torch.equal(table.batch["reward"].view(5, 3)[:, :2], against)


def test_a_run_is_its_seed():
    here = game("rps")
    runs = [play(here, algorithms.egpo(here), iterations=3, samples=4, seed=s) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_more_items_than_pairs_are_summed_over():
    here = library.random(items=65)
    with pytest.raises(ValueError, match="summing over all pairs takes up to 64 responses, found 65.*samples"):
        play(here, algorithms.egpo(here), iterations=1)
    assert play(here, algorithms.egpo(here), iterations=1, samples=3).shape == (2, 1, 65)
    assert play(here, algorithms.nash_md_pg(here), iterations=1).shape == (2, 1, 65)      # a sum over responses, not pairs
    with pytest.raises(ValueError, match="set samples"):
        play(game("rps"), algorithms.egpo(game("rps")), iterations=1, verdicts=True)


# -------------------------------------------------------------------------------------------------------- losses by hand
def exact_gradient(here: Game, algorithm: Algorithm, pi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    table = Table(here, algorithm, start=pi[None])
    table.renew()
    value = table()
    return value, table.theta.grad[0]


PI = f64([0.2, 0.5, 0.1, 0.2])


def test_uniform_pairs_by_hand():
    """e = log(pi / ref) - P pi_o / beta over uniform pairs: L = 2 Var e (population), gradient (4 / n) (e - mean e)."""
    here, beta = game("rps_plus_dominated"), 0.1
    mixed = torch.from_numpy(exact.mixed(PI.log().numpy(), numbers(here)[1], 0.05))
    for algorithm, opponent in (("omd", PI), ("nash_md", mixed)):
        value, gradient = exact_gradient(here, getattr(algorithms, algorithm)(here, beta=beta), PI)
        e = (PI / here.reference[0]).log() - here.payoff[0] @ opponent / beta
        close(value, 2 * e.var(correction=0), 1e-10)
        close(gradient, (e - e.mean()), 1e-10)                # 4 / n = 1


def test_on_policy_pairs_by_hand():
    """Online IPO: sum pi pi' (h - (P - 1/2) / beta)^2 plus a constant, gradient 4 pi (e - E e), e = log(pi/ref) - P pi / beta."""
    here, beta = game("rps_plus_dominated"), 0.1
    P, log_ratio = here.payoff[0], (PI / here.reference[0]).log()
    value, gradient = exact_gradient(here, algorithms.online_ipo(here, beta=beta), PI)
    weights = PI[:, None] * PI[None, :]
    square = ((log_ratio[:, None] - log_ratio) - (P - 0.5) / beta) ** 2
    constant = (0.25 - (P - 0.5) ** 2) / beta ** 2
    close(value, (weights * (square + constant)).sum(), 1e-10)
    e = log_ratio - P @ PI / beta
    close(gradient, 4 * PI * (e - PI @ e), 1e-10)


def test_policy_gradient_by_hand():
    """The gradient of pi P mix - beta KL(pi || ref), the mixture held fixed, by autograd."""
    here, beta, c = game("rps_plus_dominated"), 0.1, 0.3
    _, gradient = exact_gradient(here, algorithms.nash_md_pg(here, beta=beta, c=c), PI)
    theta = PI.log().requires_grad_()
    pi, ref = theta.softmax(0), here.reference[0]
    mix = torch.from_numpy(exact.mixed(PI.log().numpy(), ref.numpy(), c))
    (pi @ here.payoff[0] @ mix - beta * (pi * (pi.log() - ref.log())).sum()).backward()
    close(gradient, -theta.grad, 1e-12)


def test_policy_gradient_of_a_response_by_hand():
    """Two tokens, win rate 0.9, rho = 0.3 - 0.1: both tokens get -(0.9 - 1/2 - 0.5 * 0.2), and not each its own share."""
    columns = {"logp": f64([[-1.0, -2.0]]).requires_grad_(), "logp_old": f64([[-1.0, -2.0]]), "logp_ref": f64([[-1.3, -1.9]]),
               "mask": torch.ones(1, 2).bool(), "group": torch.zeros(1).long(), "reward": f64([0.9])}
    value_of(recipes.nash_md_pg(beta=0.5), batch := Batch(columns)).backward()
    close(batch["logp"].grad, f64([[-0.3, -0.3]]), 1e-12)


def test_egpo_by_hand():
    """rho = (1, -1), q = (0.9, 0.4), beta 0.5: h - goal = 2 - 1 = 1; loss 1, gradients 2, -2."""
    batch = step([1.0, -1.0], reward=f64([0.9, 0.4]))
    close(value_of(recipes.egpo(beta=0.5), batch), f64(1.0), 1e-14)
    close(gradient_of(recipes.egpo(beta=0.5), batch), f64([2.0, -2.0]), 1e-14)


def test_egpo_is_contrastive_policy_gradient_with_win_rates():
    """A pair: beta^2 times EGPO's loss is CoPG's with the win rates as rewards."""
    rewards = (0.9, 0.35)
    batch = step([0.7, -0.4], logp_ref=[0.2, 0.1], relevance=rewards, reward=f64(rewards))
    close(0.3 ** 2 * value_of(recipes.egpo(beta=0.3), batch), value_of(recipes.copg(beta=0.3), batch), 1e-12)


def test_inpo_by_hand():
    """logp (1, 0), ref (0.5, 0), old (0, 0.6), anchor 1/4: h = 1 - 1/8 + 3/4 * 0.6 = 1.325; goal 1; gradient 2 (0.325)."""
    batch = step([1.0, 0.0], logp_ref=[0.5, 0.0], logp_old=f64([[0.0], [0.6]]))
    made = recipes.inpo(beta=0.5, anchor=0.25)
    close(value_of(made, batch), f64(0.325 ** 2), 1e-14)
    close(gradient_of(made, batch), f64([0.65, -0.65]), 1e-14)


def test_limits_of_inpo():
    """anchor = 1, and the first iteration where pi_old = pi_ref, are IPO."""
    batch = step([0.4, -0.2], logp_ref=[0.1, 0.3], logp_old=f64([[0.7], [-0.5]]))
    close(value_of(recipes.inpo(beta=0.3, anchor=1.0), batch), value_of(recipes.ipo_summed(tau=0.3), batch), 1e-14)
    first = step([0.4, -0.2], logp_ref=[0.1, 0.3], logp_old=f64([[0.1], [0.3]]))
    for anchor in (0.0, 0.4):
        close(value_of(recipes.inpo(beta=0.3, anchor=anchor), first), value_of(recipes.ipo_summed(tau=0.3), first), 1e-14)


def test_dno_by_hand():
    """q = (1, 0): t = sigmoid(1); d = 2 (0.5); -t log s(d) - (1 - t) log s(-d); gradient 2 (s(d) - t) = 0 at d = 1."""
    batch = step([0.5, 0.0], reward=f64([1.0, 0.0]))
    d, t = f64(1.0), torch.sigmoid(f64(1.0))
    loss = -t * torch.nn.functional.logsigmoid(d) - (1 - t) * torch.nn.functional.logsigmoid(-d)
    close(value_of(recipes.dno(beta=2.0), batch), loss, 1e-14)
    close(gradient_of(recipes.dno(beta=2.0), batch), f64([0.0, 0.0]), 1e-14)
    moved = step([1.0, 0.0], reward=f64([1.0, 0.0]))
    close(gradient_of(recipes.dno(beta=2.0), moved)[0], 2 * (torch.sigmoid(f64(2.0)) - t), 1e-14)


def test_sppo_by_hand():
    """a = (0.2, -0.1), q = (0.8, 0.5), beta 0.5: residuals 0.2 - 0.6, -0.1 - 0; mean of squares; gradient of w (a - goal) / B."""
    batch = step([0.2, -0.1], reward=f64([0.8, 0.5]))
    close(value_of(recipes.sppo(beta=0.5), batch), f64((0.4 ** 2 + 0.1 ** 2) / 2), 1e-14)
    close(gradient_of(recipes.sppo(beta=0.5), batch), f64([-0.4, -0.1]), 1e-14)
    hard = step([0.2, -0.1], reward=f64([1.0, 0.0]))          # certain win rates are the hard labels, summed instead of meant
    close(2 * value_of(recipes.sppo(beta=0.5), hard), value_of(recipes.sppo_hard(beta=0.5), hard), 1e-14)


def test_gpo_by_hand():
    """a = (0.5, 0), s = (1, -1), beta 0.5: (0.5 - 2)^2 and 2^2; the limit 1 makes goals 1 and -1."""
    batch = step([0.5, 0.0], reward=f64([1.0, -1.0]))
    close(value_of(recipes.gpo(beta=0.5), batch), f64((1.5 ** 2 + 2 ** 2) / 2), 1e-14)
    close(value_of(recipes.gpo(beta=0.5, limit=1.0), batch), f64((0.5 ** 2 + 1) / 2), 1e-14)


def test_gpo_offline_by_hand():
    """P = 0.75: s = log 3, h = 0.5, beta 1."""
    wins = f64([[[0.5, 0.75], [0.25, 0.5]]])
    columns = dict(step([0.5, 0.0]))
    columns.pop("relevance")
    close(value_of(recipes.gpo_offline(beta=1.0), Batch({**columns, "wins": wins})), (0.5 - f64(3.0).log()) ** 2, 1e-14)


def test_xpo_by_hand():
    """DPO's loss plus alpha times the log-probability of the reference's response, which won; its gradient gains alpha."""
    batch = step([-1.0, -2.0], from_reference=torch.tensor([True, False]))
    dpo = gradient_of(recipes.dpo(beta=0.5), batch)
    made = recipes.xpo(beta=0.5, alpha=0.25)
    close(value_of(made, batch), value_of(recipes.dpo(beta=0.5), batch) - 0.25, 1e-14)
    close(gradient_of(made, batch), dpo + f64([0.25, 0.0]), 1e-14)
    assert not made.bounded and recipes.xpo(alpha=0.0).bounded and not recipes.xpo(alpha=0.0).regularisers


def test_rows_of_unknown_reward_do_not_count():
    """A third response without a reward changes neither the value nor the gradient of the other two."""
    two = step([0.5, -0.1], reward=f64([0.8, 0.3]), relevance=(1.0, 0.0))
    three = step([0.5, -0.1, 0.4], reward=f64([0.8, 0.3, float("nan")]), relevance=(1.0, 0.0, 0.5))
    for name in ("egpo", "dno", "sppo", "gpo"):
        made = getattr(recipes, name)(beta=0.5)
        close(value_of(made, three), value_of(made, two), 1e-14)
        close(gradient_of(made, three), torch.cat([gradient_of(made, two), f64([0.0])]), 1e-14)


# ------------------------------------------------------------------------------------------------------------ update rules
class Counted:
    """A constant gradient that counts its calls and, at each, the tensors that live beside the weight and its gradient."""

    def __init__(self, weight):
        self.weight, self.calls, self.drawn, self.alive = weight, 0, 0, []
        weight.grad = torch.ones_like(weight)

    def renew(self):
        self.drawn += 1
        self.alive.append(self.living())

    def __call__(self):
        self.calls += 1
        self.alive.append(self.living())

    def living(self):
        return sum(type(x) is torch.Tensor and x.shape == self.weight.shape for x in gc.get_objects())


@pytest.mark.parametrize("optimizer, kept", [("SGD", 1), ("AdamW", 3)])
@pytest.mark.parametrize("rule", [plain, look_ahead, extragradient])
def test_two_gradients_and_one_snapshot(rule, optimizer, kept):
    """A copy of the weight and one of each of the optimiser's moments, and nothing of what does not train."""
    gc.freeze()                                               # what lives already is not counted
    weight, frozen = torch.nn.Parameter(torch.randn(7, 13)), torch.nn.Parameter(torch.randn(7, 13))
    made, gradient = getattr(torch.optim, optimizer)([weight], lr=0.1), Counted(weight)
    plain([weight], made, gradient)                           # moments are there now
    before = gradient.living()
    gradient.calls, gradient.alive = 0, []
    rule([weight], made, gradient)
    gc.unfreeze()
    assert (gradient.calls, gradient.drawn) == (1 if rule is plain else 2, int(rule is look_ahead))
    assert max(gradient.alive) - before == (0 if rule is plain else kept) and frozen.grad is None


def test_look_ahead_moves_the_opponents_alone():
    """x y with a drawn opponent: g(x; y) = y, so that x' = x - y' where the opponent y' = 2 x of the policy one step ahead."""
    x = torch.nn.Parameter(f64([1.0]))

    class Gradient:
        opponent, seen = f64([2.0]), []

        def renew(self):
            self.opponent = 2 * x.detach()

        def __call__(self):
            self.seen.append(x.item())
            x.grad = self.opponent + x.detach()

    gradient = Gradient()
    look_ahead([x], torch.optim.SGD([x], lr=0.25), gradient)
    assert gradient.seen == [1.0, 1.0]                        # both gradients at theta
    assert x.item() == 1 - 0.25 * (2 * (1 - 0.25 * 3) + 1)    # ahead 0.25, opponent 0.5


def test_look_ahead_without_renewal_is_plain():
    here = game("rps")
    made = algorithms.egpo(here)
    still = dataclasses.replace(made, opponent=uniform)       # an opponent that does not move
    close(play(here, still, iterations=5), play(here, dataclasses.replace(still, update=plain), iterations=5), 0.0)


def test_failed_sampling_leaves_everything():
    weight = torch.nn.Parameter(torch.ones(2))

    class Gradient:
        def renew(self):
            raise RuntimeError("no sampler")

        def __call__(self):
            weight.grad = torch.ones(2)

    optimizer = torch.optim.Adam([weight], lr=0.1)
    with pytest.raises(RuntimeError, match="no sampler"):
        look_ahead([weight], optimizer, Gradient())
    assert torch.equal(weight, torch.ones(2)) and not optimizer.state


def test_extrapolated_by_hand():
    """Starts at 0; solutions 1, 2, every second step: policy 1.5, then hat 2 -> 2 + (2 - 1) / 2 = 2.5; state is kept."""
    rule, ref, policy = Extrapolated(alpha=0.5, every=2), torch.zeros(1), torch.ones(1)
    rule.step(1, [ref], [policy])
    assert (float(ref), float(policy)) == (0.0, 1.0)
    rule.step(2, [ref], [policy])
    assert (float(ref), float(policy)) == (1.5, 1.5)
    other = Extrapolated(**rule.spec())
    other.load_state_dict(rule.state_dict())
    policy.fill_(2.0)
    other.step(3, [ref], [policy])
    other.step(4, [ref], [policy])
    assert (float(ref), float(policy)) == (2.5, 2.5)


def test_extrapolated_without_momentum_copies():
    runs = []
    for rule in (Extrapolated(alpha=0.0, every=2), Moving(alpha=1.0, every=2)):
        ref, policy = torch.zeros(3), torch.arange(3.0)
        for t in range(1, 5):
            policy += 1
            rule.step(t, [ref], [policy])
        runs.append(torch.stack([ref, policy]))
    assert torch.equal(*runs)
    again = from_spec(to_spec(Extrapolated(alpha=0.2, every=3)), "prefopt.references")
    assert again.spec() == {"alpha": 0.2, "every": 3} and again.moves
    for wrong, said in ((dict(alpha=1.0), "alpha must be in"), (dict(every=0), "every must be")):
        with pytest.raises(ValueError, match=said):
            Extrapolated(**wrong)


def test_run_files_take_them():
    """Momentum goes onto any recipe by its reference, and the update rule by its name."""
    from prefopt.config import assemble
    made = assemble("sppo", {"beta": 0.1, "reference": {"Extrapolated": {"alpha": 0.2, "every": 5}}})
    assert made.reference.spec() == {"alpha": 0.2, "every": 5} and made.reference.moves
    assert from_spec("look_ahead", "prefopt.update") is look_ahead


def test_a_played_algorithm_can_be_played_again():
    """Momentum belongs to a run, not to the algorithm."""
    here = game("bt3")
    made = algorithms.apo_accel(here)
    assert torch.equal(play(here, made, iterations=3), play(here, made, iterations=3))


def test_mixture_of_one_token():
    """pi^(1 - c) ref^c, normalised, by hand: (1/2, 1/2) and (1/10, 9/10) at c = 1/2 are as 1 to 3."""
    from prefopt.games.tabular import Policies
    half, ref = f64([[0.5, 0.5]]).log(), f64([[0.1, 0.9]]).log()
    close(mixture(Policies(half, ref, half), 0, share=lambda t: 0.5).exp(), f64([[0.25, 0.75]]), 1e-14)
