"""Objectives and parts: the two phases, what counts, what is read, and the errors."""
import json
import math
from functools import partial

import pytest
import torch
from columns_for_tests import OFF_POLICY, ON_POLICY, close, columns_for, objective_for, outcome

from data_tools import Batch
from prefopt import diagnose, label_rules, margins, masks, pairwise, pointwise, recipes, regularisers, scores
from prefopt.annotations import RunningShift
from prefopt.objectives import PreferenceObjective, Term
from prefopt.parts import (
    Columns,
    Lists,
    MissingColumn,
    Pairs,
    Rows,
    Stateful,
    bind,
    columns_read,
    from_spec,
    hyperparameters,
    kind,
    needs,
    to_spec,
)
from prefopt.recipes import checks
from prefopt.references import Frozen, Moving

NAN = math.nan


def pairs(**more):
    """Two pairs of one-token responses; the first is ranked right, with a margin of 2, the second wrong, with -1."""
    columns = {"logp": torch.tensor([[-1.0], [-3.0], [-2.0], [-1.0]], dtype=torch.float64, requires_grad=True),
               "logp_ref": torch.full((4, 1), -1.0).double(), "mask": torch.ones(4, 1).bool(),
               "group": torch.tensor([0, 0, 1, 1]), "relevance": torch.tensor([1.0, 0.0, 1.0, 0.0])}
    return Batch({k: v for k, v in {**columns, **more}.items() if v is not None})


def value(objective, batch):
    return objective.loss(objective.annotate(batch)).value


# ---------------------------------------------------------------------------------------------------------- contract
def test_the_public_contract():
    logp = torch.tensor([[-1.0, -2.0], [-2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    objective = recipes.dpo(beta=0.1)
    batch = objective.annotate(Batch(dict(
        logp=logp, logp_ref=torch.tensor([[-2.0, -2.0], [-1.0, 5.0]], dtype=torch.float64),
        mask=torch.tensor([[1, 1], [1, 0]]), group=torch.tensor([5, 5]), relevance=torch.tensor([1, 0]))))
    loss = objective.loss(batch).value
    loss.backward()
    assert loss.dtype == torch.float64                        # h = (-3 + 4) - (-2 + 1) = 2
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-0.2)), rel=1e-14)
    slope = 0.1 / (1 + math.exp(0.2))
    close(logp.grad, torch.tensor([[-slope, -slope], [slope, 0.0]], dtype=torch.float64), 1e-14)


def test_loss_needs_annotate():
    with pytest.raises(KeyError, match="call objective.annotate"):
        recipes.dpo().loss(pairs())


def test_the_reference_gets_no_gradient():
    for name in ("dpo", "dpo_gamma", "hypo_optimistic", "ipo", "ld_dpo", "tdpo", "dpo_js", "dpo_alpha"):
        columns = columns_for(name)
        columns["logp_ref"].requires_grad_()
        batch = objective_for(name).annotate(Batch({**columns, "logp": columns["logp"].requires_grad_()}))
        objective_for(name).loss(batch).value.backward()
        assert columns["logp"].grad.any() and columns["logp_ref"].grad is None, name


# ---------------------------------------------------------------------------------------------------------- what counts
def test_mean_over_groups_that_have_pairs():
    """A list counts once however many pairs it has; ties, single responses and unlabelled groups do not count."""
    s = lambda m: math.log1p(math.exp(-m))
    logp = torch.tensor([2.0, 1.0, 0.0, 5.0, 1.0, 7.0, 7.0, 3.0, 4.0], dtype=torch.float64)[:, None]
    batch = Batch({"logp": logp, "mask": torch.ones(9, 1), "group": torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 4]),
                   "relevance": torch.tensor([2.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, NAN])})
    objective = PreferenceObjective(score=scores.log_likelihood, ranking=pairwise.logistic)
    list_, pair = (s(1) + s(1) + s(2)) / 3, s(-4)
    assert float(value(objective, batch)) == pytest.approx((list_ + pair) / 2, rel=1e-12)


