"""Responses for data sets: mixtures of policies, ladders, hints, files and services; what fails is tried again and told."""
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_tools import Group, Response, load, select
from data_tools.pipeline.config import make
from data_tools.pipeline.driver import build, recorded
from data_tools.pipeline.identity import content
from data_tools.pipeline.provenance import PROMPT_ID, marked
from prefopt import cli, doctor
from prefopt.rollout import generate
from prefopt.rollout.generate import Asked, Generate, Texts, tried
from rewards.stage import Score

CALLS: list = []


class Echo:
    """Answers with what it was asked; prompts with `bad` in them are an error, `flaky` ones at first, and `few` have one
    response."""

    def __init__(self, *, model="echo", broken: bool = False):
        self.broken, self.flaky = broken, Counter()

    def __call__(self, prompts, *, n, keys, temperature, **settings):
        CALLS.append([str(p) for p in prompts])
        for prompt in map(str, prompts):
            if "bad" in prompt or self.broken:
                raise RuntimeError(f"cannot answer {prompt}")
            if "flaky" in prompt and self.flaky[prompt] < 1:
                self.flaky[prompt] += 1
                raise TimeoutError("later") if "slow" in prompt else RuntimeError("later")
        return [Group(p, [Response(f"{temperature:g} {keys[i] % 1000} {j}", tokens=[1], logp=[-1.0], meta={"mask": [1]})
                          for j in range(1 if "few" in str(p) else n)]) for i, p in enumerate(prompts)]


@pytest.fixture(autouse=True)
def calls():
    CALLS.clear()


def groups(*prompts, **meta) -> list[Group]:
    return [marked(Group(p, [], meta=dict(meta)), 0, {}) for p in prompts]


def echo(**settings) -> dict:
    return {"sampler": {"test_generate:Echo": None}, **settings}


def answers(shard, seed=0, retries=2, **policies) -> list[Group]:
    return Generate(policies=policies, seed=seed, retries=retries)(shard)


# ---------------------------------------------------------------------------------------------------------- what is asked
def test_a_ladder_is_gone_through_in_turn():
    """Five responses over three temperatures and two system prompts: rounds of temperatures, each with one system prompt."""
    asked = Asked("p", echo(n=8, temperature=[0.5, 1.0, 1.5], system=[None, "Be brief."]), 0)
    assert asked.policy.variants() == {(0.5, None): 2, (1.0, None): 2, (1.5, None): 1, (0.5, "Be brief."): 1,
                                       (1.0, "Be brief."): 1, (1.5, "Be brief."): 1}
    found, = answers(groups("q"), p=echo(n=8, temperature=[0.5, 1.0, 1.5], system=[None, "Be brief."]))
    said = Counter((r.meta["sampled"]["temperature"], r.meta["sampled"].get("system")) for r in found.responses)
    assert said == asked.policy.variants()
    assert len({r.text for r in found.responses}) == 8        # each variant has noise of its own
    assert found.prompt == "q" and sorted(map(tuple, CALLS))[-1] == ("q",)
    system = str([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}])
    assert [system] in CALLS and ["q"] in CALLS


def test_hints_are_seen_and_not_kept():
    shard = groups("q", [{"role": "user", "content": "w"}], answer="4")
    first, second = answers(shard, p=echo(hint="It is {answer}.", tokens=True))
    assert [["q\n\nIt is 4.", str([{"role": "user", "content": "w\n\nIt is 4."}])]] == CALLS
    assert first.prompt == "q" and first.responses[0].meta["sampled"]["hint"] == "It is {answer}."
    assert first.responses[0].tokens == [1] and first.responses[0].logp is None     # of a prompt that is not the record's
    with pytest.raises(ValueError, match="the hint names the field 'anser', which the record lacks, did you mean 'answer'"):
        answers(shard, p=echo(hint="{anser}"))


def test_a_mixture_of_policies():
    shard = groups(*(f"q{n}" for n in range(400)))
    shard[0].responses = [Response("given", meta={"generator": "human"})]
    found = answers(shard, good=echo(n=2), poor=echo(n=1, temperature=3.0, share=0.3))
    assert [r.meta["generator"] for r in found[0].responses][:3] == ["human", "good", "good"]
    poor = [any(r.meta["generator"] == "poor" for r in g.responses) for g in found]
    assert abs(sum(poor) - 120) < 6 * (400 * 0.3 * 0.7) ** 0.5
    assert all(len(g.responses) == 2 + p for g, p in list(zip(found, poor, strict=True))[1:])
    again = answers(groups(*(f"q{n}" for n in range(100, 400))), poor=echo(share=0.3))
    assert [bool(g.responses) for g in again] == poor[100:]   # which prompts does not depend on the others


