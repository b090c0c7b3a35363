"""A judge behind any OpenAI-compatible endpoint: concurrent, patient with a busy server, and counted.

Knows the protocol (`/chat/completions` with `logprobs`), not what is asked. The key comes from the environment and is
in no file, message or score. Every prompt ends as a reading or as a failure with its reason.
"""

from __future__ import annotations

import email.utils
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import tenacity

from core.errors import JudgeError
from core.evaluation.readings import TOP, Reading, Stamp, sampled, weighted, whole_numbers

#: `auto` asks the server once whether it gives log-probabilities and has numbers as one token.
Scoring = Literal["auto", "weighted", "sampled"]

PROBE = "Reply with the number 85 and nothing else."
#: Failures in a row, without a reading between them, after which the server counts as gone.
GIVE_UP = 20
#: Statuses that may pass: too many requests, time-outs, and the server's own trouble.
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})

_LONGEST_WAIT = 600.0  # seconds that a Retry-After is honoured for


@dataclass(frozen=True)
class ApiSettings:
    """How an endpoint is asked."""

    model: str
    base_url: str
    """Up to and with `/v1`."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; none is sent where it is not set."""
    scoring: Scoring = "auto"
    temperature: float = 0.0
    """Of a sampled number; log-probabilities do not depend on it."""
    seed: int = 0
    concurrency: int = 8
    attempts: int = 6
    """Of one prompt, the first included."""
    first_wait: float = 1.0
    """Seconds before the second attempt; doubled each time, with jitter."""
    timeout: float = 120.0

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise JudgeError(f"{self.base_url!r} is no address of a judge; give http:// or https://, with its /v1.")
        if url.userinfo:
            raise JudgeError(f"The judge's address holds a password; put the key into ${self.key_env} instead.")


