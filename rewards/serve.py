"""Rewards behind HTTP, with the standard library: a server for other trainers, and clients for it.

POST /score     {"groups": [...]} -> {"scores": {reward: [[score of each response] of each group]}, "wins": {...}}, or
                {"prompts": [...], "completions": [...], column: [...]} -> {"scores": {reward: [score of each completion]}}.
                "rewards": [names] asks for some of them; "on_error": "mark" gives null and the reason under "unscored"
GET /health     {"status": "ok"}
GET /rewards    names, kinds and settings

Wrong requests are 400 and say what is wrong, rows that cannot be scored are 500 and say which row.
"""
from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data_tools.columns import nearest
from data_tools.fields import DataError, shorten
from data_tools.records import Group
from data_tools.shapes import group as read_group
from rewards.base import Comparison, Reward, Row, ScoringError, as_reward, score
from rewards.trl import groups_of
from rewards.web import PASSING, post

__all__ = ["Remote", "RemoteComparison", "Server", "remote", "serve"]


class Wrong(ValueError):
    """A request that cannot be answered, with its HTTP status."""

    def __init__(self, problem: str, status: int = 400):
        super().__init__(problem)
        self.status = status


# -------------------------------------------------------------------------------------------------------------- requests
def answer(request: object, rewards: Mapping[str, Reward | Comparison], locks: Mapping[str, threading.Lock]) -> dict:
    """The answer to the body of POST /score."""
    if not isinstance(request, dict):
        raise Wrong(f"the body should be an object, found {shorten(request)}")
    body = dict(request)
    names, on_error = body.pop("rewards", list(rewards)), body.pop("on_error", "raise")
    if not isinstance(names, list) or on_error not in ("raise", "mark"):
        raise Wrong(f"'rewards' is a list of names and 'on_error' is 'raise' or 'mark', found {shorten(names)} and "
                    f"{shorten(on_error)}")
    for name in names:
        if name not in rewards:
            raise Wrong(f"there is no reward {name!r}{nearest(name, rewards)}; rewards: {', '.join(rewards)}")
    groups = groups_asked(body)
    for name in names:
        with locks[name]:
            score(groups, {name: rewards[name]}, on_error=on_error)
    return answered(groups, {name: rewards[name] for name in names}, "groups" in body)


def groups_asked(body: dict) -> list[Group]:
    if "groups" in body:
        if len(body) > 1 or not isinstance(body["groups"], list):
            raise Wrong(f"'groups' is a list and stands alone with 'rewards' and 'on_error', found {shorten(body['groups'])} "
                        f"with {', '.join(k for k in body if k != 'groups') or 'nothing'}")
        return [numbered(record, n) for n, record in enumerate(body["groups"], 1)]
    if not {"prompts", "completions"} <= body.keys():
        raise Wrong(f"the body needs 'groups', or 'prompts' and 'completions'; keys found: {', '.join(body) or 'none'}")
    sizes = {name: len(column) if isinstance(column, list) else None for name, column in body.items()}
    if set(sizes.values()) != {sizes["prompts"]} or sizes["prompts"] is None:
        raise Wrong("prompts, completions and all columns should be lists of the same length, found "
                    + ", ".join(f"{name} {'no list' if n is None else n}" for name, n in sizes.items()))
    for name in ("prompts", "completions"):
        for n, value in enumerate(body[name], 1):
            if not isinstance(value, (str, list)) or isinstance(value, list) and not all(isinstance(m, dict) for m in value):
                raise Wrong(f"{name}, entry {n}: expected text or a list of messages, found {shorten(value)}")
    return groups_of(**body)


def numbered(record: object, n: int) -> Group:
    try:
        found = read_group(record)
    except (DataError, TypeError, AttributeError, LookupError) as error:
        raise Wrong(f"groups, entry {n}: {error}") from None
    found.meta["place"] = f"group {n}"
    return found


def answered(groups: Sequence[Group], names: Mapping[str, Reward | Comparison], nested: bool) -> dict:
    lay = (lambda rows: rows) if nested else (lambda rows: [x for row in rows for x in row])
    out: dict = {"scores": {name: lay([[r.scores.get(name) for r in g.responses] for g in groups]) for name in names}}
    wins = {name: [g.meta.get("wins", {}).get(name) for g in groups] for name, reward in names.items()
            if hasattr(reward, "compare")}
    unscored = {name: lay([[r.meta.get("unscored", {}).get(name) for r in g.responses] for g in groups]) for name in names
                if any(name in r.meta.get("unscored", {}) for g in groups for r in g.responses)}
    return {**out, **({"wins": wins} if wins else {}), **({"unscored": unscored} if unscored else {})}