@pytest.mark.parametrize("hide", [{"relevance": NAN}, {"train": False}], ids=["unlabelled", "probe"])
def test_probe_and_unlabelled_rows_are_in_no_term(hide):
    """Every recipe that reads no rows of that kind: adding them changes nothing."""
    for name in recipes.__all__:
        columns = columns_for(name)
        if name in OFF_POLICY and columns["relevance"].isnan().any() or name == "remax" and "train" in hide:
            continue                                          # recipes whose extra rows are unlabelled, or probes, by design
        if name in ON_POLICY:
            hide = {"reward": NAN} if "relevance" in hide else hide
        elif "reward" in hide:
            hide = {"relevance": NAN}
        n = len(columns["group"])
        rows = torch.arange(3)
        extra = {k: v[rows] for k, v in columns.items()}
        more = {k: torch.cat([extra[k], v]) for k, v in columns.items()}
        more["train"] = torch.cat([torch.full((3,), hide.get("train", True)), columns.get("train", torch.ones(n).bool())])
        label = "reward" if name in ON_POLICY else "relevance"
        more[label][:3] = hide.get(label, 1.0)
        more["logp"][:3] -= 2.0
        expected, gradients = outcome(objective_for(name), columns)
        found, found_gradients = outcome(objective_for(name), more)
        close(found, expected)
        assert not found_gradients["logp"][:3].any(), name
        close(found_gradients["logp"][3:], gradients["logp"])


def test_probe_rows_are_in_no_term_of_given_wins():
    wins = torch.full((2, 3, 3), NAN, dtype=torch.float64)
    wins[:, 0, 1], wins[:, 1, 0] = 0.8, 0.2
    wins[:, 2, :2], wins[:, :2, 2] = 0.9, 0.1                 # against the opponents
    batch = Batch({"logp": torch.randn(6, 1, dtype=torch.float64), "mask": torch.ones(6, 1), "group": torch.arange(6) // 3,
                   "wins": wins, "train": torch.tensor([1, 1, 0] * 2).bool()})
    objective = PreferenceObjective(score=scores.log_likelihood, ranking=pairwise.logistic)
    plain = Batch({"logp": batch["logp"][batch["train"]], "mask": torch.ones(4, 1), "group": torch.arange(4) // 2,
                   "wins": wins[:, :2, :2]})
    close(value(objective, batch), value(objective, plain))


def test_soft_wins():
    """P(i beats j) weighs both statements: margins 1 and -1/2, the second pair a tie."""
    wins = torch.tensor([[[NAN, 0.8], [0.2, NAN]], [[NAN, 0.5], [0.5, NAN]]], dtype=torch.float64)
    loss = lambda m, p: p * math.log1p(math.exp(-m)) + (1 - p) * math.log1p(math.exp(m))
    found = value(recipes.dpo(beta=0.5), pairs(wins=wins, relevance=None)).detach()
    assert float(found) == pytest.approx((loss(1.0, 0.8) + loss(-0.5, 0.5)) / 2, rel=1e-12)


def test_diagonal_of_wins():
    """A diagonal of 1/2 is not a comparison."""
    half = torch.tensor([[[0.5, 0.8], [0.2, 0.5]]] * 2).double()
    none = half.clone()
    none[:, [0, 1], [0, 1]] = NAN
    close(*(value(recipes.dpo(beta=0.5), pairs(wins=w, relevance=None)) for w in (half, none)))


def test_relevance_from_wins():
    """psi_i = (1/K) sum_j P(i beats j): three ranks give 5/6, 1/2, 1/6."""
    wins = torch.full((1, 3, 3), 0.5).double().triu(1) * 2
    psi = label_rules.relevance_of(wins, torch.ones(1, 3).bool())
    close(psi, torch.tensor([[5 / 6, 1 / 2, 1 / 6]], dtype=torch.float64))
    absent = label_rules.relevance_of(torch.nn.functional.pad(wins, (0, 1, 0, 1), value=NAN),
                                      torch.tensor([[True, True, True, False]]))
    close(absent[:, :3], psi)


def test_lipo_takes_its_pairs_from_the_order_of_psi():
    """Soft wins give labels psi, and every pair of unequal psi counts in full."""
    wins = torch.tensor([[[NAN, 0.7], [0.3, NAN]], [[NAN, 0.4], [0.6, NAN]]]).double()
    hard = value(recipes.lipo(beta=0.5), pairs(relevance=torch.tensor([1.0, 0.0, 0.0, 1.0])))
    close(value(recipes.lipo(beta=0.5), pairs(wins=wins, relevance=None)), hard)