def test_provenance():
    found, = answers(groups("q"), seed=7, student=echo(n=1, temperature=0.5, top_p=0.9, max_new_tokens=5))
    meta = found.responses[0].meta
    assert meta == {"generator": "student", "sampled": {"max_new_tokens": 5, "temperature": 0.5, "seed": 7, "top_p": 0.9}}
    assert found.responses[0].tokens is None and found.responses[0].logp is None
    found, = answers(groups("q"), student=echo(tokens=True))
    assert (found.responses[0].tokens, found.responses[0].logp, found.responses[0].meta["mask"]) == ([1], [-1.0], [1])


def test_labels_have_room_for_what_is_new():
    shard = groups("q", "w")
    shard[0].responses, shard[0].relevance = [Response("a"), Response("b")], [1.0, 0.0]
    shard[1].responses, shard[1].wins = [Response("a"), Response("b")], [[0.5, 0.9], [0.1, 0.5]]
    one, two = answers(shard, p=echo(n=1))
    assert one.relevance == [1.0, 0.0, None]
    assert two.wins == [[0.5, 0.9, None], [0.1, 0.5, None], [None, None, None]]


def test_equal_prompts_are_sampled_apart():
    shard = [marked(Group("q", []), copies, {}) for copies in (0, 1)]
    one, two = answers(shard, p=echo())
    assert one.responses[0].text != two.responses[0].text
    said = Texts(echo(), seed=0)(["q", "w", "q"])
    assert len(set(said)) == 3 and Texts(echo(), seed=0)(["w"]) == [said[1]]


# -------------------------------------------------------------------------------------------------------- what goes wrong
def test_a_prompt_that_fails_is_found_tried_again_and_told():
    shard = groups("a", "b", "bad", "flaky", "c")
    found = answers(shard, p=echo(n=2))
    assert [len(g.responses) for g in found] == [2, 2, 0, 2, 2]
    assert found[2].meta["failed"] == "p: RuntimeError: cannot answer bad"
    assert all("failed" not in found[n].meta for n in (0, 1, 3, 4))
    assert sum(call == ["bad"] for call in CALLS) == 3        # once when it is found, and twice more
    stage = Generate(policies={"p": echo(n=2)})
    assert stage.told(stage.count(found)) == ["1 prompts lack responses of p: ask again with --resume --retry",
                                              "8 responses of p"]


def test_what_is_missing_of_one_policy_is_noted():
    found = answers(groups("few", "bad few"), p=echo(n=3), q={"sampler": {"recorded": {"path": write("few", 1)}}, "n": 2})
    assert found[0].meta["unsampled"] == {"p": "it gave 1 of 3 responses", "q": "it gave 1 of 2 responses"}
    assert len(found[0].responses) == 2
    assert set(found[1].meta["unsampled"]) == {"p", "q"}
    assert found[1].meta["failed"].startswith("p: RuntimeError: cannot answer bad")


def test_tries_by_hand():
    """Against a table: how often each place is asked, where 3 and 4 fail; a batch that fails is halved."""
    asked = []

    def ask(places):
        asked.append(list(places))
        if {3, 4} & set(places):
            raise RuntimeError("no")
        return list(places)

    found = tried(ask, range(6), 1)
    assert [x if isinstance(x, int) else str(x) for x in found] == [0, 1, 2, "no", "no", 5]
    assert asked == [[0, 1, 2, 3, 4, 5], [0, 1, 2], [3, 4, 5], [3], [3], [4, 5], [4], [4], [5]]


def test_a_broken_sampler_ends_the_build():
    with pytest.raises(ValueError, match="failed on each of the first 8 prompts, the last time with cannot answer q7"):
        answers(groups(*(f"q{n}" for n in range(20))), p={"sampler": {"test_generate:Echo": {"broken": True}}})
    assert answers(groups("q"), p={"sampler": {"test_generate:Echo": {"broken": True}}})[0].meta["failed"]


