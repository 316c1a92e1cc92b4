"""Run files: what is wrong is said before anything is loaded, with the place and the nearest name; what is right is kept."""
import inspect
import itertools
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from columns_for_tests import ON_POLICY, SETTINGS, close, columns_for, objective_for, outcome, ready

from prefopt import explain, label_rules, pairwise, recipes
from prefopt.config import Run, assemble, load, make, met
from prefopt.explain import HOMES, defaults
from prefopt.folder import departures
from prefopt.objectives import PreferenceObjective
from prefopt.parts import MissingColumn, find, from_spec, hyperparameters, name, needs, to_spec
from prefopt.references import Frozen, Moving

BASE = {"recipe": "dpo", "policy": "somewhere/model", "data": {"train": "pairs.jsonl"}}


def written(tmp_path: Path, text: str) -> Path:
    """A run file with this text in it, on top of what every run needs."""
    path = tmp_path / "run.yaml"
    have = set(yaml.safe_load(text) or {})
    if text.startswith("{"):                                  # on one line
        text = yaml.safe_dump(yaml.safe_load(text))
    path.write_text(text + "\n" + yaml.safe_dump({k: v for k, v in BASE.items() if k not in have}))
    return path


# ---------------------------------------------------------------------------------------------------------------- errors
WRONG = {
    # unknown keys, at every level
    "recip: dpo": "recip: no such setting, did you mean 'recipe'",
    "train: {lrr: 1}": "train.lrr: no such setting, did you mean 'lr'",
    "train: {modules: {lrr: 1}}": "train.modules.lrr: no such setting, did you mean 'lr'.*settings here: lr, weight_decay",
    "train: {online: {max_tokens: 1}}": "train.online.max_tokens: no such setting, did you mean 'max_new_tokens'",
    "data: {train: a, evl: b}": "data.evl: no such setting, did you mean 'eval'",
    "policy: {name: a, dtpe: float32}": "policy.dtpe: no such setting, did you mean 'dtype'",
    "reference: {name: a, revison: x}": "reference.revison: no such setting, did you mean 'revision'",
    "data: {train: a, encoding: {long_promt: drop}}": "data: .*'long_promt', did you mean 'long_prompt'",
    "policy: {name: a, lora: {rank: 8}}": "policy.lora: .*no argument 'rank'",
    "train: {optimizer: {AdamW: {epsilon: 1e-8}}}": "no argument 'epsilon', did you mean 'eps'",
    # unknown names
    "recipe: dpoo": "unknown recipe 'dpoo', did you mean 'dpo'",
    "set: {betaa: 0.1}": "recipe 'dpo' has no argument or slot 'betaa', did you mean 'beta'.*slots: score, margin",
    "set: {rankin: hinge}": "no argument or slot 'rankin', did you mean 'ranking'",
    "set: {ranking: hing}": "no ranking 'hing', did you mean 'hinge'",
    "set: {score: log_rati}": "no score 'log_rati', did you mean 'log_ratio'",
    "set: {reduce: group_median}": "no reduce 'group_median', did you mean 'group_mean'",
    "set: {ranking: {hinge: {delt: 1}}}": "part 'hinge' has no argument 'delt', did you mean 'delta'",
    "set: {reference: {Moving: {alph: 0.5}}}": "part 'Moving' has no argument 'alph', did you mean 'alpha'",
    "set: {regularisers: [{best_mean_nl: {weight: 0.1}}]}": "no regularisers 'best_mean_nl', did you mean 'best_mean_nll'",
    "set: {regularisers: [{best_mean_nll: {wight: 1}}]}": "part 'best_mean_nll' has no argument 'wight'",
    "update: extragradent": "no part 'extragradent', did you mean 'extragradient'",
    "train: {optimizer: AdamWW}": "no part 'AdamWW', did you mean 'AdamW'",
    "train: {schedule: cosin}": "train.schedule: .*found 'cosin', did you mean 'cosine'",
    "log: [tensorbord]": "log.0: .*did you mean 'tensorboard'",
    "set: {score: 'nowhere.at.all:x'}": "cannot import 'nowhere.at.all'",
    "set: {score: 'math:sqrtt'}": "math has no 'sqrtt', did you mean 'sqrt'",
    "set: {score: 'os:path'}": "set.score: 'os:path' is no part, it cannot be called",
    "set: {ranking: 'math:sqrt'}": "part 'sqrt' must say in its return annotation what it returns",
    "set: {score: 'test_config:misspelt'}": "reads the column 'logpp', which is not known, did you mean 'logp'",
    # wrong types
    "train: {lr: fast}": "train.lr: .*found 'fast'",
    "train: {groups_per_step: 2.5}": "train.groups_per_step: .*found 2.5",
    "train: null": "train: .*found None",
    "set: [beta]": "set: .*found .*beta",
    "set: {beta: '1e-2'}": "'beta' of recipe 'dpo' must be a number, found '1e-2': write it without quotes",
    "set: {beta: true}": "must be a number, found True",
    "set: {beta: null}": "must be a number, found None",
    "set: {labels: {unflip: 0.3}}": r"arguments have names: \{unflip: \{argument: value\}\}",
    "set: {labels: {unflip: {flip: 0.1}, smooth: {}}}": "write 'name' or {name: {argument: value}}",
    "set: {ranking: {hinge: {delta: wide}}}": "'delta' of part 'hinge' must be a number, found 'wide'",
    "set: {ranking: {hinge: {delta: '1e-1'}}}": "is the text '1e-1'",
    "set: {regularisers: [{best_mean_nll: {weight: much}}]}": "weight of best_mean_nll must be a number, found 'much'",
    "set: {regularisers: [best_nll, best_nll]}": "set.regularisers has 'best_nll' twice",
    "set: {reference: {Moving: {every: 1.5}}}": "'every' of part 'Moving' must be a whole number, found 1.5",
    "{recipe: spo_degree, set: {degrees: 2.5}}": "'degrees' of recipe 'spo_degree' must be a whole number, found 2.5",
    "policy: 3": "policy: .*found 3",
    "data: {}": "data.train: missing",
    "data: {train: []}": "data.train: .*at least 1 item",
    # out of range
    "set: {beta: 0}": "beta must be a number greater than 0, found 0",
    "set: {beta: -0.1}": "beta must be a number greater than 0, found -0.1",
    "set: {score: {mean_logp: {beta: 0}}}": "beta must be a number greater than 0, found 0",
    "set: {label_smoothing: 0.5}": r"label_smoothing must be in \[0, 0.5\), found 0.5",
    "set: {label_smoothing: -0.1}": r"label_smoothing must be in \[0, 0.5\), found -0.1",
    "set: {labels: {smooth: {label_smoothing: 0.7}}}": r"label_smoothing must be in \[0, 0.5\), found 0.7",
    "{recipe: rdpo, set: {flip: 0.5}}": r"flip must be in \[0, 0.5\), found 0.5",
    "set: {labels: {unflip: {flip: 0.5}}}": r"flip must be in \[0, 0.5\), found 0.5",
    "data: {train: a, flip: 0.5}": "data.flip: .*less than 0.5",
    "set: {reference: {Moving: {alpha: 2}}}": r"Moving: alpha must be in \(0, 1\], found 2",
    "train: {lr: 0.0}": "train.lr: .*greater than 0",
    "train: {seed: -1}": "train.seed: .*greater than or equal to 0",
    "data: {train: a, max_length: 1}": "max_length should be a number of tokens, at least 2",
    # what does not go together
    "set: {ranking: squared}": "part 'squared' needs goal: write {squared: {goal: ...}}",
    "set: {score: null}": "set.score cannot be empty",
    "{recipe: grpo, set: {annotations: {coefficient: AdaptiveEntropy}}}": "part 'AdaptiveEntropy' needs target: write",
    "{recipe: grpo, set: {shaping: overlong}}": "part 'overlong' needs limit, buffer: write",
    "{recipe: grpo, set: {penalties: [{k3: {weight: much}}]}}": "weight of k3 must be a number, found 'much'",
    "{recipe: grpo, set: {advantage: zscor}}": "no advantage 'zscor', did you mean 'zscore'",
    "{recipe: grpo, set: {score: log_ratio}}": "recipe 'grpo' has no argument or slot 'score'",
    "{recipe: bnpo, set: {least: 1.0}}": "least must be below most=1.0, found 1.0",
    "set: {pair_weight: on_policy, ranking: list_mle}": "pair_weight 'on_policy' needs a pairwise ranking, and 'list_mle'",
    "{recipe: wpo, set: {ranking: bco}}": "pair_weight 'on_policy' needs a pairwise ranking, and 'bco' is one of rows",
    "train: {patience: 2}": "train.patience stops early on a held-out metric: set data.eval",
    "train: {eval_every: 2}": "train.eval_every evaluates on held-out data: set data.eval",
    "expect: {eval/accuracy: '>= 0.5'}": "expect.eval/accuracy is measured on held-out data: set data.eval",
    "expect: {loss: '0.5'}": "expect.loss: '0.5' is not a condition such as '>= 0.55'",
    "expect: {loss: '>= high'}": "expect.loss: '>= high' is not a condition",
    "{recipe: tr_dpo, data: {train: a, cache_reference: true}}": "'tr_dpo' moves its reference, .* set data.cache_reference",
    "{recipe: hypo, data: {train: a, cache_reference: true}}": "'hypo' scores responses sampled during training",
    "train: {optimizer: {AdamW: {lr: 1.0}}}": "lr is not set here, but by train.lr",
    "train: {optimizer: {AdamW: {weight_decay: 1.0}}}": "weight_decay is not set here, but by train.weight_decay",
    "train: {optimizer: lr_scheduler}": "train.optimizer: 'lr_scheduler' is no optimiser",
    "data: {train: a, encoding: {max_prompt: 3}}": "max_prompt is a setting of data itself",
    "policy: {name: a, lora: {}}": "policy.lora: no setting of the adapters is given",
}


