"""Sampling: what comes out is the policy's, with its probabilities, cut where it ends, repeatable, never tokenised again."""
import copy
from collections import Counter

import pytest
import torch
from small_tokenizers import fast
from tiny_models import VOCABULARY, adapted, tiny, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from data_tools.batch import Batch
from data_tools.collate import Encoding, collate
from data_tools.formats import dump, load
from data_tools.records import Group, Response
from prefopt.forward import token_logp
from prefopt.models import Trunk
from prefopt.rollout import cache
from prefopt.rollout.base import Ask, Choice, Engine, Sample, StaleSampler, end_tokens, identify, noise
from prefopt.rollout.programs import continue_prefix, conversation, single, with_greedy
from prefopt.rollout.transformers import Decoder, Sampler, continuations, distribution, drawn, prompt_ids, uniforms
from prefopt.sources import prompts, with_online

EOS, PAD = 2, 0
LENGTHS = (1, 5, 3, 5, 8)


def some_prompts(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (k,), generator=generator) for k in lengths]


def made(model, asked, *, n=1, new=6, eos=EOS, seed=0, **settings):
    torch.manual_seed(seed)
    found = continuations(model, asked, n=n, max_new_tokens=new, pad=PAD, eos=eos, **settings)
    return [[row.tolist() for row in rows] for rows in found]


@torch.no_grad()
def most_likely(model, prompt, new, eos=EOS):
    """An argmax loop without a cache, one prompt at a time."""
    ids, model = prompt, model.eval()
    for _ in range(new):
        ids = torch.cat([ids, model(input_ids=ids[None], use_cache=False).logits[0, -1].argmax()[None]])
        if ids[-1] == eos:
            break
    return ids[len(prompt):].tolist()


def with_steps_to_end(model, prompt, new, seed=0):
    """An end token that the greedy continuation of this prompt meets half way."""
    return most_likely(model, prompt, new, eos=None)[new // 2]


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("n", [1, 3])
def test_greedy_is_the_argmax_loop(name, n):
    """Prompts of unequal length, padded together, with sliding windows too; each is read once for its n continuations."""
    model, asked = tiny(name), some_prompts()
    expected = [most_likely(model, p, 6) for p in asked]
    assert made(model, asked, n=n, temperature=0) == [[row] * n for row in expected]
    assert len({tuple(row) for row in expected}) > 1


def test_a_state_space_model_is_not_prefilled_but_right():
    from transformers import MambaConfig, MambaForCausalLM
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4,
                                         use_mambapy=False)).double()
    assert made(model, some_prompts(), n=2, temperature=0) == [[most_likely(model, p, 6)] * 2 for p in some_prompts()]


def decoder(model, *, ends=(EOS,), batch=64, **settings):
    return Decoder([model], ends, PAD, batch, tokenizer(), **settings)


def questions(lengths=LENGTHS, *, n=3, limit=6, seed=0):
    return [Ask(p.tolist(), noise(0, k), n, limit) for k, p in enumerate(some_prompts(lengths, seed))]


def test_prompts_are_read_once_for_all_their_samples():
    """22 prompt tokens for 15 rows; a row of L tokens feeds L - 1 of them back. Two equal prompts are read once."""
    run = decoder(tiny(), ends=())
    run(questions(), Choice())
    assert run.counts == {"forwards": 6, "prompt": 22, "padding": 18, "decoded": 15 * 5}
    run(questions((4,)) * 2, Choice())
    assert run.counts["prompt"] == 26 and run.counts["forwards"] == 12


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_a_prompt_is_read_once_even_when_its_rows_do_not_fit(name, batch):
    """One forward may hold 6 tokens: prompts are read piece by piece. Long ones come first."""
    model, one = tiny(name, dtype=torch.float32), questions(n=5)
    whole, run = decoder(model), decoder(model, batch=batch, prefill=6)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    same(run(one, Choice()), whole(one, Choice()), atol=1e-5)
    assert run.counts["prompt"] == sum(LENGTHS) and (batch > 5 or run.counts["padding"] == 0)
    assert all(rows <= batch and (rows * width <= 6 or width == 1) for rows, width in seen[2:][:run.counts["forwards"]])


def same(found, expected, atol=1e-10):
    """Equal tokens and ends, and log-probabilities."""
    for some, others in zip(found, expected, strict=True):
        for a, b in zip(some, others, strict=True):
            assert (a.tokens, a.stopped) == (b.tokens, b.stopped)
            assert a.logp == pytest.approx(b.logp, rel=0, abs=atol)


