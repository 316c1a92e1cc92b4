"""Density ratio: identities of the card, customised prompts, routing, engines, bad input."""
import json
import math
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from loop_cases import go, workplace
from tiny_models import saved

from data_tools.encoding import Encoding
from data_tools.records import Group, Response
from rewards.base import Row, ScoringError, rows_of, score
from rewards.density_ratio import (
    DOMAINS,
    DensityRatio,
    Domain,
    customised,
    density_ratio,
    domain_of,
    likelihood,
    per_token,
    router,
    total,
)
from rewards.trained import load

GROUPS = [Group("w3 w4 ", [Response("w5 w1"), Response("w6 w7 w8 w2")]), Group("w9 ", [Response("w1"), Response("w2 w3 w4")])]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("density"))
    saved(folder / "other", "qwen2", seed=5)
    go(folder, "implicit_dpo", "dpo", **{"set.beta": 0.25, "train.epochs": 4})
    return folder


@pytest.fixture(scope="module")
def strong(place):
    return likelihood(str(place / "other"))


@pytest.fixture(scope="module")
def weak(place):
    return likelihood(str(place / "model"))


# --------------------------------------------------------------------------------------------------------- pure functions
def test_forms_by_hand():
    """In bits, (-1 - 2) - (-2 - 3 - 1) = 3 for two tokens of the strong model."""
    bits = math.log(2)
    strong, weak = [-1 * bits, -2 * bits], [-2 * bits, -3 * bits, -1 * bits]
    assert total(strong, weak) == pytest.approx(3 * bits)
    assert per_token(strong, weak) == pytest.approx(1.5 * bits)


def test_forms_when_a_response_is_repeated():
    """At a constant ratio the sum doubles with the length and the form per token stays; sums are additive over tokens."""
    strong, weak = [-1.0, -1.5], [-1.25, -1.75]
    assert per_token(strong * 2, weak * 2) == per_token(strong, weak) == 0.25
    assert total(strong * 2, weak * 2) == 2 * total(strong, weak)
    assert total(strong + [-3.0], weak + [-1.0]) == total(strong, weak) + total([-3.0], [-1.0])


