"""Loading policies from folders: what comes out, and what is said where it cannot."""
from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
from tiny_models import batch, saved, tiny, tokenizer
from torch import nn

from prefopt.forward import forward
from prefopt.models import Models, frozen_copy, load_policy, load_tokenizer


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test looks on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """An adapter whose weights are not zero, saved by peft."""
    model = load_policy(folder, lora={"r": 2})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    home = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(home)
    return str(home)


def logits(model):
    return model(input_ids=torch.arange(3, 12)[None]).logits.float()


# ------------------------------------------------------------------------------------------------- what comes out
@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16),
                                                 ("float16", torch.float16), ("float64", torch.float64)])
def test_dtype_and_weights(folder, dtype, expected):
    model = load_policy(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.training and all(p.requires_grad for p in model.parameters())
    for (name, p), q in zip(model.named_parameters(), tiny(dtype=torch.float32).parameters(), strict=True):
        assert torch.equal(p, q.to(expected)), name


def test_attention_implementation(folder):
    assert load_policy(folder, attention="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize(("family", "changes"), [
    ("gpt2", {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}), ("gpt_neox", {"attention_dropout": 0.5,
     "hidden_dropout": 0.5}), ("llama", {"attention_dropout": 0.5}), ("phi", {"embd_pdrop": 0.5, "resid_pdrop": 0.5})])
def test_dropout_is_off_unless_asked_for(family, changes, tmp_path):
    home = saved(tmp_path, family, **changes)
    quiet, noisy = load_policy(home), load_policy(home, dropout=True)
    assert quiet.training and torch.equal(logits(quiet), logits(quiet))
    assert torch.equal(logits(quiet), logits(noisy.eval()))
    assert not torch.equal(logits(noisy.train()), logits(noisy))
    assert quiet.config.to_dict() == noisy.config.to_dict()  # what is saved does not change


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_dropout_that_modules_keep_as_numbers(family, tmp_path):
    """OPT and BLOOM keep probabilities as attributes and call functional dropout."""
    import transformers
    config = {"opt": ("OPTConfig", {"vocab_size": 61, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2,
                                    "num_attention_heads": 2, "word_embed_proj_dim": 16, "dropout": 0.5, "layerdrop": 0.5}),
              "bloom": ("BloomConfig", {"vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 2,
                                        "hidden_dropout": 0.5, "attention_dropout": 0.5})}[family]
    transformers.AutoModelForCausalLM.from_config(getattr(transformers, config[0])(**config[1])).save_pretrained(tmp_path)
    quiet = load_policy(str(tmp_path))
    assert quiet.training and torch.equal(logits(quiet), logits(quiet))


def test_gradient_checkpointing(folder):
    model = load_policy(folder, gradient_checkpointing=True)
    assert model.is_gradient_checkpointing
    assert not load_policy(folder).is_gradient_checkpointing


# ------------------------------------------------------------------------------------------------- adapters
def test_lora_starts_at_the_model_and_trains_only_the_adapter(folder):
    model = load_policy(folder, lora={"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]})
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2                          # A and B of two projections in two layers
    assert all(n.split(".")[-4] in ("q_proj", "v_proj") and 3 in p.shape for n, p in trained.items())
    assert torch.equal(logits(model), logits(load_policy(folder)))


def test_lora_is_on_all_linear_layers_but_the_head_by_default(folder):
    names = {n.split(".")[-4] for n, p in load_policy(folder, lora={"r": 2}).named_parameters() if p.requires_grad}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_adapter_folder_goes_on_training(folder, adapter):
    model = load_policy(adapter)
    assert (logits(model) - logits(load_policy(folder))).abs().max() > 1e-3
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    models = Models(model)
    before = [p.detach().clone() for _, p in models.trainable()]
    loss = forward(models, batch([(0, 3, 4), (0, 3, 2)]), {"logp"})["logp"].sum()
    loss.backward()
    torch.optim.SGD([p for _, p in models.trainable()], lr=0.1).step()
    assert all(not torch.equal(p, q) for (_, p), q in zip(models.trainable(), before, strict=True))


def test_a_trained_adapter_survives_saving(adapter, tmp_path):
    model = load_policy(adapter)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).mul_(3)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_policy(str(tmp_path))), logits(model))


def test_a_new_adapter_on_an_adapter_is_an_error(adapter):
    with pytest.raises(ValueError, match="holds an adapter.*leave lora out"):
        load_policy(adapter, lora={"r": 2})


