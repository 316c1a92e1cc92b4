"""The HTTP service and its clients."""
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_tools.records import Group, Response
from rewards.base import ScoringError, Unreachable, score
from rewards.index import find
from rewards.overlap import rouge_1
from rewards.serve import Remote, RemoteComparison, Server, remote
from rewards.web import post

ROOT = Path(__file__).parents[1]


def size(text):
    return len(text)


def picky(text):
    if text == "bad":
        raise RuntimeError("boom")
    return 1.0


class Longer:
    name = "longer"

    def settings(self):
        return {"kind": "test"}

    def compare(self, groups):
        return [[[0.5 if i == j else float(len(a.text) > len(b.text)) for j, b in enumerate(g.responses)]
                 for i, a in enumerate(g.responses)] for g in groups]


@contextmanager
def serving(*rewards, **settings):
    with Server(rewards, **settings) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, body, path="/score", raw=None):
    """(status, answer) of a POST."""
    request = urllib.request.Request(server.url + path, raw if raw is not None else json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_prompts_and_completions_with_columns():
    with serving(size, rouge_1) as server:
        body = {"prompts": ["a", "a", "b"], "completions": ["x y", "x", "z"], "reference": ["x", "x", "z w"]}
        assert ask(server, body) == (200, {"scores": {"size": [3.0, 1.0, 1.0], "rouge_1": [2 / 3, 1.0, 2 / 3]}})
        assert ask(server, {**body, "rewards": ["size"]}) == (200, {"scores": {"size": [3.0, 1.0, 1.0]}})
        talk = {"prompts": [[{"role": "user", "content": "q"}]], "completions": [[{"role": "assistant", "content": "four"}]],
                "rewards": ["size"]}
        assert ask(server, talk) == (200, {"scores": {"size": [4.0]}})
        assert ask(server, {"prompts": [], "completions": [], "rewards": ["size"]}) == (200, {"scores": {"size": []}})


def test_groups_and_wins():
    with serving(size, Longer()) as server:
        groups = [Group("q", [Response("a"), Response("bbb"), Response("cc")]).to_json(),
                  {"prompt": "p", "responses": ["x", "yy"]}]
        status, found = ask(server, {"groups": groups})
        assert status == 200
        assert found["scores"] == {"size": [[1.0, 3.0, 2.0], [1.0, 2.0]], "longer": [[0.0, 1.0, 0.5], [0.0, 1.0]]}
        assert found["wins"] == {"longer": [[[0.5, 0, 0], [1, 0.5, 1], [1, 0, 0.5]], [[0.5, 0], [1, 0.5]]]}


def test_health_and_the_list():
    with serving(size, Longer()) as server:
        assert post(server.url + "/health", None) == {"status": "ok"}
        assert post(server.url + "/rewards", None) == {"rewards": [
            {"name": "size", "kind": "reward", "settings": {}},
            {"name": "longer", "kind": "comparison", "settings": {"kind": "test"}}]}


@pytest.mark.parametrize("body, status, message", [
    ([], 400, "should be an object"), ({}, 400, "'prompts' and 'completions'"),
    ({"prompts": ["a"], "completions": ["b", "c"]}, 400, "prompts 1, completions 2"),
    ({"prompts": "a", "completions": ["b"]}, 400, "prompts no list"),
    ({"prompts": ["a"], "completions": ["b"], "reference": "x"}, 400, "reference no list"),
    ({"prompts": [1], "completions": ["b"]}, 400, "prompts, entry 1.*found 1"),
    ({"prompts": ["a"], "completions": [["b"]]}, 400, "completions, entry 1"),
    ({"prompts": ["a"], "completions": ["b"], "rewards": ["sise"]}, 400, "did you mean 'size'"),
    ({"prompts": ["a"], "completions": ["b"], "rewards": "size"}, 400, "list of names"),
    ({"prompts": ["a"], "completions": ["b"], "on_error": "zero"}, 400, "'raise' or 'mark'"),
    ({"groups": [{"prompt": "a"}]}, 400, "groups, entry 1.*'responses' is missing"), ({"groups": [3]}, 400, "groups, entry 1"),
    ({"groups": [{"prompt": "a", "responses": [{"txt": "b"}]}]}, 400, "groups, entry 1.*'text'"),
    ({"groups": [], "prompts": []}, 400, "stands alone"),
    ({"prompts": ["a"], "completions": ["bad"]}, 500, "group 1: response 1.*picky.*boom")])
def test_wrong_requests_say_what_is_wrong(body, status, message):
    import re
    with serving(size, picky) as server:
        found, answer = ask(server, body)
        assert found == status and re.search(message, answer["error"]), answer


def test_rows_can_be_marked():
    with serving(picky) as server:
        assert ask(server, {"prompts": ["a", "a"], "completions": ["good", "bad"], "on_error": "mark"}) == (200, {
            "scores": {"picky": [1.0, None]}, "unscored": {"picky": [None, "RuntimeError: boom"]}})


def test_transport_errors():
    with serving(size, limit=1000) as server:
        assert ask(server, None, raw=b"{nothing")[0] == 400
        status, found = ask(server, None, raw=b"x" * 2000)
        assert status == 413 and "2,000 bytes" in found["error"]
        assert ask(server, {}, path="/scores")[0] == 404
        connection = http.client.HTTPConnection(*server.server_address)
        connection.putrequest("POST", "/score")
        connection.endheaders()
        assert connection.getresponse().status == 411
        with pytest.raises(ScoringError, match="HTTP 404.*no /nothing"):
            post(server.url + "/nothing", None)
        assert ask(server, {"prompts": ["a"], "completions": ["b"]})[0] == 200           # it is still there


def test_a_remote_reward_is_the_reward():
    with serving(size, picky, Longer()) as server:
        groups = [Group("q", [Response("a"), Response("bad")]), Group([{"role": "user", "content": "p"}], [Response("cc")])]
        found = score(groups, [find({"remote": {"url": server.url, "name": n}}) for n in ("size", "picky")], on_error="mark")
        assert [[r.scores for r in g.responses] for g in found] == [[{"size": 1.0, "picky": 1.0}, {"size": 3.0}],
                                                                    [{"size": 2.0, "picky": 1.0}]]
        assert "boom" in groups[0].responses[1].meta["unscored"]["picky"]
        judge = remote(url=server.url, name="longer")
        assert isinstance(judge, RemoteComparison) and judge.compare(groups[:1]) == Longer().compare(groups[:1])
        with pytest.raises(ValueError, match="did you mean 'picky'"):
            remote(url=server.url, name="pickie")
        with pytest.raises(ScoringError, match="400.*no reward 'x'"):
            Remote(server.url, "x")(score([Group("q", [])], {}) and [])
    with pytest.raises(Unreachable, match="2 attempts"):
        score(groups, [Remote(server.url, "size", retries=1, wait=0.01)], on_error="mark")


def test_a_remote_comparison_that_fails_is_an_error_of_its_group():
    class Fussy(Longer):
        def compare(self, groups):
            if any(r.text == "bad" for g in groups for r in g.responses):
                raise RuntimeError("boom")
            return super().compare(groups)
    with serving(Fussy()) as server:
        found = score([Group("q", [Response("a"), Response("bb")]), Group("q", [Response("bad"), Response("b")])],
                      [remote(url=server.url, name="longer")], on_error="mark")
    assert [r.scores for r in found[0].responses] == [{"longer": 0.0}, {"longer": 1.0}] and found[0].wins == [[0.5, 0], [1, 0.5]]
    assert all("boom" in r.meta["unscored"]["longer"] for r in found[1].responses) and found[1].wins is None


def test_one_reward_computes_one_request_at_a_time_and_others_go_on():
    busy, most, lock = [], [], threading.Lock()
    class Slow:
        name = "slow"
        def settings(self): return {}
        def __call__(self, rows):
            with lock:
                busy.append(1)
                most.append(len(busy))
            time.sleep(0.05)
            with lock:
                busy.pop()
            return [1.0] * len(rows)
    with serving(Slow(), size) as server:
        body = {"prompts": ["a"], "completions": ["b"], "rewards": ["slow"]}
        threads = [threading.Thread(target=ask, args=(server, body)) for _ in range(6)]
        for t in threads:
            t.start()
        assert ask(server, {**body, "rewards": ["size"]})[0] == 200 and most and len(most) < 6
        for t in threads:
            t.join()
    assert max(most) == 1 and len(most) == 6


def test_a_stopped_server_finishes_what_is_under_way():
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from rewards.serve import serve
def slow(text):
    time.sleep(1)
    return len(text)
serve([slow], port=0, ready=lambda url: print(url, flush=True))
print("closed", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        found = []
        thread = threading.Thread(target=lambda: found.append(post(url + "/score", {"prompts": ["a"], "completions": ["four"]})))
        thread.start()
        time.sleep(0.4)
        begun = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        thread.join(10)
        out, err = process.communicate(timeout=10)
        assert found == [{"scores": {"slow": [4.0]}}] and out == "closed\n" and err == "" and process.returncode == 0
        assert time.monotonic() - begun < 30
    finally:
        process.kill()
