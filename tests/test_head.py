"""The chunked head against log_softmax of all logits: values, gradients, memory."""
from __future__ import annotations

import math

import pytest
import torch
from tiny_models import EXACT, Float64, Largest, adapted, same, tiny

from prefopt.head import CHUNK_BYTES, ONE, chunks, reduced, reducers
from prefopt.models import Trunk

FAMILIES = ["llama", "qwen2", "gemma2", "granite", "cohere", "phi"]       # plain, tied, cap, scale, scale, bias


@pytest.fixture(autouse=True)
def double(request):
    if "dtype" in request.fixturenames:
        yield
    else:
        with Float64():
            yield


def case(family="llama", count=11, temperature=1.0, **changes):
    trunk = Trunk(tiny(family, **changes), temperature)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(count, 16, generator=generator, dtype=torch.float64).requires_grad_()
    return trunk, hidden, torch.randint(0, trunk.vocabulary, (count,), generator=generator)


def gradients_of(trunk, hidden, values):
    """Of weights of both signs on every value, by the head's parameters and the states."""
    named = {n: p for n, p in trunk.output.named_parameters() if p.requires_grad} | {"hidden": hidden}
    loss = sum((torch.linspace(-1, 2, len(v), dtype=v.dtype) * (k + 1) * v).sum() for k, v in enumerate(values))
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("names", [["logp"], ["entropy"], ["logp", "entropy"]])
@pytest.mark.parametrize("chunk", [1, 4, 11, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_log_softmax(family, temperature, chunk, names):
    trunk, hidden, token = case(family, temperature=temperature)
    log_p = trunk.head(hidden).log_softmax(-1)
    expected = {"logp": log_p[torch.arange(11), token], "entropy": -(log_p.exp() * log_p).sum(-1)}
    found = reducers(trunk, hidden, token, names, chunk=chunk)
    assert list(found) == names
    for name in names:
        torch.testing.assert_close(found[name], expected[name], **EXACT)
    same(gradients_of(trunk, hidden, found.values()), gradients_of(trunk, hidden, [expected[n] for n in names]))


@pytest.mark.parametrize("chunk", [3, None])
def test_gradcheck(chunk):
    trunk, hidden, token = case("gemma2", count=5, vocab_size=7)
    assert torch.autograd.gradcheck(lambda h, w: tuple(reducers(trunk, h, token, ["logp", "entropy"], chunk=chunk).values()),
                                    (hidden, trunk.output.weight), atol=1e-7)


def test_all_reducers_by_hand():
    """Probabilities 1/2, 1/3, 1/6 in this order, and the token that follows is the second."""
    found = reduced(torch.ones(1, 1), torch.tensor([1]), lambda h: h * torch.tensor([[3.0, 2.0, 1.0]]).log(), ONE)
    expected = {"logp": math.log(1 / 3), "peak": math.log(1 / 2), "mass_above": 1 / 2, "collision": math.log(14 / 36),
                "entropy": math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6}
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", sorted(ONE))
def test_the_fast_way_is_that_of_any_reducer(name):
    """Asked for together with another reducer, all go through checkpoints."""
    trunk, hidden, token = case()
    one = reducers(trunk, hidden, token, [name], chunk=4)[name]
    both = reducers(trunk, hidden, token, [name, "collision" if name != "collision" else "peak"], chunk=4)[name]
    torch.testing.assert_close(one, both, **EXACT)
    same(gradients_of(trunk, hidden, [one]), gradients_of(trunk, hidden, [both]))


def test_frozen_heads_and_states_get_no_gradient():
    trunk, hidden, token = case()
    trunk.output.weight.requires_grad_(False)
    reducers(trunk, hidden, token, ["logp"])["logp"].sum().backward()
    assert trunk.output.weight.grad is None and hidden.grad.abs().sum() > 0
    trunk, hidden, token = case()
    reducers(trunk, hidden.detach(), token, ["logp"])["logp"].sum().backward()
    assert trunk.output.weight.grad.abs().sum() > 0


def test_two_backward_passes():
    trunk, hidden, token = case()
    value = reducers(trunk, hidden, token, ["logp", "entropy"])
    loss = value["logp"].sum() + value["entropy"].square().sum()
    one, two = (torch.autograd.grad(loss, [hidden, trunk.output.weight], retain_graph=True) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_heads_with_adapters_take_the_other_way():
    model = adapted(tiny(), target_modules=["lm_head"])
    trunk = Trunk(model)
    hidden, token = torch.randn(5, 16, dtype=torch.float64), torch.arange(5)
    found = reducers(trunk, hidden, token, ["logp"])["logp"]
    torch.testing.assert_close(found, trunk.head(hidden).log_softmax(-1)[torch.arange(5), token], **EXACT)
    found.sum().backward()
    assert any(p.grad is not None for n, p in model.named_parameters() if "lora" in n)


# ------------------------------------------------------------------------------------------------------------- precision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    """Values in float32; gradients as autograd makes them from logits in the model's precision."""
    trunk, _, token = case(count=40)
    trunk.model.to(dtype)
    hidden = torch.randn(40, 16, dtype=dtype).requires_grad_()
    token = token.repeat(4)[:40]
    log_p = trunk.head(hidden).float().log_softmax(-1)
    found = reducers(trunk, hidden, token, ["logp"], chunk=7)["logp"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, log_p[torch.arange(40), token])
    one, two = (gradients_of(trunk, hidden, [v]) for v in (found, log_p[torch.arange(40), token]))
    for key in two:
        assert one[key].dtype == dtype
        assert (one[key] - two[key]).abs().max() < (1e-6 if dtype == torch.float32 else 0.01) * two[key].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("chunk", [7, None])
def test_autocast(dtype, chunk):
    trunk, _, token = case(count=40)
    trunk.model.to(dtype)
    hidden, token = torch.randn(40, 16, requires_grad=True), token.repeat(4)[:40]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = trunk.head(hidden).float().log_softmax(-1)[torch.arange(40), token]
        found = reducers(trunk, hidden, token, ["logp"], chunk=chunk)["logp"]
    torch.testing.assert_close(found, expected)
    one, two = (gradients_of(trunk, hidden, [v]) for v in (found, expected))
    for key in two:
        assert one[key].dtype == dtype
        assert (one[key] - two[key]).abs().max() < 0.01 * two[key].abs().max()


# ------------------------------------------------------------------------------------------------------------- what it costs
@pytest.mark.parametrize("names", [["logp"], ["logp", "entropy"]])
def test_logits_are_computed_once_where_they_fit_and_twice_where_not(names):
    for chunk, times in ((None, 1), (11, 1), (4, 2)):
        trunk, hidden, token = case()
        sum(v.sum() for v in reducers(trunk, hidden, token, names, chunk=chunk).values()).backward()
        assert trunk.calls["positions"] == times * 11
    trunk, hidden, token = case()
    with torch.no_grad():
        reducers(trunk, hidden, token, names, chunk=4)
    assert trunk.calls["positions"] == 11


def test_no_tensor_larger_than_a_chunk_or_the_head():
    trunk, hidden, token = case(count=64, vocab_size=5000)
    with Largest() as largest:
        reducers(trunk, hidden, token, ["logp", "entropy"], chunk=8)["entropy"].sum().backward()
    assert largest.elements == 16 * 5000                      # the gradient of the head


def test_chunks():
    assert [s.start for s in chunks(1100, 2 ** 17, None)] == [0, 512, 1024] and CHUNK_BYTES == 4 * 512 * 2 ** 17
    assert [s.start for s in chunks(40, 2 ** 30, None)] == [0, 16, 32] and chunks(0, 10, None) == []


def test_nothing_to_project_still_carries_a_gradient():
    trunk, hidden, token = case()
    found = reducers(trunk, hidden[:0], token[:0], ["logp", "entropy"])
    assert found["logp"].shape == (0,) and found["entropy"].requires_grad