def test_weight_of_a_group():
    """A group of weight 3 counts as three times its share of the unweighted mean."""
    batch = pairs()
    each = [value(recipes.dpo(), b) for b in batch.split([1, 1])]
    weighted = value(recipes.dpo(), pairs(weight=torch.tensor([3.0, 3.0, 1.0, 1.0])))
    close(weighted, (3 * each[0] + each[1]) / 2)


def test_weight_of_the_ranking_and_of_terms():
    objective = recipes.orpo(weight=0.3)
    batch = objective.annotate(pairs())
    loss = objective.loss(batch)
    close(loss.value, loss.metrics["loss/ranking"] + loss.metrics["loss/sft"])
    close(loss.metrics["loss/ranking"] / 0.3, recipes.orpo(weight=1.0).loss(batch).metrics["loss/ranking"])


# ---------------------------------------------------------------------------------------------------------- metrics
def test_metrics_by_hand():
    metrics = recipes.dpo(beta=0.5).loss(recipes.dpo(beta=0.5).annotate(pairs())).metrics
    expected = {"accuracy": 0.5, "margin": 0.25, "score/chosen": -0.25, "score/rejected": -0.5, "logp/chosen": -1.5,
                "logp/rejected": -2.0, "shift/chosen": -0.5, "shift/rejected": -1.0, "displaced": 0.0,
                "ranking/policy": 0.5, "ranking/policy_per_token": 0.5, "ranking/reference": 1.0,
                "length/chosen_longer": 0.5, "rows/desirable": 0.5}
    assert {k: float(metrics[k]) for k in expected} == pytest.approx(expected, rel=1e-12)


def test_displaced_pairs():
    """The margin over the reference grew, and yet the chosen response became less likely."""
    batch = pairs(logp_ref=torch.tensor([[0.0], [-1.0], [-2.0], [-1.0]]).double())
    assert float(recipes.dpo().loss(recipes.dpo().annotate(batch)).metrics["displaced"]) == 0.5


@pytest.mark.parametrize("name", ["dpo", "kto", "lipo", "sparsepo"])
def test_metrics_of_micro_batches_add(name):
    objective = objective_for(name)
    batch = objective.annotate(Batch(columns_for(name)))
    whole = objective.loss(batch).metrics
    parts = [objective.loss(b).metrics for b in batch.split([2, batch.groups - 2])]
    assert whole.keys() == parts[0].keys()
    for key, v in whole.items():
        close(sum(p[key] for p in parts).double(), v.double())


def test_length_controlled_accuracy():
    """Half of the accuracy among pairs whose chosen response is longer, half among the others."""
    mask = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 1]]).bool()
    logp = torch.tensor([[-1.0, -1.0], [-3.0, 0.0], [-2.0, 0.0], [-0.5, 0.0]]).double()
    batch = pairs(logp=logp, logp_ref=torch.zeros(4, 2).double(), mask=mask)
    metrics = recipes.dpo().loss(recipes.dpo().annotate(batch)).metrics
    combined = diagnose.combined({k: float(v) for k, v in metrics.items()})
    assert combined["accuracy/length_controlled"] == pytest.approx((1.0 + 0.0) / 2)
    assert not any(k.startswith(("rows/", "length/correct")) for k in combined)


def test_measure_more_than_the_loss_logs():
    batch = recipes.dpo().annotate(pairs(token_kl=torch.full((4, 1), 0.3).double()))
    sums = recipes.dpo().measure(batch, diagnose.EVALUATION_METRICS)
    combined = diagnose.combined({k: float(v) for k, v in sums.items()})
    assert combined["kl/ref"] == pytest.approx(0.3) and combined["ranking/idealised_min"] == 1.0
    assert combined["ranking/gap"] == 1.0