def test_what_cannot_be_reached_ends_the_build():
    with pytest.raises(OSError, match="later"):
        answers(groups("a", "flaky slow"), p=echo())


@pytest.mark.parametrize("policies, said", [
    ({}, "policies has names"), ({"p": 3}, "policy 'p' needs a sampler"), ({"p": {"n": 2}}, "policy 'p' needs a sampler"),
    ({"p": echo(m=3)}, "has no argument 'm'"), ({"p": echo(n=0)}, "a whole number from 1, found 0"),
    ({"p": echo(share=0)}, "above 0 and at most 1"),
    ({"p": echo(temperature=[1.0, -1])}, "temperature should be a number from 0"),
    ({"p": echo(stop=[""])}, "stop should be a list of strings that are not empty"),
    ({"p": {"sampler": "transformers"}}, "policy 'p': write a sampler with its settings"),
    ({"p": {"sampler": {"transfomers": {}}}}, "policy 'p': there is no sampler 'transfomers', did you mean 'transformers'?"),
    ({"p": {"sampler": {"transformers": {"modl": "x"}}}}, "has no setting 'modl', did you mean 'model'"),
    ({"p": {"sampler": {"transformers": {"model": "./no/model"}}}}, "there is no folder './no/model'"),
    ({"p": {"sampler": {"transformers": {}}}}, "needs model"),
    ({"p": echo(program="singel")}, "did you mean 'single'")])
def test_mistakes(policies, said):
    with pytest.raises(ValueError) as found:
        Generate(policies=policies)
    assert said in str(found.value)


# ---------------------------------------------------------------------------------------------------- recorded responses
def write(prompt: str, n: int, name: str = "recorded.jsonl") -> str:
    Path(name).write_text(json.dumps({"prompt": prompt, "responses": [{"text": f"r{j}", "meta": {"generator": f"g{j}"}}
                                                                     for j in range(n)]}) + "\n")
    return name


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_recorded_responses_are_found_by_what_the_prompt_says():
    path = write("What  IS it?", 3)
    found = answers(groups("what is it?", "other"), old={"sampler": {"recorded": {"path": path}}, "n": 2})
    assert [r.text for r in found[0].responses] == ["r0", "r1"] and found[0].responses[1].meta == {
        "generator": "g1", "sampled": {"path": path}}
    assert found[1].meta["failed"] == "old: it gave 0 of 2 responses"


# ---------------------------------------------------------------------------------------------------------------- service
class Service:
    """Answers chat requests with `say(body)`: (status, text or None). Status 0 is a connection that is cut in the middle of the
    answer; a text in bytes is the whole answer."""

    def __init__(self, say, port=0):
        outer = self
        self.bodies = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                status, text = say(body)
                said = "" if isinstance(text, bytes) else text
                choice = {"message": {"content": said}, "finish_reason": "length" if text == "cut" else "stop"}
                raw = text if isinstance(text, bytes) else json.dumps({"choices": [choice]}).encode()
                self.send_response(status or 200)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw if status else raw[:9])

            def log_message(self, *_):
                pass
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def served(service, **settings) -> dict:
    return {"sampler": {"endpoint": {"url": service.url, "model": "m", "wait": 0.01, "retries": 0}}, **settings}


def test_a_service_is_asked_once_for_each_response():
    with Service(lambda body: (200, "cut" if body["messages"][-1]["content"] == "long" else f"{body['seed']}")) as service:
        first, second = answers(groups("q", "long"), p=served(service, n=3, temperature=0.7, max_new_tokens=9, system="S"))
        assert len(service.bodies) == 6 and len({r.text for r in first.responses}) == 3
        body = service.bodies[0]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.7, 9) and "stop" not in body
        assert body["messages"][0] == {"role": "system", "content": "S"}
        assert {r.meta["finished"] for r in first.responses} == {True} and not second.responses[0].meta["finished"]
        assert first.responses[0].meta["sampled"]["model"] == "m"
        again, = answers(groups("q"), p=served(service, n=3, temperature=0.7, max_new_tokens=9, system="S"))
        assert [r.text for r in again.responses] == [r.text for r in first.responses]


