"""The forward engine against the plain model: log_softmax of all logits, row by row, in float64."""
from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny_models import (
    CONFIGS,
    EXACT,
    VOCABULARY,
    Float64,
    Largest,
    adapted,
    batch,
    gradients,
    logits_before,
    plain,
    plain_logp,
    same,
    spread,
    tiny,
)

from prefopt.forward import GRADIENT, Positions, fill, forward, mismatched_rows, states, token_logp
from prefopt.head import reduced
from prefopt.models import Models, Trunk, frozen_copy
from prefopt.references import Moving

ROWS = [(0, 3, 4), (0, 3, 2), (1, 2, 6), (1, 2, 1)]
MOVED = [{"padding": "left"}, {"left": 3}, {"right": 6}, {"left": 2, "right": 1, "padding": "left"}]


@pytest.fixture(autouse=True)
def double(request):
    """Exact models, but where a test chooses its own dtype."""
    if "dtype" in request.fixturenames:
        yield
    else:
        with Float64():
            yield


def some(b) -> torch.Tensor:
    """Fixed weights of both signs, so that no gradient cancels."""
    return torch.linspace(-1, 2, b["mask"].numel(), dtype=torch.float64).view(b["mask"].shape)


# ------------------------------------------------------------------------------------------------- log-probabilities
@pytest.mark.parametrize(("family", "changes"), [*((f, {}) for f in CONFIGS), ("llama", {"tie_word_embeddings": True}),
                                                 ("qwen2", {"tie_word_embeddings": False}),
                                                 ("gemma2", {"tie_word_embeddings": False})])
def test_log_probabilities_and_all_gradients(family, changes):
    model, b = tiny(family, **changes), batch(ROWS, padding="left", right=1)
    found = forward(Models(model), b, {"logp"}, chunk=3)["logp"]
    expected = plain_logp(model, b)
    torch.testing.assert_close(found, expected, **EXACT)
    same(gradients(model, (some(b) * found).sum()), gradients(model, (some(b) * expected).sum()))
    torch.testing.assert_close(token_logp(Trunk(model), b), expected.detach(), **EXACT)


def test_the_families_differ_where_they_should():
    """Tied heads are one tensor, Phi's head has a bias, and caps and scales are in force."""
    tied = tiny("gemma3")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = tiny("qwen3")
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert tiny("phi").lm_head.bias.abs().min() > 0
    assert (Trunk(tiny("gemma2")).cap, Trunk(tiny("cohere")).scale) == (2.0, 0.25)
    assert Trunk(tiny("granite")).scale == pytest.approx(1 / 3)


def test_distribution_reducers_by_their_formulas():
    model, ref, b = tiny("llama"), tiny("llama", seed=1), batch(ROWS)
    found = forward(Models(model, ref), b, {"entropy", "collision", "token_kl"}, chunk=3)
    with torch.no_grad():
        expected = {"entropy": plain(model, b, lambda logp, _: -(logp.exp() * logp).sum()),
                    "collision": plain(model, b, lambda logp, _: logp.exp().square().sum().log())}
        of_ref = {n: logits_before(ref, b, n) for n in range(b.N)}
        kl = torch.zeros_like(expected["entropy"])
        for n in range(b.N):
            for column, logits in logits_before(model, b, n).items():
                p = of_ref[n][column].softmax(-1)
                kl[n, column] = sum(p[v] * (p[v].log() - logits.softmax(-1)[v].log()) for v in range(VOCABULARY))
    for key, value in {**expected, "token_kl": kl}.items():
        torch.testing.assert_close(found[key].detach(), value, **EXACT)
        assert found[key].requires_grad
    assert kl.max() > 0.1


def test_distribution_reducers_by_hand():
    """Two tokens of probability 3/4 and 1/4, reference 1/2 and 1/2; one hidden unit, whose head is the logits."""
    logits = torch.tensor([[3.0, 1.0]]).log()
    found = reduced(torch.ones(1, 1), torch.tensor([1]), lambda h: h * logits, ["logp", "entropy", "collision", "token_kl"],
                    hidden_ref=torch.zeros(1, 1), head_ref=lambda h: h * logits)
    expected = {"logp": -1.3862944, "entropy": 0.5623351, "collision": -0.4700036, "token_kl": 0.1438410}
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-6)


def test_token_kl_of_a_model_with_itself_is_zero_with_zero_gradient():
    model, b = tiny("llama"), batch(ROWS)
    kl = forward(Models(model, frozen_copy(model)), b, {"token_kl"})["token_kl"]
    assert kl.abs().max() < 1e-12
    assert max(g.abs().max() for g in gradients(model, kl.sum()).values()) < 1e-12