@pytest.mark.parametrize("window", [None, 2, 5, 200])
def test_a_cache_that_grows_in_place_is_transformers(window):
    """Pieces, single tokens, repeated and dropped rows, beyond the room of several blocks; a copy goes its own way."""
    torch.manual_seed(0)
    own, other = cache.Growing(window), DynamicSlidingWindowLayer(window) if window else DynamicLayer()
    rows = 3
    for step, more in enumerate([7, 3, *[1] * 150, 90, *[1] * 20]):
        if keep := {2: [1, 0, 1, 2], 42: [3, 0, 2], 82: [2], 150: [0]}.get(step):
            twin, rows = copy.deepcopy(own), len(keep)
            twin.update(torch.ones(len(own.keys), 2, 1, 4), torch.ones(len(own.keys), 2, 1, 3))
            own.reorder_cache(torch.tensor(keep))
            other.reorder_cache(torch.tensor(keep))
        assert own.get_mask_sizes(more) == other.get_mask_sizes(more)
        keys, values = torch.randn(rows, 2, more, 4), torch.randn(rows, 2, more, 3)
        for a, b in zip((*own.update(keys, values), own.keys, own.values),
                        (*other.update(keys, values), other.keys, other.values), strict=True):
            assert torch.equal(a, b)
        assert own.get_seq_length() == other.get_seq_length() and own.is_sliding == other.is_sliding
    assert own.blocks[0].shape[2] < 400


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma3", "gpt2", "gpt_neox"])
def test_samples_are_those_of_a_copied_cache_bit_by_bit(name, monkeypatch):
    model, asked = tiny(name, dtype=torch.float32), questions(n=4, limit=30)
    found = decoder(model, ends=range(3, 9))(asked, Choice())
    monkeypatch.setattr(cache, "empty", lambda config: DynamicCache(config=config))
    assert found == decoder(model, ends=range(3, 9))(asked, Choice())


class Copied(TorchDispatchMode):
    """Numbers in keys and values of several tokens that any operation copies while open."""

    def __init__(self):
        TorchDispatchMode.__init__(self)
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.cat.default, torch.ops.aten.copy_.default) and out.ndim == 4 and out.shape[2] > 1:
            self.numbers += out.numel()
        return out


def test_keys_are_not_copied_at_every_token():
    """200 tokens behind a prompt of one: blocks grow at 65, 130 and 195, so that a token is copied about twice, and not a hundred
    times, as with concatenation."""
    run = decoder(tiny(max_position_embeddings=512), ends=())
    with Copied() as copied:
        run(questions((1,), n=3, limit=200), Choice())
    whole = 2 * 2 * 3 * 8 * 200                               # layers, keys and values, rows, width, tokens
    assert whole < copied.numbers < 3 * whole


def test_rows_that_ended_cost_nothing():
    """Tokens of ended rows that are fed back: at most a quarter of a batch, as it shrinks at a quarter."""
    model = tiny()
    run = decoder(model, ends=range(3, 12))                   # rows end at many lengths
    lengths = [len(s.tokens) for some in run(questions(n=12, limit=30), Choice()) for s in some]
    useful = sum(lengths) - len(lengths)
    assert len(set(lengths)) > 8 and useful < 0.4 * len(lengths) * (max(lengths) - 1)
    assert useful <= run.counts["decoded"] <= useful * 4 / 3
    assert run.counts["forwards"] == max(lengths)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 5}])
def test_a_seed_decides(settings):
    model, asked = tiny(), some_prompts()
    first = made(model, asked, n=4, **settings)
    assert first == made(model, asked, n=4, **settings) != made(model, asked, n=4, seed=1, **settings)
    assert len({tuple(row) for rows in first for row in rows}) > len(asked)


