"""A reward computed by another process, over HTTP."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from src.errors import RewardError, require

if TYPE_CHECKING:  # imported late, as only this reward needs them
    import httpx


class BadAnswerError(RuntimeError):
    """An invalid answer; the request may be repeated."""


class HttpReward:
    """Posts {"query": prompt + response, "prompts", "labels"} and reads {"rewards": one number per query}.

    The protocol of OpenRLHF's remote reward models. Texts are sent in pieces of `batch_size`, at most `concurrency` at
    a time. A request is repeated up to `attempts` times, with random waits that double, when the connection fails, the
    answer takes longer than `timeout` seconds, its status is not 200, or it is not a list of as many numbers.
    """

    def __init__(
        self, url: str, timeout: float, attempts: int, concurrency: int, batch_size: int, label_column: str,
        token_variable: str,
    ) -> None:  # fmt: skip
        require(url.startswith(("http://", "https://")), "url", url, "an address that starts with http:// or https://")
        require(timeout > 0, "timeout", timeout, "greater than 0 seconds")
        for name, value in (("attempts", attempts), ("concurrency", concurrency), ("batch_size", batch_size)):
            require(value >= 1, name, value, "at least 1")
        self.url, self.timeout, self.attempts = url, timeout, attempts
        self.concurrency, self.batch_size, self.label_column = concurrency, batch_size, label_column
        self.token_variable = token_variable

    def score(self, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        """One number per text. Raises `RewardError` when all attempts for a piece failed."""
        import httpx

        starts = range(0, len(prompts), self.batch_size)
        token = os.environ.get(self.token_variable, "").strip()
        headers = {b"Authorization": f"Bearer {token}".encode()} if token else {}
        with (
            httpx.Client(timeout=self.timeout, headers=headers) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            pieces = [slice(start, start + self.batch_size) for start in starts]
            jobs = [pool.submit(self._request, client, prompts[p], responses[p], metadata[p]) for p in pieces]
            try:
                return [score for job in jobs for score in job.result()]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # one failed: cancel the others

    def _request(
        self, client: httpx.Client, prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """The scores of one piece, after up to `attempts` requests."""
        import httpx
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

        body = {
            "query": [prompt + response for prompt, response in zip(prompts, responses, strict=True)],
            "prompts": prompts,
            "labels": [row.get(self.label_column, "") for row in metadata],
        }
        retrying = Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_random_exponential(multiplier=0.1, max=10),
            retry=retry_if_exception_type((httpx.RequestError, BadAnswerError)),
            reraise=True,
        )
        try:
            return retrying(self._post, client, body)
        except (httpx.RequestError, BadAnswerError) as error:
            what = str(error) or type(error).__name__
            raise RewardError(
                f"reward server {self.url}: {self.attempts} failed attempts for {len(prompts)} texts, the first of "
                f"them {body['query'][0][:80]!r}; the last time: {what}"
            ) from error

    def _post(self, client: httpx.Client, body: dict[str, Any]) -> list[float]:
        answer = client.post(self.url, json=body)
        if answer.status_code in (401, 403, 404, 413):  # a repeated request would fail too
            raise RewardError(f"reward server {self.url}: status {answer.status_code}: {answer.text[:200]}")
        if answer.status_code != 200:
            raise BadAnswerError(f"status {answer.status_code}")
        try:
            scores = answer.json()["rewards"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # JSONDecodeError is a ValueError
            raise BadAnswerError(f'no {{"rewards": [...]}} but {answer.text[:80]!r}') from error
        wanted = len(body["query"])
        if not isinstance(scores, list) or len(scores) != wanted:
            raise BadAnswerError(f"{len(scores) if isinstance(scores, list) else scores!r} scores for {wanted} texts")
        if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
            raise BadAnswerError(f"a score that is not a number: {scores[:5]!r}")
        return [float(score) for score in scores]