# ------------------------------------------------------------------------------------------------- layout and chunks
ALL = {"logp", "entropy", "collision", "token_kl", "states_ref", "last_state"}


@pytest.mark.parametrize("layout", MOVED)
def test_padding_does_not_matter(layout):
    """Neither its side, nor its amount, nor what stands there."""
    models, a, b = Models(tiny("gpt2"), tiny("gpt2", seed=1)), batch(ROWS), batch(ROWS, **layout)
    b = b.with_columns(tokens=torch.where(b["attend"].bool(), b["tokens"], 7))
    one, two = forward(models, a, ALL), forward(models, b, ALL)
    for key in ALL - {"last_state"}:
        torch.testing.assert_close(two[key][b["mask"].bool()], one[key][a["mask"].bool()], **EXACT)
        assert two[key][~b["mask"].bool()].abs().max() == 0
    torch.testing.assert_close(two["last_state"], one["last_state"], **EXACT)


@pytest.mark.parametrize("chunk", [1, 4, 13, None])
def test_chunks_do_not_matter(chunk):
    model, ref, b = tiny("gemma2"), tiny("gemma2", seed=1), batch(ROWS)
    results = []
    for size in (5, chunk):
        found = forward(Models(model, ref), b, {"logp", "entropy", "collision", "token_kl"}, chunk=size)
        values = {k: found[k].detach() for k in ("logp", "entropy", "collision", "token_kl")}
        loss = sum((some(b) * found[k]).sum() for k in values)
        results.append((values, gradients(model, loss)))
    same(results[0][0], results[1][0])
    same(results[0][1], results[1][1])


@pytest.mark.parametrize("layout", [{}, {"left": 2}])
def test_a_response_without_anything_before_it_is_an_error(layout):
    with pytest.raises(ValueError, match="first token of its row.*BOS"):
        forward(Models(tiny()), batch([(0, 2, 2), (1, 0, 3)], **layout), {"logp"})


def test_a_batch_without_response_tokens_gives_zeros_that_carry_a_gradient():
    model, b = tiny(), batch([(0, 3, 0), (0, 2, 0)])
    found = forward(Models(model), b, {"logp", "entropy"})
    assert found["logp"].abs().max() == 0 and found["logp"].shape == b["mask"].shape
    assert all(g.abs().max() == 0 for g in gradients(model, found["logp"].sum()).values())


def test_tokens_without_mask_are_not_scored():
    model, b = tiny(), batch(ROWS)
    gaps = b.with_columns(mask=b["mask"] * (torch.arange(8) % 2))
    torch.testing.assert_close(forward(Models(model), gaps, {"logp"})["logp"], plain_logp(model, b) * gaps["mask"], **EXACT)


# ------------------------------------------------------------------------------------------------- states
def test_states_of_the_reference_are_those_of_output_hidden_states():
    models, b = Models(tiny("gemma3"), tiny("gemma3", seed=1)), batch(ROWS, padding="left")
    found = forward(models, b, {"states_ref"})["states_ref"]
    assert found.shape == (*b["mask"].shape, 2, 16) and not found.requires_grad
    for n in range(b.N):
        real = b["attend"][n].nonzero().squeeze(1).tolist()
        layers = models.reference(b["tokens"][n, real][None], output_hidden_states=True).hidden_states
        for column in b["mask"][n].nonzero().squeeze(1).tolist():
            for layer in (0, 1):
                torch.testing.assert_close(found[n, column, layer], layers[layer + 1][0, real.index(column) - 1], **EXACT)


def test_last_state_is_that_of_the_last_real_token():
    model, b = tiny("qwen3"), batch(ROWS, padding="left", right=2)
    found = forward(Models(model), b, {"last_state"})["last_state"]
    for n in range(b.N):
        real = b["attend"][n].bool()
        torch.testing.assert_close(found[n], model.model(b["tokens"][n, real][None]).last_hidden_state[0, -1], **EXACT)
    assert found.requires_grad


def test_one_pass_serves_all_columns_of_a_model():
    """last_state comes from the pass of logp, and token_kl's reference states from that of states_ref."""
    models, b = Models(tiny(), tiny(seed=1)), batch(ROWS)
    found = forward(models, b, ALL)
    assert models.policy_model().calls["forwards"] == models._reference.calls["forwards"] == 1
    for key in ALL:
        torch.testing.assert_close(found[key], forward(models, b, {key})[key], **EXACT)