def test_frequencies_are_the_models_probabilities():
    """4,000 draws of one token: every frequency within 5 standard errors of softmax(logits / temperature)."""
    model, asked, n = tiny(), some_prompts((3, 6)), 4_000
    found = made(model, asked, n=n, new=1, eos=None, temperature=1.5)
    for prompt, rows in zip(asked, found, strict=True):
        with torch.no_grad():
            expected = (model(input_ids=prompt[None]).logits[0, -1] / 1.5).softmax(-1)
        drawn = torch.bincount(torch.tensor(rows)[:, 0], minlength=VOCABULARY) / n
        assert bool(((drawn - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all())


@pytest.mark.parametrize("own", [{"repetition_penalty": 5.0}, {"top_k": 1, "temperature": 0.1, "do_sample": True},
                                 {"eos_token_id": list(range(VOCABULARY))}, {"max_new_tokens": 1},
                                 {"suppress_tokens": list(range(3, VOCABULARY))}])
def test_the_models_own_generation_settings_do_not_count(own):
    """Hub models bring penalties and cuts; samples made with them would not be the policy's."""
    model, asked = tiny(), some_prompts()
    expected = made(model, asked, n=2, eos=None), made(model, asked, eos=None, temperature=0)
    model.generation_config = GenerationConfig(**own)
    assert (made(model, asked, n=2, eos=None), made(model, asked, eos=None, temperature=0)) == expected
    assert all(getattr(model.generation_config, key) == value for key, value in own.items())


@pytest.mark.parametrize("several", [False, True])
def test_cut_after_the_end_token(several):
    """The greedy row that meets the end token half way keeps it and stops there; the others go on."""
    model, asked = tiny("gpt2"), some_prompts()
    eos = with_steps_to_end(model, asked[2], 6)
    found = made(model, asked, temperature=0, eos=[eos, VOCABULARY - 1] if several else eos)
    for prompt, (row,) in zip(asked, found, strict=True):
        whole = most_likely(model, prompt, 6, eos=None)
        ends = [k for k, t in enumerate(whole) if t in ([eos, VOCABULARY - 1] if several else [eos])]
        assert row == (whole[:ends[0] + 1] if ends else whole)
    assert found[2][0][-1] == eos and len(found[2][0]) <= 4


def test_adapters_take_part_and_the_mode_is_put_back():
    model, asked = adapted(tiny()), some_prompts()
    assert model.training
    found = made(model, asked, n=2, temperature=0)
    assert model.training and all(m.training for m in model.modules())
    assert found == [[most_likely(model, p, 6)] * 2 for p in asked]
    with model.disable_adapter():
        assert found != made(model, asked, n=2, temperature=0)
    model.eval()
    made(model, asked)
    assert not model.training


@pytest.mark.parametrize("asked, n", [([], 1), ([torch.tensor([], dtype=torch.long)], 1), (some_prompts(), 0)])
def test_nothing_to_sample_is_an_error(asked, n):
    with pytest.raises(ValueError, match="prompts of at least one token, n >= 1"):
        made(tiny(), asked, n=n)


def test_each_module_keeps_its_mode():
    model = tiny()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    made(model, some_prompts())
    assert [m.training for m in model.modules()] == before and len(set(before)) == 2


def test_memory_says_what_to_lower():
    model = tiny()

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    model.model.layers[1].register_forward_hook(full)
    with pytest.raises(RuntimeError, match="out of memory with 7 responses at a time: lower its batch"):
        decoder(model, batch=7)(questions(), Choice())
    assert model.training


def test_positions_are_limited():
    """64 positions: a prompt of 60 tokens leaves 4 for its response, and 64 leave none."""
    for name in ("gpt2", "llama"):
        (one,), = decoder(tiny(name), ends=())(questions((60,), n=1, limit=20), Choice())
        assert (len(one.tokens), one.stopped) == (4, "length")
        with pytest.raises(ValueError, match="64 tokens, and the model has 64 positions"):
            decoder(tiny(name))(questions((3, 64)), Choice())


def test_a_tokenizer_of_another_model():
    with pytest.raises(ValueError, match="holds token 61, and the model knows 61"):
        decoder(tiny())([Ask([5, 61], 0, 1, 1)], Choice())


def test_a_model_without_a_known_cache_is_refused():
    model = tiny()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="LlamaForCausalLM has no cache that prefopt"):
        patch.setattr(type(model.model), "forward", lambda self, input_ids: None)
        decoder(model)


def test_broken_weights():
    model = tiny()
    run = decoder(model)
    run(questions(), Choice())
    with torch.no_grad():
        model.lm_head.weight[7] = float("inf")
    with pytest.raises(RuntimeError, match="LlamaForCausalLM gives logits that are not finite after 0 sampled tokens"):
        run(questions(), Choice())


# -------------------------------------------------------------------------------------------------------------- noise
def test_a_result_depends_on_nothing_but_its_prompt():
    """Alone, in another order, with other n, in batches of another size: the same tokens."""
    model = tiny()
    whole = decoder(model)(questions(n=4), Choice(temperature=1.3))
    assert len({tuple(s.tokens) for some in whole for s in some}) == 20
    turned = decoder(model, batch=3)(questions(n=2)[::-1], Choice(temperature=1.3))[::-1]
    same(turned, [some[:2] for some in whole])
    same([decoder(model)([one], Choice(temperature=1.3))[0] for one in questions(n=4)], whole)


def test_a_longer_limit_only_adds():
    model = tiny()
    short, long = (decoder(model, ends=())(questions(limit=k), Choice()) for k in (3, 9))
    assert [[s.tokens for s in some] for some in short] == [[s.tokens[:3] for s in some] for some in long]


def test_streams():
    """Uniform and apart: means within 5 standard errors, neighbours not correlated; a longer one begins like a shorter."""
    many = torch.stack([torch.from_numpy(uniforms(k, 200)) for k in range(500)])
    error = (1 / 12 / many.numel()) ** 0.5
    assert abs(many.mean() - 0.5) < 5 * error and many.min() >= 0 and many.max() < 1
    assert abs(((many[1:] - 0.5) * (many[:-1] - 0.5)).mean() * 12) < 5 / many.numel() ** 0.5
    assert uniforms(7, 10)[:4].tolist() == uniforms(7, 4).tolist()


def test_prompts_are_told_apart():
    """Equal prompts of one call get noise of their own; the names hold across calls."""
    names = identify(["a", "b", "a", [{"role": "user", "content": "a"}]])
    assert len(set(names)) == 4 and names == [*identify(["a", "b", "a"]), names[3]] and identify(["b"]) == names[1:2]
    assert noise(1, 2) == noise(1, 2) != noise(12) and 0 <= noise("x" * 9999) < 2**62
    sampler = Sampler(tiny(), tokenizer())
    one, other = sampler(["w1", "w1"], n=3, max_new_tokens=20, seed=0)
    assert [r.tokens for r in one.responses] != [r.tokens for r in other.responses]
    swapped = sampler(["w1", "w2", "w1"], n=3, max_new_tokens=20, seed=0, keys=[5, 6, 5])
    assert swapped[0].responses == swapped[2].responses != swapped[1].responses
    assert [r.tokens for r in swapped[0].responses] != [r.tokens for r in one.responses]


# ------------------------------------------------------------------------------------------------------ distributions
def test_the_cut_distribution_by_hand():
    """p = .4 .3 .2 .1; top_k 3 leaves 4/9 3/9 2/9, of which top_p .7 keeps the first two: 4/9 < .7 <= 7/9."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log() + 3

    def cut(**settings):
        return distribution(logits, Choice(**settings)).exp().tolist()

    assert cut(top_k=3, top_p=0.7) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert cut(top_p=0.75) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9])
    assert cut(top_p=1e-9) == cut(top_k=1) == [0, 1, 0, 0]
    assert cut(temperature=0.5) == pytest.approx([1 / 30, 16 / 30, 4 / 30, 9 / 30])
    assert cut(temperature=0, top_p=0.1) == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert cut(top_k=99) == pytest.approx([0.1, 0.4, 0.2, 0.3])


def test_cuts_are_those_of_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(20)(None, TemperatureLogitsWarper(0.7)(None, logits)))
    torch.testing.assert_close(distribution(logits, Choice(0.7, 0.8, 20)), expected.log_softmax(-1))


def test_every_number_draws_the_token_of_its_interval():
    logp = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64).log()
    uniform = torch.tensor([0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-32], dtype=torch.float64)
    assert drawn(logp.expand(6, -1), uniform).tolist() == [1, 1, 3, 3, 4, 4]
    assert drawn(logp.float().expand(1, -1) - 0.3, uniform[-1:]).tolist() == [4]          # not normalised: no fall off the end


@pytest.mark.parametrize("settings, message", [
    (dict(temperature=-1), "temperature should be"), (dict(temperature=float("nan")), "temperature should be"),
    (dict(top_p=0), "top_p should be"), (dict(top_p=1.1), "top_p should be"), (dict(top_k=-1), "top_k should be"),
    (dict(stop=[""]), "not empty"), (dict(max_new_tokens=0), "max_new_tokens = 0"), (dict(n=0), "n = 0")])
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(tiny(), tokenizer())(["w1"], **{"n": 1, **settings})


# ---------------------------------------------------------------------------------------------------- log-probabilities
def gap(model, groups, words, encoding=Encoding()):
    """Between what the sampler says and the trainer's teacher-forced forward pass, at most."""
    batch = collate(groups, words, encoding)
    with torch.no_grad():
        trainer = token_logp(Trunk(model), batch)
    assert int(batch["mask"].sum()) == sum(sum(r.meta.get("mask", [1] * len(r.tokens))) for g in groups for r in g.responses)
    return float((batch["logp_rollout"] - trainer)[batch["mask"].bool()].abs().max())


QUESTIONS = ["w1 w2 w3 w4 w5 w6 w7 w8", "w9", "w4 w5 w6", "w2 w2"]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "cohere", "phi"])
def test_log_probabilities_are_the_trainers(name, lora):
    """At most 1e-5 apart in float32, before and after the weights change."""
    model, words = tiny(name, dtype=torch.float32), tokenizer()
    model = adapted(model) if lora else model
    sampler = Sampler(model, words, batch=8)
    before = sampler(QUESTIONS, n=4, max_new_tokens=12, seed=0)
    assert gap(model.eval(), before, words) <= 1e-5
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    after = sampler(QUESTIONS, n=4, max_new_tokens=12, seed=0)
    assert gap(model, after, words) <= 1e-5 < gap(model, before, words)