class _Passing(Exception):
    """A failure that may not happen again; `after` is how many seconds the server asked to be left alone."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


class _Unreadable(Exception):
    """The server will not read this one prompt: too long, or not to its taste."""


class ApiJudge:
    """See the module. Close it, or use it in a `with`."""

    def __init__(self, settings: ApiSettings, transport: httpx.BaseTransport | None = None):
        self.settings = settings
        self._key = os.environ.get(settings.key_env, "").strip()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        self._client = httpx.Client(timeout=settings.timeout, headers=headers, limits=limits, transport=transport)
        self._url = f"{settings.base_url.rstrip('/')}/chat/completions"
        self._stopping = threading.Event()
        self._limit = "max_tokens"
        self._mode: Literal["weighted", "sampled"] | None = None if settings.scoring == "auto" else settings.scoring
        self.note = ""
        """Why numbers are sampled, where `auto` came to that."""

    def __enter__(self) -> ApiJudge:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    @property
    def stamp(self) -> Stamp:
        s = self.settings
        return Stamp(f"api:{s.model}", {
            "base_url": s.base_url.rstrip("/"), "model": s.model, "scoring": self._mode or s.scoring,
            "temperature": s.temperature, "seed": s.seed, "max_tokens": self._max_tokens, "top_logprobs": TOP,
        })  # fmt: skip

    def prepare(self) -> None:
        """Settle how scores are read, with one request that scores nothing. Raises `JudgeError`."""
        if self._mode is not None:
            return
        try:
            choice = self._retrying(lambda: self._choice(self._post(PROBE, "weighted")))
        except _Passing as error:
            raise JudgeError(f"The judge at {self.settings.base_url} does not answer: {error}.") from None
        tokens = [t["token"] for position in _positions(choice) for t in position]
        if not tokens:
            self._mode, self.note = "sampled", "the server gives no log-probabilities"
        elif not whole_numbers(tokens):
            self._mode, self.note = "sampled", "the server's tokenizer writes numbers digit by digit"
        else:
            self._mode = "weighted"

    def read(
        self, prompts: Sequence[str], done: Callable[[int, Reading], None], failed: Callable[[int, str], None]
    ) -> None:
        """See `Judge.read`. A stop (an exception, Ctrl-C) waits for the requests under way, whose scores are kept."""
        self.prepare()
        self._stopping.clear()
        waiting, running, in_a_row = list(reversed(range(len(prompts)))), {}, 0
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < self.settings.concurrency:
                        index = waiting.pop()
                        running[pool.submit(self._one, index, prompts[index], done)] = index
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        index = running.pop(future)
                        reason = _outcome(future)
                        in_a_row = in_a_row + 1 if reason else 0
                        if reason:
                            failed(index, reason)
                        if in_a_row >= GIVE_UP:
                            raise JudgeError(
                                f"The judge at {self.settings.base_url} failed {in_a_row} times in a row ({reason}); "
                                "what was scored is kept: run the same command again to go on."
                            )
            except BaseException:
                self._stopping.set()  # ends every back-off; the pool waits for requests under way
                raise

    def _one(self, index: int, prompt: str, done: Callable[[int, Reading], None]) -> None:
        done(index, self._retrying(lambda: self._reading(prompt)))

    def _reading(self, prompt: str) -> Reading:
        reply = self._post(prompt, self._mode)
        choice, usage = self._choice(reply), reply.get("usage") or {}
        tokens = {"tokens_in": _count(usage, "prompt_tokens"), "tokens_out": _count(usage, "completion_tokens")}
        message = choice.get("message") or {}
        text = message.get("content") or ""
        if message.get("refusal"):
            return Reading(None, self._mode, str(message["refusal"])[:60], "refusal", **tokens)
        if choice.get("finish_reason") == "content_filter":
            return Reading(None, self._mode, text[:60], "filtered", **tokens)
        if self._mode == "sampled":
            return sampled(text, **tokens)
        first = next(iter(_positions(choice)), [])
        if not first:
            raise _Passing("the reply has no log-probabilities")
        return weighted(((t["token"], t["logprob"]) for t in first), text.strip(), **tokens)

    @property
    def _max_tokens(self) -> int:
        return 16 if self._mode == "sampled" else 5  # the first one scores; the rest spell out REFUSAL or CODE

    def _post(self, prompt: str, mode: str | None) -> dict[str, Any]:
        s = self.settings
        body: dict[str, Any] = {
            "model": s.model, "messages": [{"role": "user", "content": prompt}], "temperature": s.temperature,
            "seed": s.seed, self._limit: self._max_tokens,
        }  # fmt: skip
        if mode == "weighted":
            body |= {"logprobs": True, "top_logprobs": TOP}
        try:
            reply = self._client.post(self._url, json=body)
        except httpx.TimeoutException:
            raise _Passing(f"no answer within {s.timeout:g} s") from None
        except httpx.TransportError as error:
            raise _Passing(self._safe(str(error)) or type(error).__name__) from None
        if reply.status_code in PASSING:
            raise _Passing(f"status {reply.status_code}", _retry_after(reply))
        if reply.status_code == 400 and self._limit == "max_tokens" and "max_completion_tokens" in reply.text:
            self._limit = "max_completion_tokens"  # as newer models call it
            return self._post(prompt, mode)
        if reply.status_code != 200:
            if mode == "weighted" and s.scoring == "auto" and self._mode is None and reply.status_code in (400, 422):
                return self._post(prompt, None)  # the probe: the server may not know what log-probabilities are
            said = f"status {reply.status_code}: {self._safe(_message(reply))}"
            if self._mode is not None and reply.status_code in (400, 413, 422):
                raise _Unreadable(said)
            raise JudgeError(f"The judge at {s.base_url} refuses the request with {said}")
        try:
            found = reply.json()
        except ValueError:
            raise _Passing("the reply is no whole JSON") from None
        if not isinstance(found, dict):
            raise _Passing("the reply is no JSON object")
        return found

    @staticmethod
    def _choice(reply: dict[str, Any]) -> dict[str, Any]:
        choices = reply.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise _Passing("the reply has no choices")
        return choices[0]

    def _retrying(self, call: Callable[[], Any]) -> Any:
        """`call` until it succeeds; waits what the server asks for, else longer and longer, with jitter."""
        s = self.settings
        backoff = tenacity.wait_exponential_jitter(initial=s.first_wait, max=60.0, jitter=s.first_wait)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = getattr(error, "after", None)
            return max(backoff(state), asked or 0.0)

        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Passing), wait=pause, reraise=True,
            stop=tenacity.stop_after_attempt(s.attempts) | tenacity.stop_when_event_set(self._stopping),
            sleep=tenacity.sleep_using_event(self._stopping),
        )  # fmt: skip
        return again(call)

    def _safe(self, text: str) -> str:
        """One line of a server's words, without the key."""
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:200]


def _outcome(future: Future) -> str:
    """Why a prompt has no reading; empty where it has one. Raises what cannot pass."""
    try:
        future.result()
    except (_Passing, _Unreadable) as error:
        return str(error)
    return ""


def _positions(choice: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The likeliest tokens of every position of the reply; none where the server gives no log-probabilities."""
    found = (choice.get("logprobs") or {}).get("content") or []
    tops = [p.get("top_logprobs") or [] for p in found if isinstance(p, dict)]
    return [
        [t for t in top if isinstance(t, dict) and isinstance(t.get("token"), str)
         and isinstance(t.get("logprob"), (int, float))]
        for top in tops
    ]  # fmt: skip


def _retry_after(reply: httpx.Response) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date."""
    text = reply.headers.get("Retry-After", "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), _LONGEST_WAIT) if seconds == seconds else None


def _message(reply: httpx.Response) -> str:
    try:
        error = reply.json().get("error")
        return str(error.get("message") if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return reply.text[:200]


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and value >= 0 else 0
