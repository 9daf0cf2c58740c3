"""Web servers for the tests, in threads of this process: one that misbehaves as told, and a real uvicorn."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import uvicorn

Says = Callable[[dict[str, Any]], str]  # what to do with a body: the name of a fault, or "ok"


def score_of(text: str) -> float:
    """The score that `Server` gives a text; exact in binary."""
    return sum(map(ord, text)) % 1000 / 8


AnyServer = TypeVar("AnyServer", bound=Any)  # with an event `over`


class Server(ThreadingHTTPServer):
    """Scores texts, save where `says` names a fault; keeps what it was asked."""

    daemon_threads = True

    def __init__(self, says: Says) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.says, self.over, self.lock = says, threading.Event(), threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.running, self.most = 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet, or the second one waits for the client
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        try:
            (FAULTS | SPECIAL)[self.server.says(body)](self, [score_of(text) for text in body["query"]])
        finally:
            with self.server.lock:
                self.server.running -= 1

    def answer(self, content: str, status: int = 200, length: int = 0, **headers: str) -> None:
        data = content.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def scores(self, scores: Any) -> None:
        self.answer(json.dumps({"rewards": scores}))

    def slow(self, scores: list[float]) -> None:
        self.server.over.wait(30)

    def cut(self, scores: list[float]) -> None:
        """The head announces more than comes."""
        whole = json.dumps({"rewards": scores})
        self.answer(whole[: len(whole) // 2], length=len(whole))
        self.close_connection = True

    def drip(self, content: str) -> None:
        """One byte at a time, for as long as somebody reads."""
        for byte in content.encode():
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.server.over.wait(0.05):
                break
        self.close_connection = True

    def drip_head(self, scores: list[float]) -> None:
        self.drip(f"HTTP/1.1 200 OK\r\nX-Long: {'x' * 200}\r\n")

    def drip_body(self, scores: list[float]) -> None:
        self.drip("HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n" + " " * 200)

    def hang_up(self, scores: list[float]) -> None:
        self.close_connection = True

    def late(self, scores: list[float]) -> None:
        """Right, a little later."""
        time.sleep(0.02)
        self.scores(scores)

    def log_message(self, *_: Any) -> None:
        """Nothing on the console."""


FAULTS: dict[str, Callable[[Handler, list[float]], None]] = {
    "ok": Handler.scores,
    "late": Handler.late,
    "slow": Handler.slow,
    "cut": Handler.cut,
    "hang up": Handler.hang_up,
    "truncated": lambda h, s: h.answer(json.dumps({"rewards": s})[:-3]),
    "empty": lambda h, s: h.answer(""),
    "html": lambda h, s: h.answer("<html>try later</html>"),
    "deep": lambda h, s: h.answer("[" * 200_000),
    "digits": lambda h, s: h.answer('{"rewards": [' + "9" * 5000 + "]}"),
    "no gzip": lambda h, s: h.answer("no gzip", Content_Encoding="gzip"),
    "one less": lambda h, s: h.scores(s[:-1]),
    "one more": lambda h, s: h.scores([*s, 0.0]),
    "one number": lambda h, s: h.scores(1.0),
    "a mapping": lambda h, s: h.scores({str(i): x for i, x in enumerate(s)}),
    "nothing": lambda h, s: h.scores(None),
    "bare list": lambda h, s: h.answer(json.dumps(s)),
    "other key": lambda h, s: h.answer(json.dumps({"scores": s})),
    "null": lambda h, s: h.scores([None, *s[1:]]),
    "strings": lambda h, s: h.scores([*s[:-1], str(s[-1])]),
    "booleans": lambda h, s: h.scores([True, *s[1:]]),
    "lists": lambda h, s: h.scores([[x] for x in s]),
    "short part": lambda h, s: h.answer(json.dumps({"rewards": s, "extra_logs": {"a": s[1:]}})),
    "unnamed parts": lambda h, s: h.answer(json.dumps({"rewards": s, "extra_logs": s})),
    "scores of text": lambda h, s: h.answer(json.dumps({"rewards": s, "scores": ["1"] * len(s)})),
} | {
    str(status): lambda h, s, status=status: h.answer("says why", status)
    for status in (302, 400, 401, 403, 404, 413, 422, 429, 500, 503)
}


SPECIAL: dict[str, Callable[[Handler, list[float]], None]] = {  # which no test of every fault needs
    "drips its head": Handler.drip_head,
    "drips its body": Handler.drip_body,
    "wait 7": lambda h, s: h.answer("busy", 429, Retry_After="7"),
    "wait a date": lambda h, s: h.answer("busy", 503, Retry_After=formatdate(time.time() + 7, usegmt=True)),
    "moved": lambda h, s: h.answer("", 307, Location="/elsewhere"),
    "echo": lambda h, s: h.answer(f"{h.headers['Authorization']} is unknown", 400),
}


@contextmanager
def up(server: AnyServer) -> Iterator[AnyServer]:
    """The server, which answers until the block ends; then `over` is set."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def misbehaving(says: Says) -> AbstractContextManager[Server]:
    """A `Server` that is up."""
    return up(Server(says))


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address of an application under uvicorn."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=free_port(), log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.config.port}/"
    finally:
        server.should_exit = True
        thread.join()