@pytest.mark.parametrize("settings", [dict(temperature=0.6), dict(top_p=0.7), dict(top_k=4), dict(temperature=0),
                                      dict(temperature=1.5, top_p=0.9, top_k=9)])
def test_log_probabilities_are_of_the_distribution_that_was_sampled(settings):
    model = tiny()
    choice = Choice(**settings)
    for ask, some in zip(questions(), decoder(model)(questions(), choice), strict=True):
        for s in some:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ask.ids + s.tokens])).logits[0, len(ask.ids) - 1:-1]
            expected = distribution(logits, choice).gather(1, torch.tensor(s.tokens)[:, None])[:, 0]
            assert s.logp == pytest.approx(expected.tolist(), rel=0, abs=1e-6) and min(s.logp) > -1e4


# ---------------------------------------------------------------------------------------------------------------- ends
def test_end_tokens():
    """EOS is </s> and the template closes turns with <|im_end|>: both end. Words named by stale settings do not."""
    words = fast("bytes")
    eos, end, start, word = words.convert_tokens_to_ids(["</s>", "<|im_end|>", "<|im_start|>", "e"])
    assert end_tokens(words) == sorted([eos, end])
    assert end_tokens(words, GenerationConfig(eos_token_id=[start, word])) == sorted([eos, end, start])
    assert end_tokens(fast("bytes", template=None), GenerationConfig(eos_token_id=word)) == [eos]
    assert end_tokens(fast("bytes", template="{{ 1 // 0 }}")) == [eos]
    assert end_tokens(fast("bytes", template=None), None, Encoding(chat_template=words.chat_template)) == sorted([eos, end])
    words.eos_token = None
    assert end_tokens(words) == [end]