# ---------------------------------------------------------------------------------------------------------- reading
READS = {"dpo": {"logp", "logp_ref", "mask", "relevance"}, "simpo": {"logp", "mask", "relevance"},
         "orpo": {"logp", "mask", "relevance"}, "kto": {"logp", "logp_ref", "mask", "relevance", "mismatched"},
         "aot": {"logp", "logp_old", "logp_ref", "mask", "relevance"},
         "trpa": {"logp", "logp_old", "logp_ref", "mask", "relevance"},
         "wpo": {"logp", "logp_ref", "mask", "relevance", "collision"},
         "smpo": {"logp", "logp_ref", "mask", "relevance", "reward"},
         "sparsepo": {"logp", "logp_ref", "mask", "relevance", "token_kl", "states_ref"},
         "mapo": {"logp", "logp_ref", "mask", "relevance", "token_kl", "activation_mask"},
         "spo_degree": {"logp", "logp_ref", "mask", "relevance", "last_state", "degree", "side"},
         "irpo_ranking": {"logp", "logp_ref", "mask", "relevance", "position"}}


@pytest.mark.parametrize("name", READS)
def test_what_a_recipe_reads_follows_from_its_parts(name):
    assert getattr(recipes, name)().reads() == READS[name]


@pytest.mark.parametrize("name", recipes.__all__)
def test_a_recipe_runs_on_what_it_says_it_reads(name):
    """Nothing else is needed, and none of it can be left out."""
    objective, columns = objective_for(name), columns_for(name)
    columns.setdefault("logp_old", columns["logp"].detach())
    always = {"group", "train", "noise"} if name in ON_POLICY else {"group"}        # marks of probe rows, and chance
    needed = {k: v for k, v in columns.items() if k in objective.reads() | always}
    close(outcome(objective_for(name), needed)[0], outcome(objective_for(name), columns)[0])
    made = {"logp_now"} if name in ON_POLICY else {"logp_old", "outputs_old", "relevance"}      # from logp, outputs, or wins
    for key in objective.reads() - made:
        with pytest.raises(KeyError, match=key):
            outcome(objective_for(name), {k: v for k, v in needed.items() if k != key})


def test_before_and_forward_columns():
    assert recipes.aot().reads_before() == {"logp_old", "logp_ref", "mask", "relevance"}
    assert recipes.dpo().reads_before() == {"relevance"}
    assert "logp_ref" not in recipes.simpo().reads_forward()


def test_modules_and_states():
    assert recipes.dpo().modules() == [] and recipes.dpo().states() == {}
    assert len(recipes.sparsepo().modules()) == 1 and len(recipes.sparsepo_independent().modules()) == 2
    assert len(recipes.spo_degree().modules()) == 1               # one head, in two terms
    states = recipes.bco().states()
    assert list(states) == ["baseline"] and isinstance(states["baseline"], Stateful)


def test_running_shift_remembers():
    shift, real = RunningShift(), torch.ones(1, 2).bool()
    shift(torch.tensor([[1.0, 3.0]]), real)
    saved = json.loads(json.dumps(shift.state_dict()))
    first = shift(torch.tensor([[5.0, 7.0]]), real)
    other = RunningShift()
    other.load_state_dict(saved)
    assert torch.equal(other(torch.tensor([[5.0, 7.0]]), real), first) and float(first) == 4.0


# ---------------------------------------------------------------------------------------------------------- errors
def test_a_missing_column_names_the_part_and_the_nearest():
    with pytest.raises(MissingColumn, match="smoothed reads column 'reward', which is not there, did you mean 'rewards'"):
        value(recipes.smpo(), pairs(rewards=torch.zeros(4, 1)))
    with pytest.raises(MissingColumn, match="reads column 'mismatched'"):
        value(recipes.kto(), pairs())
    with pytest.raises(MissingColumn, match="reads column 'relevance'.* which as_given needs"):
        value(recipes.dpo(), pairs(relevance=None))


def test_a_part_must_say_what_it_returns():
    with pytest.raises(TypeError, match="'log_ratio' must say .*-> Pairs"):
        PreferenceObjective(score=scores.log_ratio, ranking=scores.log_ratio)


def test_pair_weights_need_pairs():
    with pytest.raises(ValueError, match="pair_weight 'lambda_ndcg' needs a pairwise ranking, and 'kto' is one of rows"):
        recipes.lipo_lambda().with_slots(ranking=pointwise.kto)


