"""Serve a reward over HTTP, in the form that `reward=http` asks for.

python -m src.serve_reward reward=vader
python -m src.serve_reward reward=learned reward.path=FOLDER --port 8100
curl -s localhost:8000 -H 'content-type: application/json' -d '{"query": ["A lovely film."]}'

POST / with {"query": [...], "prompts": [...], "labels": [...]} (the last two may be left out) answers
{"rewards": [...]}; GET /health says that the server is up. A query is the whole text; its response is what follows the
prompt. Labels reach verifiers as the column --label-column. Only this machine is served, unless --host says otherwise;
then a token is needed: clients send "Authorization: Bearer TOKEN", and both sides read it from the environment variable
REWARD_TOKEN. Where there is a token, /health needs it too.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from src.config.compose import compose, instantiate
from src.config.validate import preflight
from src.errors import ConfigError
from src.runs.prerequisites import ensure
from src.runs.report import friendly_errors, quiet_libraries
from src.train import train
from src.types import Reward

TOKEN_VARIABLE = "REWARD_TOKEN"  # the name of a variable, not a secret
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Question(BaseModel):
    """Texts to score."""

    query: list[str] = Field(min_length=1)
    prompts: list[str] | None = None
    labels: list[Any] | None = None


def build_app(reward: Reward, label_column: str, token: str, max_bytes: int) -> FastAPI:
    """The server. Without a token everybody is served."""
    app = FastAPI(title="reward")

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("authorization", "").encode("latin-1")  # the bytes that were sent
        if token and not secrets.compare_digest(given, f"Bearer {token}".encode()):
            return Response("a bearer token is needed", status_code=401)
        body = b""
        async for piece in request.stream():  # Content-Length may be missing, or wrong
            body += piece
            if len(body) > max_bytes:
                return Response(f"the body has more than {max_bytes} bytes", status_code=413)
        request._body = body
        return await call_next(request)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/")
    async def rewards(question: Question) -> dict[str, list[float]]:
        columns = {"prompts": question.prompts, "labels": question.labels}
        for name, values in columns.items():
            if values is not None and len(values) != len(question.query):
                raise HTTPException(422, f"{len(values)} {name} for {len(question.query)} queries")
        return {"rewards": await run_in_threadpool(score, reward, question, label_column)}

    return app


def score(reward: Reward, question: Question, label_column: str) -> list[float]:
    """The reward of each query."""
    count = len(question.query)
    prompts = question.prompts or [""] * count
    responses = [
        query[len(prompt) :] if query.startswith(prompt) else query
        for prompt, query in zip(prompts, question.query, strict=True)
    ]
    metadata = [{label_column: label} for label in question.labels or [""] * count]
    scores = reward.score(prompts, responses, metadata)
    return scores.tolist() if isinstance(scores, torch.Tensor) else [float(score) for score in scores]


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="reward=... and its keys, as for python -m src.train")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--label-column", default="answer", help="column that labels reach the reward as")
    parser.add_argument("--max-bytes", type=int, default=16 * 2**20, help="longest request body")
    arguments = parser.parse_intermixed_args()
    quiet_libraries()
    with friendly_errors(arguments.overrides):
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        if arguments.host not in LOOPBACK and not token:
            raise ConfigError(
                f"--host {arguments.host}: others can reach it, so a token is needed: set {TOKEN_VARIABLE}"
            )
        config = compose(arguments.overrides)
        if config.choices.reward == "adapter":
            raise ConfigError("reward=adapter needs a policy's base: serve reward=learned reward.path=ITS_MODEL_FOLDER")
        config.run_dir = config.log_dir  # asked for by the checks; nothing is written there
        preflight(config)
        ensure_reward(config)
        app = build_app(instantiate(config.reward), arguments.label_column, token, arguments.max_bytes)
        require_free(arguments.host, arguments.port)
        print(f"{config.choices.reward}: POST http://{arguments.host}:{arguments.port}/, GET /health; Ctrl-C ends it")
        uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")


def require_free(host: str, port: int) -> None:
    """Raise `ConfigError` when nothing can listen there: another program does, or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "there is no such port"
        raise ConfigError(
            f"cannot listen on {host}, port {port} ({why}): choose another with --host or --port"
        ) from error


def ensure_reward(config: Any) -> None:
    """Train the experiment's own reward model if the reward is a learned one without a path."""
    if config.reward.get("path", "given") is None:
        ensure(config, train)


if __name__ == "__main__":
    main()