def misspelt(logpp, mask):
    """A part with a misspelt column, for the table above."""


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong(tmp_path, text):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=WRONG[text]) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_all_problems_at_once(tmp_path):
    with pytest.raises(ValueError, match="data.evl: .*; train.lrr: .*; recip: "):
        load(written(tmp_path, "recip: dpo\ntrain: {lrr: 1}\ndata: {train: a, evl: b}"))


@pytest.mark.parametrize("text, said", [("[1, 2]", "holds keys .*found list"), ("a: [", "not valid YAML"),
                                        ("a: \xff\xfe", "not valid YAML")])
def test_files_that_are_no_run(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=said):
        load(path)
    with pytest.raises(ValueError, match="no run file"):
        load(tmp_path / "none.yaml")


# ----------------------------------------------------------------------------------------------------- numbers, overrides
def test_powers_of_ten_are_numbers(tmp_path):
    """PyYAML alone reads 1e-6 as text."""
    assert yaml.safe_load("1e-6") == "1e-6"
    path = written(tmp_path, "set: {beta: 1e-2}\ntrain: {lr: 1e-6, optimizer: {AdamW: {eps: 1E-7}}, weight_decay: 1.5e+0}")
    run = load(path, ["set.label_smoothing=2e-1", "train.clip=2.e0"])
    assert (run.set, run.train.lr, run.train.weight_decay, run.train.clip) == (
        {"beta": 0.01, "label_smoothing": 0.2}, 1e-6, 1.5, 2.0)
    assert run.make_optimizer().keywords["eps"] == 1e-7
    assert load(path, ["out=1e", "policy=e1-6", "tokenizer=1-6e"]).out == "1e"


