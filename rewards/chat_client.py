"""One question to an OpenAI-compatible server: what may be tried again, how long to wait, and how much is read.

The HTTP client is httpx (extra `judge`). huggingface_hub's AsyncInferenceClient does not serve here: it refuses under
HF_HUB_OFFLINE=1, which a run with a local judge may well set, and it sends the Hub's token where none is given.
"""

from __future__ import annotations

import email.utils
import json
import ssl
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

from .waiting import TryAgain

LARGEST_ANSWER_BYTES = 1 << 20
_TRANSIENT = {408, 409, 425, 429}  # and all from 500


class JudgeServerError(RuntimeError):
    """The server refuses: trying again would not help."""


@dataclass(frozen=True)
class Reply:
    """What the server answered: the message, and the tokens it counted (None: not said)."""

    content: Any
    prompt_tokens: int | None
    completion_tokens: int | None


class ChatClient:
    """Asks `POST {base_url}/chat/completions`. An async context manager.

    Args:
        base_url: such as `http://localhost:8000/v1`.
        key: sent as a bearer token; None: none.
        timeout_s: longest wait for a connection, and for each piece of the answer.
    """

    def __init__(self, base_url: str, key: str | None, timeout_s: float) -> None:
        try:
            import httpx
        except ImportError:
            raise ModuleNotFoundError(
                "judge_reward needs httpx: pip install 'grpo-lite[judge]' (in a checkout: .venv/bin/pip install httpx)"
            ) from None
        self._errors = httpx.HTTPError
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # No redirects: the key goes to the address that the recipe names.
        verify = _certificates() if self.url.startswith("https:") else False  # nothing to verify without TLS
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout_s, follow_redirects=False, verify=verify)

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    async def ask(self, request: dict[str, Any]) -> Reply:
        """Send one request.

        Raises:
            TryAgain: the server is busy, broken or not there, or its answer is not one.
            JudgeServerError: it refuses the request.
        """
        try:
            async with self._client.stream("POST", self.url, json=request) as response:
                body = b""
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > LARGEST_ANSWER_BYTES:
                        raise TryAgain(f"the judge's answer is larger than {LARGEST_ANSWER_BYTES >> 20} MiB")
                status, headers = response.status_code, response.headers
        except self._errors as error:
            raise TryAgain(f"the judge at {self.url} cannot be asked ({type(error).__name__}: {error})") from None
        if status in _TRANSIENT or status >= 500:
            raise TryAgain(f"the judge answers HTTP {status}", _seconds(headers.get("retry-after")))
        if status != 200:
            raise JudgeServerError(f"the judge at {self.url} answers HTTP {status}: {_said(body)}")
        return _reply(body)


@cache
def _certificates() -> ssl.SSLContext:
    """Return the trusted certificates; reading them takes 0.2 s, and there is a client for every batch."""
    import httpx

    return httpx.create_ssl_context()


def _reply(body: bytes) -> Reply:
    try:
        answer = json.loads(body)
        content = answer["choices"][0]["message"]["content"]
        usage = answer.get("usage") or {}
        return Reply(content, _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise TryAgain(f"the judge's answer is no chat completion: {_said(body)}") from None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40 else None


def _said(body: bytes) -> str:
    """Return the beginning of what a server said, on one line."""
    return repr(body[:200].decode("utf-8", "replace"))


def _seconds(retry_after: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header, which is a number or a date; None where it is neither."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
