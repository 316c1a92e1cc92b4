"""Reward models through the loop: heads on any body, scores that do not depend on the layout, folders others can open."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from loop_cases import go, lines, plan, workplace, write
from tiny_models import EXACT, Float64, tiny, tokenizer

from data_tools.batch import Batch
from data_tools.collate import EncodedGroup, EncodedRow, collate, pad
from data_tools.encoding import Encoding, encode
from data_tools.fields import DataError
from data_tools.records import Group, Response
from prefopt import config, recipes
from prefopt.forward import fill, forward
from prefopt.models import Models, head_of, load_policy, prepare_padding
from rewards.base import Row, ScoringError, rows_of, score
from rewards.trained import TrainedComparison, TrainedReward, load

DECODERS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox", "phi"]
ENCODERS = {"BertModel": {}, "DistilBertModel": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}, "RobertaModel": {},
            "ModernBertModel": {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}}


def body(name: str, folder) -> str:
    """The folder of a body without a head of its own, or of a language model."""
    import transformers
    if name not in ENCODERS:
        tiny(name, dtype=torch.float32).save_pretrained(folder)
        return str(folder)
    size = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    settings = ENCODERS[name] if "dim" in ENCODERS[name] else {**size, **ENCODERS[name]}
    made = getattr(transformers, name.removesuffix("Model") + "Config")(**{"vocab_size": 61, "max_position_embeddings": 64,
                                                                           **settings})
    torch.manual_seed(0)
    getattr(transformers, name)(made).save_pretrained(folder)
    return str(folder)


def ragged(seed: int = 0) -> Batch:
    """Two groups of two and three rows of unlike length."""
    rng = np.random.default_rng(seed)
    def ids(n):
        return rng.integers(4, 60, n).astype(np.int32)
    groups = [EncodedGroup(ids(4), [EncodedRow(ids(n)) for n in (3, 6)], np.array([1.0, 0.0], np.float32)),
              EncodedGroup(ids(2), [EncodedRow(ids(n)) for n in (1, 5, 2)], np.array([0.5, 1.0, 0.0], np.float32))]
    return pad(groups)


# ------------------------------------------------------------------------------------------------------ forward passes
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_outputs_are_those_of_transformers(name, tmp_path):
    """Row by row without padding, the class of transformers gives what one padded pass gives; gradients reach the body."""
    objective = recipes.bradley_terry()
    model = load_policy(body(name, tmp_path), dtype="float64", head=head_of(objective))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    batch, models = ragged(), Models(model)
    step = objective.annotate(batch)
    found = forward(models, step, objective.reads())
    assert models.policy_model().causal == (name in DECODERS)
    model.eval()
    model.config.pad_token_id = 0
    own = [model(input_ids=batch["tokens"][n][batch["attend"][n]][None]).logits[0] for n in range(batch.N)]
    torch.testing.assert_close(found["outputs"], torch.stack(own), **EXACT)
    objective.loss(found).value.backward()
    assert sum(float(p.grad.abs().sum()) > 0 for p in model.parameters() if p.grad is not None) > 5


def test_no_logits_and_one_pass_per_response(tmp_path):
    """No head over the vocabulary is loaded; K responses cost K rows of one pass, whatever is compared."""
    for recipe in ("bradley_terry", "general_preference"):
        objective = recipes.find(recipe)()
        model = load_policy(body("llama", tmp_path), head=head_of(objective))
        assert not hasattr(model, "lm_head") and model.score.weight.shape == (objective.outputs, 16)
        models, batch = Models(model), ragged()
        forward(models, objective.annotate(batch), objective.reads())
        calls = models.policy_model().calls
        assert (calls["forwards"], calls["positions"], calls["rectangle"]) == (1, batch.N, batch["tokens"].numel())


REWARD_RECIPES = [name for name in recipes.__all__ if recipes.find(name)().outputs]


def test_there_are_recipes_of_reward_models():
    assert {"bradley_terry", "bt_list", "bt_ties", "ordinal", "gaussian", "general_preference", "gpm_gated", "process",
            "multi_objective", "outcome"} <= set(REWARD_RECIPES)


def with_columns(batch: Batch, objective) -> Batch:
    """Columns that only records bring."""
    rng = torch.Generator().manual_seed(1)
    out = {}
    if "rewards" in objective.reads():
        out["rewards"] = torch.rand(batch.N, objective.outputs, generator=rng)
    if "step_label" in objective.reads():
        out["step_label"] = torch.where(batch["mask"] & (torch.rand(batch["mask"].shape, generator=rng) < 0.5),
                                        torch.rand(batch["mask"].shape, generator=rng).round(), torch.nan)
        out["step_label"][batch["mask"].int().cumsum(1) == 1] = 1.0
    if objective.outputs == 4 and "grade_logits" in objective.providers:
        out["relevance"] = torch.tensor([3.0, 0.0, 1.0, 4.0, 2.0])
    return batch.with_columns(**out)


@pytest.mark.parametrize("name", REWARD_RECIPES)
def test_gradients_do_not_depend_on_the_layout(name, tmp_path):
    """Whole step, micro-batches, and padding on the left: one gradient, to 1e-10."""
    objective = recipes.find(name)()
    torch.manual_seed(3)
    model = load_policy(body("llama", tmp_path), dtype="float64", head=head_of(objective))
    models = Models(model)
    for module in objective.modules():
        module.setup(layers=2, width=16)
        module.double()
    batch = with_columns(ragged(), objective)

    def gradients(batch, tokens):
        model.zero_grad()
        step = objective.annotate(fill(models, batch, objective.reads(), tokens=tokens))
        total = 0.0
        for micro in step.microbatches(tokens):
            loss = objective.loss(forward(models, micro, objective.reads()))
            loss.value.backward()
            total += float(loss.value)
        return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def left(batch):
        """The same rows with three more columns of padding on the left, and nothing on the right."""
        length, width = batch["attend"].sum(1), batch["tokens"].shape[1] + 3
        place = torch.arange(width) - (width - length[:, None])
        out = {}
        for key, value in batch.items():
            if value.ndim == 2 and value.shape == batch["tokens"].shape:
                value = torch.where(place >= 0, value.gather(1, place.clamp(min=0)), torch.zeros((), dtype=value.dtype))
            out[key] = value
        return Batch(out)

    with Float64():
        value, expected = gradients(batch, None)
        for other, tokens in ((batch, 40), (left(batch), None)):
            again, found = gradients(other, tokens)
            assert again == pytest.approx(value, abs=1e-10)
            assert len(found) == len(expected) > 10
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, **EXACT)
    assert max(float(g.abs().max()) for g in expected) > 1e-4


# ------------------------------------------------------------------------------------------------------- steps, segments
def test_step_labels_stand_at_the_ends_of_steps():
    words = tokenizer()
    stepwise = Response("w1 w2\nw3\nw4 w5", meta={"steps": ["w1 w2", "w3", "w4 w5"], "step_labels": [True, None, False]})
    batch = collate([Group("w9", [stepwise])], words)
    labels = batch["step_label"][0][batch["mask"][0]]
    ids = batch["tokens"][0][batch["mask"][0]].tolist()
    assert [words.decode(i) for i in ids] == ["w1", "w2", "w3", "w4", "w5", "<eos>"]
    assert labels.tolist() == pytest.approx([np.nan, 1.0, np.nan, np.nan, np.nan, 0.0], nan_ok=True)


def test_segments_mark_every_token_also_inside_a_chat_template():
    words = tokenizer()
    answer = Response("w1 w2 w3", meta={"segments": [["w1 ", 1], ["w2 w3", 3]]})
    for prompt in ("w9", [{"role": "user", "content": "w9"}]):
        batch = collate([Group(prompt, [answer])], words)
        assert batch["segment"][0][batch["mask"][0]].tolist() == [1.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize(("meta", "said"), [
    ({"steps": ["w1", "w3"]}, "the steps .* are not its text"), ({"steps": ["w1", ""]}, "step 2 of the response is empty"),
    ({"steps": ["w1", "w2"], "step_labels": [1.0]}, "2 steps and 1 step_labels")])
def test_steps_that_do_not_fit(meta, said):
    with pytest.raises(DataError, match=said):
        encode([Group("w9", [Response("w1\nw2", meta=meta)])], tokenizer())


# ------------------------------------------------------------------------------------------------------------ whole runs
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("rewards"), train=90, held_out=12)


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_bradley_terry_run_gives_a_folder_that_transformers_opens(place, lora):
    """It learns, and transformers' own class scores a padded batch as the reward does."""
    out = f"bt-{bool(lora)}"
    result = go(place, "bradley_terry", out, **{"train.epochs": 4, "train.lr": 0.02, "policy.lora": lora})
    assert result.metrics["eval/accuracy"] == pytest.approx(1.0) and result.metrics["eval/loss"] < 0.5
    assert 0.6 < lines(place / out)[0]["loss"] < 0.8          # log 2, but for the random head
    reward = load(str(place / out))
    assert isinstance(reward, TrainedReward)
    groups = [Group("w3 w4 ", [Response("w5 w1"), Response("w6 w7 w8 w2")]), Group("w9 ", [Response("w1")])]
    score(groups, {"bt": reward})
    found = [r.scores["bt"] for g in groups for r in g.responses]
    assert found[0] > found[1]
    words = reward.models.tokenizer
    rows = [words(f"{g.prompt}{r.text}")["input_ids"] + [words.eos_token_id] for g in groups for r in g.responses]
    if lora:
        from peft import AutoPeftModelForSequenceClassification as Auto
    else:
        from transformers import AutoModelForSequenceClassification as Auto
    own = Auto.from_pretrained(place / out / "model", **({"num_labels": 1} if lora else {})).eval()
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=words.pad_token_id)
    with torch.no_grad():
        theirs = own(input_ids=ids, attention_mask=ids != words.pad_token_id).logits[:, 0]
    torch.testing.assert_close(torch.tensor(found), theirs, rtol=0, atol=1e-5)