# ------------------------------------------------------------------------------------------------- frozen columns
def test_columns_that_are_there_are_not_made_again():
    models, b = Models(tiny(), tiny(seed=1)), batch(ROWS)
    cached = b.with_columns(logp_ref=torch.full(b["mask"].shape, -3.0))
    assert fill(models, cached, {"logp_ref"})["logp_ref"].eq(-3).all()
    assert models._reference.calls["forwards"] == 0


def test_old_log_probabilities_have_no_gradient_and_equal_the_new():
    models, b = Models(tiny()), batch(ROWS)
    filled = fill(models, b, {"logp_old", "logp"}, tokens=15)
    assert "logp" not in filled and not filled["logp_old"].requires_grad
    torch.testing.assert_close(filled["logp_old"], forward(models, b, {"logp"})["logp"].detach(), **EXACT)


def test_groups_out_of_order_keep_their_rows():
    models = Models(tiny(), tiny(seed=1))
    b = batch([(5, 3, 4), (2, 2, 6), (5, 3, 2), (9, 2, 1), (2, 2, 3)])
    found = fill(models, b, {"logp_ref"}, tokens=16)["logp_ref"]
    torch.testing.assert_close(found, plain_logp(models.reference, b).detach(), **EXACT)


def test_mismatched_rows_by_a_loop():
    """Prompt of the row, response of the other group's row in the same place (modulo its size), masks included."""
    b, other = batch([(0, 3, 4), (0, 3, 2), (0, 3, 1), (1, 2, 5)], padding="left"), \
        batch([(4, 1, 2), (4, 1, 3), (7, 5, 4)], seed=9, right=2)
    other = other.with_columns(mask=other["mask"] * (torch.arange(11) != 6))
    found = mismatched_rows(b, other)
    for n, source in enumerate([0, 1, 0, 2]):
        mine, theirs = b["attend"][n].bool(), other["attend"][source].bool()
        prompt, start = int(b["prompt_length"][n]), int(other["prompt_length"][source])
        ids = [*b["tokens"][n][mine][:prompt].tolist(), *other["tokens"][source][theirs][start:].tolist()]
        mask = [0] * prompt + other["mask"][source][theirs][start:].tolist()
        real = found["attend"][n].bool()
        assert found["tokens"][n][real].tolist() == ids and found["mask"][n][real].int().tolist() == mask
        assert not found["mask"][n][~real].any()


@pytest.mark.parametrize("tokens", [None, 14, 8])
def test_mismatched_log_ratios(tokens):
    """Also where a mismatched row (3 + 6) is longer than every row of the batch and than the budget allows groups."""
    b, other = batch([(0, 3, 4), (1, 2, 5)]), batch([(0, 1, 6), (1, 2, 3)], seed=9)
    models = Models(tiny("llama"), tiny("llama", seed=1))
    found = fill(models, b, {"mismatched"}, tokens=tokens, other=other)["mismatched"]
    rows = mismatched_rows(b, other)
    expected = (plain_logp(models.policy, rows) - plain_logp(models.reference, rows)).sum(1).detach()
    torch.testing.assert_close(found, expected, **EXACT)
    assert not found.requires_grad


def test_a_step_of_one_prompt_has_nothing_to_mismatch():
    models = Models(tiny(), tiny(seed=1))
    assert fill(models, batch([(0, 3, 2), (0, 3, 1)]), {"mismatched"}, other=None)["mismatched"].isnan().all()


# ------------------------------------------------------------------------------------------------- adapters, references
def test_adapters_off_are_the_base_model():
    b, base = batch(ROWS), tiny("qwen2")
    models = Models(adapted(tiny("qwen2")))
    filled = fill(models, b, {"logp_ref", "logp_old"})
    torch.testing.assert_close(filled["logp_ref"], plain_logp(base, b).detach(), **EXACT)
    torch.testing.assert_close(filled["logp_old"], plain_logp(models.policy, b).detach(), **EXACT)
    assert (filled["logp_ref"] - filled["logp_old"]).abs().max() > 0.1
    assert models.policy.training and all("lora" in n for n, _ in models.trainable()) and models.trainable()


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_token_kl_with_adapters_also_on_the_head(settings):
    """The reference's head is the one without adapters, in the first pass and where backward runs it again."""
    b, base = batch(ROWS), tiny("llama")
    policy = adapted(tiny("llama"), **settings)
    one = forward(Models(policy), b, {"token_kl"}, chunk=4)["token_kl"]
    first = gradients(policy, (some(b) * one).sum())
    two = forward(Models(policy, base.requires_grad_(False)), b, {"token_kl"}, chunk=4)["token_kl"]
    torch.testing.assert_close(one, two, **EXACT)
    same(first, gradients(policy, (some(b) * two).sum()))