def test_overrides(tmp_path):
    path = written(tmp_path, "policy: gpt2\nset: {beta: 0.2}")
    run = load(path, ["policy.dtype=bfloat16", "train.lr=0.5", "set.labels={unflip: {flip: 0.3}}", "data.eval=held.jsonl",
                      "reference.name=other", "expect.loss=<= 0.7", "train.clip=null"])
    assert (run.policy.name, run.policy.dtype, run.reference.name) == ("gpt2", "bfloat16", "other")
    assert run.set == {"beta": 0.2, "labels": {"unflip": {"flip": 0.3}}} and run.data.train == "pairs.jsonl"
    assert (run.train.lr, run.train.clip, run.data.eval, run.expect) == (0.5, None, "held.jsonl", {"loss": "<= 0.7"})
    assert load(path, ["policy.name=other"]).policy.name == "other"
    assert load(path, ["policy=third"]).policy.name == "third"


@pytest.mark.parametrize("item, said", [("lr", "'lr' is not of the form a.b=c"), ("=3", "not of the form"),
                                        ("recipe.x=3", "'recipe' is 'dpo', not a block of settings"),
                                        ("set={a", "not valid YAML"), ("train.lrr=1", "train.lrr: no such setting")])
def test_wrong_overrides(tmp_path, item, said):
    with pytest.raises(ValueError, match=said):
        load(written(tmp_path, ""), [item])


