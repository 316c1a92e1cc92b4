"""JSON over HTTP with the standard library: retries with growing waits, and a clear end."""
from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping

from rewards.base import ScoringError, Unreachable

__all__ = ["post"]

PASSING = (408, 425, 429, 500, 502, 503, 504)                 # answers that may be different a moment later


def post(url: str, payload: dict | None, *, secret: Mapping[str, str] | None = None, timeout: float = 60.0, retries: int = 4,
         wait: float = 1.0, passing: Collection[int] = PASSING) -> dict:
    """The JSON answer to `payload` (a GET where it is None).

    secret      headers that never follow a redirect and are never shown (Authorization)
    timeout     seconds a connection may be silent
    retries     further attempts after one that failed in passing
    wait        seconds before the first of them, doubled each time; a service's Retry-After goes first, up to a minute
    passing     HTTP statuses that are tried again; any other error is final at once
    """
    request = urllib.request.Request(url, None if payload is None else json.dumps(payload).encode(),
                                     {"Content-Type": "application/json"})
    for key, value in (secret or {}).items():
        request.add_unredirected_header(key, value)
    begun = time.monotonic()
    for attempt in range(retries + 1):
        pause = wait * 2 ** attempt
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode("utf-8", "replace").strip()
            problem = f"HTTP {error.code} {error.reason}{': ' if said else ''}{said}"
            if error.code not in passing:
                raise ScoringError(f"{url} refused the request: {problem}") from None
            asked = error.headers.get("Retry-After", "")
            pause = min(float(asked), 60.0) if asked.isdigit() else pause
        except json.JSONDecodeError as error:
            raise ScoringError(f"{url} answered with something that is no JSON ({error}): is it the right address?") from None
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", None) or error) or type(error).__name__
        if attempt < retries:
            time.sleep(pause)
    raise Unreachable(f"{url} cannot be used: {retries + 1} attempts in {time.monotonic() - begun:.0f} s, the last ended with "
                      f"{problem}. Is the service up, and the address right?")