def cyclic(n: int, seed: int = 0) -> list[dict]:
    """w1 beats w2, w2 beats w3, w3 beats w1."""
    beats = [("w1", "w2"), ("w2", "w3"), ("w3", "w1")]
    return [{"prompt": "w9 ", "chosen": beats[i % 3][0], "rejected": beats[i % 3][1]} for i in range(n)]


def test_a_general_preference_run_fits_a_cycle(place):
    """Which no scores can: of three pairs in a circle they rank two at most."""
    settings = {"data.train": write(place / "cycle.jsonl", cyclic(18)), "data.eval": str(place / "cycle.jsonl"),
                "train.epochs": 20, "train.lr": 0.01}
    assert go(place, "general_preference", "gpm", **settings, **{"set.dim": 4}).metrics["eval/accuracy"] > 0.999
    assert go(place, "bradley_terry", "bt-cycle", **settings).metrics["eval/accuracy"] <= 2 / 3 + 1e-9
    comparison = load(str(place / "gpm"))
    assert isinstance(comparison, TrainedComparison)
    wins = np.array(comparison.compare([Group("w9 ", [Response(w) for w in ("w1", "w2", "w3")])])[0])
    assert np.allclose(wins + wins.T, 1, atol=1e-7) and wins[0, 1] > 0.8 and wins[1, 2] > 0.8 and wins[2, 0] > 0.8