# ----------------------------------------------------------------------------------------------------------------- models
def test_log_probabilities_are_those_of_transformers(place, strong):
    """Row by row without padding, log softmax at every response token and its end."""
    from transformers import AutoModelForCausalLM
    own, words = AutoModelForCausalLM.from_pretrained(place / "other").eval(), strong.models.tokenizer
    rows = rows_of(GROUPS)
    for row, values in zip(rows, strong(rows), strict=True):
        prompt, answer = words(row.prompt)["input_ids"], [*words(row.text)["input_ids"], words.eos_token_id]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logp = own(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        assert values == pytest.approx(logp[len(prompt) - 1:].tolist(), abs=1e-5)


def test_a_model_over_itself_is_zero(strong):
    assert DensityRatio(strong, strong)(rows_of(GROUPS)) == [0.0] * 4


def test_exchanging_the_models_changes_the_sign(strong, weak):
    rows = rows_of(GROUPS)
    found = DensityRatio(strong, weak)(rows)
    assert found == pytest.approx([-x for x in DensityRatio(weak, strong)(rows)]) and min(map(abs, found)) > 1e-3


def test_it_is_the_implicit_reward_over_beta(place):
    """Where the weak model is the reference that DPO started from."""
    rows = rows_of(GROUPS)
    implicit = load(str(place / "dpo"))(rows)
    found = density_ratio(str(place / "dpo"), str(place / "model"))(rows)
    assert found == pytest.approx([x / 0.25 for x in implicit], abs=1e-4) and max(map(abs, found)) > 1e-2


def test_tokens_chain(weak, strong):
    """A response in two halves: the second one's ratio is that behind the first."""
    plain = [likelihood(str(m.folder), encoding=Encoding(add_eos=False)) for m in (strong, weak)]
    def ratio(prompt, text):
        return DensityRatio(*plain)(rows_of([Group(prompt, [Response(text)])]))[0]
    assert ratio("w9 ", "w1 w2 w3") == pytest.approx(ratio("w9 ", "w1 ") + ratio("w9 w1 ", "w2 w3"), abs=1e-5)


def test_every_model_reads_with_its_own_tokenizer(place, tmp_path):
    """A weak model whose tokenizer cuts words into letters: sums are compared, not tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<eos>", "w", *"0123456789", " "])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    saved(tmp_path / "letters")
    PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>").save_pretrained(tmp_path / "letters")
    strong, weak = likelihood(str(place / "model")), likelihood(str(tmp_path / "letters"))
    rows = rows_of(GROUPS)
    a, b = strong(rows), weak(rows)
    assert [len(x) for x in a] == [3, 5, 2, 4] and [len(x) for x in b] == [6, 12, 3, 9]
    assert DensityRatio(strong, weak)(rows) == pytest.approx([math.fsum(x) - math.fsum(y) for x, y in zip(a, b, strict=True)])
    assert DensityRatio(strong, weak, per_token)(rows)[0] == pytest.approx((math.fsum(a[0]) - math.fsum(b[0])) / 3)


def test_one_pass_each(place):
    strong, weak = (likelihood(str(place / name)) for name in ("other", "model"))
    DensityRatio(strong, weak)(rows_of(GROUPS))
    for model in (strong, weak):
        calls = model.models.policy_model().calls
        assert calls["positions"] == 3 + 5 + 2 + 4 and calls["tokens"] <= 1.05 * (14 + 3 + 3 + 2 + 2 - 4)


@contextmanager
def serving(folder, places=32):
    """The address of a server that answers as vLLM does where a prompt's log-probabilities are asked for."""
    from transformers import AutoModelForCausalLM
    own = AutoModelForCausalLM.from_pretrained(folder).eval()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def say(self, content):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self):
            self.say({"data": [{"id": "own", "root": str(folder), "max_model_len": places}]})

        def do_POST(self):
            ids = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
            with torch.no_grad():
                logp = own(torch.tensor([ids])).logits[0].log_softmax(-1)
            told = [None, *({str(t): {"logprob": float(logp[k, t])}} for k, t in enumerate(ids[1:]))]
            self.say({"choices": [{"prompt_logprobs": told}]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_served_model_says_what_the_model_says(place, strong, weak):
    """By address in the place of a folder; what does not fit is marked, and a server that is gone ends the run."""
    rows = rows_of(GROUPS)
    with serving(place / "other") as url:
        found = density_ratio(url, str(place / "model"))
        assert found(rows) == pytest.approx(DensityRatio(strong, weak)(rows), abs=1e-5)
        assert found.settings()["strong"]["served"] == str(place / "other")
        served = found.strong
        assert [len(x) for x in served(rows)] == [3, 5, 2, 4]
    with serving(place / "other", places=6) as url:
        fits, *others = likelihood(url)(rows[:2])
        assert len(fits) == 3 and [str(e) for e in others] == [
            f"prompt and response have 7 tokens, and the server at {url} reads up to 5: start it with a larger --max-model-len"]
    with pytest.raises(RuntimeError, match="failed 1 times"):
        replace(served, server=gone(served.server))(rows)


def gone(server):
    server.retries = 0
    return server


# ---------------------------------------------------------------------------------------------------- domains and routing
def test_the_last_user_turn_is_customised():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    shown = customised(turns, Domain("Be safe.", ["Bad Assistant: x\nGood Assistant: y"]))
    assert shown[:2] == turns[:2]
    assert shown[2]["content"] == "Be safe.\nBad Assistant: x\nGood Assistant: y\nc\nGood Assistant:"
    assert customised("c", Domain()) == "c"
    with pytest.raises(ScoringError, match="no user turn"):
        customised([{"role": "system", "content": "a"}], Domain("b"))


def test_exemplars_are_drawn_by_content():
    """All blocks are drawn, about evenly, and a prompt always gets the same one."""
    domain = Domain(exemplars=["one", "two"])
    drawn = [customised(f"q{n}", domain).split("\n")[0] for n in range(400)]
    assert drawn == [customised(f"q{n}", domain).split("\n")[0] for n in range(400)]
    assert 150 < drawn.count("one") < 250
    assert drawn != [customised(f"q{n}", domain, seed=1).split("\n")[0] for n in range(400)]


@pytest.mark.parametrize(("reply", "domain"), [
    ("[START] SAFETY [END]", "SAFETY"), ("so: [START]\nREASONING\n[END] [START]SAFETY[END]", "REASONING"), ("SAFETY", "CHAT"),
    ("[START] safety [END]", "CHAT"), ("[END] SAFETY [START]", "CHAT"), ("", "CHAT"), ("[START] MUSIC [END]", "CHAT")])
def test_domains_of_replies(reply, domain):
    assert domain_of(reply) == domain


def test_the_router_asks_once_per_question(strong, weak):
    """Both models read what the domain says; a domain that is not given leaves the question as it is."""
    asked = []

    def ask(text):
        asked.append(text)
        return "[START] SAFETY [END]" if "w3 w4" in text else "no idea"

    seen = []

    def engine(rows):
        seen.append([row.prompt for row in rows])
        return [[-1.0, -2.0]] * len(rows)

    reward = DensityRatio(engine, weak, domains={"SAFETY": Domain("w20 w21")}, route=router(ask))
    found = reward(rows_of(GROUPS))
    assert len(asked) == 2 and all(name in asked[0] for name in DOMAINS)
    assert seen == [["w20 w21\nw3 w4 "] * 2 + ["w9 "] * 2]
    behind = weak(rows_of([Group("w20 w21\nw3 w4 ", GROUPS[0].responses)]))
    assert found[:2] == pytest.approx([-3.0 - math.fsum(x) for x in behind], abs=1e-4)
    assert GROUPS[0].prompt == "w3 w4 " and GROUPS[0].responses[0].prompt is None


def test_settings_say_what_a_score_depends_on(place, strong, weak):
    def other(domains=None, **changes):
        return json.dumps(DensityRatio(strong, weak, domains=domains or {}, **changes).settings(), sort_keys=True)
    seen = {other(), other({"CHAT": Domain("be kind")}), other({"CHAT": Domain(exemplars=["be kind"])}), other(form=per_token),
            other(seed=1), other(route=router(str)), json.dumps(DensityRatio(weak, strong).settings(), sort_keys=True)}
    assert len(seen) == 7
    assert DensityRatio(likelihood(str(place / "other")), weak).settings() == DensityRatio(strong, weak).settings()


# -------------------------------------------------------------------------------------------------------------- bad input
def test_rows_that_cannot_be_scored(strong, weak):
    groups = [Group("w3 ", [Response("w1"), Response("w1", prompt="w3 w4 w5 w6 ")])]
    score(groups, {"ratio": DensityRatio(replace(strong, encoding=Encoding(max_length=4)), weak)}, on_error="mark")
    assert "ratio" in groups[0].responses[0].scores
    assert "cannot read the response: " in groups[0].responses[1].meta["unscored"]["ratio"]
    empty = DensityRatio(lambda rows: [[]] * len(rows), lambda rows: [[-1.0]] * len(rows))
    assert "no token" in str(empty([Row(groups[0], groups[0].responses[0])])[0])


def test_settings_that_do_not_fit(place):
    with pytest.raises(ValueError, match="total or per_token, found 'per_tokens'.*per_token"):
        density_ratio("a", "b", form="per_tokens")
    with pytest.raises(ValueError, match="domains.CHAT.*'criteria'.*criterion"):
        density_ratio("a", "b", domains={"CHAT": {"criteria": "x"}})