# ---------------------------------------------------------------------------------------------------------------- server
class Server(ThreadingHTTPServer):
    """One thread for each connection; each reward computes one request at a time.

    limit       bytes of a body that are accepted
    """
    daemon_threads = True                                     # idle connections do not keep it from closing
    request_queue_size = 128

    def __init__(self, rewards: Mapping[str, Callable] | Sequence[Callable], host: str = "127.0.0.1", port: int = 0, *,
                 limit: int = 32 * 2 ** 20):
        named = rewards if isinstance(rewards, Mapping) else {as_reward(r).name: r for r in rewards}
        self.rewards = {name: r if hasattr(r, "compare") else as_reward(r, name) for name, r in named.items()}
        self.locks = {name: threading.Lock() for name in self.rewards}
        self.limit = limit
        self.under_way, self.changed = 0, threading.Condition()
        super().__init__((host, port), Handler)

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request that closing waits for."""
        with self.changed:
            self.under_way += 1
        try:
            yield
        finally:
            with self.changed:
                self.under_way -= 1
                self.changed.notify_all()

    def server_close(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.under_way)
        super().server_close()

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host}:{port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60                                              # seconds a connection may be silent
    server: Server

    def do_GET(self) -> None:
        known = {"/health": lambda: {"status": "ok"}, "/rewards": lambda: {"rewards": [
            {"name": name, "kind": "comparison" if hasattr(r, "compare") else "reward", "settings": r.settings()}
            for name, r in self.server.rewards.items()]}}
        if self.path in known:
            self.reply(200, known[self.path]())
        else:
            self.reply(404, {"error": f"there is no {self.path}; there are /health, /rewards and POST /score"})

    def do_POST(self) -> None:
        with self.server.request():
            try:
                if self.path != "/score":
                    raise Wrong(f"there is no POST {self.path}; there is POST /score", 404)
                self.reply(200, answer(self.body(), self.server.rewards, self.server.locks))
            except Wrong as error:
                self.reply(error.status, {"error": str(error)})
            except ScoringError as error:
                self.reply(500, {"error": str(error)})
            except Exception as error:
                self.reply(500, {"error": f"{type(error).__name__}: {error}"})
                raise

    def body(self) -> object:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            raise Wrong("the request needs a Content-Length", 411)
        if int(length) > self.server.limit:
            self.discard(min(int(length), 4 * self.server.limit))          # so that the client reads the answer
            raise Wrong(f"the body has {int(length):,} bytes, and at most {self.server.limit:,} are accepted: send fewer rows "
                        "at a time", 413)
        try:
            return json.loads(self.rfile.read(int(length)))
        except ValueError as error:
            raise Wrong(f"the body is no JSON: {error}") from None

    def discard(self, length: int) -> None:
        while length > 0 and (read := len(self.rfile.read(min(length, 1 << 20)))):
            length -= read

    def reply(self, status: int, content: dict) -> None:
        raw = json.dumps(content).encode()
        self.close_connection = True
        with suppress(ConnectionError):                       # nobody waits for the answer any more
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(raw)

    def log_message(self, *_) -> None:
        pass


def serve(rewards: Mapping[str, Callable] | Sequence[Callable], host: str = "127.0.0.1", port: int = 8000, *,
          limit: int = 32 * 2 ** 20, ready: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM; requests that are under way are finished first. `ready` is told the address."""
    with Server(rewards, host, port, limit=limit) as server:
        stop = lambda *_: threading.Thread(target=server.shutdown).start()
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            ready(server.url)
            server.serve_forever(poll_interval=0.1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------------------- clients
REPEATED = tuple(status for status in PASSING if status != 500)          # 500 is a row that cannot be scored


@dataclass(frozen=True)
class Remote:
    """A reward that a server computes.

    url         the server's address
    remote      the reward's name there
    """
    url: str
    remote: str
    timeout: float = 600.0
    retries: int = 4
    wait: float = 1.0

    @property
    def name(self) -> str:
        return self.remote

    def settings(self) -> dict:
        return {"url": self.url, "remote": self.remote}

    def ask(self, groups: Sequence[Group]) -> dict:
        return post(f"{self.url.rstrip('/')}/score",
                    {"groups": [g.to_json() for g in groups], "rewards": [self.remote], "on_error": "mark"},
                    timeout=self.timeout, retries=self.retries, wait=self.wait, passing=REPEATED)

    def __call__(self, rows: Sequence[Row]) -> list[float | ScoringError]:
        found = self.ask([Group(row.group.prompt, [row.response], meta=row.group.meta) for row in rows])
        reasons = found.get("unscored", {}).get(self.remote) or [[None]] * len(rows)
        return [ScoringError(str(why)) if x is None else x
                for (x,), (why,) in zip(found["scores"][self.remote], reasons, strict=True)]


@dataclass(frozen=True)
class RemoteComparison(Remote):
    """A comparison that a server computes."""

    def compare(self, groups: Sequence[Group]) -> list:
        found = self.ask(groups)
        if None in found["wins"][self.remote]:
            reasons = dict.fromkeys(why for group in found["unscored"][self.remote] for why in group if why)
            raise ScoringError("; ".join(reasons))
        return found["wins"][self.remote]


def remote(*, url: str, name: str, timeout: float = 600.0, retries: int = 4) -> Reward:
    """A reward or comparison of a server, by its name there."""
    known = {r["name"]: r["kind"] for r in post(f"{url.rstrip('/')}/rewards", None, timeout=timeout, retries=retries)["rewards"]}
    if name not in known:
        raise ValueError(f"{url} has no reward {name!r}{nearest(name, known)}; rewards there: {', '.join(known)}")
    return (RemoteComparison if known[name] == "comparison" else Remote)(url, name, timeout, retries)