def test_a_part_that_breaks_its_promise():
    def wrong(score) -> Pairs:
        return score

    with pytest.raises(ValueError, match=r"part 'wrong' returned \(2, 2\) where its reduction has \(2, 2, 2\)"):
        value(recipes.dpo().with_slots(ranking=wrong), pairs())


def test_an_annotation_that_is_not_finite_is_named():
    def broken(score, real):
        return score / 0

    with pytest.raises(FloatingPointError, match=r"broken \(baseline\) is not finite \(4 of 4 values\)"):
        recipes.bco().with_slots(annotations={"baseline": broken}).annotate(pairs(logp_ref=torch.zeros(4, 1).double()))


@pytest.mark.parametrize("recipe", [recipes.apo_zero, recipes.bco_pair, recipes.sppo_hard])
def test_graded_pairs_are_refused_where_labels_are_absolute(recipe):
    """Scores of 8 and 3 would make winners of both; 0.9 and 0.2, or a tie, do not."""
    with pytest.raises(ValueError, match="1 groups have both on one side: the first has relevance 8 and 3"):
        recipe().annotate(pairs(relevance=torch.tensor([8.0, 3.0, 1.0, 0.0])))
    soft = recipe().annotate(pairs(relevance=torch.tensor([0.9, 0.2, 1.0, 0.0])))
    assert soft["unit"].ne(0).all()


@pytest.mark.parametrize("recipe, message", [(recipes.aot, "every group needs exactly two labelled responses"),
                                             (recipes.aot_unpaired, "found 4 and 5")])
def test_aot_needs_pairs(recipe, message):
    columns = columns_for("lipo")
    columns["relevance"] = (columns["relevance"] > 0.6).double()
    good = int(columns["relevance"].sum())
    message = message.replace("4 and 5", f"{good} and {len(columns['relevance']) - good}")
    with pytest.raises(ValueError, match=message):
        recipe().annotate(Batch(columns))


@pytest.mark.parametrize("check, good, bad", [
    (checks.number, [0, -1.5], ["1", None, True, NAN]), (checks.positive, [1e-9, 3], [0, -1, "1", True, NAN]),
    (checks.not_negative, [0, 2.0], [-1e-9, "0", False, NAN]), (checks.below_half, [0, 0.49], [0.5, -0.1, "0", NAN]),
    (checks.share, [0, 1, 0.5], [-0.1, 1.1, "1", NAN])])
def test_ranges(check, good, bad):
    for x in good:
        check(beta=x)
    for x in bad:
        with pytest.raises(ValueError, match=f"^beta must be .*found {x!r}"):
            check(beta=x)


# ---------------------------------------------------------------------------------------------------------- binding
def part(log_ratio, advantage, *, low=0.2, high=0.3):
    return log_ratio * advantage * low * high


def test_signatures_are_the_contract():
    assert columns_read(part) == columns_read(partial(part, low=1)) == ["log_ratio", "advantage"]
    assert hyperparameters(partial(part, low=1)) == {"low": 1, "high": 0.3}
    assert columns_read(masks.TokenMask()) == ["states_ref", "mask"]
    assert columns_read(RunningShift()) == ["score", "real"]
    assert kind(partial(pairwise.squared, goal=1.0)) == "Pairs" and kind(masks.DegreeHead()) == "Rows"
    assert kind(regularisers.best_nll) == "Lists" and kind(regularisers.k3_old) == "Tokens"


def test_bind_makes_columns_once_and_on_demand():
    calls = []

    def doubled(x):
        calls.append(1)
        return 2 * x

    def total(doubled, x):
        return doubled + x

    columns = Columns({"x": torch.ones(1)}, {"doubled": doubled, "never": doubled})
    assert float(bind(total, columns)) == float(bind(total, columns)) == 3.0 and calls == [1]
    assert "doubled" in columns and "y" not in columns and len(columns) == 3
    assert needs([total], {"doubled": doubled}) == {"x"}