def test_conditions():
    assert met(">= 0.5", 0.5) and not met("> 0.5", 0.5) and met("<=1e-3", 0.001) and met(" < 2 ", 1)
    assert not met(">= 0.5", float("nan")) and not met("<= 0.5", float("nan"))


# ------------------------------------------------------------------------------------------------------------- round trips
FULL = {
    "recipe": "tr_dpo", "set": {"beta": 1e-7, "labels": {"unflip": {"flip": 0.3}}, "regularisers": [
        {"best_mean_nll": {"weight": 0.1}}, "token_nll"], "pair_weight": None,
        "reference": {"Moving": {"alpha": 0.5, "every": 2}}},
    "policy": {"name": "p", "dtype": "bfloat16", "lora": {"r": 4, "target_modules": ["q_proj"]}}, "reference": "q",
    "tokenizer": "t", "data": {"train": ["a.jsonl", "b.jsonl"], "eval": "c.jsonl", "columns": {"chosen": "good"},
                               "encoding": {"long_prompt": "drop", "template_settings": {"x": True}}, "max_length": 77},
    "train": {"lr": 3.0000000000000004e-07, "warmup": 0.1, "steps": 7, "optimizer": {"AdamW": {"betas": [0.9, 0.95]}},
              "eval_every": 3, "patience": 2, "clip": None, "tokens": None, "modules": {"lr": 0.1}},
    "update": {"extragradient": {}}, "log": ["tensorboard"], "expect": {"eval/accuracy": ">= 0.6"}, "out": "runs/x"}


def test_run_yaml_loads_to_the_same_run(tmp_path):
    run = make(FULL)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
    assert load(path) == run and load(path).train.lr == FULL["train"]["lr"]
    assert make({**FULL, "policy": {**FULL["policy"], "name": "other"}}) != run


def every_spec():
    """Each part that a slot may hold, with every hyperparameter given; a class with those that it asks for."""
    given = {"goal": 0.7, "gamma": 0.7, "label_smoothing": 0.1, "flip": 0.2, "limit": 9, "buffer": 4, "low": 0.2, "high": 0.8,
             "length": 7, "target": 1.5}
    empty = inspect.Parameter.empty
    known = [(slot, home, part) for slot, homes in HOMES.items() for home in homes for part in import_module(home).__all__]
    for slot, home, part in known:
        found = find(part, home)
        asked = defaults(found).items() if inspect.isclass(found) else hyperparameters(found).items()
        kept = {k: given[k] if v is empty else v for k, v in asked if v is empty or not inspect.isclass(found)}
        yield pytest.param(slot, home, {part: kept} if kept else part, id=f"{slot}-{part}")


@pytest.mark.parametrize("slot, home, spec", every_spec())
def test_parts_survive_yaml(slot, home, spec):
    written = yaml.safe_load(yaml.safe_dump({slot: spec}))[slot]
    part = from_spec(written, home)
    again = to_spec(part)
    assert again == spec or next(iter(again)) in spec                                   # objects say their defaults
    assert to_spec(from_spec(again, home)) == again


