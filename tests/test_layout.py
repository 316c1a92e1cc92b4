"""Packed rows with shared beginnings against padded rows: the same states and the same gradients, from fewer tokens."""
from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tiny_models import EXACT, Float64, adapted, batch, gradients, same, spread, tiny

from data_tools.batch import Batch
from prefopt.forward import fill, forward
from prefopt.layout import Bucketed, Packed, bucketed, packed, padded, rectangles, shared
from prefopt.models import Head, Models, Trunk, frozen_copy
from prefopt.speed import operations

GROUPS = [(0, 7, 4), (0, 7, 2), (0, 7, 6), (1, 5, 1), (1, 5, 3), (2, 3, 9), (3, 2, 1), (3, 4, 2)]
FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": None}, "gemma3": {"sliding_window": 64},
            "gemma2": {"attn_logit_softcapping": None, "attn_implementation": "sdpa", "sliding_window": 64}, "granite": {},
            "cohere": {}, "phi": {}, "gpt2": {}, "gpt_neox": {}}


@pytest.fixture(autouse=True)
def double(request):
    """Exact models, but where a test chooses its own dtype."""
    if "dtype" in request.fixturenames:
        yield
    else:
        with Float64():
            yield


def some(x: torch.Tensor) -> torch.Tensor:
    """Fixed weights of both signs, so that no gradient cancels."""
    return torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)


def both(make, b, reads, **settings):
    """Columns and gradients of packed and of padded rows."""
    results = []
    for packing in (True, False):
        model = make()
        models = Models(model, frozen_copy(make()), packing=packing, **settings)
        found = forward(models, fill(models, b, reads), reads)
        values = {k: found[k] for k in reads if k in found}
        loss = sum((some(v) * v).sum() for v in values.values() if v.requires_grad)
        results.append(({k: v.detach() for k, v in values.items()}, gradients(model, loss), models))
    return results


# --------------------------------------------------------------------------------------------------------------- layouts
def rows(*texts: str, group=None) -> dict:
    """Letters as tokens, `.` as padding on any side."""
    tokens = torch.tensor([[ord(c) - 96 if c != "." else 0 for c in t] for t in texts])
    return {"tokens": tokens, "attend": (tokens > 0).long(), "group": torch.tensor(group or [0] * len(texts))}


def test_layouts_by_hand():
    """Two groups: `ab` then `c` or `de`; `f` alone. Five tokens of the first in the place of seven."""
    b = rows("abc..", "..abd", "f....", group=[4, 4, 9])
    found = packed(b)
    assert found.tokens.tolist() == [[1, 2, 6, 3, 4]] or sorted(found.tokens[0].tolist()) == [1, 2, 3, 4, 6]
    assert found.shared.tolist() == [2, 2, 0] and found.rectangle == 9
    row, column = b["attend"].nonzero(as_tuple=True)
    at = found.place(row, column)
    assert found.tokens[0, at].tolist() == b["tokens"][row, column].tolist()
    assert found.position[0, at].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert at[:2].tolist() == at[3:5].tolist() and len(set(at.tolist())) == 5
    wide = padded(b)
    assert wide.tokens.flatten()[wide.place(row, column)].tolist() == b["tokens"][row, column].tolist()
    assert wide.tokens[1].tolist() == [1, 2, 4] and wide.offset.tolist() == [0, 2, 0]


def test_what_rows_share():
    """The beginning of all rows, further than the prompt where responses begin alike; nothing in a group of one."""
    assert shared(rows("abcd", "abce", "ab..")).tolist() == [2, 2, 2]
    assert shared(rows("abcd", "abcd")).tolist() == [4, 4] and shared(rows("abcd")).tolist() == [0]
    assert shared(rows("abcd", "xbcd")).tolist() == [0, 0]
    assert shared(rows("abc", "abd", "abc", "abd", group=[0, 1, 1, 0])).tolist() == [2, 2, 2, 2]
    assert packed(rows("abcd", "abcd")).tokens.tolist() == [[1, 2, 3, 4]]


