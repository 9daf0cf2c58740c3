"""A server that speaks as vLLM's does and draws from the weights it was given, save where it misbehaves as told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from src.models.roles import Roles
from src.rollout.engines.vllm_worker import CODE, TESTED, description
from src.rollout.sampling import Sampler

Says = Callable[[int], str]  # what to do with the n-th prompt, counted from 0: the name of a fault, or "ok"

LOADING = threading.Lock()  # transformers changes torch for all threads while it loads


class RolloutServer(ThreadingHTTPServer):
    """Keeps the prompts that it was asked for, and the names of the weights that it was given."""

    daemon_threads = True

    def __init__(self, roles: Roles, says: Says = lambda n: "ok", port: int = 0, **described: Any) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        with roles.acting("policy") as lm:
            common = description(lm.config, str(lm.dtype), roles.tokenizer)
        extra = {"context": 48, "logprobs": "processed_logprobs", "vllm": TESTED, "code": CODE}
        self.description, self.says = common | extra | described, says
        self.over, self.lock = threading.Event(), threading.Lock()
        self.prompts: list[list[int]] = []
        self.given: list[str] = []
        self.serves: str | None = None
        self.lm: Any = roles.merged_policy()  # what it starts with

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no news."""

    def describe(self) -> dict[str, Any]:
        return self.description | {"serves": self.serves}

    def take_policy(self, folder: str, name: str) -> None:
        with LOADING:
            self.lm, self.serves = GPT2LMHeadModel.from_pretrained(folder).eval(), name
        self.given.append(name)

    def die(self) -> None:
        """No answer to anything from now on."""
        self.over.set()
        self.socket.close()

    def draw(self, body: dict[str, Any]) -> dict[str, Any]:
        """An answer in the form of /inference/v1/generate."""
        given = body["sampling_params"]
        prompt, stop = torch.tensor([body["token_ids"]]), torch.tensor(given["stop_token_ids"])
        sampler = Sampler(given["max_tokens"], given["temperature"])
        draws = torch.Generator().manual_seed(given["seed"])
        ids, mask, logprobs, _ = sampler.sample(self.lm, prompt, torch.ones_like(prompt).bool(), stop, 0, draws)
        tokens = [
            {"token_id": i, "logprob": x} for i, x in zip(ids[mask].tolist(), logprobs[mask].tolist(), strict=True)
        ]
        choice = {"token_ids": ids[mask].tolist(), "logprobs": {"content": tokens}}
        return {"prompt_token_ids": body["token_ids"], "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: RolloutServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if server.over.is_set():
            self.close_connection = True
        elif self.path == "/collective_rpc":
            self.answer({"results": [getattr(server, body["method"])(*body["args"])]})
        elif self.path == "/inference/v1/generate":
            with server.lock:
                number = len(server.prompts)
                server.prompts.append(body["token_ids"])
                answer = server.draw(body)
            FAULTS[server.says(number)](self, answer)

    def answer(self, content: Any, status: int = 200, cut: int = 0) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) - cut))
        self.end_headers()
        self.wfile.write(data[: len(data) - cut])

    def hang(self, answer: dict[str, Any]) -> None:
        self.server.over.wait(30)
        self.close_connection = True

    def hang_up(self, answer: dict[str, Any]) -> None:
        self.close_connection = True

    def die(self, answer: dict[str, Any]) -> None:
        self.server.die()
        self.close_connection = True

    def restart(self, answer: dict[str, Any]) -> None:
        """It comes back at once with the weights it was started with, and this answer is drawn from them."""
        self.server.serves = None
        self.answer(answer)

    def log_message(self, *_: Any) -> None:
        """Nothing on the console."""


def tampered(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Callable[[Handler, dict[str, Any]], None]:
    """An answer after `change(answer, its choice)`."""

    def misbehave(handler: Handler, answer: dict[str, Any]) -> None:
        change(answer, answer["choices"][0])
        handler.answer(answer)

    return misbehave


def halve(answer: dict[str, Any], choice: dict[str, Any]) -> None:
    """The first token alone, which is none that ends."""
    choice["token_ids"], choice["logprobs"]["content"] = [5], [{"token_id": 5, "logprob": -1.0}]


FAULTS: dict[str, Callable[[Handler, dict[str, Any]], None]] = {
    "ok": Handler.answer,
    "hang": Handler.hang,
    "hang up": Handler.hang_up,
    "die": Handler.die,
    "restart": Handler.restart,
    "500": lambda h, a: h.answer({"error": "says why"}, 500),
    "no JSON": lambda h, a: h.answer(a, cut=3),
    "nothing": lambda h, a: h.answer(None),
    "no choice": lambda h, a: h.answer(a | {"choices": []}),
    "half": tampered(halve),
    "no log-probabilities": tampered(lambda a, c: c.pop("logprobs")),
    "one less": tampered(lambda a, c: c["logprobs"]["content"].pop()),
    "other prompt": tampered(lambda a, c: a["prompt_token_ids"].append(4)),
    "other tokens": tampered(lambda a, c: c["logprobs"]["content"][0].update(token_id=c["token_ids"][0] + 1)),
    "words": tampered(lambda a, c: c.update(token_ids=["a"], logprobs={"content": [{"token_id": "a", "logprob": -1}]})),
    "null": tampered(lambda a, c: c["logprobs"]["content"][0].update(logprob=None)),
    "positive": tampered(lambda a, c: c["logprobs"]["content"][0].update(logprob=0.5)),
    "infinite": tampered(lambda a, c: c["logprobs"]["content"][0].update(logprob=float("-inf"))),
}


@contextmanager
def serving_rollouts(*servers: RolloutServer) -> Iterator[None]:
    """The servers are up within the block."""
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.over.set()
            server.shutdown()
            thread.join()
            server.server_close()