def test_frozen_copy_shares_what_does_not_train():
    def storage(model):
        return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}

    policy = adapted(tiny("llama"))
    copied = frozen_copy(policy)
    trained_bytes = sum(p.untyped_storage().nbytes() for p in policy.parameters() if p.requires_grad)
    extra = {k: v for k, v in storage(copied).items() if k not in storage(policy)}
    assert sum(extra.values()) == trained_bytes < sum(storage(policy).values()) / 2
    assert {n for n, p in copied.named_parameters() if p is dict(policy.named_parameters())[n]} == \
        {n for n, p in policy.named_parameters() if not p.requires_grad}
    assert not copied.training and not any(p.requires_grad for p in copied.parameters())
    full = tiny("qwen2")
    assert not set(storage(full)) & set(storage(frozen_copy(full)))
    assert frozen_copy(full).lm_head.weight is not full.lm_head.weight


def test_a_frozen_copy_keeps_its_values_and_never_gets_gradients():
    policy, b = tiny("qwen2"), batch(ROWS)
    models = Models(policy, frozen_copy(policy))
    before = plain_logp(policy, b).detach()
    found = forward(models, fill(models, b, {"logp_ref"}), {"logp", "token_kl"})
    ((found["logp"] - found["logp_ref"]).square().sum() + found["token_kl"].sum() + found["logp"].sum()).backward()
    with torch.no_grad():
        for p in policy.parameters():
            p.sub_(0.1 * p.grad)
    assert all(p.grad is None for p in models.reference.parameters())
    assert models.reference.lm_head.weight is models.reference.model.embed_tokens.weight
    torch.testing.assert_close(fill(models, b, {"logp_ref"})["logp_ref"], before, **EXACT)
    assert (forward(models, b, {"logp"})["logp"].detach() - before).abs().max() > 1e-3


@pytest.mark.parametrize("make", [lambda: tiny("llama"), lambda: adapted(tiny("llama"))], ids=["full", "lora"])
def test_a_moving_reference_equals_the_closed_form(make):
    """ref_3 = (1-a)^3 p_0 + a sum_k (1-a)^(3-k) p_k for policies p_k after steps 1 to 3; only what trains moves."""
    policy, alpha, b = make(), 0.3, batch(ROWS)
    models = Models(policy, frozen_copy(policy))
    reference, moving = models.reference_trainable(), Moving(alpha=alpha, every=1)
    trail = [[p.detach().clone() for _, p in models.trainable()]]
    for step in (1, 2, 3):
        loss = forward(models, b, {"logp"})["logp"].sum()
        grads = torch.autograd.grad(loss, [p for _, p in models.trainable()])
        with torch.no_grad():
            for (_, p), g in zip(models.trainable(), grads, strict=True):
                p.add_(g, alpha=0.01)
        trail.append([p.detach().clone() for _, p in models.trainable()])
        moving.step(step, reference, [p for _, p in models.trainable()])
    weights = [(1 - alpha) ** 3, *(alpha * (1 - alpha) ** (3 - k) for k in (1, 2, 3))]
    for number, r in enumerate(reference):
        torch.testing.assert_close(r, sum(w * t[number] for w, t in zip(weights, trail, strict=True)), rtol=0, atol=1e-12)
    expected = make()
    with torch.no_grad():
        for (_, p), r in zip(Models(expected).trainable(), reference, strict=True):
            p.copy_(r)
    torch.testing.assert_close(fill(models, b, {"logp_ref"})["logp_ref"], plain_logp(expected, b).detach(), **EXACT)


def test_every_other_step_moves_the_reference_where_asked():
    reference, policy = [torch.zeros(2).double()], [torch.ones(2).double()]
    for step in range(1, 6):
        Moving(alpha=0.5, every=2).step(step, reference, policy)
    assert reference[0].tolist() == [0.75, 0.75]              # after steps 2 and 4