def test_sharing_has_to_pay():
    """P = 4, R = 12 and 12: saved 4 tokens; attention computes 8 + 2 * 12 * 16 scores in the place of 256, 136 more."""
    b = batch([(0, 4, 12), (0, 4, 12)])
    assert shared(b, 34.1).tolist() == [4, 4] and shared(b, 33.9).tolist() == [0, 0]
    assert packed(b, 33.9).tokens.numel() == 32 and packed(b).tokens.numel() == 28


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 7], [7, 0, 3, 1, 5, 2, 6, 4]])
def test_every_token_is_there_once(order):
    b = batch(GROUPS, seed=1, padding="left").select(torch.arange(8))
    b = Batch({k: v[torch.tensor(order)] for k, v in b.items()})
    found = packed(b)
    assert found.tokens.numel() == (7 + 12) + (5 + 4) + 12 + (3 + 6) == 49
    row, column = b["attend"].nonzero(as_tuple=True)
    at = found.place(row, column)
    assert set(at.tolist()) == set(range(49)) and found.tokens[0, at].equal(b["tokens"][row, column])
    queries = torch.cat([block.queries[block.real] for block in found.blocks])
    assert queries.tolist() == list(range(49))                # attention's output needs no reordering


def test_rectangles_bound_what_is_wasted():
    sizes = sorted((int(x) for x in torch.randint(1, 3000, (200,), generator=torch.Generator().manual_seed(0))), reverse=True)
    runs = list(rectangles(sizes, sizes))
    assert [i for r in runs for i in range(200)[r]] == list(range(200)) and len(runs) < 20
    for r in runs:
        real = sum(s * s for s in sizes[r])
        assert len(sizes[r]) * sizes[r.start] ** 2 - real <= max(real / 2, 2 ** 16)
    assert list(rectangles([], [])) == []


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_flex_attention_sees_what_the_rectangles_see(family, dtype):
    """The GPU's way, forward, as it runs on a CPU without a compiler."""
    b, trunk = batch(GROUPS, seed=1, padding="left"), Trunk(tiny(family, dtype=dtype))
    row, column = b["attend"].nonzero(as_tuple=True)
    trunk.check(padded(b).tokens)
    with torch.no_grad():
        one, two = (trunk(layout)[layout.place(row, column)] for layout in (packed(b), packed(b, flex=True)))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert not trunk.flex and packed(b, flex=True).blocks == ()


# -------------------------------------------------------------------------------------------------------------- equality
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_all_gradients(family):
    """Ragged groups with long, short and no shared beginnings, with padding on either side; 49 tokens in the place of 104."""
    b = batch(GROUPS, seed=1, padding="left", right=2)
    make = lambda: tiny(family, **FAMILIES[family])
    one, two = both(make, b, {"logp", "logp_ref", "entropy", "token_kl", "states_ref", "last_state"})
    for key in two[0]:
        torch.testing.assert_close(one[0][key], two[0][key], **EXACT)
    same(one[1], two[1])
    assert one[2].policy_model().plain is None and two[2].policy_model().plain == "train.packing is off"
    assert one[2].policy_model().calls["tokens"] == 49 and two[2].policy_model().calls["tokens"] == 8 * 13


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("reads", [{"outputs", "last_state", "prompt_state"}, {"token_reward"}])
def test_reward_models(family, reads):
    head = Head("AutoModelForTokenClassification", "TOKEN_CLS", 1) if "token_reward" in reads else \
        Head("AutoModelForSequenceClassification", "SEQ_CLS", 3)
    one, two = both(lambda: tiny(family, head=head), batch(GROUPS, seed=1, padding="left"), reads)
    assert one[2].policy_model().calls["tokens"] < two[2].policy_model().calls["tokens"]
    for key in reads:
        torch.testing.assert_close(one[0][key], two[0][key], **EXACT)
    same(one[1], two[1])


def test_critics():
    b, found = batch(GROUPS, seed=1), []
    for packing in (True, False):
        critic = tiny(head=Head("AutoModelForTokenClassification", "TOKEN_CLS", 1))
        value = forward(Models(tiny(), critic=critic, packing=packing), b, {"value"})["value"]
        found.append((value.detach(), gradients(critic, (some(value) * value).sum())))
    torch.testing.assert_close(found[0][0], found[1][0], **EXACT)
    same(found[0][1], found[1][1])


