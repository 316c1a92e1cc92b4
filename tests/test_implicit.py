"""Implicit and process rewards: where steps end, what they are worth, what is chosen, and PRIME's returns."""
import math

import pytest
import torch
import torch.nn.functional as F
from columns_for_tests import close, f64

from data_tools import Batch
from prefopt import recipes, scores
from rewards import implicit, process


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- rewards
def test_token_rewards_add_up_to_the_score_of_the_recipe():
    logp, ref, mask = draw(4, 7), draw(4, 7, seed=1), draw(4, 7, seed=2) > 0
    junk = torch.where(mask, logp, math.nan)
    tokens = implicit.token_rewards(junk, ref, mask, beta=0.3)
    close(implicit.outcome(tokens), scores.log_ratio(logp, ref, mask, beta=0.3))
    close(implicit.cumulative(tokens)[:, -1], implicit.outcome(tokens))
    none = implicit.token_rewards(logp, torch.zeros_like(ref), mask, beta=0.3)
    close(implicit.outcome(none), scores.log_likelihood(logp, mask, beta=0.3))


def test_step_rewards_are_differences_of_values():
    rewards, ends = draw(9), [2, 2, 5, 9]
    steps = implicit.step_rewards(rewards, ends)
    values = implicit.cumulative(rewards)[[e - 1 for e in ends]]
    close(steps, torch.cat([values[:1], values.diff()]))
    close(steps.sum(), implicit.outcome(rewards))
    assert steps[1] == 0
    close(implicit.step_rewards(rewards, [9]), implicit.outcome(rewards)[None])       # one step: an outcome reward
    assert implicit.step_rewards(rewards, []).shape == (0,)


# ------------------------------------------------------------------------------------------------- steps of a text
@pytest.mark.parametrize("splitter, text, steps", [
    (implicit.newline, "a\nb\n\nc", ["a\n", "b\n\n", "c"]),
    (implicit.newline, "\n\na\n", ["\n\na\n"]),
    (implicit.newline, "one line", ["one line"]),
    (implicit.newline, " \n ", []),
    (implicit.newline, "", []),
    (implicit.blank_line, "a\nb\n\nc\n \n\nd", ["a\nb\n\n", "c\n \n\n", "d"]),
    (implicit.sentence, "It is 3.5. Then? Yes", ["It is 3.5. ", "Then? ", "Yes"]),
    (implicit.regex(r";"), "a;b;", ["a;", "b;"]),
    (implicit.offsets([1, 4]), "abcd", ["a", "bcd"])])
def test_splitters(splitter, text, steps):
    ends = splitter(text)
    assert [text[i:j] for i, j in zip([0, *ends], ends, strict=False)] == steps


def test_a_token_belongs_to_the_step_it_starts_in():
    """Tokens 'a', '.\\n\\n', 'b c', ' d': the second crosses the first newline, the third holds two words."""
    text, spans = "a.\n\nb c d", [(0, 1), (1, 4), (4, 7), (7, 9)]
    assert implicit.step_ends(text, implicit.newline, spans) == [2, 4]
    assert implicit.step_ends(text, implicit.regex(" "), spans) == [3, 4]      # 'b ' and 'c ' end in the same token
    assert implicit.step_ends("", implicit.newline, []) == []


# ------------------------------------------------------------------------------------------------- aggregation, choice
def test_aggregations():
    steps = f64([0.5, 0.2, 0.8])
    found = {name: float(f(steps)) for name, f in implicit.AGGREGATIONS.items()}
    assert found == pytest.approx({"min": 0.2, "mean": 0.5, "last": 0.8, "sum": 1.5, "prod": 0.08})
    one = {round(float(f(f64([0.3]))), 12) for f in implicit.AGGREGATIONS.values()}
    assert one == {0.3}
    for f in implicit.AGGREGATIONS.values():
        with pytest.raises(ValueError, match="without steps"):
            f(torch.zeros(0))


def test_product_of_many_small_probabilities():
    assert float(implicit.product(f64([0.9] * 200))) == pytest.approx(0.9 ** 200, rel=1e-12)
    assert float(implicit.product(f64([0.0, 0.5]))) == 0.0


def test_vote():
    answers = ["a", "b", "b", "c"]
    assert implicit.weighted_vote(answers, [1, 1, 1, 1]) == "b"
    assert implicit.weighted_vote(answers, [0.9, 0.3, 0.3, 0.9]) == "a"        # the first of equals
    assert implicit.best_of_n([-1.0, -0.5, -2.0]) == 1


# ------------------------------------------------------------------------------------------------- easy to hard
def by_loop(p, product):
    """As the released code walks the steps."""
    low, out = 1.0, []
    for x in p.tolist():
        new = low * x if product else min(low, x)
        out.append(new - low)
        low = new
    return f64(out)


@pytest.mark.parametrize("n", [0, 1, 6])
def test_shaping(n):
    p = torch.sigmoid(draw(n))
    close(process.shaped_lowest(p), by_loop(p, False))
    close(process.shaped_product(p), by_loop(p, True))
    if n:
        both = {"min": process.shaped_lowest(p), "prod": process.shaped_product(p)}
        for name, rewards in both.items():
            close(process.with_bonus(rewards).sum(), implicit.AGGREGATIONS[name](p) - 1 + 0.25 * n / (n + 1e-6))
    if n == 1:
        close(process.shaped_lowest(p), process.shaped_product(p))