def test_a_process_run_finds_the_wrong_step(place):
    """Steps with w2 are wrong. The score is that of the worst step."""
    rng = np.random.default_rng(0)

    def solution(n):
        steps = [f"w{rng.integers(10, 40)} w{'12'[rng.integers(2)]}" for _ in range(3)]
        return {"prompt": "w9 ", "completions": steps, "labels": [s.endswith("w1") for s in steps]}

    data = write(place / "steps.jsonl", [solution(n) for n in range(48)])
    go(place, "process", "prm", **{"data.train": data, "data.eval": data, "train.epochs": 8, "train.lr": 0.03})
    reward = load(str(place / "prm"))
    steps = ["w11 w1", "w12 w2", "w13 w1"]
    row = Row(Group("w9 ", []), Response("\n".join(steps), meta={"steps": steps}))
    (words, values), = reward.tokens_of([row])
    assert len(words) == 7 and values[1] > 0.8 and values[3] < 0.2 and values[6] > 0.8       # w1, w2, <eos>


def test_an_implicit_reward_is_its_log_ratio(place):
    """The sum of the token rewards is the score; the reference is found by what the folder says."""
    go(place, "implicit_ce", "implicit", **{"set.beta": 0.5, "train.epochs": 6})
    reward = load(str(place / "implicit"))
    rows = rows_of([Group("w3 w4 ", [Response("w5 w1"), Response("w6 w2")])])
    found = reward(rows)
    assert found[0] > found[1]
    for (words, values), value in zip(reward.tokens_of(rows), found, strict=True):
        assert len(words) == len(values) and sum(values) == pytest.approx(value, abs=1e-5)