def test_either_end_token_ends_a_response():
    words, model = fast("bytes"), tiny(vocab_size=450)
    eos, end = words.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    with torch.no_grad():
        model.lm_head.weight[[eos, end]] *= 6
    responses = [r for g in Sampler(model, words)(["The fox", "It is"], n=40, max_new_tokens=40, seed=0) for r in g.responses]
    assert Counter(r.tokens[-1] for r in responses if r.meta["stopped"] == "eos").keys() == {eos, end}
    for r in responses:
        assert not {eos, end} & set(r.tokens[:-1]) and r.text == words.decode(r.tokens[:-1] if r.meta["finished"] else r.tokens)


@pytest.mark.parametrize("kind", ["bytes", "always"])
def test_stop_strings(kind):
    """Tokens go up to the one that completes the string, also where it is made of several and where bytes are not yet a
    character; the text ends before it. Without it, rows are what they were."""
    words, model = fast(kind), tiny(vocab_size=450)
    sampler, settings = Sampler(model, words), dict(n=30, max_new_tokens=30, seed=0)
    free = [r for g in sampler(["The fox", "It is"], **settings) for r in g.responses]
    stop = ["o", "2 ", "an"]
    held = [r for g in sampler(["The fox", "It is"], stop=stop, **settings) for r in g.responses]
    for a, b in zip(free, held, strict=True):
        assert a.tokens[:len(b.tokens)] == b.tokens
        ends = [k for k in range(1, len(a.tokens) + 1) if any(s in words.decode(a.tokens[:k]) for s in stop)]
        if a.meta["stopped"] == "eos" and ends and ends[0] == len(a.tokens):
            ends = []
        assert (b.meta["stopped"] == "stop") == bool(ends)
        if ends:
            whole = words.decode(a.tokens)
            assert len(b.tokens) == ends[0] and b.meta["finished"] and b.logp == pytest.approx(a.logp[:ends[0]])
            assert b.text == whole[:min(whole.find(s) for s in stop if s in whole)]
        else:
            assert b.text == a.text
    assert {r.meta["stopped"] for r in held} >= {"stop", "length"}
    assert sampler(["The fox"], stop="o", **settings) == sampler(["The fox"], stop=["o"], **settings)


# ------------------------------------------------------------------------------------------------------------- groups
CHAT = [{"role": "user", "content": "w1 w2"}]


def test_prompts_are_encoded_as_in_training():
    """Text, chat and limits give the ids that collate gives."""
    words, asked = tokenizer(), ["w1 w2 w3", "w4", CHAT]
    for encoding in (Encoding(), Encoding(max_prompt=2)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("data_tools.encoding.Counts.warn", lambda self: None)
            batch = collate([Group(p, [Response("w9")]) for p in asked], words, encoding)
            found = prompt_ids(asked, words, encoding)
        assert [f.tolist() for f in found] == [p.tolist() for p in prompts(batch)]
    with pytest.raises(ValueError, match="2 of 3 prompts are longer"), pytest.warns(UserWarning):
        prompt_ids(asked, words, Encoding(max_prompt=2, long_prompt="drop"))


def test_groups_of_the_sampler():
    """One group per prompt in order, whatever the batch; the end token is in the tokens and not in the text."""
    model, words, asks = tiny(), tokenizer(), ["w1 w2", CHAT, "w3", "w4 w5 w6", "w7"]
    torch.manual_seed(0)
    groups = Sampler(model, words, batch=2)(asks, n=3, max_new_tokens=20)
    torch.manual_seed(0)
    assert groups == Sampler(model, words, batch=2)(asks, n=3, max_new_tokens=20)
    assert groups != Sampler(model, words, batch=2)(asks, n=3, max_new_tokens=20)
    seed = groups[0].meta["sampler"]["seed"]
    expected = decoder(model)([Ask(p.tolist(), noise(seed, key), 3, 20) for p, key in
                               zip(prompt_ids(asks, words), identify(asks), strict=True)], Choice())
    assert [g.prompt for g in groups] == asks and all(len(g.responses) == 3 for g in groups)
    same([[Sample(r.tokens, r.logp, r.meta["stopped"]) for r in g.responses] for g in groups], expected)
    assert groups[0].meta == {"sampler": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "version": None, "seed": seed}}
    responses = [r for g in groups for r in g.responses]
    assert {r.meta["finished"] for r in responses} == {True, False}
    for r in responses:
        assert r.meta["finished"] == (r.tokens[-1] == EOS) == (r.meta["stopped"] == "eos") and len(r.logp) == len(r.tokens)
        assert EOS not in r.tokens[:-1] and len(r.tokens) <= 20 and (r.meta["finished"] or len(r.tokens) == 20)
        assert r.text == words.decode(r.tokens[:-1] if r.meta["finished"] else r.tokens)