def test_rewards_on_tokens():
    rewards, ends = draw(3), [1, 4, 9]
    out = process.on_tokens(rewards, ends, 10, terminal=5.0)
    assert out.nonzero().squeeze(1).tolist() == [0, 2, 3, 7, 8, 9]
    close(out.sum(), rewards.sum() + 5)
    close(out[[0, 2, 3, 7, 8]], f64([1, .5, .5, .5, .5]) * rewards[[0, 1, 1, 2, 2]])
    assert not process.on_tokens(rewards[:0], [], 3).any()


# ------------------------------------------------------------------------------------------------- PRIME
def test_rloo_returns_by_loops():
    """Token by token as the released code does, groups of 2 and 3 in any order."""
    rewards, group = draw(5, 6), torch.tensor([7, -1, 7, -1, 7])
    mask = torch.arange(6) < torch.tensor([6, 4, 3, 5, 1])[:, None]
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    for scored in (mask, last):
        found = implicit.rloo_returns(rewards, mask, group, scored)
        for i in range(5):
            others = [j for j in range(5) if group[j] == group[i]]
            n = len(others)
            means = {j: float(rewards[j][scored[j]].mean()) for j in others}
            terms = [(float(rewards[i, t]) * n / (n - 1) - sum(means.values()) / (n - 1)) if scored[i, t] else 0.0
                     for t in range(6)]
            close(found[i], f64([sum(terms[t:]) if mask[i, t] else 0.0 for t in range(6)]))
            mean = sum(terms) / int(scored[i].sum())
            assert mean == pytest.approx(means[i] - (sum(means.values()) - means[i]) / (n - 1), rel=1e-9)


def test_a_group_of_one_has_no_others():
    with pytest.raises(ValueError, match="at least two responses to every prompt, and 1 prompts have one"):
        implicit.rloo_returns(draw(3, 2), torch.ones(3, 2), torch.tensor([0, 0, 1]))


def test_normalised_and_whitened():
    rewards, mask = draw(4, 5), torch.arange(5) < torch.tensor([5, 2, 3, 4])[:, None]
    scaled = implicit.normalised(torch.where(mask, rewards, math.nan), mask)
    to_go = [abs(float(scaled[i, t:].sum())) for i in range(4) for t in range(5)]
    assert max(to_go) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(scaled[mask] / rewards[mask], (scaled[0, 0] / rewards[0, 0]).expand(14))
    a = implicit.prime_advantages([rewards, draw(4, 5, seed=1)], mask, [1.0, 3.0])
    close(a[mask].mean(), f64(0.0))
    assert float(a[mask].var()) == pytest.approx(1, abs=1e-6) and not a[~mask].any()
    close(a, implicit.prime_advantages([rewards + 3 * draw(4, 5, seed=1)], mask))


# ------------------------------------------------------------------------------------------------- the claim, small
def chains(n, seed):
    """Three steps of four actions; one action of a step is wrong, which depends on the action before. (n, 3), wrong (n, 3)."""
    g = torch.Generator().manual_seed(seed)
    actions = torch.randint(4, (n, 3), generator=g)
    before = torch.cat([torch.zeros(n, 1).long(), actions[:, :-1]], 1)
    return actions, before, actions == (before + 1) % 4


def test_outcomes_alone_point_to_the_first_wrong_step():
    """A table trained by the cross-entropy of outcomes, one response per prompt: in over 90 % of the chains that fail in
    one step that step has the lowest reward, and best-of-16 by the sum or the minimum beats chance."""
    actions, before, wrong = chains(3000, 0)
    table = torch.zeros(3, 4, 4, requires_grad=True)
    objective, place = recipes.implicit_ce(beta=1.0), torch.arange(3)

    def logp(actions, before):
        return table.log_softmax(-1)[place, before, actions]

    optimizer = torch.optim.Adam([table], 0.1)
    batch = {"logp_ref": torch.full((3000, 3), -math.log(4)), "mask": torch.ones(3000, 3), "group": torch.arange(3000),
             "relevance": (~wrong.any(1)).float()}
    for _ in range(150):
        step = Batch({**batch, "logp": logp(actions, before)})
        loss = objective.loss(objective.annotate(step)).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    actions, before, wrong = chains(3200, 1)
    with torch.no_grad():
        steps = implicit.token_rewards(logp(actions, before), torch.full((3200, 3), -math.log(4)), torch.ones(3200, 3))
    failing, alone = wrong.any(1), wrong.sum(1) == 1
    assert float((steps.argmin(1) == wrong.int().argmax(1))[alone].float().mean()) > 0.9
    right = (~failing).view(-1, 16).float()
    for aggregate in (implicit.lowest, implicit.total):
        picked = right.gather(1, aggregate(steps).view(-1, 16).argmax(1, keepdim=True)).mean()
        assert float(picked) > float(right.mean()) + 0.3
    assert float(F.sigmoid(steps.sum(1))[failing].mean()) < 0.5