def spec_of(filling):
    """What to write in YAML for what fills a slot. A module may be in two places, so it is left out."""
    if isinstance(filling, Mapping):
        return {key: to_spec(part) for key, part in filling.items() if not isinstance(part, torch.nn.Module)}
    return to_spec(filling)


@pytest.mark.parametrize("recipe", recipes.__all__)
def test_parts_of_recipes_survive_yaml(recipe):
    """Every slot of every recipe, taken from its spec, gives the same loss. In YAML terms have the names of their parts."""
    objective = objective_for(recipe)
    terms = {slot for slot in ("regularisers", "penalties", "shaping") if slot in objective.home}
    specs = {slot: spec_of(getattr(objective, slot)) for slot in objective.home if slot not in terms}
    departures = {k: v for k, v in specs.items() if v is not None or type(objective).__dataclass_fields__[k].default is None}
    again = assemble(recipe, yaml.safe_load(yaml.safe_dump({**SETTINGS.get(recipe, {}), **departures})))
    for slot, spec in specs.items():
        assert spec_of(getattr(again, slot)) == spec, slot
    assert again.reference == objective.reference
    for slot, term in ((s, term) for s in terms for term in getattr(objective, s).values()):
        spec = to_spec(part := getattr(term, "part", term))
        if name(part) in explain.parts_of(slot) and not isinstance(part, torch.nn.Module):
            added = assemble(recipe, {slot: yaml.safe_load(yaml.safe_dump([spec]))})
            assert to_spec(getattr(made := getattr(added, slot)[name(part)], "part", made)) == spec
    close(outcome(ready(again), columns_for(recipe))[0], outcome(objective, columns_for(recipe))[0])


# ---------------------------------------------------------------------------------------------------------- composition
@pytest.mark.parametrize("recipe", ["ipo", "hinge"])
def test_flipped_labels_fit_any_pairwise_loss(recipe):
    """E over flips at the rate e of the corrected loss is the clean loss: (1-e) l'(x) + e l'(-x) = l(x), pair by pair."""
    flip = 0.3
    corrected = ready(make({**BASE, "recipe": recipe, "set": {"labels": {"unflip": {"flip": flip}}}}).objective())
    assert corrected.labels.func is label_rules.unflip and corrected.labels.keywords == {"flip": flip}
    clean, columns = ready(assemble(recipe, {})), columns_for("aot")
    flipped = {**columns, "relevance": 1 - columns["relevance"]}
    value, _ = outcome(clean, columns)
    right, wrong = (outcome(corrected, c)[0] for c in (columns, flipped))
    assert float((1 - flip) * right + flip * wrong) == pytest.approx(float(value), rel=1e-12)
    assert float(right) != pytest.approx(float(value), rel=1e-3)


def compositions():
    given = {"squared": {"goal": 0.7}, "squared_goal": {"goal": 0.7}}
    rankings, scores = ([n for home in PreferenceObjective.home[slot] for n in import_module(home).__all__]
                        for slot in ("ranking", "score"))
    for ranking, score in itertools.product(rankings, scores):
        yield {"ranking": {ranking: given[ranking]} if ranking in given else ranking, "score": score}


ELSEWHERE = {"kto": "baseline", "bco": "baseline", "aot_unpaired": "transported", "token_masked": "reward_mask",
             "length_desensitised": "shared_length", "expected_grade": "grade_logits", "ordinal": "grade_logits",
             "linearised": "tangent"}


@pytest.mark.parametrize("departures", compositions(), ids=lambda d: "-".join(next(iter(v)) if isinstance(v, dict) else v
                                                                              for v in d.values()))
def test_any_ranking_with_any_score(departures):
    """They compose; those that live by another part's column say which."""
    objective = ready(assemble("dpo", departures))
    columns = columns_for("aot")
    reads_score = needs([objective.ranking], {}) & {"score", "margin"}
    used = [objective.ranking, objective.score][:1 + bool(reads_score)]
    missing = [ELSEWHERE[p] for p in map(name, used) if p in ELSEWHERE]
    if missing:
        with pytest.raises(MissingColumn, match="|".join(missing)):
            outcome(objective, columns)
        return
    value, gradients = outcome(objective, columns)
    assert value.isfinite() and all(g.isfinite().all() for g in gradients.values())
    assert any(g.any() for g in gradients.values())