@pytest.mark.parametrize("batch", [2, 6, 7, 100])
def test_portions_give_what_one_call_gives(batch):
    """Prompts that grow together, long ones first and equal ones in one, sampled call by call: the same bits."""
    model, asks = tiny(), ["w1 w2", "w1 w2 w3 w4 w5", "w3", "w1 w2", "w4 w5 w6", "w7", "w8 w9 w1 w2"]
    sampler, settings = Sampler(model, tokenizer(), batch=batch), dict(n=3, max_new_tokens=20, seed=0)
    whole = sampler(asks, keys=range(7), **settings)
    portions, found = sampler.portions(asks, 3), {}
    for some in portions:
        before = sampler.decoder.counts["prompt"]
        found |= zip(some, sampler([asks[i] for i in some], keys=some, **settings), strict=True)
        assert sampler.decoder.counts["prompt"] - before == sum(len(p) for p in prompt_ids({asks[i] for i in some}, tokenizer()))
    assert [found[i] for i in range(7)] == whole
    assert portions == {2: [[1], [6], [4], [0, 3], [2], [5]], 6: [[1, 6], [4], [0, 3], [2, 5]], 7: [[1, 6], [4], [0, 3], [2, 5]],
                        100: [list(range(7))]}[batch]


def test_limits_of_their_own():
    groups = Sampler(tiny(vocab_size=450), fast("bytes", template=None))(["a", "b"], n=2, max_new_tokens=[1, 3], seed=0)
    assert [[len(r.tokens) for r in g.responses] for g in groups] == [[1, 1], [3, 3]]


def test_sampled_tokens_are_never_tokenised_again(tmp_path):
    """Bytes of a random model, whose text encodes to other tokens, survive records on disk and collate unchanged."""
    words = fast("bytes")
    torch.manual_seed(1)
    groups = Sampler(tiny(vocab_size=len(words)), words)(["The fox", "It is"], n=4, max_new_tokens=12)
    again = [words(r.text)["input_ids"] + [EOS] * r.meta["finished"] for g in groups for r in g.responses]
    assert sum(ids != r.tokens for ids, r in zip(again, [r for g in groups for r in g.responses], strict=True)) >= 6
    for group in groups:
        group.relevance = [1.0, 0.0, 0.0, 1.0]
    dump(groups, tmp_path / "groups.jsonl")
    batch = collate(load(tmp_path / "groups.jsonl"), words)
    for n, response in enumerate(r for g in groups for r in g.responses):
        start = int(batch["prompt_length"][n])
        assert batch["tokens"][n][batch["mask"][n].bool()].tolist() == response.tokens
        assert batch["tokens"][n, start:start + len(response.tokens)].tolist() == response.tokens


def test_sync_takes_another_model_and_its_version():
    words, one, other = tokenizer(), tiny(seed=0), tiny(seed=1)
    sampler = Sampler(one, words)

    def greedy(**settings):
        return [g.responses[0].tokens for g in sampler(["w1 w2", "w3"], n=1, max_new_tokens=5, temperature=0, **settings)]

    before = greedy()
    with pytest.raises(StaleSampler, match="version 1 of the weights was asked for, and the sampler holds none"):
        greedy(version=1)
    sampler.sync(other, 1)
    assert greedy(version=1) == [r for (r,) in made(other, prompt_ids(["w1 w2", "w3"], words), new=5, temperature=0)] != before
    with pytest.raises(StaleSampler, match="version 2 .* holds 1: call sync"):
        greedy(version=2)
    sampler.close()


class Script(Engine):
    """An engine that gives what it is told, and keeps what it is asked."""

    def __init__(self, words, samples):
        self.tokenizer, self.encoding, self.version, self.samples, self.asks = words, Encoding(), None, iter(samples), []

    def continued(self, asks, choice):
        self.asks.append((list(asks), choice))
        return next(self.samples)

    def sync(self, model, version=None):
        self.version = version

    def close(self):
        pass


def says(words, text, stopped="eos"):
    ids = words(text, add_special_tokens=False)["input_ids"]
    return Sample(ids, [-0.5] * len(ids), stopped)


@pytest.mark.parametrize("returned", [[[]], [[1, 2]], [[1], [1]]])
def test_fewer_responses_are_an_error(returned):
    words = fast("bytes")
    samples = [[says(words, "a")] * len(some) for some in returned]
    with pytest.raises(RuntimeError, match="1 responses were asked for each of 1 prompts"):
        Script(words, [samples])(["It"], n=1)


