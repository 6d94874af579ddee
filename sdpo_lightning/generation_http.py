"""Rank 2: answers by any endpoint that speaks OpenAI's chat format, over HTTP of the standard library."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from sdpo_lightning.generation import Answer, Generator, Message, Prompt, Sampling
from sdpo_lightning.redaction import HIDDEN, hide_in_text
from sdpo_lightning.types import ConfigurationError

# Too many requests, or the server's own trouble: worth another try.
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
_LONGEST_WAIT = 60.0


class OpenAIGenerator(Generator):
    """A model behind `URL/chat/completions`: vLLM's server, llama.cpp's, a provider's.

    A text prompt is sent as the one turn of a user.

    Args:
        url: up to and with the version, as `http://localhost:8000/v1`.
        model: its name there.
        api_key_env: name of the environment variable that holds the key; None sends none. The key itself is taken by no
            setting, and is written nowhere.
        timeout: seconds until an answer must be there.
        retries: further tries after a timeout, a broken connection or a server that is busy or at fault.
        wait: seconds before the first of them, doubled each time.
        parallel: requests at a time.
        tokens_field: what the endpoint calls the most tokens of an answer; some want `max_completion_tokens`.

    Raises:
        ConfigurationError: no http address, one with a password in it, an empty or missing environment variable, a
            number outside its range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        wait: float = 1.0,
        parallel: int = 4,
        tokens_field: str = "max_tokens",
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"the endpoint is {hide_in_text(url)!r}, expected http://... or https://...")
        if parts.username or parts.password or parts.query:
            raise ConfigurationError(
                "the endpoint's address has a user, a password or a query in it, which would stand in records; name "
                "the environment variable of a key instead"
            )
        if timeout <= 0 or retries < 0 or wait < 0 or parallel < 1:
            raise ConfigurationError(
                f"`timeout` {timeout}, `retries` {retries}, `wait` {wait}, `parallel` {parallel} of an endpoint: "
                "expected above 0, at least 0, at least 0, at least 1"
            )
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ConfigurationError(f"the environment variable {api_key_env!r} for the endpoint's key is not set")
        self.url, self._model, self._key_env = url.rstrip("/"), model, api_key_env
        self._timeout, self._retries, self._wait, self._parallel = timeout, retries, wait, parallel
        self._tokens_field = tokens_field
        # A redirect would take the key along to another host.
        self._opener = urllib.request.build_opener(_NoRedirect())

    @property
    def model_name(self) -> str:
        """The model's name at the endpoint."""
        return self._model

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Answer]]:
        """See `Generator.generate`. One request an answer; the k-th has seed + k."""
        jobs = [(prompt, number) for prompt in prompts for number in range(sampling.answers)]
        pool = ThreadPoolExecutor(self._parallel)
        try:
            found = list(pool.map(lambda job: self._ask(job[0], job[1], sampling), jobs))
        finally:
            # After a failure the requests that haven't begun are dropped.
            pool.shutdown(cancel_futures=True)
        return [found[place : place + sampling.answers] for place in range(0, len(found), sampling.answers)]

    def _ask(self, prompt: Prompt, number: int, sampling: Sampling) -> Answer:
        messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        reply = self._post(
            {
                "model": self._model,
                "messages": messages,
                self._tokens_field: sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": sampling.seed + number,
                "n": 1,
            }
        )
        try:
            choice = reply["choices"][0]
            # None where the model has said nothing.
            return Answer(choice["message"]["content"] or "", choice.get("finish_reason") == "stop")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise OSError(
                f"{self.url} answered {self._clean(json.dumps(reply))}, expected OpenAI's chat format"
            ) from error

    def _post(self, body: dict[str, Any]) -> Any:
        failure = ""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(self._wait * 2 ** (attempt - 1), _LONGEST_WAIT))
            try:
                with self._opener.open(self._request(body), timeout=self._timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                failure = f"{error.code} {self._clean(error.read().decode(errors='replace'))}"
                if error.code not in _PASSING:
                    break
            except (OSError, HTTPException) as error:
                failure = self._clean(str(error) or type(error).__name__)
            except ValueError as error:
                failure = f"no JSON: {self._clean(str(error))}"
        # Without the chain, whose request has the key.
        raise OSError(f"{self.url}, model {self._model!r}, after {attempt + 1} tries: {failure}") from None

    def _request(self, body: dict[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self._key_env, '')}"
        return urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)

    def _clean(self, text: str) -> str:
        """What a server says may hold the key that it was sent."""
        key = os.environ.get(self._key_env, "") if self._key_env is not None else ""
        text = text.replace(key, HIDDEN) if key else text
        return " ".join(hide_in_text(text).split())[:300]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """No request: urllib raises HTTPError with the redirect's own code."""
        return None