def test_a_service_that_refuses_some_prompts():
    """The others are not asked again; a refused prompt is, and then told. Text that is missing is such an error."""
    with Service(lambda body: (400, "") if "bad" in body["messages"][0]["content"] else
                 (200, None if "mute" in body["messages"][0]["content"] else "fine")) as service:
        found = answers(groups("a", "bad", "mute", "b"), p=served(service, n=2), retries=1)
        assert [len(g.responses) for g in found] == [2, 0, 0, 2]
        assert "refused the request: HTTP 400" in found[1].meta["failed"] and "without text" in found[2].meta["failed"]
        asked = Counter(b["messages"][0]["content"] for b in service.bodies)
        assert asked == {"a": 2, "b": 2, "bad": 4, "mute": 4}


def test_a_service_that_is_down_ends_the_build():
    with pytest.raises(ConnectionError, match="cannot be used"):
        answers(groups("a", "b"), p={"sampler": {"endpoint": {"url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}}})


RESPONSE = re.compile(r"<response_[ab]>\n(.*?)\n</response_[ab]>", re.DOTALL)


class Faulty:
    """What a service says: responses of 1 to 3 words, and to a judge that the longer one is better. It answers nothing to `mute`
    and no JSON to `broken`, and a judge that is shown `odd` always says A. With `faults` every request fails at first, by turns
    with 429, 500 and a cut connection; with `dies` the service is gone from that request on."""

    def __init__(self, faults: bool, dies: int = 10**9):
        self.faults, self.dies, self.seen, self.judged, self.lock = faults, dies, Counter(), 0, threading.Lock()

    def __call__(self, body):
        asked = body["messages"][-1]["content"]
        texts = RESPONSE.findall(asked)
        with self.lock:
            self.seen[name := json.dumps(body)] += 1
            self.judged += bool(texts)
            turn = len(self.seen) % 3
            if self.judged == self.dies:
                threading.Thread(target=self.service.__exit__).start()
            if self.judged >= self.dies:
                return 0, "gone"
            if self.faults and self.seen[name] == 1:
                return (0, 429, 500)[turn], "later"
        if texts:
            first, second = (len(t.split()) for t in texts)
            if "broken" in asked and {first, second} == {1, 3}:
                return 200, b"{"
            return 200, "Both are fine. [[A]]" if "odd" in asked or first > second else "[[B]]" if second > first else "[[C]]"
        if "mute" in asked:
            return 200, None
        return 200, " ".join(["word"] * (1 + body["seed"] % 3))


def test_a_service_samples_and_judges_in_one_pipeline_and_dies_in_the_middle():
    """Over sockets. Each request fails once, the service dies while it judges, another one goes on at its address: the bytes of a
    build with a sound service, and what was committed is not asked again."""
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (
        "one", "two", "mute", "odd", "broken", "three", "four", "five")))

    def run(out, cache, port, *more):
        service = {"url": f"http://127.0.0.1:{port}/v1", "model": "m", "wait": 0.01, "retries": 3, "concurrency": 1}
        Path("build.yaml").write_text(json.dumps({"source": "prompts.jsonl", "out": out, "cache": cache, "shard": 2, "stages": [
            {"generate": {"policies": {"p": {"sampler": {"endpoint": service}, "n": 4}}, "retries": 0}}, {"select": "distinct"},
            {"score": {"rewards": [{"judge": service}], "unscored": "mark"}}, {"write": {"name": "judged"}},
            {"select": ["scored", "best_worst"]}, {"write": {"name": "pairs", "format": "pair"}}]}))
        result = CliRunner().invoke(cli.app, ["data", "build", "build.yaml", *more], env={"COLUMNS": "100"})
        return result.exit_code, " ".join(result.output.split())

    say = Faulty(faults=True, dies=30)
    with Service(say) as say.service:
        port = say.service.port
        code, said = run("one", "cache", port)
    assert code == 2 and "stage 'score'" in said and "cannot be used: 4 attempts" in said
    with Service(say := Faulty(faults=True), port) as service:
        code, said = run("one", "cache", port, "--resume")
        again = [b for b in service.bodies if "response_a" not in b["messages"][-1]["content"]]
    assert code == 1 and "1 groups failed" in said and not again                       # nothing is sampled twice
    with Service(sound := Faulty(faults=False), port):
        assert run("two", "other", port)[0] == 1
    for name in ("judged/train.jsonl", "pairs/train.jsonl", "failed.jsonl"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    assert 0 < len(say.seen) < sum("response_a" in body for body in sound.seen)        # nor is all judged twice
    assert "without text" in Path("one/failed.jsonl").read_text()
    groups = {g.prompt: g for g in load("one/judged/train.jsonl")}
    for prompt, group in groups.items():
        size = [len(r.text.split()) for r in group.responses]
        wins = [[None if prompt == "broken" and {a, b} == {1, 3} else 0.5 if prompt == "odd" or a == b else float(a > b)
                 for b in size] for a in size]
        assert group.wins == wins
    assert len(groups) == 7 and "1 of 21 pairs have no verdict" in said
    for pair in load("one/pairs/train.jsonl"):
        assert pair.prompt != "odd" and len(pair.responses[0].text) > len(pair.responses[1].text)


# ------------------------------------------------------------------------------------------------------------ a real model
@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return doctor.tiny(tmp_path_factory.mktemp("model") / "tiny")


def real(model, **settings) -> dict:
    return {"sampler": {"transformers": {"model": model}}, "max_new_tokens": 6, **settings}


def test_samples_depend_on_nothing_but_their_prompt(model):
    shard = ["? ?", "? ? ?", "good"]
    policies = {"p": real(model, n=3, temperature=[0.7, 1.3]), "q": real(model, n=2)}
    together = answers(groups(*shard), **policies)
    apart = [answers(groups(p), **policies)[0] for p in reversed(shard)][::-1]
    assert [[r.text for r in g.responses] for g in together] == [[r.text for r in g.responses] for g in apart]
    alone = answers(groups(*shard), q=policies["q"])
    assert [[r.text for r in g.responses[3:]] for g in together] == [[r.text for r in g.responses] for g in alone]
    other = answers(groups(*shard), seed=1, **policies)
    assert [[r.text for r in g.responses] for g in together] != [[r.text for r in g.responses] for g in other]
    version = together[0].responses[0].meta["sampled"]["version"]
    assert version == content(model)[:16]


def test_what_is_sampled_is_what_the_sampler_gives(model):
    """Greedy: against the embedded sampler itself."""
    from prefopt.models import load_policy, load_tokenizer
    from prefopt.rollout.transformers import Sampler
    shard = ["? ?", "good"]
    expected = Sampler(load_policy(model).eval(), load_tokenizer(model))(shard, n=1, temperature=0.0, max_new_tokens=6)
    found = answers(groups(*shard), p=real(model, temperature=0.0, tokens=True))
    for one, two in zip(found, expected, strict=True):
        assert [(r.text, r.tokens, r.logp) for r in one.responses] == [(r.text, r.tokens, r.logp) for r in two.responses]


def test_the_version_of_a_model_of_the_hub(tmp_path, monkeypatch):
    """The commit that its name stood for when it was fetched; nothing is asked of the hub."""
    import huggingface_hub.constants
    home = tmp_path / "models--me--model"
    (home / "snapshots" / "abc123").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc123")
    (home / "snapshots" / "abc123" / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    named = lambda **more: Asked("p", {"sampler": {"transformers": {"model": "me/model", **more}}}, 0).label
    assert named() == {"model": "me/model", "version": "abc123"} and named(revision="v2")["version"] == "v2"
    served = Asked("p", {"sampler": {"endpoint": {"url": "http://x/v1", "model": "me/model"}}}, 0)
    assert served.label == {"model": "me/model"}


def test_a_pipeline_that_samples_scores_and_pairs(model, tmp_path):
    """The whole way, twice: byte for byte; another model's weights are another policy."""
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": "? " * (n + 1)}) + "\n" for n in range(6)))

    def plan(out, **more):
        return make({"source": "prompts.jsonl", "out": out, "cache": more.pop("cache", "cache"), "shard": 4, "stages": [
            {"generate": {"policies": {"p": real(model, n=4)}}}, {"score": {"rewards": ["test_generate:shortness"]}},
            {"select": {"best_worst": {"score": "reward"}}}, {"write": {"name": "pairs", "format": "pair"}}], **more})

    found = build(plan("one"))
    build(plan("two", cache="other"))
    assert Path("one/pairs/train.jsonl").read_bytes() == Path("two/pairs/train.jsonl").read_bytes()
    record = json.loads(Path("one/pairs/train.jsonl").read_text().splitlines()[0])
    assert record["scored_by"] == {"shortness": {"reward": "test_generate:shortness"}}
    assert record["sampled_chosen"]["version"] and record["shortness_chosen"] > record["shortness_rejected"]
    assert [s.name for s in found.steps] == ["source", "generate", "score", "select: best_worst", "write"]
    assert any("shortness: mean" in line for line in found.steps[2].said)
    before = recorded(plan("one"))["stages"][0]
    (Path(model) / "note.txt").write_text("x")
    assert recorded(plan("one"))["stages"][0] != before


class Timed(Echo):
    """Takes its time, so that somebody can come between."""

    def __call__(self, prompts, **settings):
        time.sleep(0.05)
        return super().__call__(prompts, **settings)


@pytest.mark.parametrize("sampler", ["timed", pytest.param("model", marks=pytest.mark.slow)])
def test_killed_while_sampling(sampler, request):
    """Killed (SIGKILL) among its shards and resumed: the bytes of a build that was left alone, and no shard sampled again."""
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": "? " * (n + 1)}) + "\n" for n in range(8)))
    policy = {"sampler": {"test_generate:Timed": None}, "n": 2} if sampler == "timed" else \
        real(str(Path(request.getfixturevalue("model")).resolve()), n=2, max_new_tokens=150)
    spec = {"source": "prompts.jsonl", "out": "one", "cache": "cache", "shard": 1, "stages": [{"generate": {"policies": {
        "p": policy}}}, {"write": {"name": "all"}}]}
    child = os.fork()
    if not child:
        try:
            build(make(spec))
        finally:
            os._exit(0)
    made = lambda: {p: p.stat().st_mtime_ns for p in Path("cache/made").rglob("*.json")}
    while len(made()) < 3 and not os.waitpid(child, os.WNOHANG)[0]:                    # the source and two shards
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    before = made()
    assert 3 <= len(before) < 9
    found = build(make(spec), resume=True)
    assert found.steps[1].reused == len(before) - 1 and {p: t for p, t in made().items() if p in before} == before
    build(make({**spec, "out": "two", "cache": "other"}))
    for name in ("all/train.jsonl", "build.json"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


def test_what_one_policy_of_two_lacks_is_told_and_asked_again(tmp_path, monkeypatch):
    """The groups go on with what they have."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("a", "b bad", "c")))

    def once(**more):
        return build(make({"source": "prompts.jsonl", "out": "out", "cache": "cache", "shard": 2, "stages": [{"generate": {
            "policies": {"p": echo(), "q": {"sampler": {"test_generate:Steady": None}}}}}]}), **more)

    said = once().steps[1].said
    assert said[0].startswith("prompts.jsonl:2: p: RuntimeError: cannot answer b bad")
    assert "1 prompts lack responses of p: ask again with --resume --retry" in said
    CALLS.clear()
    assert once(resume=True).steps[1].said == said and CALLS == []
    monkeypatch.setattr(Echo, "__call__", Steady.__call__)
    found = once(resume=True, retry=True)
    assert [sorted(call) for call in CALLS] == [["a", "b bad"]] * 2 and not any("lack" in line for line in found.steps[1].said)


def test_what_an_earlier_stage_lacked_stays_told():
    """Until the same policy is asked again."""
    first = Generate(policies={"p": echo(n=3)})(groups("few"))
    both = Generate(policies={"q": echo(n=2)})(first)
    assert set(both[0].meta["unsampled"]) == {"p", "q"}
    again = Generate(policies={"p": {"sampler": {"test_generate:Steady": None}}})
    assert again.lacking(both) == [f"{both[0].meta[PROMPT_ID]}: p: it gave 1 of 3 responses"]
    assert set(again(both)[0].meta["unsampled"]) == {"q"}


class Steady(Echo):
    def __call__(self, prompts, *, n, **settings):
        CALLS.append([str(p) for p in prompts])
        return [Group(p, [Response(f"{j}") for j in range(n)]) for p in prompts]


def shortness(text) -> float:
    return -float(len(text))


# ---------------------------------------------------------------------------------------------------------------- scores
def scored(**settings) -> list[Group]:
    shard = [Group("q", [Response("a b", meta={"x": 1}), Response("a", meta={"x": 2}), Response("b")], meta={PROMPT_ID: "0"}),
             Group("w", [Response("a"), Response("a")], meta={PROMPT_ID: "1"})]
    return Score(**settings)(shard)


def places(x) -> float:
    return float(x)


def test_scores_and_what_is_told_of_them():
    """shortness is -3, -1, -1 and -1, -1; letters 2, 1, 1 and 1, 1 (half of it in the sum): they order two pairs, none alike."""
    stage = Score(rewards=["test_generate:shortness", {"test_generate:letters": {"weight": 0.5, "as": "letters"}}])
    found = stage([Group("q", [Response("a b"), Response("a"), Response("b")]), Group("w", [Response("a"), Response("a")])])
    assert [[r.scores for r in g.responses] for g in found][0] == [
        {"shortness": -3.0, "letters": 2.0, "reward": -2.0}, *[{"shortness": -1.0, "letters": 1.0, "reward": -0.5}] * 2]
    counts = stage.count(found)
    assert counts["scored shortness"] == 5 and counts["sum shortness"] == -7 and counts["flat shortness"] == 1
    assert counts["ordered shortness and letters"] == 2 and counts["alike shortness and letters"] == 0
    assert stage.told(counts) == ["letters: mean 1.2 of 5 responses; all responses are equal in 1 of 2 groups",
                                  "shortness: mean -1.4 of 5 responses; all responses are equal in 1 of 2 groups",
                                  "shortness and letters order 0.0% of 2 pairs of responses alike"]
    assert found[0].meta["scored_by"]["letters"] == {"reward": "test_generate:letters", "weight": 0.5}


def letters(text) -> float:
    return float(sum(c.isalpha() for c in text))


def test_responses_that_cannot_be_scored():
    with pytest.raises(ValueError, match="reads the field 'x', which the row lacks"):
        scored(rewards="test_generate:places")
    found = scored(rewards="test_generate:places", unscored="mark")
    assert len(select.scored(found[0])[0].responses) == 2     # the sum is missing for a known reason
    assert found[0].responses[2].meta["unscored"]["reward"].startswith("places: ")
    assert [r.scores.get("reward") for r in found[0].responses] == [1.0, 2.0, None]
    assert "places" in found[0].responses[2].meta["unscored"]
    stage = Score(rewards="test_generate:places", unscored="mark")
    assert stage.told(stage.count(found)) == ["places: mean 1.5 of 2 responses, 3 without a score"]


def test_mistakes_of_rewards_are_told_before_anything_runs():
    with pytest.raises(ValueError, match="there is no reward 'final_anser', did you mean 'final_answer'"):
        Score(rewards=["final_anser"]).identity()
    with pytest.raises(ValueError, match="test_generate has no 'shortnes', did you mean 'shortness'"):
        Score(rewards=["test_generate:shortnes"]).identity()
    with pytest.raises(ValueError, match="reward 'bleu' has no argument 'ordr', did you mean 'order'"):
        Score(rewards={"bleu": {"ordr": 2, "weight": 0.5, "as": "overlap"}}).identity()
    with pytest.raises(ValueError, match="'raise' or 'mark'"):
        Score(rewards="bleu", unscored="skip")
    assert set(Score(rewards={"weighted": {"parts": {"bleu": None}, "weights": {"bleu": 1}}}).identity()) == {"weighted", "bleu"}


def test_the_samplers_of_engines(monkeypatch):
    """What is handed on to vLLM."""
    import prefopt.models
    import prefopt.rollout.vllm
    made = []
    monkeypatch.setattr(prefopt.models, "load_tokenizer", lambda name: f"tokenizer of {name}")
    monkeypatch.setattr(prefopt.rollout.vllm, "VLLMSampler", lambda *a, **k: made.append((a, k)))
    monkeypatch.setattr(prefopt.rollout.vllm, "VLLMServer", lambda *a, **k: made.append((a, k)))
    generate.vllm(model="m", dtype="float32", engine={"max_model_len": 9})
    generate.vllm_server(url="u", model="m")
    assert made == [(("m", "tokenizer of m"), {"dtype": "float32", "max_model_len": 9}),
                    (("u", "tokenizer of m"), {"workers": 64, "timeout": 600.0})]
