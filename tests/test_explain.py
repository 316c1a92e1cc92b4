"""What `explain` says is derived, so each claim is checked against another way to know it."""
import inspect
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from columns_for_tests import OFF_POLICY, ON_POLICY

from data_tools.columns import COLUMNS
from prefopt import explain, memory, recipes, regularisers
from prefopt.config import make
from prefopt.evaluation import METRICS
from prefopt.explain import document, pages, shown, slots
from prefopt.forward import FROZEN, GRADIENT, REFERENCE
from prefopt.objectives import Term
from prefopt.rehearsal import example, rehearse

ROOT = Path(__file__).parents[1]
EVERY = pytest.mark.parametrize("name", recipes.__all__)


# --------------------------------------------------------------------------------------------------------- docstrings
def test_document_takes_a_docstring_apart():
    def part(score, *, low=0.1, high=0.2):
        """Summary over
        two lines.

        l = score
            + more

        Prose here,
        that goes on.

        low, high   the range,
                    continued
        Gradient    through score
        Departs     -
        At policy = reference: log 2

        >>> part(1)
        1
        """

    doc = document(part)
    assert doc.summary == "Summary over two lines."
    assert doc.equation == "l = score\n    + more"
    assert doc.prose == "Prose here, that goes on."
    assert doc.arguments == {"low, high": "the range, continued"}
    assert doc.notes == {"Gradient": "through score", "At policy = reference": "log 2"}


@EVERY
def test_every_recipe_is_documented(name):
    """An equation, where it comes from, and a meaning for every argument that is not one of its parts'."""
    doc = document(recipes.find(name))
    assert doc.equation and doc.summary.endswith((".", ")"))
    assert "Reference" in doc.notes
    known = set(inspect.signature(recipes.find(name)).parameters)
    assert known.issuperset(argument for key in doc.arguments for argument in key.split(", "))


# -------------------------------------------------------------------------------------------------------------- slots
def test_slots_of_a_recipe_with_everything():
    o = recipes.sparsepo_independent(beta=0.5, l1_reward=0.001, l1_kl=0.002)
    assert slots(o, brief=True) == {
        "score": "token_masked(beta=0.5)", "margin": "difference", "ranking": "logistic", "labels": "as_given",
        "pair_weight": "", "regularisers": "0.001 * l1_reward_mask; 0.002 * l1_kl_mask", "reduce": "group_mean",
        "reference": "Frozen", "annotations": "", "providers": "reward_mask: TokenMask; kl_mask: TokenMask"}


def test_a_term_names_its_weight_reduction_and_terms():
    o = recipes.dpo().with_slots(weight=0.5, regularisers={"a": Term(
        partial(regularisers.k3_old), 2.0, explain.recipes.trpa().reduce, partial(regularisers.degree_rows, of=1))})
    found = slots(o, brief=True)
    assert found["ranking"] == "0.5 * logistic"
    assert found["regularisers"] == "2 * k3_old by term_mean on degree_rows(of=1)"


def test_shown_leaves_out_defaults_on_demand():
    part = partial(explain.recipes.dpo().score, beta=0.2)
    assert shown(part) == shown(part, brief=True) == "log_ratio(beta=0.2)"
    assert shown(recipes.tr_dpo(every=9).reference, brief=True) == "Moving(every=9)"
    assert shown(recipes.tr_dpo().reference) == "Moving(alpha=0.6, every=512)"


def test_departures():
    found = explain.departures_of("ipo", {"tau": 0.25, "labels": {"unflip": {"flip": 0.3}}})
    assert found == {"ranking": ("squared(goal=2)", "squared(goal=5)"), "labels": ("unflip(flip=0.3)", "as_given")}
    assert explain.departures_of("dpo", {}) == {}


