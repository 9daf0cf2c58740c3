"""Serve a reward over HTTP, for `reward=http`.

python -m src.serve_reward reward=vader
python -m src.serve_reward reward=learned reward.path=FOLDER --port 8100
curl -s localhost:8000 -H 'content-type: application/json' -d '{"query": ["A lovely film."]}'

POST / with {"query": [...], "prompts": [...], "labels": [...]} (the last two are optional) returns {"rewards": [...],
"scores": the same, "extra_logs": {NAME: [...]}}, the last with the parts of a reward that has parts;
GET /health returns ok. A query is the whole text; its response is what follows the prompt. Labels reach verifiers as
the column --label-column. The server listens on this machine only; any other --host needs a token: clients send
"Authorization: Bearer TOKEN", and both sides read it from the environment variable REWARD_TOKEN. With a token, /health
needs it too.
"""

from __future__ import annotations

import argparse
import math
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

from src.config.compose import compose
from src.config.schema import PPORun
from src.errors import ConfigError
from src.rollout.scoring import call_with_texts
from src.runs.prerequisites import train_missing
from src.runs.start import train
from src.stages.ppo import PPOStage
from src.types import LoadedReward, Reward
from src.utils.exits import friendly_errors
from src.utils.output import set_up_output

TOKEN_VARIABLE = "REWARD_TOKEN"  # the name of a variable, not a secret
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Question(BaseModel):
    """Texts to score."""

    query: list[str] = Field(min_length=1)
    prompts: list[str] | None = None
    labels: list[Any] | None = None


def build_app(reward: Reward, label_column: str, token: str, max_bytes: int) -> FastAPI:
    """The server. An empty token serves everybody."""
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
    async def rewards(question: Question) -> dict[str, Any]:
        columns = {"prompts": question.prompts, "labels": question.labels}
        for name, values in columns.items():
            if values is not None and len(values) != len(question.query):
                raise HTTPException(422, f"{len(values)} {name} for {len(question.query)} queries")
        given, parts = await run_in_threadpool(numbers, reward, question, label_column)
        return {"rewards": given, "scores": given, "extra_logs": parts}

    return app


def numbers(reward: Reward, question: Question, label_column: str) -> tuple[list[float], dict[str, list[float]]]:
    """The reward of each query, and its parts; 422 with the reason when it raises, or gives what is no finite number.

    Not 500: a client would ask for the same texts again, for minutes.
    """
    try:
        scores, parts = score(reward, question, label_column)
    except Exception as error:  # a user's function may raise anything
        raise HTTPException(422, f"the reward raised {error!r}") from error
    for given in (scores, *parts.values()):
        if len(given) != len(question.query):
            raise HTTPException(422, f"the reward gave {len(given)} scores for {len(question.query)} queries")
        for query, number in zip(question.query, given, strict=True):
            if not math.isfinite(number):  # JSON has no NaN: it would arrive as null
                what = f"the reward gave {number} for {query[:80]!r}; a score must be a finite number"
                raise HTTPException(422, what)
    return scores, parts


def score(reward: Reward, question: Question, label_column: str) -> tuple[list[float], dict[str, list[float]]]:
    """The reward of each query, as the reward gives it, and its parts by name."""
    count = len(question.query)
    prompts = question.prompts or [""] * count
    responses = [
        query[len(prompt) :] if query.startswith(prompt) else query
        for prompt, query in zip(prompts, question.query, strict=True)
    ]
    metadata = [{label_column: label} for label in question.labels or [""] * count]
    scores, parts = call_with_texts(reward, prompts, responses, metadata)
    given = scores.tolist() if isinstance(scores, torch.Tensor) else [float(score) for score in scores]
    return given, {name: part.tolist() for name, part in parts.items()}


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m src.serve_reward", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="reward=... and its keys, as for python -m src.train")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--label-column", default="answer", help="column of the labels, for the reward")
    parser.add_argument("--max-bytes", type=int, default=16 * 2**20, help="longest request body")
    arguments = parser.parse_intermixed_args()
    set_up_output()
    with friendly_errors(arguments.overrides):
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        if arguments.host not in LOOPBACK and not token:
            raise ConfigError(
                f"--host {arguments.host}: other machines can reach it, so it needs a token: set {TOKEN_VARIABLE}"
            )
        name, reward = load_reward(arguments.overrides)
        app = build_app(reward, arguments.label_column, token, arguments.max_bytes)
        require_free(arguments.host, arguments.port)
        print(f"{name}: POST http://{arguments.host}:{arguments.port}/, GET /health; Ctrl-C ends it")
        uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")


def require_free(host: str, port: int) -> None:
    """Raise `ConfigError` when the port is in use, or the address is not this machine's."""
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


def load_reward(overrides: list[str]) -> tuple[str, Any]:
    """Name and object of the chosen reward; the experiment's own reward model is trained if it is missing."""
    run = compose(overrides)
    if not isinstance(run, PPORun):
        raise ConfigError(f"stage={run.stage}: a reward belongs to stage=ppo; leave stage out")
    if run.choices["reward"] == "adapter":
        raise ConfigError("reward=adapter needs a policy's base: serve reward=learned reward.path=RUN/model instead")
    stage = PPOStage(run)
    stage.check()
    if stage.reward is None:
        stage.set_paths(**train_missing(run, train))
    if isinstance(stage.reward, LoadedReward):
        stage.reward.load(None)
    return run.choices["reward"], stage.reward


if __name__ == "__main__":
    main()