# ----------------------------------------------------------------------------------------------------------- programs
SUM = [{"role": "user", "content": "2 + 2?"}]


def test_single_and_greedy_programs():
    """The probe is the arg-max response and does not train; the samples are what they are without it."""
    sampler = Sampler(tiny(), tokenizer())
    settings = dict(n=3, max_new_tokens=6, seed=0, top_p=0.9)
    plain = single(sampler, QUESTIONS, **settings)
    assert plain == sampler(QUESTIONS, **settings)
    groups = with_greedy(single)(sampler, QUESTIONS, **settings)
    greedy = sampler(QUESTIONS, n=1, max_new_tokens=6, temperature=0)
    for group, before, (best,) in zip(groups, plain, (g.responses for g in greedy), strict=True):
        *rows, probe = group.responses
        assert rows == before.responses and group.meta == before.meta
        assert (probe.tokens, probe.train, probe.meta["probe"]) == (best.tokens, False, "greedy")


def test_prefixes_are_forced_and_not_trained():
    """Log-probabilities are of what follows prompt and prefix; a stop string in the prefix does not count."""
    model, words = tiny(dtype=torch.float32), tokenizer()
    program = continue_prefix(lambda asks: [[10 + k, 20] for k in range(len(asks))])
    groups = program(Sampler(model, words), QUESTIONS, n=3, max_new_tokens=5, seed=0, stop=["w12", "w20 "])
    assert gap(model.eval(), groups, words) <= 1e-5
    for k, group in enumerate(groups):
        for r in group.responses:
            assert r.tokens[:2] == [10 + k, 20] and r.meta["mask"] == [0, 0] + [1] * (len(r.tokens) - 2)
            assert r.logp[:2] == [0, 0] and 0 not in r.logp[2:] and r.text.startswith(words.decode([10 + k, 20]))
    assert continue_prefix(lambda asks: [[]] * 4)(Sampler(model, words), QUESTIONS, n=1, seed=0) == \
        Sampler(model, words)(QUESTIONS, n=1, seed=0)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>", ""])
def test_a_conversation_is_the_template_around_sampled_tokens(end):
    """What was sampled spells 'The' as T + he, which the tokenizer would not do; around it the row is the template's text, and
    a turn that did not end as the template ends it is closed by it."""
    words = fast("bytes")
    a, b, eos = words.convert_tokens_to_ids(["T", "he", end or "T"])
    first = Sample([a, b] + [eos] * bool(end), [-1.0, -2.0] + [-3.0] * bool(end), "eos" if end else "stop")
    script = Script(words, [[[first]], [[says(words, "4<|im_end|>")]]])
    script.encoding = Encoding(system="Be brief.")
    seen = []

    def step(messages):
        seen.append(messages)
        return [{"role": "tool", "content": "It is 4."}] if len(messages) == 2 else None

    (group,) = conversation(step)(script, [SUM], n=1, seed=0, stop=["he"], temperature=0.7)
    row, = group.responses
    answer = "The" if end else "T"
    assert row.text == [{"role": "assistant", "content": answer}, {"role": "tool", "content": "It is 4."},
                        {"role": "assistant", "content": "4"}]
    assert seen == [SUM + row.text[:1], SUM + row.text]
    close = "" if end == "<|im_end|>" else "<|im_end|>"
    between = f"{close}\n<|im_start|>tool\nIt is 4.<|im_end|>\n<|im_start|>assistant\n"
    assert words.decode(row.tokens) == f"The{end}{between}4<|im_end|>"
    assert row.tokens[:2] == [a, b] != words("The", add_special_tokens=False)["input_ids"]
    inner = words(between, add_special_tokens=False)["input_ids"]
    assert row.tokens[len(first.tokens):-2] == inner
    assert row.meta == {"finished": True, "stopped": "eos", "mask": [1] * len(first.tokens) + [0] * len(inner) + [1, 1]}
    assert row.logp == first.logp + [0.0] * len(inner) + [-0.5, -0.5]
    prompt = prompt_ids([SUM], words, script.encoding)[0].tolist()
    (one,), (two,) = (asks for asks, _ in script.asks)
    assert one.ids == prompt and two.ids == prompt + row.tokens[:-2] and one.noise != two.noise
    assert script.asks[0][1] == script.asks[1][1] == Choice(temperature=0.7, stop=("he",))