def test_tables_show_their_base_and_what_differs_from_it():
    table = explain.table()
    assert set(table) == set(OFF_POLICY)
    assert table["dpo"]["score"] == "log_ratio" and table["dpo"]["ranking"] == "logistic"
    assert {k: v for k, v in table["hinge"].items() if v} == {"ranking": "hinge"}
    assert {k: v for k, v in table["rdpo"].items() if v} == {"labels": "unflip(flip=0.1)"}
    assert {k: v for k, v in table["tr_dpo"].items() if v} == {"reference": "Moving"}
    table = explain.table("grpo")
    assert set(table) == set(ON_POLICY)
    assert table["grpo"]["advantage"] == "zscore" and table["grpo"]["reduce"] == "sequence_mean"
    assert {k: v for k, v in table["gspo"].items() if v} == {"ratio": "sequence_token",
                                                             "surrogate": "clip(low=0.0003, high=0.0004)"}


def test_themes_hold_every_recipe_once():
    names = [name for names in explain.themes().values() for name in names]
    assert sorted(names) == sorted(recipes.__all__) and names[0] == "dpo"


# ------------------------------------------------------------------------------------------------ reads, models, passes
@EVERY
def test_page_of_every_recipe(name):
    objective, page = recipes.find(name)(), explain.recipe_page(name)
    assert [row[0] for row in page.tables["Columns it reads"]] == sorted(objective.reads())
    loads = [row[0] for row in page.tables["Models it loads"]]
    read = {"reference": objective.reads() & REFERENCE, "critic": objective.reads() & {"value", "value_old"}}
    assert loads == ["reward model" if objective.outputs else "policy", *(model for model in read if read[model])]
    assert ("prompts" in dict(page.tables["Data"])["takes"]) == (name in ON_POLICY)
    assert [row[0] for row in page.tables["Arguments"]] == list(inspect.signature(recipes.find(name)).parameters)
    text = explain.rendered([page])
    assert page.doc.equation.split("\n")[0][:60] in text and max(map(len, text.splitlines())) <= 100


def test_every_column_of_the_models_has_its_pass():
    """Whatever `fill` and `forward` compute beyond the policy's one pass is told."""
    assert set(explain.PASSES) >= (FROZEN | REFERENCE | {"online"})
    one_pass = {"logp", "entropy", "collision", "peak", "mass_above", "last_state", "prompt_state", "outputs", "token_reward"}
    assert GRADIENT - set(explain.PASSES) == one_pass


def test_origin_of_columns():
    assert [explain.origin(c) for c in ("logp", "logp_old", "logp_ref", "token_kl", "mismatched", "states_ref")] == \
        ["policy", "policy", "reference", "policy and reference", "policy and reference", "reference"]
    assert explain.origin("position") == explain.origin("relevance") == "the data"
    assert explain.origin("reward") == "the data or the rewards"
    assert [explain.origin(c) for c in ("value", "value_old", "logp_now", "logp_rollout")] == \
        ["critic", "critic", "policy", "sampler"]
    assert explain.origin("online") == "sampling"
    assert all(explain.origin(c) for c in COLUMNS)


def test_slots_that_nothing_reads_are_not_shown():
    assert explain.unread(recipes.kto()) == {"margin", "labels"}        # pointwise
    assert explain.unread(recipes.simpo()) == {"reference"}
    assert explain.unread(recipes.dpo()) == set()
    assert explain.unread(recipes.lipo_softmax()) == {"margin", "labels"}


def test_unbounded_recipes_say_so():
    assert "Unbounded" in dict(explain.recipe_page("rdpo").tables["Notes"])
    assert "Unbounded" not in dict(explain.recipe_page("rdpo", {"flip": 0.0}).tables["Notes"])


def test_what_the_data_must_bring():
    assert list(explain.asks(recipes.smpo())) == ["reward"]
    assert list(explain.asks(recipes.mapl())) == ["contrast", "level"]
    assert explain.asks(recipes.hypo()) == {}                           # online rows are sampled


def test_explain_is_its_pages_as_text():
    assert explain.explain("hinge") == explain.rendered(pages("hinge"))
    assert max(map(len, explain.explain("dpo", width=70).splitlines())) <= 70