def test_with_adapters():
    """The reference is the policy with adapters off, in the same layout."""
    results = []
    for packing in (True, False):
        model, b = adapted(tiny()), batch(GROUPS, seed=1)
        models = Models(model, packing=packing)
        found = forward(models, fill(models, b, {"logp_ref"}), {"logp", "logp_ref"})
        results.append((found["logp"].detach(), found["logp_ref"], gradients(model, (some(found["logp"]) * found["logp"]).sum())))
    torch.testing.assert_close(results[0][0], results[1][0], **EXACT)
    torch.testing.assert_close(results[0][1], results[1][1], **EXACT)
    assert (results[0][0] - results[0][1]).abs().max() > 0.1
    same(results[0][2], results[1][2])


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_gradient_checkpointing(family, dtype):
    results, b = [], batch(GROUPS, seed=1)
    for packing, on in ((True, True), (True, False), (False, False)):
        model = tiny(family, dtype=dtype)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        logp = forward(Models(model, packing=packing), b, {"logp"})["logp"]
        results.append((logp.detach(), gradients(model, (some(logp) * logp).sum())))
    for value, grads in results[1:]:
        torch.testing.assert_close(value, results[0][0], rtol=1e-5, atol=1e-5)
        for key in grads:
            torch.testing.assert_close(grads[key], results[0][1][key], rtol=1e-4, atol=1e-5 * float(grads[key].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision(dtype):
    b, found = batch(GROUPS, seed=1), []
    for packing in (True, False):
        found.append(forward(Models(tiny("qwen2", dtype=dtype), packing=packing), b, {"logp"})["logp"].detach())
    bound = 1e-5 if dtype is torch.float32 else 0.15
    assert (found[0] - found[1]).abs().max() < bound * float(found[1].abs().max())


# ------------------------------------------------------------------------------------------------------ negative controls
def logp_of(model, layout: Packed, b) -> torch.Tensor:
    row, column = b["mask"].bool().nonzero(as_tuple=True)
    logits = model.lm_head(Trunk(model)(layout)[layout.place(row, column - 1)])
    return logits.log_softmax(-1).gather(1, b["tokens"][row, column][:, None])[:, 0]


@pytest.mark.parametrize("wrong", ["positions", "mask", "another's row"])
def test_wrong_layouts_show(wrong):
    model, b = tiny(), batch(GROUPS, seed=1)
    models = Models(model)
    expected = forward(models, b, {"logp"})["logp"][b["mask"].bool()].detach()
    right = packed(b)
    torch.testing.assert_close(logp_of(model, right, b).detach(), expected, **EXACT)
    if wrong == "positions":
        layout = replace(right, position=torch.arange(right.tokens.shape[1])[None])
    else:
        spoil = {"mask": lambda k: replace(k, mask=torch.ones_like(k.mask)),
                 "another's row": lambda k: replace(k, keys=k.keys.roll(1))}
        layout = replace(right, blocks=tuple(k if k.mask is None else spoil[wrong](k) for k in right.blocks))
    assert (logp_of(model, layout, b) - expected).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------- models that are padded
def test_models_that_cannot_be_packed():
    """Each says why, and gets rows by their length."""
    b = batch(GROUPS, seed=1)
    cases = [(tiny("gemma2"), "its attention is eager"), (tiny("llama", attention_dropout=0.1), "dropout is on")]
    for model, why in cases:
        trunk = Models(model).policy_model()
        assert isinstance(trunk.layout(b), Bucketed) and trunk.plain.startswith(why)


def test_windows_pack_up_to_their_length():
    trunk = Trunk(tiny("mistral", sliding_window=12))
    assert isinstance(trunk.layout(batch([(0, 4, 8), (0, 4, 2)])), Packed)
    assert isinstance(trunk.layout(batch([(0, 4, 9), (0, 4, 2)])), Bucketed)
    assert Trunk(tiny("llama")).window is None and Trunk(tiny("gemma3")).window == 4


def test_experts_are_not_packed():
    from transformers import MixtralConfig, MixtralForCausalLM
    model = MixtralForCausalLM(MixtralConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                             num_attention_heads=2, num_key_value_heads=1, num_local_experts=2))
    assert Trunk(model).plain == "MixtralModel routes tokens to experts"


def test_a_model_whose_packed_rows_differ_falls_back_loudly():
    """A model that ignores positions it is given."""
    model = tiny()
    body, forward_of = model.model, model.model.forward
    body.forward = lambda *a, **k: forward_of(*a, **{**k, "position_ids": None})
    trunk, b = Trunk(model), batch(GROUPS, seed=1)
    with pytest.warns(UserWarning, match="packed rows of LlamaForCausalLM give other states.*slower"):
        layout = trunk.layout(b)
    assert isinstance(layout, Bucketed) and isinstance(trunk.layout(b), Bucketed)
    row, column = b["attend"].nonzero(as_tuple=True)
    plain = padded(b)
    torch.testing.assert_close(trunk(layout)[layout.place(row, column)], Trunk(tiny())(plain)[plain.place(row, column)], **EXACT)


RAGGED = [(0, 20, 110), (0, 20, 12), (1, 4, 3), (1, 4, 120), (2, 30, 95), (2, 30, 1)]


def test_long_continuations_are_read_in_stripes(monkeypatch):
    """Stripes of 64 queries and the rest behind prompts of 30 and 4 see what one call for all sees; fewer scores are computed."""
    import prefopt.layout as module
    b, scores, call = batch([(0, 30, 200), (0, 30, 120), (1, 4, 190), (1, 4, 3)], seed=1), [], module.scaled_dot_product_attention

    def counted(q, k, v, **settings):
        scores.append(q.shape[0] * q.shape[2] * k.shape[2])
        return call(q, k, v, **settings)

    def found():
        trunk, layout = Trunk(tiny()), packed(b)
        assert trunk.packs(b)
        scores.clear()
        states = trunk(layout)
        states.square().sum().backward()
        return {"states": states, **{n: p.grad for n, p in trunk.model.named_parameters() if p.grad is not None}}, sum(scores)

    monkeypatch.setattr(module, "scaled_dot_product_attention", counted)
    one, few = found()
    monkeypatch.setattr(module, "STRIPE", 10 ** 6)
    two, many = found()
    same(one, two)
    assert few < 0.8 * many


def test_rows_of_like_length_share_a_rectangle():
    """Of 130, 32, 7, 124, 125 and 31 tokens: three long rows and three short ones, 486 tokens in the place of 780."""
    b = batch(RAGGED, seed=1, padding="left")
    found = bucketed(b)
    assert [tuple(part.tokens.shape) for part in found.parts] == [(3, 130), (3, 32)] and found.rectangle == 6 * 130
    assert found.order.tolist() == [0, 3, 5, 2, 1, 4]
    row, column = b["attend"].nonzero(as_tuple=True)
    tokens = torch.cat([part.tokens.flatten() for part in found.parts])
    assert tokens[found.place(row, column)].equal(b["tokens"][row, column])
    assert [len(part.tokens) for part in bucketed(batch([(0, 3, 5), (1, 2, 60)])).parts] == [2]           # too few to matter


def test_ragged_rows_of_models_that_are_not_packed():
    """States of all tokens, outputs of an encoder, and gradients, against one rectangle of all rows; and what it saves."""
    b = batch(RAGGED, seed=1, padding="left")
    row, column = b["attend"].nonzero(as_tuple=True)

    def found(trunk, layout, grade):
        trunk.model.zero_grad()
        outputs, states = trunk.grade(layout, None) if grade else (None, trunk(layout))
        states = states[layout.place(row, column)]
        (states.square().sum() + (outputs.square().sum() if grade else 0)).backward()
        return {"states": states, **({"outputs": outputs} if grade else {}),
                **{n: p.grad.clone() for n, p in trunk.model.named_parameters() if p.grad is not None}}

    for model, grade in ((tiny("gemma2"), False), (encoder(), True)):
        trunk = Trunk(model)
        assert not trunk.packs(b)
        trunk.calls.update(tokens=0, rectangle=0)
        one, two = found(trunk, trunk.layout(b), grade), found(trunk, one_rectangle(b), grade)
        assert trunk.calls["tokens"] == 486 + 780 and trunk.calls["rectangle"] == 2 * 780
        for name, value in two.items():
            torch.testing.assert_close(one[name], value, **EXACT)


def test_divided_models_run_once_for_all_rows():
    """Where the layers of a model are divided, every call is one of all processes, which have rows of other lengths."""
    b = batch(RAGGED, seed=1)
    trunk = Trunk(encoder())
    assert not trunk.packs(b) and not trunk.divided
    trunk.calls["forwards"] = 0
    outputs, _ = trunk.grade(trunk.layout(b), None)
    assert trunk.calls["forwards"] == 2
    trunk.divided = True
    alone, _ = trunk.grade(trunk.layout(b), None)
    assert trunk.calls["forwards"] == 3
    torch.testing.assert_close(outputs, alone, **EXACT)


def encoder():
    from transformers import BertConfig, BertForSequenceClassification
    return spread(BertForSequenceClassification(BertConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, max_position_embeddings=160)).double())


