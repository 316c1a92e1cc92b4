"""vLLM as the sampler, against the real engine (its CPU build): in process and as a server."""
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from operator import sub

import pytest
import torch
from loop_cases import lines, write
from small_tokenizers import fast
from tiny_models import adapted, tiny
from torch import nn

from data_tools.collate import collate
from data_tools.records import Group, Response
from prefopt.config import make
from prefopt.forward import token_logp
from prefopt.models import Trunk
from prefopt.rollout import vllm
from prefopt.rollout.base import Ask, Choice, StaleSampler
from prefopt.rollout.programs import conversation
from prefopt.rollout.serve import command
from prefopt.rollout.transformers import distribution
from prefopt.rollout.vllm import VLLMSampler, VLLMServer, asked, plain, stopped, weights
from prefopt.train import train
from rewards.base import rows_of
from rewards.density_ratio import likelihood

real = [pytest.mark.slow, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (.ci/install_vllm)")]
WORDS = 450
SIZE = dict(dtype=torch.float32, vocab_size=WORDS, hidden_size=64, head_dim=32, intermediate_size=96, max_position_embeddings=512)
QUESTIONS = ["The quick brown fox", "It is 4", "def f(x):\n    return", "Question: " * 40]     # more than one block of the cache
ENGINE = dict(enforce_eager=True, max_model_len=512, max_num_seqs=32, gpu_memory_utilization=0.3)
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
               "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}


def calm(model, factor):
    """Trained matrices made smaller: those of `tiny` amplify rounding so much that two float32 passes of the trainer alone,
    with other padding, differ by more than 1e-5."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.ndim > 1:
                p.mul_(factor)
    return model


def policy(*, tied=False, seed=0):
    """A Qwen2 with tied embeddings or a Llama without."""
    name = "qwen2" if tied else "llama"
    size = {k: v for k, v in SIZE.items() if k != "head_dim" or not tied}
    return calm(tiny(name, seed=seed, **size), 0.5)


def with_lora(model, **settings):
    return calm(adapted(model, **settings), 0.3)


def saved(folder, model):
    model.save_pretrained(folder)
    fast("bytes").save_pretrained(folder)
    return str(folder)


def moved(model, amount=0.02):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * amount)
    return model


def gap(model, groups, words):
    """Between engine and trainer, at most, over tokens sampled at temperature 1."""
    batch = collate(groups, words)
    with torch.no_grad():
        found = token_logp(Trunk(model.eval()), batch)
    return float((batch["logp_rollout"] - found)[batch["mask"].bool()].abs().max())


def follows(engine, model, words, syncs=2):
    """Log-probabilities are the policy's before and after weight updates, and not the last one's."""
    for version in range(syncs + 1):
        engine.sync(model, version)
        groups = engine(QUESTIONS, n=4, max_new_tokens=24, seed=0, version=version)
        assert gap(model, groups, words) <= 1e-5
        assert groups[0].meta["sampler"]["version"] == version == engine.version
        moved(model)
        assert gap(model, groups, words) > 1e-2
    with pytest.raises(StaleSampler, match=f"version {syncs + 1} .* holds {syncs}"):
        engine(QUESTIONS, n=1, version=syncs + 1)


def behaves(engine, model, words):
    """What any sampler does: cut distributions, ends, stop strings, seeds, prefixes."""
    engine.sync(model, 7)
    settings = dict(n=3, max_new_tokens=40, seed=3)
    free = engine(QUESTIONS, **settings)
    rows = [r for g in free for r in g.responses]
    assert {r.meta["stopped"] for r in rows} == {"eos", "length"}
    for r in rows:
        assert (r.tokens[-1] in engine.ends) == r.meta["finished"] and not set(engine.ends) & set(r.tokens[:-1])
        assert r.text == words.decode(r.tokens[:-1] if r.meta["finished"] else r.tokens)
    assert len({tuple(r.tokens) for r in rows}) == len(rows)
    again = engine(QUESTIONS[::-1], **{**settings, "n": 2})[::-1]
    assert [[r.tokens for r in g.responses] for g in again] == [[r.tokens for r in g.responses[:2]] for g in free]
    assert engine(QUESTIONS, **{**settings, "seed": 4})[0].responses != free[0].responses

    choice = Choice(temperature=0.7, top_p=0.6, top_k=50)
    for group in engine(QUESTIONS[:2], n=3, max_new_tokens=12, seed=0, temperature=0.7, top_p=0.6, top_k=50):
        prompt = words(group.prompt)["input_ids"]
        for r in group.responses:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + r.tokens])).logits[0, len(prompt) - 1:-1]
            expected = distribution(logits, choice).gather(1, torch.tensor(r.tokens)[:, None])[:, 0]
            assert r.logp == pytest.approx(expected.tolist(), rel=0, abs=1e-5)

    greedy = [g.responses[0] for g in engine(QUESTIONS, n=1, max_new_tokens=12, temperature=0)]
    for question, r in zip(QUESTIONS, greedy, strict=True):
        prompt = words(question)["input_ids"]
        logits = model(input_ids=torch.tensor([prompt + r.tokens])).logits[0, len(prompt) - 1:-1]
        assert r.tokens == logits.argmax(-1).tolist()

    held = [r for g in engine(QUESTIONS, stop=["o", "an"], **settings) for r in g.responses]
    assert {r.meta["stopped"] for r in held} >= {"stop"}
    for a, b in zip(rows, held, strict=True):
        assert a.tokens[:len(b.tokens)] == b.tokens and len(b.logp) == len(b.tokens)
        if b.meta["stopped"] == "stop":
            assert any(s in words.decode(b.tokens) for s in ("o", "an")) and "o" not in b.text and "an" not in b.text
            assert not any(s in words.decode(b.tokens[:-1]) for s in ("o", "an"))

    forced = engine(QUESTIONS[:1], n=2, max_new_tokens=5, seed=0, prefixes=[[9, 10]])
    assert all(r.tokens[:2] == [9, 10] and r.meta["mask"][:2] == [0, 0] for r in forced[0].responses)
    assert gap(model, forced, words) <= 1e-5
    with pytest.raises(ValueError, match="512 positions"):
        engine(["a b" * 400], n=1)

    talk = conversation(lambda m: None if len(m) > 3 else [{"role": "tool", "content": "4"}])
    groups = talk(engine, [[{"role": "user", "content": "2 + 2?"}]], n=8, max_new_tokens=60, seed=0)
    assert max(len(r.text) for r in groups[0].responses) == 3 and gap(model, groups, words) <= 1e-5


def by_length(groups):
    for response in (r for g in groups for r in g.responses):
        response.scores["reward"] = float(sum(response.tokens) % 7)
    return groups


def terse(model, factor):
    """The model with end tokens that are likely enough."""
    ends = fast("bytes").convert_tokens_to_ids(["</s>", "<|im_end|>"])
    with torch.no_grad():
        model.get_output_embeddings().weight[ends] *= factor
    return model


# --------------------------------------------------------------------------------------------------------- in process
@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def in_process(environment, tmp_path):
    """Makes an engine that starts from the weights of seed 9."""
    made = []

    def make(tied=False, **settings):
        made.append(VLLMSampler(saved(tmp_path / "model", policy(tied=tied, seed=9)), fast("bytes"), **ENGINE, **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


class TestInProcess:
    pytestmark = real

    @pytest.mark.parametrize("lora", [False, True])
    @pytest.mark.parametrize("tied", [False, True])
    def test_weights_follow(self, in_process, tied, lora):
        engine = in_process(tied)
        state = torch.get_rng_state()
        policy(tied=tied, seed=9)                             # the last that took noise before the engine
        assert torch.equal(torch.get_rng_state(), state)
        model = policy(tied=tied)
        follows(engine, with_lora(model) if lora else model, fast("bytes"))

    def test_adapters_follow(self, in_process):
        engine = in_process(adapters=8)
        model = with_lora(policy(seed=9), target_modules=["q_proj", "v_proj", "down_proj"])
        follows(engine, model, fast("bytes"), syncs=3)
        with pytest.raises(ValueError, match="the policy has none"):
            engine.sync(policy(), 9)

    def test_more_prompts_than_a_step_of_the_engine_reads(self, in_process):
        """The engine must not read a prompt in parts: it would have to take a seed back."""
        engine = in_process(max_num_batched_tokens=512)
        engine.sync(policy(), 1)
        groups = engine([f"{QUESTIONS[3]} {n}" for n in range(12)], n=2, max_new_tokens=4, seed=0)
        assert len(groups) == 12 and all(len(r.tokens) == len(r.logp) for g in groups for r in g.responses)

    def test_a_run_on_it(self, environment, tmp_path):
        """The whole loop: what is sampled in every step is what the trainer then holds."""
        saved(tmp_path / "model", policy())
        write(tmp_path / "prompts.jsonl", [{"prompt": q} for q in QUESTIONS])
        run = make({"recipe": "grpo", "policy": str(tmp_path / "model"), "data": {"train": str(tmp_path / "prompts.jsonl")},
                    "rollout": {"k": 4, "max_new_tokens": 12, "sampler": {"vllm": ENGINE}},
                    "train": {"steps": 3, "groups_per_step": 4, "lr": 1e-3, "device": "cpu"}, "out": str(tmp_path / "run")})
        train(run, show=False, score=by_length)
        steps = lines(tmp_path / "run")
        assert [s["step"] for s in steps] == [1, 2, 3] and all(s["gap/rollout"] < 1e-5 for s in steps)
        assert all(s["grad_norm"] > 0 for s in steps)

    def test_it_samples_as_any_sampler(self, in_process):
        behaves(in_process(), terse(policy(), 2), fast("bytes"))

    def test_wrong_weights_are_found(self, in_process, monkeypatch):
        """Tied embeddings without the head, which vLLM packs by itself; and another model's weights altogether."""
        engine, model = in_process(tied=True), policy(tied=True)
        engine.sync(model, 1)
        monkeypatch.setattr(vllm, "weights", lambda m: {k: v for k, v in weights(m).items() if k != "lm_head.weight"})
        with pytest.raises(StaleSampler, match="does not hold the policy's weights: log-probabilities differ by"):
            engine.sync(moved(model), 2)
        with pytest.raises(StaleSampler, match="version 1 .* holds none"):
            engine(QUESTIONS, n=1, version=1)
        monkeypatch.setattr(vllm, "weights", lambda m: weights(policy(tied=True, seed=4)))
        with pytest.raises(StaleSampler, match="does not hold the policy's weights"):
            engine.sync(model, 3)


# ------------------------------------------------------------------------------------------------------------- server
class Running:
    """A server of its own, in a process group of its own."""

    def __init__(self, model, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prefopt.rollout.serve", model, "--port", str(self.port), "--dtype", "float32",
             "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "32", "--gpu-memory-utilization", "0.3", *options],
            env={**os.environ, **ENVIRONMENT}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def client(self, **settings):
        """Waits until the server answers."""
        end = time.monotonic() + 240
        while True:
            try:
                return VLLMServer(self.url, fast("bytes"), retries=0, **settings)
            except RuntimeError:
                assert self.process.poll() is None and time.monotonic() < end, "the server did not start"
                time.sleep(1)

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Running(saved(tmp_path_factory.mktemp("served"), policy(tied=True, seed=9)),
                      "--enable-lora", "--max-loras", "3", "--max-lora-rank", "8")
    yield running
    running.kill()


class TestServer:
    pytestmark = real

    @pytest.mark.parametrize("lora", [False, True])
    def test_weights_follow(self, server, lora):
        model = policy(tied=True)
        follows(server.client(), with_lora(model) if lora else model, fast("bytes"))

    def test_it_samples_as_any_sampler(self, server):
        behaves(server.client(), terse(policy(tied=True), 4), fast("bytes"))

    def test_it_says_how_likely_responses_are(self, server):
        """As the same weights in transformers."""
        server.client().sync(policy(tied=True, seed=9), 0)
        rows = rows_of([Group(q, [Response("a b c"), Response("Yes, and no.")]) for q in QUESTIONS])
        found = likelihood(server.url)
        own = likelihood(found.server.root)(rows)
        assert all(max(map(abs, map(sub, a, b))) < 1e-4 for a, b in zip(found(rows), own, strict=True)) and len(own[0]) > 2

    def test_adapters_follow(self, server):
        base = server.client()
        base.sync(policy(tied=True, seed=9), 0)
        model = with_lora(policy(tied=True, seed=9), target_modules=["q_proj", "v_proj", "down_proj"])
        follows(server.client(adapters=True), model, fast("bytes"), syncs=3)

    def test_a_version_is_the_runs_own(self, server):
        """Another run's version 1 is not ours, and what it sends makes ours stale."""
        one, other = server.client(), server.client()
        one.sync(policy(tied=True), 1)
        assert (one.version, other.version) == (1, None)
        other.sync(policy(tied=True, seed=3), 1)
        with pytest.raises(StaleSampler, match="version 1 .* holds none"):
            one(QUESTIONS, n=1, version=1)

    def test_wrong_weights_are_found(self, server, monkeypatch):
        client, model = server.client(), policy(tied=True)
        monkeypatch.setattr(vllm, "weights", lambda m: {k: v for k, v in weights(m).items() if k != "lm_head.weight"})
        with pytest.raises(StaleSampler, match="does not hold the policy's weights"):
            client.sync(moved(model), 1)
        with pytest.raises(StaleSampler, match="holds none"):
            client(QUESTIONS, n=1, version=1)

    def test_a_server_that_dies_is_an_error(self, server):
        """Last, as it ends the server: requests that run, and later ones, fail after the retries."""
        client = server.client()
        client.retries = 1
        client.sync(policy(tied=True), 1)
        server.kill()
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="failed 2 times .*start it again"):
            client(QUESTIONS, n=2, version=1)
        assert time.monotonic() - start < 10


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (.ci/install_vllm)")
def test_a_data_pipeline_over_the_openai_protocol(tmp_path):
    """Responses and verdicts in one build: P(A) in both orders is what the same model says through transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from data_tools import formats
    from data_tools.pipeline import config, driver
    from rewards.judge import judge
    words = ["<pad>", "<bos>", "<eos>", "?", "A", "B", "user", "assistant", *(f"w{n}" for n in range(12))]
    known = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="?"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = str(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=known, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=(
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}assistant ")).save_pretrained(model)
    calm(tiny("qwen2", **SIZE | {"vocab_size": len(words)}), 0.5).save_pretrained(model)        # 20 words: all are told
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{n} w{n + 1}"}}\n' for n in range(6)))
    running = Running(model, "--served-model-name", "small")
    service = {"url": f"{running.url}/v1", "model": "small"}
    try:
        running.client()
        found = driver.build(config.make({
            "source": str(tmp_path / "prompts.jsonl"), "out": str(tmp_path / "out"), "cache": str(tmp_path / "cache"), "stages": [
                {"generate": {"policies": {"p": {"sampler": {"endpoint": service}, "n": 3, "max_new_tokens": 6}}}},
                {"score": {"rewards": [{"judge": {**service, "letters": True}}]}}]}))
    finally:
        running.kill()
    groups = list(formats.load(str(tmp_path / "out" / "groups" / "train.jsonl")))
    assert found.splits == {"train": 6} and len({r.text for g in groups for r in g.responses}) > 12
    told = judge(model=model).compare(groups)
    assert [torch.tensor(g.wins) for g in groups] == [pytest.approx(torch.tensor(wins), abs=2e-5) for wins in told]
    assert max(abs(p - 0.5) for wins in told for row in wins for p in row) > 0.002


# ---------------------------------------------------------------------------------------------------- without an engine
def test_weights_of_a_policy():
    """Tied ones under both names; LoRA as merging gives it, while the policy keeps its own."""
    model = policy(tied=True)
    assert weights(model).keys() == model.state_dict().keys() and "lm_head.weight" in weights(model)
    for target in ("all-linear", ["q_proj", "embed_tokens"]):
        model = adapted(policy(), target_modules=target, modules_to_save=["lm_head"] if target != "all-linear" else None)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        found = {k: v.clone() for k, v in weights(model).items()}
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        expected = model.merge_and_unload().state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)


def test_dora_is_merged_too():
    model = adapted(policy(), use_dora=True)
    found = {k: v.clone() for k, v in weights(model).items()}
    expected = model.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_names_without_marks():
    assert plain("model.layers.0.q_proj.lora_magnitude_vector.default.weight") == ""
    assert plain("head.original_module.weight") == "" and plain("model.norm.weight") == "model.norm.weight"


def test_settings_as_vllm_names_them():
    found = asked(Ask([1] * 10, 77, 4, 50), Choice(0.5, 0.9, 3, ("x",)), [2, 4], 32)
    assert (found["seed"], found["n"], found["max_tokens"], found["stop_token_ids"]) == (77, 4, 22, [2, 4])
    with pytest.raises(ValueError, match="a prompt has 32 tokens, and the engine has 32 positions"):
        asked(Ask([1] * 32, 0, 1, 1), Choice(), [], 32)
    assert [stopped("length", None), stopped("stop", "x"), stopped("stop", 2)] == ["length", "stop", "eos"]
    with pytest.raises(RuntimeError, match="ended a response by 'abort'"):
        stopped("abort", None)


def test_agreement_of_log_probabilities():
    """1e-4 in float32; what a policy in bfloat16 explains is more."""
    model = policy().eval()

    def scored(ids, off=0.0):
        with torch.no_grad():
            logp = model.float()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return [float(logp[k, t]) + off for k, t in enumerate(ids[1:])]

    vllm.agree(model, scored, "float32")
    with pytest.raises(StaleSampler, match="differ by 0.1 on average, and 0.0001 is what float32 explains"):
        vllm.agree(model, lambda ids: scored(ids, 0.1), "float32")
    vllm.agree(model, lambda ids: scored(ids, 0.1), "bfloat16")
    with pytest.raises(StaleSampler, match="differ by nan"):
        vllm.agree(model, lambda ids: scored(ids, float("nan")), "bfloat16")


def test_without_vllm(monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'prefopt\[vllm\]'"):
        VLLMSampler("model", fast("bytes"))


def test_no_server_is_an_error_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"server at http://127.0.0.1:{port} failed 2 times .*refused"):
        VLLMServer(f"http://127.0.0.1:{port}/", fast("bytes"), retries=1)
    assert 1 <= time.monotonic() - start < 5


def test_command_of_the_server(tmp_path):
    model = saved(tmp_path / "model", nn.Module.eval(policy()))
    found = command([model, "--port", "1", "--host=0.0.0.0"], str(tmp_path / "words"))
    assert found == ["serve", model, "--port", "1", "--host=0.0.0.0", "--tokenizer", str(tmp_path / "words"),
                     "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
                     *["--no-enable-chunked-prefill"] * (not torch.cuda.is_available())]
    assert (tmp_path / "words" / "tokenizer.json").exists()
    with pytest.raises(SystemExit, match="usage"):
        command(["--port", "1"], "")