def rated(n: int, seed: int = 0) -> list[dict]:
    """Good responses end with w1, safe ones begin with w3; every third response lacks one of the two grades."""
    rng = np.random.default_rng(seed)

    def response(k):
        good, safe = rng.integers(2, size=2)
        scores = {"good": float(good), "safe": float(safe)}
        scores.pop(("good", "safe", "")[k % 3], None)
        return {"text": f"w{3 if safe else 4} w{rng.integers(10, 40)} w{1 if good else 2}", "scores": scores}

    return [{"prompt": "w9 ", "responses": [response(2 * i), response(2 * i + 1)]} for i in range(n)]


def test_labels_of_aspects_come_from_scores(place):
    """A head per aspect, learned from records in which grades are missing; each is a reward of its own."""
    data = write(place / "rated.jsonl", rated(60))
    aspects = {"data.encoding": {"aspects": ["safe", "good"]}}
    go(place, "multi_objective", "aspects", **aspects, **{"data.train": data, "data.eval": data, "train.epochs": 8,
                                                          "train.lr": 0.02})
    row = Row(Group("w9 ", []), Response("w3 w20 w2"))        # safe, and not good
    safe, good, both = (load(str(place / "aspects"), aspect=a)([row])[0] for a in ("safe", "good", None))
    assert safe > 0.7 and good < 0.3 and both == pytest.approx((safe + good) / 2, abs=1e-6)
    with pytest.raises(ValueError, match="no aspect 'god', did you mean 'good'"):
        load(str(place / "aspects"), aspect="god")


def test_an_aspect_that_no_score_has(place):
    data = write(place / "rated.jsonl", rated(4))
    with pytest.raises(DataError, match="none of the aspects saef, gud is among the scores .*did you mean 'safe'"):
        go(place, "multi_objective", "wrong", **{"data.train": data, "data.eval": data,
                                                 "data.encoding": {"aspects": ["saef", "gud"]}})


def test_a_row_that_cannot_be_encoded_is_not_scored(place):
    go(place, "bradley_terry", "small", **{"train.steps": 1})
    reward = replace(load(str(place / "small")), encoding=Encoding(max_length=4))
    groups = [Group("w3 ", [Response("w1"), Response("w1", prompt="w3 w4 w5 w6 ")])]
    with pytest.raises(ScoringError, match="response 2.*cannot be scored.*no room"):
        score(groups, {"bt": reward})
    score(groups, {"bt": reward}, on_error="mark")
    assert "bt" in groups[0].responses[0].scores and "bt" not in groups[0].responses[1].scores


def test_tokens_of_another_model_do_not_count(place):
    """A sampled response holds its policy's ids, which mean something else here."""
    go(place, "bradley_terry", "foreign", **{"train.steps": 1})
    reward = load(str(place / "foreign"))
    one, other = reward(rows_of([Group("w3 ", [Response("w1 w2"), Response("w1 w2", tokens=[9, 9, 9], logp=[0.0] * 3)])]))
    assert one == other


def test_settings_name_the_score_and_the_weights(place):
    """They are the key of caches: the same in every process, and another for another beta, reference or training."""
    for out, steps in (("key", 1), ("key-longer", 2)):
        go(place, "implicit_ce", out, **{"train.steps": steps})
    found = [load(str(place / "key")), load(str(place / "key")), load(str(place / "key"), set={"beta": 0.7}),
             load(str(place / "key-longer")), load(str(place / "key"), reference=str(place / "key-longer" / "model"))]
    keys = [json.dumps(r.settings()) for r in found]
    assert keys[0] == keys[1] and len(set(keys)) == 4 and not any(" at 0x" in key for key in keys)


def test_token_rewards_are_of_log_ratios_alone(place):
    """The score of ipo is a mean over tokens: its terms are not."""
    go(place, "ipo", "mean", **{"train.steps": 1})
    with pytest.raises(ValueError, match="grades whole responses"):
        load(str(place / "mean")).tokens_of([])