def test_limits_of_a_conversation():
    """Row by row: ended, out of turns, cut in its turn, no room for the tool, a failing step."""
    words = fast("bytes")
    firsts = [says(words, "It is 4.<|im_end|>"), says(words, "fox<|im_end|>"), says(words, "It is", "length"),
              says(words, "x" * 60 + "<|im_end|>"), says(words, "(<|im_end|>")]
    script = Script(words, [[firsts], [[says(words, "dog<|im_end|>")]]])

    def step(messages):
        last = messages[-1]["content"]
        if last == "It is 4.":
            return []
        if last == "(":
            raise SyntaxError("unclosed")
        assert last != "It is"                                # a turn cut by length is no turn
        return [{"role": "tool", "content": "more"}]

    (group,) = conversation(step, turns=2, max_tokens=70, tools=TOOLS)(script, [SUM], n=5, max_new_tokens=61)
    assert [(r.meta["stopped"], r.meta["finished"]) for r in group.responses] == [
        ("eos", True), ("turns", False), ("length", False), ("length", False), ("error", False)]
    assert [r.meta.get("error") for r in group.responses] == [None] * 4 + ["SyntaxError: unclosed"]
    assert [len(r.text) for r in group.responses] == [1, 3, 1, 1, 1]
    assert [(r.tokens, r.logp) for r in group.responses[2:]] == [(s.tokens, s.logp) for s in firsts[2:]]
    (again,), _ = script.asks[1]
    spent = len(group.responses[1].tokens) - len(says(words, "dog<|im_end|>").tokens)
    assert again.limit == min(61, 70 - spent) < 61
    assert group.meta["tools"] == TOOLS


def test_bad_conversations():
    words = fast("bytes")
    with pytest.raises(ValueError, match="needs prompts of messages, found the plain text 'It is'"):
        conversation(lambda messages: None)(Script(words, []), ["It is"], n=1)
    with pytest.raises(TypeError, match="step should return a list of messages .* found 'more'"):
        conversation(lambda messages: "more")(Script(words, [[[says(words, "a<|im_end|>")]]]), [SUM], n=1)


def test_conversations_of_a_real_policy_train_as_they_were_sampled():
    """Two turns with a template; rows collate with their masks, and log-probabilities are the trainer's."""
    model, words = tiny(dtype=torch.float32, vocab_size=450, max_position_embeddings=512), fast("bytes")
    eos = end_tokens(words)
    with torch.no_grad():
        model.lm_head.weight[eos] *= 4
    program = with_greedy(conversation(lambda m: None if len(m) > 4 else [{"role": "tool", "content": f"It is {len(m)}."}]))
    settings = dict(n=4, max_new_tokens=60, seed=0)
    asks = [SUM, [{"role": "user", "content": "The lazy dog?"}]]
    groups = program(Sampler(model, words), asks, **settings)
    assert max(len(r.text) for g in groups for r in g.responses) == 5
    assert gap(model.eval(), groups, words) <= 1e-5
    for group in groups:
        for r in group.responses:
            inside = [t for t, m in zip(r.tokens, r.meta["mask"], strict=True) if not m]
            assert (words.decode(inside).count("tool\nIt is")) == len(r.text) // 2
    again = program(Sampler(model, words, batch=1), asks[::-1], **settings)[::-1]
    assert [[r.tokens for r in g.responses] for g in again] == [[r.tokens for r in g.responses] for g in groups]


# ------------------------------------------------------------------------------------------------------------- online
def test_online_rows_are_the_samples():
    """Two groups (ids 7 and 3, rows interleaved) get 2 samples each: prompt of their group, all sampled tokens in the mask,
    no label. Rows that were there are unchanged up to padding."""
    tokens = torch.tensor([[5, 6, 9, 0], [4, 8, 8, 8], [5, 6, 10, 11], [4, 9, 0, 0]])
    batch = Batch({"tokens": tokens, "attend": tokens > 0, "group": torch.tensor([7, 3, 7, 3]),
                   "mask": (tokens > 0) & (torch.arange(4) >= torch.tensor([[2], [1], [2], [1]])),
                   "prompt_length": torch.tensor([2, 1, 2, 1]), "relevance": torch.tensor([1.0, 0.0, 0.0, 1.0])})
    assert [p.tolist() for p in prompts(batch)] == [[4], [5, 6]]
    torch.manual_seed(0)
    samples = continuations(tiny(), prompts(batch), n=2, max_new_tokens=5, pad=PAD, eos=EOS)
    joined = with_online(batch, samples)
    assert joined["online"].tolist() == [False] * 4 + [True] * 4
    assert joined["group"].tolist() == [7, 3, 7, 3, 3, 3, 7, 7]
    assert joined["relevance"][:4].tolist() == [1.0, 0.0, 0.0, 1.0] and bool(joined["relevance"][4:].isnan().all())
    for n, (prompt, response) in enumerate([([4], samples[0][0]), ([4], samples[0][1]), ([5, 6], samples[1][0]),
                                            ([5, 6], samples[1][1])], start=4):
        row = [*prompt, *response.tolist()]
        assert joined["tokens"][n][joined["attend"][n].bool()].tolist() == row
        assert joined["tokens"][n][joined["mask"][n].bool()].tolist() == response.tolist()
        assert int(joined["prompt_length"][n]) == len(prompt)
        assert not joined["attend"][n, len(row):].any() and not joined["mask"][n, len(row):].any()
    for name in ("tokens", "attend", "mask"):
        assert torch.equal(joined[name][:4, :4], batch[name]) and not joined[name][:4, 4:].any()