def test_bind_errors():
    with pytest.raises(MissingColumn, match="part reads column 'advantage', which is not there, did you mean 'advantages'"):
        bind(part, {"log_ratio": torch.ones(1), "advantages": torch.ones(1)})

    def circle(square):
        return square

    def square(circle):
        return circle

    with pytest.raises(MissingColumn, match="column 'square' is made from itself: square <- circle <- square"):
        bind(circle, Columns({}, {"circle": circle, "square": square}))


SPECS = [("scores", "log_ratio"), ("scores", {"log_ratio": {"beta": 0.5}}), ("pairwise", {"squared": {"goal": 2.0}}),
         ("margins", {"shifted": {"gamma": 1.0}}), ("masks", {"TokenMask": {"dropout": 0.1}}), ("masks", "same_mask"),
         ("annotations", {"RunningShift": {}}), ("references", {"Moving": {"alpha": 0.5, "every": 4}})]


@pytest.mark.parametrize("module, spec", SPECS, ids=[str(s) for _, s in SPECS])
def test_specs_round_trip(module, spec):
    assert to_spec(from_spec(spec, f"prefopt.{module}")) == spec


def test_spec_of_own_part():
    found = from_spec({f"{__name__}:part": {"low": 0.5}}, "prefopt.scores")
    assert hyperparameters(found)["low"] == 0.5 and to_spec(found) == {f"{__name__}:part": {"low": 0.5}}
    assert from_spec(None, "prefopt.scores") is None and to_spec(None) is None


@pytest.mark.parametrize("spec, message", [
    ("log_ration", "prefopt.scores has no part 'log_ration', did you mean 'log_ratio'"),
    ("F", "prefopt.scores has no part 'F'"),
    ({"log_ratio": {"betta": 1.0}}, "part 'log_ratio' has no argument 'betta', did you mean 'beta'.*arguments: beta"),
    ({"log_ratio": {"beta": "1e-3"}}, "argument 'beta' of 'log_ratio' is the text '1e-3': YAML reads 1e-3 as text"),
    ({"log_ratio": {}, "mean_logp": {}}, "a part is written as 'name' or {name:"),
    (3, "the name of a part is a string, found 3"),
    ("no.such.module:part", "cannot import 'no.such.module'"),
    ("prefopt.scores:log_ratoi", "prefopt.scores has no 'log_ratoi', did you mean 'log_ratio'"),
])
def test_wrong_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        from_spec(spec, "prefopt.scores")


def test_spec_without_its_needed_argument():
    with pytest.raises(ValueError, match=r"part 'squared' needs goal: write \{squared: \{goal: ...\}\}"):
        from_spec("squared", "prefopt.pairwise")


def test_slots_by_hand_are_the_recipe():
    """A recipe is its parts: DPO + SFT built from slots equals rpo_mean."""
    objective = PreferenceObjective(score=partial(scores.log_ratio, beta=0.1), margin=margins.difference,
                                    ranking=pairwise.logistic, labels=label_rules.as_given,
                                    regularisers={"sft": Term(regularisers.best_mean_nll, 0.7)})
    close(*(outcome(o, columns_for("rpo_mean"))[0] for o in (objective, recipes.rpo_mean(alpha=0.7))))


def test_own_parts_of_each_kind():
    """Rows, Lists and Pairs of one's own are reduced as they say."""
    def rows(score) -> Rows:
        return score

    def lists(score, real) -> Lists:
        return torch.where(real, score, 0.0).sum(-1)

    for ranking, expected in ((rows, -1.75), (lists, -3.5)):
        objective = PreferenceObjective(score=scores.log_likelihood, ranking=ranking)
        assert float(value(objective, pairs()).detach()) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------- references
def test_references():
    ref, policy = [torch.zeros(2)], [torch.ones(2)]
    Frozen().step(1, ref, policy)
    assert not Frozen().moves and not ref[0].any()
    moving = Moving(alpha=0.25, every=3)
    for step in (1, 2):
        moving.step(step, ref, policy)
        assert not ref[0].any()
    moving.step(3, ref, policy)
    assert ref[0].tolist() == [0.25, 0.25] and moving.spec() == {"alpha": 0.25, "every": 3}
    for wrong in (dict(alpha=0.0), dict(alpha=1.1), dict(every=0)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            Moving(**wrong)