def test_an_evaluation_wants_the_head_of_its_recipe(place):
    from prefopt import evaluation
    go(place, "bradley_terry", "judged", **{"train.steps": 1})
    with pytest.raises(ValueError, match="its head has 1 outputs, and the recipe 2"):
        evaluation.evaluate(evaluation.plan(str(place / "judged"), recipe="gaussian"))


def test_steps_of_another_meaning():
    batch = collate([Group("w9", [Response("w1 w2", meta={"steps": 3})])], tokenizer())
    assert "step_label" not in batch
    chat = [{"role": "assistant", "content": "w1"}]
    with pytest.raises(DataError, match="the response is a conversation"):
        encode([Group([{"role": "user", "content": "w9"}], [Response(chat, meta={"steps": ["w1"]})])], tokenizer())


def test_batches_of_ten_thousand_lengths_hold_little_padding(place):
    go(place, "bradley_terry", "batches", **{"train.steps": 1})
    reward = load(str(place / "batches"))
    rng = np.random.default_rng(0)
    encoded = {n: EncodedGroup(np.zeros(size, np.int32), [EncodedRow(np.zeros(1 + size % 7, np.int32))])
               for n, size in enumerate(rng.lognormal(5, 0.8, 10000).astype(int).clip(1, 2000))}
    seen, real, padded = set(), 0, 0
    for numbers, batch in reward.batches(encoded):
        seen |= set(numbers)
        real, padded = real + int(batch["attend"].sum()), padded + batch["tokens"].numel()
        assert batch["tokens"].numel() <= reward.tokens
    assert len(seen) == 10000 and padded <= 1.05 * real


# ------------------------------------------------------------------------------------------------------------- bad input
def test_folders_that_are_no_reward_model(place, tmp_path):
    with pytest.raises(ValueError, match="is not a reward model of this recipe: it holds LlamaForCausalLM"):
        load(str(place / "model"))
    go(place, "bradley_terry", "tiny", **{"train.steps": 1})
    with pytest.raises(ValueError, match="its head has 1 outputs, and the recipe 4"):
        load(str(place / "tiny"), recipe="ordinal")
    go(place, "simpo", "policy", **{"train.steps": 1})
    with pytest.raises(ValueError, match="trained with 'simpo', which has no reward"):
        load(str(place / "policy"))
    with pytest.raises(ValueError, match="grades whole responses"):
        load(str(place / "tiny")).tokens_of([])


@pytest.mark.parametrize(("special", "expected"), [
    ({"pad_token": "<pad>", "eos_token": "<eos>"}, "<pad>"), ({"eos_token": "<eos>", "unk_token": "<unk>"}, "<unk>"),
    ({"eos_token": "<eos>", "pad_token": "<eos>", "bos_token": "<bos>"}, "<bos>"), ({"eos_token": "<eos>"}, "<|pad|>")])
def test_a_padding_token_that_no_text_ends_with(special, expected):
    from transformers import PreTrainedTokenizerFast
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, **special)
    prepare_padding(words)
    assert words.pad_token == expected != words.eos_token
    model = load_policy_of_size(len(words))
    prepare_padding(words, model)
    assert model.config.pad_token_id == words.pad_token_id < model.get_input_embeddings().num_embeddings


def load_policy_of_size(size: int):
    from transformers import LlamaConfig, LlamaForSequenceClassification
    return LlamaForSequenceClassification(LlamaConfig(
        vocab_size=min(size, 61), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1))


def test_policy_and_model_are_one_setting(place):
    raw = plan(place, "bradley_terry", "x").model_dump()
    with pytest.raises(ValueError, match="policy and model are the same setting"):
        config.make({**raw, "model": "a"})
    raw["model"] = raw.pop("policy")
    assert config.make(raw).policy.name == str(place / "model")


def test_what_a_model_was_trained_as_is_beside_it(place):
    go(place, "bco", "card", **{"set.beta": 0.3, "train.epochs": 2})
    card = json.loads((place / "card/model/prefopt.json").read_text())
    assert card["recipe"] == "bco" and card["set"] == {"beta": 0.3} and card["start"] == str(place / "model")
    assert card["memory"]                                     # BCO's running shift
