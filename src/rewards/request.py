"""Asking a JSON service: one deadline per request, patience while it is away, its own words when it refuses."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from asyncio import sleep
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from src.errors import NO_SECRETS, ConfigError, RewardError, require, without_secrets

if TYPE_CHECKING:  # imported late, as only rewards that ask others need them
    import httpx
    from tenacity import RetryCallState
    from tenacity.wait import wait_base

log = logging.getLogger(__name__)

T = TypeVar("T")
Body = dict[str, Any]
OF_THE_BODY = (400, 413, 422)  # statuses that refuse one body, maybe not the next one
AWAY = (408, 425, 429, 500, 502, 503, 504)  # statuses of a server that may answer later; any other stays as it is


class AwayError(RuntimeError):
    """The server does not answer now; carries the seconds after which it wants to be asked again (None: not said)."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


class BadAnswerError(RuntimeError):
    """An answer that cannot be used; the request may be repeated."""


class StatusError(RuntimeError):
    """A status that another attempt would not change."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(what)
        self.status = status


class NoAnswerError(RewardError):
    """One body has no usable answer, after all attempts; the service may answer others."""


@dataclass(frozen=True)
class Service:
    """An address that takes JSON by POST and answers with JSON.

    One request takes at most `timeout` seconds, from looking up the address to the last byte. It is repeated for
    `patience` seconds while the server is away (no connection, no answer in time, status 408, 425, 429 or 5xx), and
    up to `attempts` times when the answer cannot be used; any other status than 200 ends it. Waits are random and
    double up to 10 s, and are at least what `Retry-After` says. At most `concurrency` requests run at a time. The
    environment variable `token_variable` holds the bearer token, or, with a space in it, the whole header
    (`Basic ...`); empty or not set: none is sent.
    """

    name: str  # what it is, in messages
    url: str
    timeout: float
    patience: float
    attempts: int
    concurrency: int
    token_variable: str

    def __post_init__(self) -> None:
        """Refuse what cannot work, and an address that would store a password with the run."""
        if without_secrets(self.url) != self.url:
            raise ConfigError(f"{self.name} {without_secrets(self.url)}: {NO_SECRETS}")
        require(is_address(self.url), "url", self.url, "an address that starts with http:// or https://")
        for name, value in (("timeout", self.timeout), ("patience", self.patience)):
            require(value > 0, name, value, "greater than 0 seconds")
        for name, value in (("attempts", self.attempts), ("concurrency", self.concurrency)):
            require(value >= 1, name, value, "at least 1")

    def ask(self, bodies: list[Body], read: Callable[[Any, Body], T], about: Callable[[Body], str]) -> list[T]:
        """What `read` takes from the answer to each body; `about` names a body in messages.

        `read` raises `BadAnswerError` for an answer that cannot be used. Raises `RewardError` as soon as one of the
        bodies has no usable answer.
        """
        return in_own_loop(lambda: self._ask_all(bodies, read, about))

    def ask_each(
        self, bodies: list[Body], read: Callable[[Any, Body], T], about: Callable[[Body], str]
    ) -> list[T | NoAnswerError]:
        """The same, with the error in place of the answer to a body that has none.

        Raises `RewardError` for a status that no other body can change, such as 401 and 404.
        """

        async def kept(answer: Coroutine[Any, Any, T]) -> T | NoAnswerError:
            try:
                return await answer
            except NoAnswerError as error:
                return error

        return in_own_loop(lambda: self._ask_all(bodies, read, about, kept))

    async def _ask_all(
        self, bodies: list[Body], read: Callable[[Any, Body], T], about: Callable[[Body], str],
        kept: Callable[[Coroutine[Any, Any, T]], Coroutine[Any, Any, Any]] = lambda answer: answer,
    ) -> list[Any]:  # fmt: skip
        import httpx

        token = os.environ.get(self.token_variable, "").strip()
        headers = {b"Authorization": (token if " " in token else f"Bearer {token}").encode()} if token else {}
        turn = asyncio.Semaphore(self.concurrency)
        async with httpx.AsyncClient(headers=headers, timeout=None) as client:

            async def one(body: Body) -> T:
                async def post() -> T:
                    return await self._post(client, body, token, read)

                async with turn:
                    return await self._patiently(post, about(body))

            jobs = [asyncio.create_task(kept(one(body))) for body in bodies]
            try:
                return await asyncio.gather(*jobs)
            finally:  # one failed: cancel the others
                for job in jobs:
                    job.cancel()

    async def _patiently(self, post: Callable[[], Coroutine[Any, Any, T]], about: str) -> T:
        """The answer to one body, asked for until there is one or patience ends."""
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_before_delay, wait_random_exponential

        invalid = 0

        def too_many(state: RetryCallState) -> bool:
            nonlocal invalid
            invalid += isinstance(state.outcome and state.outcome.exception(), BadAnswerError)
            return invalid >= self.attempts

        retrying = AsyncRetrying(
            stop=lambda state: stop_before_delay(self.patience)(state) or too_many(state),
            wait=_no_sooner_than_asked(wait_random_exponential(multiplier=0.1, max=10)),
            retry=retry_if_exception_type((AwayError, BadAnswerError)),
            sleep=sleep,
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            return await retrying(post)
        except (AwayError, BadAnswerError) as error:
            tries = retrying.statistics["attempt_number"]
            raise NoAnswerError(
                f"{self.name} {self.url}: {tries} failed attempts {about}; the last time: {error}"
            ) from error

    async def _post(self, client: httpx.AsyncClient, body: Body, token: str, read: Callable[[Any, Body], T]) -> T:
        """One request. Raises `AwayError`, `BadAnswerError`, or `RewardError` for a status that will stay."""
        try:
            return await post(client, self.url, body, self.timeout, read, token)
        except StatusError as error:
            kind = NoAnswerError if error.status in OF_THE_BODY else RewardError
            raise kind(f"{self.name} {self.url}: {error}") from error

    def _tell(self, state: RetryCallState) -> None:
        """Say once, after about a second, why nothing happens: at the first attempt if it took as long."""
        slow = (state.seconds_since_start or 0.0) > 1
        if state.outcome is not None and (state.attempt_number == 4 or (state.attempt_number == 1 and slow)):
            log.warning(f"{self.name} {self.url}: {state.outcome.exception()}; asked again for {self.patience:g} s")


async def post(
    client: httpx.AsyncClient, url: str, body: Body, timeout: float, read: Callable[[Any, Body], T], secret: str = ""
) -> T:
    """What `read` takes from the answer to one body, whose last byte comes within `timeout` seconds.

    Raises `AwayError` for a server that may answer later, `StatusError` for a status that will stay, both without
    `secret`, and `BadAnswerError`.
    """
    import httpx

    try:
        async with asyncio.timeout(timeout):
            answer = await client.post(url, json=body)
    except TimeoutError as error:
        raise AwayError(f"no whole answer within {timeout:g} s") from error
    except httpx.RequestError as error:
        raise AwayError(str(error) or type(error).__name__) from error
    if answer.status_code != 200:
        words = " ".join(answer.text.replace(secret or "\0", "...").split())[:200]
        moved = answer.headers.get("Location") if answer.is_redirect else None
        words = f"moved to {moved}, which is not followed: give that address" if moved else words
        what = f"status {answer.status_code}" + (f": {words}" if words else "")
        if answer.status_code in AWAY:
            raise AwayError(what, _seconds(answer.headers.get("Retry-After", "")))
        raise StatusError(what, answer.status_code)
    try:
        content = answer.json()
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        raise BadAnswerError(f"no JSON but {answer.text[:80]!r}") from error
    return read(content, body)


def in_own_loop(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The result of a coroutine in a thread with its own event loop; the process never waits for it at its end."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(asyncio.run(work()))
        except BaseException as error:  # raised again in the waiting thread
            done.set_exception(error)

    threading.Thread(target=run, daemon=True, name="requests").start()
    return done.result()


def _no_sooner_than_asked(otherwise: wait_base) -> Callable[[RetryCallState], float]:
    """The wait before the next attempt in seconds, at least what the server asked for."""

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(otherwise(state), getattr(error, "after", None) or 0.0)

    return wait


def _seconds(retry_after: str) -> float | None:
    """The seconds of a `Retry-After` header, which is a number or a date; None for anything else."""
    try:
        return float(retry_after) if retry_after.isdigit() else parsedate_to_datetime(retry_after).timestamp() - time()
    except ValueError:
        return None


def is_address(url: str) -> bool:
    """Whether it has a scheme, a host and, if any, a port that is a number."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
