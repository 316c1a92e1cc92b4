"""Sampling: what comes out is the policy's, cut where it ends, repeatable, and never tokenised again."""
import pytest
import torch
from small_tokenizers import fast
from tiny_models import VOCABULARY, adapted, tiny, tokenizer
from transformers import GenerationConfig

from data_tools.batch import Batch
from data_tools.collate import Encoding, collate
from data_tools.formats import dump, load
from data_tools.records import Group, Response
from prefopt.rollout.transformers import Sampler, continuations, prompt_ids
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


def test_prompts_are_read_once_for_all_their_samples():
    """Prompts of 5 tokens: 4 go into the shared cache once, the last one and the new ones are read 6 times."""
    model, seen = tiny(), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    made(model, some_prompts((5, 5)), n=6, new=3, eos=None)
    assert seen == [(2, 4), (12, 1), (12, 1), (12, 1)]


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
    with pytest.raises(ValueError, match="prompts of at least one token and n >= 1"):
        made(tiny(), asked, n=n)


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
    model, words, asked = tiny(), tokenizer(), ["w1 w2", CHAT, "w3", "w4 w5 w6", "w7"]
    ids = prompt_ids(asked, words)
    torch.manual_seed(0)
    groups = Sampler(model, words, batch=2)(asked, n=3, max_new_tokens=20)
    torch.manual_seed(0)
    settings = dict(n=3, max_new_tokens=20, pad=PAD, eos=EOS)
    expected = [row for k in (0, 2, 4) for row in continuations(model, ids[k:k + 2], **settings)]
    assert [g.prompt for g in groups] == asked
    assert [[r.tokens for r in g.responses] for g in groups] == [[t.tolist() for t in row] for row in expected]
    responses = [r for g in groups for r in g.responses]
    assert {r.meta["finished"] for r in responses} == {True, False}
    for r in responses:
        assert r.meta["finished"] == (r.tokens[-1] == EOS)
        assert EOS not in r.tokens[:-1] and len(r.tokens) <= 20 and (r.meta["finished"] or len(r.tokens) == 20)
        assert r.text == words.decode(r.tokens[:-1] if r.meta["finished"] else r.tokens)


def test_sampled_tokens_are_never_tokenised_again(tmp_path):
    """Bytes of a random model, whose text encodes to other tokens, survive records on disk and collate unchanged."""
    words = fast("bytes")
    torch.manual_seed(1)
    groups = Sampler(tiny(vocab_size=len(words)), words)(["The fox", "It is"], n=4, max_new_tokens=12)
    again = [words(r.text)["input_ids"] + [EOS] * r.meta["finished"] for g in groups for r in g.responses]
    assert all(ids != r.tokens for ids, r in zip(again, [r for g in groups for r in g.responses], strict=True))
    for group in groups:
        group.relevance = [1.0, 0.0, 0.0, 1.0]
    dump(groups, tmp_path / "groups.jsonl")
    batch = collate(load(tmp_path / "groups.jsonl"), words)
    for n, response in enumerate(r for g in groups for r in g.responses):
        start = int(batch["prompt_length"][n])
        assert batch["tokens"][n][batch["mask"][n].bool()].tolist() == response.tokens
        assert batch["tokens"][n, start:start + len(response.tokens)].tolist() == response.tokens


def test_sync_takes_another_model():
    words, one, other = tokenizer(), tiny(seed=0), tiny(seed=1)
    sampler = Sampler(one, words)

    def greedy():
        return [g.responses[0].tokens for g in sampler(["w1 w2", "w3"], n=1, max_new_tokens=5, temperature=0)]

    before = greedy()
    sampler.sync(other)
    assert greedy() == [r for (r,) in made(other, prompt_ids(["w1 w2", "w3"], words), new=5, temperature=0)] != before


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