def one_rectangle(b):
    whole = padded(b)
    return Bucketed((whole,), torch.arange(b.N), torch.arange(b.N) * whole.tokens.shape[1], whole.offset, whole.rectangle)


# ------------------------------------------------------------------------------------------------------- the last layer
def counted(model) -> dict[str, list[int]]:
    """How many rows each linear map of the first and the last layer gets, filled at every call from now on."""
    found: dict[str, list[int]] = {}
    layers = model.base_model.layers
    for place, layer in (("first", layers[0]), ("last", layers[-1])):
        for name, part in layer.named_modules():
            if isinstance(part, torch.nn.Linear):
                rows = found.setdefault(f"{place} {name.split('.')[1]}", [])
                part.register_forward_pre_hook(lambda _, x, rows=rows: rows.append(x[0].shape[1]))
    return found


ENDS = {"logp": 33, "prompt_state": 33, "token_reward": 28, "outputs": 8}


@pytest.mark.parametrize("reads", ENDS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_last_layer_computes_what_is_read(family, reads):
    """Of 49 tokens: the last of each prompt and the responses, 1 + 12, 1 + 4, 1 + 9, 1 + 1 and 1 + 2; the responses alone; or the
    ends of 8 rows. Keys and values are those of all."""
    head = {"outputs": Head("AutoModelForSequenceClassification", "SEQ_CLS", 3),
            "token_reward": Head("AutoModelForTokenClassification", "TOKEN_CLS", 1)}
    b, make = batch(GROUPS, seed=1, padding="left", right=2), lambda: tiny(
        family, **FAMILIES[family], **{"head": head[reads]} if reads in head else {})
    one, two = both(make, b, {reads})
    torch.testing.assert_close(one[0][reads], two[0][reads], **EXACT)
    same(one[1], two[1])
    models = one[2]
    rows, before = counted(models.policy), models.policy_model().calls["unread"]
    forward(models, b, {reads})
    assert models.policy_model().calls["unread"] - before == 49 - ENDS[reads]
    assert models.policy_model().ends and {k: v for k, [v] in rows.items()} == {
        f"{place} {name}": ENDS[reads] if place == "last" and name not in ("k_proj", "v_proj") else 49
        for place in ("first", "last") for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("reads", ["logp", "outputs"])
def test_responses_that_begin_alike(reads):
    """What rows share goes further than the prompt, to the end of one of them and of two equal ones."""
    b = batch([(0, 5, 6), (0, 5, 6), (0, 5, 2), (0, 5, 4), (1, 4, 3), (1, 4, 3)], seed=2)
    tokens = b["tokens"].clone()
    tokens[1], tokens[2, :7], tokens[3, :8], tokens[5] = tokens[0], tokens[0, :7], tokens[0, :8], tokens[4]
    b = b.with_columns(tokens=tokens)
    assert shared(b).tolist() == [7, 7, 7, 7, 7, 7]
    head = {"head": Head("AutoModelForSequenceClassification", "SEQ_CLS", 1)} if reads == "outputs" else {}
    one, two = both(lambda: tiny(**head), b, {reads})
    torch.testing.assert_close(one[0][reads], two[0][reads], **EXACT)
    same(one[1], two[1])


def test_queries_of_several_starts_in_stripes(monkeypatch):
    """Rows of one rectangle that are read from different tokens on, in stripes of two: none sees less than it should."""
    monkeypatch.setattr("prefopt.layout.STRIPE", 2)
    b = batch([(0, 3, 20), (1, 9, 14), (2, 20, 3), (3, 1, 22), (4, 12, 11)], seed=3)
    one, two = both(tiny, b, {"logp"})
    torch.testing.assert_close(one[0]["logp"], two[0]["logp"], **EXACT)
    same(one[1], two[1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32])
def test_the_last_layer_and_flex_attention(dtype):
    trunk, b = Trunk(tiny(dtype=dtype)), batch(GROUPS, seed=1)
    first = b["prompt_length"] - 1
    row, column = b["mask"].bool().nonzero(as_tuple=True)
    whole = trunk(trunk.layout(b))
    for flex in (False, True):
        layout = packed(b, flex=flex, first=first)
        assert layout.last.read.numel() == 33 and bool(layout.last.blocks) == (not flex)
        place = layout.place(row, column - 1)
        torch.testing.assert_close(trunk(layout)[place], whole[place], rtol=1e-4, atol=1e-5)


def test_a_last_layer_with_nothing_to_leave_out():
    """Where all or nothing is read, and where three of four tokens are, the layer computes all."""
    b = batch([(0, 1, 3), (0, 1, 3)])
    assert packed(b, first=torch.tensor([0, 0])).last is None and packed(b, first=torch.tensor([4, 4])).last is None
    assert packed(b, first=torch.tensor([1, 1])).last is None and packed(b, first=torch.tensor([2, 2])).last.read.numel() == 4


def test_operations_leave_out_what_the_last_layer_does():
    """q 16 x 16, o 16 x 16 and an MLP of 3 x 16 x 24 for the 41 tokens that are not read, forward and backward."""
    b, found = batch(GROUPS, seed=1), []
    for ends in (True, False):
        models = Models(tiny(head=Head("AutoModelForSequenceClassification", "SEQ_CLS", 1)))
        trunk = models.policy_model()
        trunk.check(padded(b).tokens)
        trunk.ends = ends
        forward(models, b, {"outputs"})
        found.append(operations(trunk))
    assert found[1] - found[0] == 6 * (256 + 256 + 1152) * 41


def test_hooks_of_the_last_layer_change_nothing_else():
    """The model's own call, a copy of it, and a second trunk on it, which adds no hooks."""
    model, b = tiny(), batch(GROUPS, seed=1)
    expected = model(input_ids=b["tokens"]).logits
    logp = forward(Models(model), b, {"logp"})["logp"]
    hooks = len(model.base_model.layers[-1].mlp._forward_hooks)
    assert hooks == 1 and model(input_ids=b["tokens"]).logits.equal(expected)
    for other in (model, deepcopy(model)):
        assert forward(Models(other), b, {"logp"})["logp"].equal(logp)
        assert len(other.base_model.layers[-1].mlp._forward_hooks) == hooks
    assert model(input_ids=b["tokens"]).logits.equal(expected)


@pytest.mark.parametrize(("offset", "why"), [(0.1, "gives other states"), (torch.zeros(3, 5), "cannot compute some tokens")])
def test_a_last_layer_that_needs_all_tokens_falls_back_loudly(offset, why):
    """An MLP that counts what it gets, and one that breaks."""
    model, b = tiny(), batch(GROUPS, seed=1)
    mlp = model.base_model.layers[-1].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x) + offset if x.shape[1] < 4 else inner(x)
    with pytest.warns(UserWarning, match=f"the last layer of LlamaForCausalLM {why}"):
        found = forward(Models(model), b, {"logp"})["logp"]
    torch.testing.assert_close(found, forward(Models(model, packing=False), b, {"logp"})["logp"], **EXACT)


@pytest.mark.parametrize("wrong", ["tokens", "keys"])
def test_wrong_last_layers_show(wrong):
    model, b = tiny(), batch(GROUPS, seed=1)
    expected = forward(Models(model), b, {"logp"})["logp"][b["mask"].bool()].detach()
    right = packed(b, first=b["prompt_length"] - 1)
    torch.testing.assert_close(logp_of(model, right, b).detach(), expected, **EXACT)
    ends = replace(right.last, read=right.last.read.roll(1)) if wrong == "tokens" else \
        replace(right.last, blocks=tuple(replace(k, keys=k.keys.roll(1)) for k in right.last.blocks))
    assert (logp_of(model, replace(right, last=ends), b) - expected).abs().max() > 1e-2