# ---------------------------------------------------------------------------------------------------------- rehearsal
SINGLE, LISTS, PAIRS = "single responses marked good or bad", "lists of three or more", "pairs"


@pytest.mark.parametrize("name, shapes", [
    ("dpo", [PAIRS, LISTS]), ("aot", [PAIRS]), ("kto", [PAIRS, LISTS, SINGLE]), ("lipo_list_mle", [PAIRS, LISTS]),
    ("bco_pair", [PAIRS, LISTS, SINGLE]), ("irpo_ranking", [PAIRS, LISTS]), ("orpo", [PAIRS, LISTS])])
def test_data_that_a_recipe_takes(name, shapes):
    assert explain.takes(recipes.find(name)) == shapes


def test_rehearsal_finds_the_groups_that_teach_nothing():
    """A tie, a single response and an unlabelled pair have no gradient in DPO."""
    nan = float("nan")
    batch = example([[1.0, 0.0], [0.5, 0.5], [1.0], [nan, nan], [0.0, 1.0, 1.0]])
    assert rehearse(recipes.dpo(), batch).learns.tolist() == [True, False, False, False, True]
    assert rehearse(recipes.kto(), batch).learns.tolist() == [True, True, True, False, True]


def test_rehearsal_ignores_regularisers():
    assert not rehearse(recipes.rpo(), example([[1.0], [0.0]])).learns.any()


def test_rehearsal_raises_what_training_would():
    with pytest.raises(ValueError, match="pairs"):
        rehearse(recipes.aot(), example([[1.0, 0.5, 0.0]]))
    batch = example([[1.0, 0.0]])
    without = type(batch)({k: v for k, v in batch.items() if k != "reward"})
    with pytest.raises(KeyError, match="reward"):
        rehearse(recipes.smpo(), without)


def test_metrics_of_a_rehearsal_are_explained():
    assert set(rehearse(recipes.dpo(), example([[1.0, 0.0]])).metrics) <= set(METRICS)


# -------------------------------------------------------------------------------------------------------------- pages
def test_one_name_may_be_a_recipe_and_a_part():
    assert [p.title for p in pages("hinge")] == ["hinge (recipe)", "hinge (part of the slot ranking)"]
    assert [p.title for p in pages("best_nll")] == ["best_nll (part of the slot regularisers)"]
    assert [p.title for p in pages("logp_ref")] == ["logp_ref (column)"]
    assert [p.title for p in pages("eval/kl/ref")] == ["eval/kl/ref (metric)"]


def test_page_of_a_part():
    page, = pages("squared")
    assert page.tables["Arguments"] == [("goal", "must be given", "IPO: 1 / (2 tau)")]
    assert [row[0] for row in page.tables["Columns it reads"]] == ["margin"]
    assert page.tables["Recipes with it"] == [("inpo, ipo, ipo_md, ipo_summed, online_ipo",)]
    page, = pages("TokenMask")
    assert [row[0] for row in page.tables["Columns it reads"]] == ["states_ref", "mask"]
    page, = pages("Moving")
    assert [row[0] for row in page.tables["Arguments"]] == ["alpha", "every"]


def test_every_part_has_a_page():
    for slot in explain.HOMES:
        for name, part in explain.parts_of(slot).items():
            assert explain.part_page(slot, part).doc.summary, (slot, name)


def test_departures_show_in_the_page():
    text = explain.explain("dpo", {"ranking": "hinge", "beta": 0.3})
    assert "hinge(delta=1)" in text and "[instead of logistic]" in text and "0.3 (recipe: 0.1)" in text
    assert "the slots below say what departs" in " ".join(text.split())


@pytest.mark.parametrize("name, departures, said", [
    ("dpoo", {}, "did you mean 'dpo'"), ("dpo", {"bta": 1}, "did you mean 'beta'"),
    ("hinges", {}, "did you mean 'hinge'"), ("squared", {"goal": 1}, "only recipes take departures")])
