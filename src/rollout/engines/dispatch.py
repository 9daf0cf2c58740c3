"""Prompts dealt to several vLLM servers, so that each is answered once, by the weights that were asked for."""

from __future__ import annotations

import asyncio
import logging
from asyncio import sleep
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from src.errors import EngineError
from src.rewards.request import AwayError, BadAnswerError, Body, StatusError, post
from src.rollout.engines.rows import Answer
from src.rollout.engines.vllm_worker import difference

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

HEALTH = 15.0  # seconds at most in which a server says what it serves
START = "start it by `python -m src.serve_rollout MODEL` (docs/engines.md)"
Failures = dict[int, list[str]]  # of a row: what went wrong, where
FAILURES = (AwayError, BadAnswerError)


@dataclass(frozen=True)
class Weights:
    """The weights to be served: their folder and name, what they are the weights of, and how many tokens are read."""

    folder: str
    name: str
    own: dict[str, Any]  # `description`
    longest: int


@dataclass
class Dispatch:
    """One batch on the servers at `urls`.

    Rows are dealt to the servers that answer; one that fails is left out for as long as another is there. Its rows, and
    those of a server that cannot confirm afterwards that it still serves the weights, are dealt again. While no server
    answers, all are asked again for `patience` seconds. A row is tried `attempts` times, each for at most `timeout`
    seconds, and a server answers at most `concurrency` rows at a time.
    """

    urls: Sequence[str]
    weights: Weights
    timeout: float
    patience: float
    attempts: int
    concurrency: int
    lost: dict[str, str] = field(default_factory=dict)  # a server's address, and why it was left out

    async def load(self) -> None:
        """Let the servers take the weights. Raises `EngineError` when none does."""
        async with _client() as client:
            await self._ready(client)

    async def answers(self, bodies: list[Body], read: Callable[[Any, Body], Answer]) -> list[Answer]:
        """The answer to each body, in their order. Raises `EngineError` as soon as one cannot be had."""
        found: dict[int, Answer] = {}
        failures: Failures = defaultdict(list)
        async with _client() as client:
            while missing := [row for row in range(len(bodies)) if row not in found]:
                ready, left = await self._ready(client), missing[::-1]
                jobs = [self._served(client, url, left, bodies, read, failures) for url in ready]
                for own in await asyncio.gather(*jobs):
                    found |= own
                for row, reasons in failures.items():
                    if len(reasons) >= self.attempts:
                        what = f"{len(reasons)} failed attempts for a prompt of {len(bodies[row]['token_ids'])} tokens"
                        raise EngineError(f"rollout server {reasons[-1]} ({what})")
        return [found[row] for row in range(len(bodies))]

    async def _served(
        self, client: httpx.AsyncClient, url: str, left: list[int], bodies: list[Body],
        read: Callable[[Any, Body], Answer], failures: Failures,
    ) -> dict[int, Answer]:  # fmt: skip
        """The rows of `left` that one server answered until it failed; none unless it confirms the weights."""
        own: dict[int, Answer] = {}

        async def work() -> None:
            while left and url not in self.lost:
                row = left.pop()
                try:
                    own[row] = await post(client, f"{url}/inference/v1/generate", bodies[row], self.timeout, read)
                except FAILURES as error:
                    self._leave_out(url, error)
                    failures[row].append(f"{url}: {error}")
                except StatusError as error:
                    raise EngineError(f"rollout server {url}: {error}; {START}") from error

        self.lost.pop(url, None)
        await asyncio.gather(*(work() for _ in range(self.concurrency)))
        if own and await self._refused(client, url, load=False):
            for row in own:
                failures[row].append(f"{url}: {self.lost[url]}")
            own = {}
        return own

    async def _ready(self, client: httpx.AsyncClient) -> list[str]:
        """The servers that serve the weights: those that have not failed, or all again when none of them is left."""
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_before_delay, wait_random_exponential

        async def some() -> list[str]:
            for urls in ([url for url in self.urls if url not in self.lost], self.urls):
                refused = await asyncio.gather(*(self._refused(client, url, load=True) for url in urls))
                if ready := [url for url, no in zip(urls, refused, strict=True) if not no]:
                    return ready
            raise AwayError("; ".join(f"{url}: {why}" for url, why in self.lost.items()))

        retrying = AsyncRetrying(
            stop=stop_before_delay(self.patience), wait=wait_random_exponential(multiplier=0.1, max=10),
            retry=retry_if_exception_type(AwayError), sleep=sleep, reraise=True,
        )  # fmt: skip
        try:
            return await retrying(some)
        except AwayError as error:
            raise EngineError(f"no rollout server answers ({error}); {START}") from error

    async def _refused(self, client: httpx.AsyncClient, url: str, *, load: bool) -> bool:
        """Whether a server does not serve the weights, after it was asked to `load` them; it is then left out.

        Raises `EngineError` for a server of another model, version or kind.
        """
        try:
            served = await self._call(client, url, HEALTH, "describe", [])
            if not isinstance(served, dict):
                raise BadAnswerError(f"no description but {str(served)[:80]!r}")
            if why := difference(self.weights.own, served, self.weights.longest):
                raise EngineError(f"rollout server {url}: {why}; {START}")
            if served["serves"] != self.weights.name:
                if not load:
                    raise BadAnswerError("it was given other weights, or has lost them, during the batch")
                await self._call(client, url, self.timeout, "take_policy", [self.weights.folder, self.weights.name])
        except FAILURES as error:
            self._leave_out(url, error)
            return True
        except StatusError as error:
            raise EngineError(f"rollout server {url}: {error}; {START}") from error
        return False

    async def _call(self, client: httpx.AsyncClient, url: str, timeout: float, method: str, given: list[str]) -> Any:
        """What a method of `PolicyWorker` returns on the first worker of a server."""

        def read(answer: Any, _: Body) -> Any:
            try:
                return answer["results"][0]
            except (KeyError, TypeError, IndexError) as error:
                raise BadAnswerError(f"no results but {str(answer)[:80]!r}") from error

        body = {"method": method, "args": given}
        return await post(client, f"{url}/collective_rpc", body, min(timeout, self.timeout), read)

    def _leave_out(self, url: str, error: Exception) -> None:
        if url not in self.lost:
            log.warning(f"rollout server {url}: {error}; its prompts go to the other servers, or wait for it")
        self.lost[url] = str(error)


def _client() -> httpx.AsyncClient:
    import httpx

    return httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None))
