"""An OpenAI-compatible server on loopback that misbehaves as told: statuses, time-outs, half replies, refusals.

It knows the right score of every prompt (`true_score`), and keeps a log of what it was asked and what it did.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def true_score(prompt: str) -> int:
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 98 + 1


def choice(prompt: str) -> dict:
    """A reply whose weighted score is `true_score`: half on the score, a quarter on either side; the rest is words."""
    n = true_score(prompt)
    top = [(str(n), 0.4), (str(n - 1), 0.2), (str(n + 1), 0.2), ("The", 0.1), (" maybe", 0.05), ("1000", 0.05)]
    pairs = [{"token": t, "logprob": math.log(p)} for t, p in top]
    return {"message": {"role": "assistant", "content": str(n)}, "finish_reason": "stop",
            "logprobs": {"content": [{"token": str(n), "logprob": -0.9, "top_logprobs": pairs}]}}  # fmt: skip


class Stub:
    """`faults(prompt, n)` says what goes wrong the n-th time a prompt is asked (from 0); None: nothing."""

    def __init__(self, faults: Callable[[str, int], str | None]):
        self.faults = faults
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.times: dict[str, list[float]] = defaultdict(list)
        self.headers: list[str | None] = []
        self.bodies: list[dict] = []
        self.running = self.most_running = 0
        self.delay = 0.0
        self.url = ""
        self.lock = threading.Lock()

    def reply(self, body: dict) -> tuple[int, dict[str, str], bytes]:
        prompt = body["messages"][0]["content"]
        with self.lock:
            n = self.asked[prompt]
            self.asked[prompt] += 1
            self.times[prompt].append(time.monotonic())
            self.bodies.append(body)
        fault = self.faults(prompt, n)
        good = {"choices": [choice(prompt)], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}
        if fault and fault.isdecimal():
            return int(fault), {}, b'{"error": {"message": "busy with Bearer secret-key"}}'
        if fault and fault.startswith("wait "):
            return 429, {"Retry-After": fault.split()[1]}, b"{}"
        if fault == "slow":
            time.sleep(0.8)
        if fault == "truncated":
            return 200, {}, json.dumps(good).encode()[:-20]
        if fault == "empty":
            return 200, {}, b"{}"
        if fault == "no logprobs":
            good["choices"][0].pop("logprobs")
        if fault == "refusal":
            good["choices"][0] = {"message": {"content": None, "refusal": "I will not."}, "finish_reason": "stop"}
        if fault == "filtered":
            good["choices"][0] |= {"finish_reason": "content_filter"}
        if fault == "says REFUSAL":
            top = [{"token": "REF", "logprob": math.log(0.9)}, {"token": "50", "logprob": math.log(0.1)}]
            good["choices"][0] |= {"message": {"content": "REFUSAL"}, "logprobs": {"content": [{"top_logprobs": top}]}}
        with self.lock:
            self.answered[prompt] += 1
        return 200, {}, json.dumps(good).encode()


@contextmanager
def serving(faults: Callable[[str, int], str | None] = lambda prompt, n: None) -> Iterator[Stub]:
    stub = Stub(faults)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            with stub.lock:
                stub.running += 1
                stub.most_running = max(stub.most_running, stub.running)
                stub.headers.append(self.headers.get("Authorization"))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(stub.delay)
            try:
                if stub.faults(body["messages"][0]["content"], -1) == "drops":
                    self.close_connection = True
                    with stub.lock:
                        stub.asked[body["messages"][0]["content"]] += 1
                    return
                status, headers, raw = stub.reply(body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(raw))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                with stub.lock:
                    stub.running -= 1

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