def test_mistakes(name, departures, said):
    with pytest.raises(ValueError, match=said):
        pages(name, departures)


def test_unknown_slot():
    with pytest.raises(ValueError, match="did you mean 'ranking'"):
        explain.parts_of("rankin")


# ------------------------------------------------------------------------------------------------------- the documents
@pytest.fixture(scope="module")
def methods():
    return explain.methods_page()


def test_methods_page_is_current(methods):
    path = ROOT / "docs" / "methods.md"
    assert path.read_text(encoding="utf-8") == methods, "run: python -m prefopt.explain"


def test_table_in_the_readme_is_current():
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if explain.BEGIN not in text:
        pytest.skip("README.md has no place for the table of recipes")
    assert text == explain.refreshed(text), "run: python -m prefopt.explain"


def test_markdown_tables_have_as_many_cells_as_columns(methods):
    tables = [part for part in methods.split("\n\n") if part.startswith("| ")]
    assert len(tables) > len(recipes.__all__)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_refreshed_keeps_the_rest():
    text = f"before\n{explain.BEGIN}\nold\n{explain.END}\nafter"
    assert explain.refreshed(text) == f"before\n{explain.markdown_table()}\nafter"
    assert explain.refreshed("nothing to see") == "nothing to see"


# ------------------------------------------------------------------------------------------------------------- memory
def tiny_config(**changes):
    from transformers import Qwen2Config
    return Qwen2Config(**{"vocab_size": 50, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2,
                          "num_attention_heads": 2, "num_key_value_heads": 2, **changes})


def run_of(**settings):
    return make({"recipe": "dpo", "policy": {"name": "m"}, "data": {"train": "d"}, **settings})


def test_size_against_a_real_model():
    """Parameters exactly; saved activations against a real forward pass."""
    from transformers import AutoModelForCausalLM
    config = tiny_config()
    model = AutoModelForCausalLM.from_config(config).eval()
    size = memory.size(config)
    assert size.parameters == size.trainable == sum(p.numel() for p in model.parameters())
    assert size.weights == 4 * size.parameters
    tokens = torch.zeros(1, memory.LENGTH, dtype=torch.long)
    kept = memory.saved(lambda: model.base_model(input_ids=tokens, use_cache=False), list(model.parameters()))
    assert size.activations == kept / memory.LENGTH


def test_size_of_adapters():
    """r = 3 on the seven linear maps of a layer: 3 (in + out) each."""
    maps = 4 * (16 + 16) + 2 * (16 + 40) + (40 + 16)
    assert memory.size(tiny_config(), lora={"r": 3}).trainable == 2 * 3 * maps


def test_optimiser_state_is_measured():
    assert memory.optimizer_bytes(run_of()) == 2
    assert memory.optimizer_bytes(run_of(train={"optimizer": "SGD"})) == 0
    assert memory.optimizer_bytes(run_of(train={"optimizer": {"SGD": {"momentum": 0.9}}})) == 1


def test_estimate_adds_what_a_run_holds():
    config = tiny_config()
    size = memory.size(config)
    full = memory.estimate(run_of(), config, tokens=100)
    assert full["weights"] == full["gradients"] == full["reference"] == full["optimiser"] / 2 == size.weights
    assert full["activations"] == 100 * size.activations
    adapters = memory.estimate(run_of(policy={"name": "m", "lora": {"r": 3}}), config, tokens=100)
    assert "reference" not in adapters and adapters["gradients"] < full["gradients"]
    assert "reference" not in memory.estimate(run_of(recipe="simpo"), config, tokens=100)
    saved = memory.estimate(run_of(policy={"name": "m", "gradient_checkpointing": True}), config, tokens=100)
    assert saved["activations"] < full["activations"]
    masks = memory.estimate(run_of(recipe="sparsepo"), config, tokens=100)
    assert masks["hidden states of the reference"] == 2 * 100 * 2 * 16 * 4