def test_adapters_are_read_from_safetensors_only(adapter, tmp_path):
    from safetensors.torch import load_file
    shutil.copy(f"{adapter}/adapter_config.json", tmp_path)
    torch.save(load_file(f"{adapter}/adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="no adapter_model.safetensors"):
        load_policy(str(tmp_path))


# ------------------------------------------------------------------------------------------------- what cannot be loaded
def test_weights_are_read_from_safetensors_only(tmp_path):
    model = tiny(dtype=torch.float32)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load .*causal language model.*safetensors"):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("content", [None, {}, {"config.json": "{}"}])
def test_a_wrong_folder(content, tmp_path):
    home = tmp_path / "there"
    if content is not None:
        home.mkdir()
        for name, text in content.items():
            (home / name).write_text(text)
    with pytest.raises(ValueError, match="cannot load .*there.*config.json and safetensors, or a hub id") as error:
        load_policy(str(home))
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)


def test_a_model_of_another_kind(tmp_path):
    """A sequence-to-sequence model, and a classifier, whose language-model head would be random."""
    from transformers import LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration
    t5 = T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="cannot load .*T5Config"):
        load_policy(str(tmp_path / "t5"))
    LlamaForSequenceClassification(tiny(tie_word_embeddings=False).config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="lacks weights of LlamaForCausalLM: lm_head.weight.*another kind of model"):
        load_policy(str(tmp_path / "classifier"))


def test_an_encoder_is_refused_before_its_first_use(tmp_path):
    from transformers import BertConfig, BertForMaskedLM
    torch.manual_seed(0)
    config = BertConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                        initializer_range=0.5)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal.*encoders"):
        forward(Models(load_policy(str(tmp_path))), batch([(0, 3, 4)]), {"logp"})


def test_code_of_others_does_not_run(tmp_path, monkeypatch):
    """A folder that brings its own Python: refused without trust_remote_code, and its file is not executed."""
    home, proof = tmp_path / "model", tmp_path / "it_ran"
    saved(home)
    settings = json.loads((home / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}}
    (home / "config.json").write_text(json.dumps(settings))
    (home / "code.py").write_text(f"open({str(proof)!r}, 'w').close()\nraise RuntimeError('it ran')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_policy(str(home))
    assert not proof.exists()
    with pytest.raises(RuntimeError, match="it ran"):
        load_policy(str(home), trust_remote_code=True)
    assert proof.exists()


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantisation_names_the_package(folder):
    with pytest.raises(ImportError, match=r"pip install 'prefopt\[quantize\]'"):
        load_policy(folder, quantize=4)


def test_wrong_settings(folder):
    with pytest.raises(ValueError, match="4 or 8 bits, found 5"):
        load_policy(folder, quantize=5)
    with pytest.raises(ValueError, match="unknown dtype 'bfloat', did you mean 'bfloat16'"):
        load_policy(folder, dtype="bfloat")


# ------------------------------------------------------------------------------------------------- models together
def test_reference_counterparts_have_the_same_names(folder):
    policy = load_policy(folder, lora={"r": 2})
    models = Models(policy, frozen_copy(policy))
    mine = models.reference_trainable()
    assert [p.shape for p in mine] == [p.shape for _, p in models.trainable()]
    assert all(torch.equal(p, q) and p is not q for p, (_, q) in zip(mine, models.trainable(), strict=True))


def test_a_moving_reference_must_be_built_like_the_policy(folder):
    models = Models(load_policy(folder, lora={"r": 2}), load_policy(folder))
    with pytest.raises(ValueError, match="must be built like it.*lora_A"):
        models.reference_trainable()


def test_adapters_come_back_on_after_an_error(folder):
    policy = load_policy(folder, lora={"r": 2})
    models, names = Models(policy), {n for n, p in policy.named_parameters() if p.requires_grad}
    with pytest.raises(KeyError), models.reference_model() as reference:
        assert reference.model is policy and not policy.training
        raise KeyError
    assert policy.training and {n for n, p in policy.named_parameters() if p.requires_grad} == names
    assert not any(vars(m).get("_disable_adapters", False) for m in policy.modules() if isinstance(m, nn.Module))


def test_tokenizer(folder):
    words = load_tokenizer(folder)
    assert words("w0 w1").input_ids == [8, 9] and words.chat_template == tokenizer().chat_template
