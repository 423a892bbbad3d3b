"""Network errors become messages whatever HTTP library huggingface_hub uses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.errors
import pytest

from grpo_lite.files import hub


class HTTPError(Exception):
    """Stands for httpx2's base class."""


class ConnectError(HTTPError):
    """Stands for httpx2's: nobody answers at that address."""


@pytest.fixture
def httpx2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A huggingface_hub of the 2.x series: its errors are httpx2's, and httpx is not installed."""

    def head(address: str, timeout: float) -> None:
        raise ConnectError("connection refused")

    assert callable(huggingface_hub.get_session)  # the real one is loaded, so that importing is over
    monkeypatch.setitem(sys.modules, "httpx", None)  # importing it raises ImportError
    monkeypatch.setattr(huggingface_hub.errors, "HTTPError", HTTPError)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
    hub.hub_answers.cache_clear()
    yield
    hub.hub_answers.cache_clear()


def test_a_hub_that_does_not_answer_is_noticed_without_httpx(httpx2: None) -> None:
    assert not hub.hub_answers()


def test_a_broken_connection_becomes_a_message_without_httpx(httpx2: None) -> None:
    assert "the connection to the Hub broke" in str(hub.hub_message(ConnectError("reset"), "me/sums"))


def test_an_error_of_ours_is_left_alone(httpx2: None) -> None:
    assert hub.hub_message(KeyError("weight"), "me/sums") is None
