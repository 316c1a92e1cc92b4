"""MaPO's mask against a version that walks through each row by hand, one module call after the other."""
from __future__ import annotations

import sys

import pytest
import torch
from tiny_models import Float64, Largest, adapted, batch, tiny

from prefopt.activations import activation_mask, rescaled, taps
from prefopt.forward import fill
from prefopt.layout import padded
from prefopt.models import Models, Trunk

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "granite"]
ROWS = [(0, 3, 4), (0, 3, 2), (1, 2, 6), (1, 2, 1)]


@pytest.fixture(autouse=True)
def double():
    with Float64():
        yield


def rotate(x, cos, sin):
    """Rotary embedding written out: pairs (i, i + d/2) turn by their angle."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    c, s = cos[..., :half], sin[..., :half]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def attended(attention, q, k, v, config):
    """Causal attention of one row, heads first, (H, T, d); query heads share key heads."""
    share = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
    score = q @ k.transpose(1, 2) * attention.scaling
    cap = vars(attention).get("attn_logit_softcapping")
    if cap:
        score = torch.tanh(score / cap) * cap
    where = torch.arange(q.shape[1])
    seen = where[None] <= where[:, None]
    window = vars(attention).get("sliding_window", config.sliding_window if config.model_type == "mistral" else None)
    if window:
        seen &= where[:, None] - where[None] < window
    return score.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def by_hand(model, ids):
    """Every tensor of the mask for one row of ids, as lists of (T, features) by type."""
    body, config = model.model, model.config
    reference = body(input_ids=ids[None], output_hidden_states=True).hidden_states
    out = {"mlp": [], "attention": [], "residual": [body.embed_tokens(ids)], "logits": [model(ids[None]).logits[0]]}
    T = len(ids)
    for number, block in enumerate(body.layers):
        attention, mlp, x = block.self_attn, block.mlp, reference[number][0]
        sandwich = "gemma" in config.model_type
        normed = block.input_layernorm(x)
        q, k, v = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
        heads = [z.view(T, -1, attention.head_dim) for z in (q, k, v)]
        if "q_norm" in dict(attention.named_children()):
            heads[:2] = [attention.q_norm(heads[0]), attention.k_norm(heads[1])]
        heads = [z.transpose(0, 1) for z in heads]
        extra = (config.layer_types[number],) if config.model_type == "gemma3_text" else ()
        cos, sin = body.rotary_emb(x[None], torch.arange(T)[None], *extra)
        turned = [rotate(z, cos[0], sin[0]) for z in heads[:2]]
        mixed = attended(attention, *turned, heads[2], config).transpose(0, 1).flatten(1)
        added = attention.o_proj(mixed)
        added = block.post_attention_layernorm(added) if sandwich else added
        scale = config.residual_multiplier if config.model_type == "granite" else 1.0
        middle = x + scale * added
        mlp_in = (block.pre_feedforward_layernorm if sandwich else block.post_attention_layernorm)(middle)
        product = mlp.act_fn(mlp.gate_proj(mlp_in)) * mlp.up_proj(mlp_in)
        more = mlp.down_proj(product)
        more = block.post_feedforward_layernorm(more) if sandwich else more
        end = middle + scale * more
        out["mlp"].append(product)
        out["attention"] += [q, k, v, mixed, *(z.transpose(0, 1).flatten(1) for z in turned)]
        out["residual"] += [x, normed, added, middle, mlp_in, more, end]
    out["residual"].append(body.norm(end))
    torch.testing.assert_close(out["residual"][-1], reference[-1][0], rtol=1e-9, atol=1e-9)    # the hand is right
    return out


def mask_by_hand(model, b):
    out = torch.zeros(b["mask"].shape, dtype=torch.float64)
    for n in range(b.N):
        real = b["attend"][n].nonzero().squeeze(1)
        places = b["mask"][n].nonzero().squeeze(1)
        if not len(places):
            continue
        types = by_hand(model, b["tokens"][n][real])
        before = [int((real == p).nonzero()) - 1 for p in places]
        of_types = []
        for tensors in types.values():
            of_tensors = []
            for tensor in tensors:
                a = [float(tensor[i].mean()) for i in before]
                low, high = min(a), max(a)
                of_tensors.append([(x - low) / (high - low) if high > low else 1.0 for x in a])
            of_types.append([sum(c) / len(c) for c in zip(*of_tensors, strict=True)])
        out[n, places] = torch.tensor([sum(c) / len(c) for c in zip(*of_types, strict=True)], dtype=torch.float64)
    return out


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_the_row_loop(family):
    model, b = tiny(family).eval(), batch(ROWS)
    found = activation_mask(Trunk(model), b)
    torch.testing.assert_close(found, mask_by_hand(model, b), rtol=0, atol=1e-9)
    assert found.dtype == torch.float64 and not found.requires_grad


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_number_of_tensors_of_each_type(family):
    """Per layer 1, 6 and 7; the embedding and the final norm are added to the residual stream (the latter by the caller)."""
    trunk, seen = Trunk(tiny(family)), []
    layout = padded(batch(ROWS))
    trunk.check(layout.tokens)
    with taps(trunk, lambda kind, x: seen.append((kind, tuple(x.shape[:2])))):
        trunk(layout)
    assert {k: sum(kind == k for kind, _ in seen) for k, _ in seen} == {"mlp": 2, "attention": 12, "residual": 15}
    assert {shape for _, shape in seen} == {tuple(layout.tokens.shape)}


@pytest.mark.parametrize("layout", [{"padding": "left"}, {"left": 3}, {"right": 5}, {"left": 2, "padding": "left"}])
def test_padding_does_not_matter(layout):
    trunk, plain, moved = Trunk(tiny("qwen3")), batch(ROWS), batch(ROWS, **layout)
    a, b = activation_mask(trunk, plain), activation_mask(trunk, moved)
    torch.testing.assert_close(b[moved["mask"].bool()], a[plain["mask"].bool()], rtol=0, atol=1e-10)
    assert b[~moved["mask"].bool()].abs().max() == 0


def test_one_token_is_one_no_token_is_zero_and_all_lie_between():
    b = batch([(0, 3, 4), (0, 3, 1), (1, 2, 3)])
    b = b.with_columns(mask=b["mask"] * torch.tensor([1, 1, 0])[:, None])
    found = activation_mask(Trunk(tiny()), b)
    inside = found[0][b["mask"][0].bool()]
    assert found[1].sum() == 1 and found[1][3] == 1
    assert found[2].abs().max() == 0
    assert inside.min() >= 0 and inside.max() <= 1 and inside.std() > 0.01


@torch.no_grad()
def test_only_masked_tokens_set_the_range():
    """A token that does not train (tool output) counts neither for min and max nor for the others."""
    b, trunk = batch([(0, 3, 6)]), Trunk(tiny())
    cut = b.with_columns(mask=b["mask"] * (torch.arange(9) != 5))
    found = activation_mask(trunk, cut)
    torch.testing.assert_close(found, mask_by_hand(trunk.model, cut), rtol=0, atol=1e-9)
    assert found[0, 5] == 0


def test_rescaled_by_hand():
    a, row = torch.tensor([1.0, 3.0, 2.0, -5.0, 4.0, 4.0]), torch.tensor([0, 0, 0, 2, 1, 1])
    assert rescaled(a, row, 4).tolist() == [0.0, 1.0, 0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("family", "absent"), [("gpt2", "self_attn.q_proj"), ("gpt_neox", "self_attn.q_proj"),
                                                ("phi", "self_attn.o_proj"), ("cohere", "post_attention_layernorm")])
def test_other_architectures_name_what_is_missing(family, absent):
    with pytest.raises(ValueError, match=absent.replace(".", r"\.")) as error:
        activation_mask(Trunk(tiny(family)), batch(ROWS))
    assert "mapo" in str(error.value) and type(tiny(family)).__name__ in str(error.value)


def test_a_model_that_rotates_elsewhere_is_refused(monkeypatch):
    model = tiny("llama")
    home = sys.modules[type(model.model.layers[0].self_attn).__module__]
    own, forward = home.apply_rotary_pos_emb, type(model.model.layers[0].self_attn).forward
    free = type(forward)(forward.__code__, {**forward.__globals__, "apply_rotary_pos_emb": own}, "forward",
                         forward.__defaults__, forward.__closure__)
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", free)
    with pytest.raises(ValueError, match="after rotation"):
        activation_mask(Trunk(model), batch(ROWS))
    assert home.apply_rotary_pos_emb is own


def test_hooks_and_the_wrapped_function_are_gone_afterwards():
    model, b = tiny("qwen2"), batch(ROWS)
    home = sys.modules[type(model.model.layers[0].self_attn).__module__]
    own, trunk = home.apply_rotary_pos_emb, Trunk(model)
    trunk.check(b["tokens"])                                  # puts those of prefopt.last_layer there
    hooks = lambda: [[*m._forward_hooks.values(), *m._forward_pre_hooks.values()] for m in model.modules()]
    before = hooks()
    activation_mask(trunk, b)
    with pytest.raises(RuntimeError, match="stop"), taps(trunk, lambda kind, x: None):
        raise RuntimeError("stop")
    assert home.apply_rotary_pos_emb is own and hooks() == before and sum(map(len, before)) == 8


def test_adapters_are_off_for_the_mask_of_the_reference():
    b, base = batch(ROWS), tiny("llama")
    expected = activation_mask(Trunk(base), b)
    models = Models(adapted(tiny("llama")))
    torch.testing.assert_close(fill(models, b, {"activation_mask"})["activation_mask"], expected, rtol=0, atol=1e-10)
    assert (activation_mask(models.policy_model(), b) - expected).abs().max() > 1e-3
    assert models.policy.training


def test_microbatches_do_not_matter():
    b, models = batch(ROWS), Models(tiny("llama"), tiny("llama", seed=1))
    whole = fill(models, b, {"activation_mask"})["activation_mask"]
    parts = fill(models, b, {"activation_mask"}, tokens=16)["activation_mask"]
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("family", "projected"), [("llama", 0), ("gemma2", 60)])
def test_logits_of_all_tokens_are_never_built(family, projected, monkeypatch):
    """Vocabulary 5000: the mean logit comes from the mean row of the head, behind a soft cap from chunks of 16.

    The head itself has 16 x 5000 weights, so nothing may be larger than that; all logits would be 60 x 5000.
    """
    import prefopt.activations
    monkeypatch.setattr(prefopt.activations, "CHUNK_BYTES", 0)
    b = batch([(0, 2, 30), (0, 2, 30)])
    trunk = Trunk(tiny(family, vocab_size=5000))
    trunk.check(b["tokens"])
    with Largest() as largest:
        activation_mask(trunk, b)
    assert largest.elements <= 16 * 5000
    assert trunk.calls["positions"] == projected