def test_moving_reference_by_yaml(tmp_path):
    run = load(written(tmp_path, "set: {reference: {Moving: {alpha: 0.5, every: 2}}}"))
    assert run.objective().reference == Moving(alpha=0.5, every=2)
    assert load(written(tmp_path, "set: {reference: Moving}")).objective().reference == Moving()
    assert load(written(tmp_path, "{recipe: tr_dpo, set: {reference: Frozen}}")).objective().reference == Frozen()


def test_regularisers_add_up():
    """dpo with 0.1 of best_mean_nll is rpo_mean(alpha=0.1)."""
    made = assemble("dpo", {"regularisers": [{"best_mean_nll": {"weight": 0.1}}]})
    theirs = recipes.rpo_mean(beta=0.1, alpha=0.1)
    ours, wanted = (outcome(ready(o), columns_for("dpo")) for o in (made, theirs))
    assert float(ours[0]) == pytest.approx(float(wanted[0]), rel=1e-12)
    assert set(assemble("rpo", {"regularisers": ["token_nll"]}).regularisers) == {"sft", "token_nll"}


def test_arguments_and_slots_together():
    made = assemble("simpo", {"beta": 3.0, "ranking": {"hinge": {"delta": 2}}, "pair_weight": "gap"})
    assert made.score.keywords == {"beta": 3.0} and made.ranking.func is pairwise.hinge and name(made.pair_weight) == "gap"
    assert assemble("wpo", {"pair_weight": None}).pair_weight is None


# ------------------------------------------------------------------------------------------------------------- departures
def planned(recipe: str, **departures) -> Run:
    more = {"data": {**BASE["data"], "encoding": {"aspects": ["a", "b"]}}} if recipe.startswith("multi_") else \
        {"rollout": {"rewards": "final_answer"}} if recipe in ON_POLICY else {}
    return make({**BASE, "recipe": recipe, "set": departures, **more})


def test_departures():
    assert departures(planned("dpo")) == departures(planned("dpo", beta=0.1)) == {"recipe": "dpo"}
    assert departures(planned("dpo", beta=0.5)) == {
        "recipe": "dpo", "score": {"recipe": {"log_ratio": {"beta": 0.1}}, "here": {"log_ratio": {"beta": 0.5}}}}
    assert departures(planned("dpo", ranking="hinge", labels={"unflip": {"flip": 0.3}}, pair_weight="gap")) == {
        "recipe": "dpo", "ranking": {"recipe": "logistic", "here": {"hinge": {"delta": 1.0}}},
        "labels": {"recipe": "as_given", "here": {"unflip": {"flip": 0.3}}}, "pair_weight": {"recipe": None, "here": "gap"}}
    found = departures(planned("tr_dpo", every=2, regularisers=[{"best_nll": {"weight": 0.2}}]))
    assert found == {"recipe": "tr_dpo", "reference": {"recipe": {"Moving": {"alpha": 0.6, "every": 512}},
                                                       "here": {"Moving": {"alpha": 0.6, "every": 2}}},
                     "regularisers": {"recipe": {}, "here": {"best_nll": ["best_nll", 0.2]}}}


@pytest.mark.parametrize("recipe", recipes.__all__)
def test_no_recipe_departs_from_itself(recipe):
    assert departures(planned(recipe)) == {"recipe": recipe}


def test_a_flip_correction_given_as_labels_is_unbounded():
    assert not planned("dpo", labels={"unflip": {"flip": 0.3}}).objective().bounded
    assert planned("dpo", labels={"unflip": {"flip": 0.0}}).objective().bounded


def test_aspects_and_outputs_must_agree():
    with pytest.raises(ValueError, match="learns 2 aspects, and data.encoding.aspects names none"):
        make({**BASE, "recipe": "multi_objective"})


