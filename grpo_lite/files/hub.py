"""The Hub's errors as messages without tokens or signed addresses, and a short wait where the Hub does not answer.

Errors of the network are known by `huggingface_hub.errors.HTTPError`, the base class of the HTTP library that
huggingface_hub itself uses: httpx in 1.x, httpx2 in 2.x.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

HUB_PATIENCE_S = 5.0


def hub_message(error: BaseException, repo_id: str) -> str | None:
    """Return a message for people, or None where the Hub, the network and the account are not at fault."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    chain = _chain(error)
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it and push again."
    for cause in chain:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return _by_status(status, repo_id, _server_words(cause))
    for cause in chain:
        # A refused file comes with status 200.
        if isinstance(cause, ValueError) and str(cause).startswith("LFS batch API"):
            return f"the Hub refused a file: {str(cause).partition(':')[2].strip()[:500]}. Fix that and push again."
    if any(isinstance(cause, HTTPError | ConnectionError | TimeoutError) for cause in chain):
        return (
            "the connection to the Hub broke. Nothing is visible there yet, and the Hub keeps what was sent: give the "
            "same command again to send the rest."
        )
    return None


@cache
def hub_answers() -> bool:
    """Return whether the Hub answers within a few seconds, asked once."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE_S)
    except (HTTPError, ConnectionError):  # the second: HF_HUB_OFFLINE is set
        return False
    return True


@contextlib.contextmanager
def only_cache_if_unreachable() -> Iterator[None]:
    """Let the libraries below use only their caches while the Hub does not answer.

    Left alone they retry: 45 s until a dataset is given up (huggingface_hub 1.x, datasets 4.x).
    """
    from huggingface_hub import constants

    modules: list[Any] = [constants, *([sys.modules["datasets"].config] if "datasets" in sys.modules else [])]
    before = [module.HF_HUB_OFFLINE for module in modules]
    if not hub_answers():
        for module in modules:
            module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _by_status(status: int, repo_id: str, words: str) -> str:
    owner = repo_id.partition("/")[0]
    reply = f" The Hub says: {words}" if words else ""
    if status == 401:
        return f"the Hub does not accept your token (401).{reply} Log in again: `hf auth login`, or set a new HF_TOKEN."
    if status == 403:
        return (
            f"your token may not write to {owner} (403).{reply} Use a token with write access to it (its settings page "
            f"on the Hub), or push under your own name."
        )
    if status == 404:
        return f"there is no {owner} on the Hub, or you may not see {repo_id} (404).{reply} Check the name."
    if status in (409, 412):
        return (
            f"someone else is changing the repository, or has changed it meanwhile ({status}).{reply} Look at it, and "
            "run the same command again."
        )
    if status == 429 or status >= 500:
        return f"the Hub is busy or down ({status}).{reply} It keeps what was sent: run the same command again later."
    return f"the Hub refused ({status}).{reply} Fix what it names and push again."


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def _server_words(cause: BaseException) -> str:
    from huggingface_hub import get_token

    words = str(getattr(cause, "server_message", None) or "").strip().replace("\n", " ")[:300]
    for secret in (os.environ.get("HF_TOKEN"), get_token()):
        if secret:
            words = words.replace(secret, "…")
    return words


def hub_unreachable(key: str, what: str, error: BaseException) -> str:
    """Return the message for something that is neither cached nor reachable; the caller ends the sentence."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    why = "HF_HUB_OFFLINE is set" if offline else f"the Hub cannot be reached ({type(error).__name__})"
    return (
        f"{key}: {what} is not in the local cache and {why}. Connect once (and unset HF_HUB_OFFLINE) to download it, "
        "or copy it here and give its path"
    )