# ------------------------------------------------------------------------------------------------- costs
def test_counts_of_tokens_and_positions():
    """The head sees masked tokens only, once forward and once more backward; the body sees real tokens, and prompts once."""
    for packing, tokens in ((True, (3 + 4 + 2) + (2 + 6 + 1)), (False, 4 * 8)):
        models, b = Models(tiny(), packing=packing), batch(ROWS, left=4, right=3)
        calls = models.policy_model().calls
        loss = forward(models, b, {"logp", "entropy"}, chunk=4)["logp"].sum()
        assert calls == {"tokens": tokens, "forwards": 1, "positions": 4 + 2 + 6 + 1, "rectangle": 4 * 8,
                         "trained": tokens, "unread": 0}
        loss.backward()
        assert calls == {"tokens": tokens, "forwards": 1, "positions": 2 * 13, "rectangle": 4 * 8, "trained": tokens, "unread": 0}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_tensor_of_all_tokens_and_the_vocabulary(family):
    """Vocabulary 5000, hidden 16, chunk 16: nothing is larger than the head itself, forward or backward."""
    models = Models(tiny(family, vocab_size=5000), tiny(family, vocab_size=5000, seed=1))
    b = batch([(0, 2, 30), (0, 2, 20)])
    reads = {"logp", "logp_ref", "entropy", "collision", "token_kl"}
    with Largest() as largest:
        found = forward(models, fill(models, b, reads, chunk=16), reads, chunk=16)
        sum(found[k].sum() for k in reads & GRADIENT).backward()
    assert largest.elements == 16 * 5000 < 50 * 5000 < b["mask"].numel() * 5000
    with Largest() as plainly:
        plain_logp(models.policy, b.select(torch.arange(2)))
    assert plainly.elements >= 32 * 5000                      # the recorder sees the plain way's logits


def test_the_default_chunk_is_bounded_in_bytes():
    """256 MiB of float32: 2^26 / vocabulary positions, and never fewer than 16."""
    seen = []

    def head(h):
        seen.append(len(h))
        return h.expand(-1, 4)

    reduced(torch.zeros(1200, 1), torch.zeros(1200).long(), head, ["logp"], vocabulary=2**17)
    assert seen == [512, 512, 176]
    seen.clear()
    reduced(torch.zeros(40, 1), torch.zeros(40).long(), head, ["logp"], vocabulary=2**30)
    assert seen == [16, 16, 8]


@pytest.mark.parametrize("make", [lambda: tiny("qwen2"), lambda: tiny("gpt2"), lambda: adapted(tiny("llama"))],
                         ids=["qwen2", "gpt2", "lora"])
def test_gradient_checkpointing_does_not_matter(make):
    """Backward runs the first block's norm again; the context keeps that run in float64, which backward leaves."""
    results, b = [], batch(ROWS)
    for on in (False, True):
        model, ran = make(), []
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), Float64())})
        first = next(m for n, m in model.named_modules() if n.endswith(("input_layernorm", "ln_1")))
        found = forward(Models(model), b, {"logp"})["logp"]
        first.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        results.append((found.detach(), gradients(model, (some(b) * found).sum()), len(ran)))
    torch.testing.assert_close(results[0][0], results[1][0], **EXACT)
    same(results[0][1], results[1][1])
    assert (results[0][2], results[1][2]) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_at_least_float32(dtype):
    model, b = tiny("llama", dtype=dtype), batch(ROWS)
    found = forward(Models(model, frozen_copy(model)), b, ALL)
    assert {found[k].dtype for k in ALL} == {torch.float32}
    hidden = states(Trunk(model), b, Positions.of(b))
    logits = model.lm_head(hidden).double()
    expected = logits.log_softmax(-1).gather(1, Positions.of(b).token[:, None])[:, 0]
    torch.testing.assert_close(found["logp"][b["mask"].bool()].double(), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- the check of the halves
def test_a_model_that_changes_its_logits_is_refused_each_time():
    model, b = tiny("llama"), batch(ROWS)
    model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", output.logits * 1.01))
    models = Models(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM changes its logits .*(1\.0e-02|9\.9e-03)"):
            forward(models, b, {"logp"})


def test_a_model_that_looks_ahead_is_refused():
    from transformers import BertConfig, BertLMHeadModel
    model = spread(BertLMHeadModel(BertConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                              num_attention_heads=2)).double())
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal"):
        forward(Models(model), batch(ROWS), {"logp"})


def test_the_check_is_free_of_dropout_and_runs_once():
    model, b = tiny("gpt2", attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5), batch(ROWS)
    modes = []
    model.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    models = Models(model)
    first, second = (forward(models, b, {"logp"})["logp"] for _ in range(2))
    assert modes == [False] and model.training and not torch.equal(first, second)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has no head"):
        Models(tiny("llama").model)
