"""judge_reward: a language model behind an OpenAI-compatible server grades each completion by a rubric."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from typing import Any

from .chat_client import ChatClient, Reply
from .completion import completion_text, visible_texts
from .facts import states
from .head_start import HeadStart, shared
from .ledger import BUDGET_KEYS, Ledger, digest
from .verdict import LONGEST_VERDICT_TOKENS, RESPONSE_FORMAT, TOP, NoVerdict, messages, read_verdict
from .waiting import Pace, Questions, TryAgain

RIGHT = 0.8  # judges seldom give full marks: 8 of 10 is right for the checks, gates and scores
_SETTINGS = {"temperature": 0.0, "max_tokens": LONGEST_VERDICT_TOKENS, "response_format": RESPONSE_FORMAT}


@states(top=RIGHT)
async def judge_reward(
    completions: list[Any],
    prompts: list[Any] | None = None,
    answer: list[Any] | None = None,
    log_metric: Any = None,
    *,
    rubric: str,
    model: str,
    base_url: str,
    key_from: str | None = None,
    show_answer: bool = False,
    concurrency: int = 16,
    per_minute: float | None = None,
    timeout_s: float = 60.0,
    retries: int = 3,
    usd_per_million: Sequence[float] | None = None,
    budget: Mapping[str, float] | None = None,
    cache: str | None = None,
    request: Mapping[str, Any] | None = None,
    prefilled: bool | None = None,
    passed_gate: list[bool] | None = None,
    head_start: HeadStart | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Return the judge's score of each completion, from 0 to 1 (whole tenths); 0.8 counts as right.

    Thinking is removed first; a completion that says nothing outside it gets 0 without being sent. The same request is
    asked once and kept on disk. A verdict that is no JSON by the schema, or out of range, is asked for again; a row
    without one after all retries fails, and never becomes a number.

    Formula: the judge's whole number / 10.

    Args:
        completions: text or chat messages.
        prompts: the tasks, shown to the judge.
        answer: right answers, shown to the judge with `show_answer`.
        log_metric: TRL's; gets `judge/calls`, `judge/cached`, `judge/retries`, `judge/saved`, `judge/tokens` and
            `judge/usd` of a batch. `judge/saved` are calls that a gate spared.
        rubric: what a good response does, in words.
        model: its name on the server.
        base_url: the server's address, up to `/v1`. There is no default: nothing is sent unless it is given.
        key_from: name of the environment variable that holds the server's key; None: no key is sent.
        show_answer: show the judge the row's `answer`.
        concurrency: most requests at once.
        per_minute: most requests a minute.
        timeout_s: longest attempt.
        retries: further attempts of a row. The server's `Retry-After` is kept, up to a minute.
        usd_per_million: price in US dollars of a million tokens, of the prompt and of the answer.
        budget: most `calls`, `tokens` and `usd`, over all runs that share the cache. In a recipe: limits.judge_budget.
        cache: file of verdicts and spending; None: `judge.sqlite` in grpo_lite's cache folder.
        request: further fields of the request, or others in place of ours; null leaves one out (`temperature: null`).
        prefilled: whether the prompt has opened the thinking.
        passed_gate: which completions count, from `rewards.gated` (`gate: true`); nobody is asked about the others.
        head_start: what was asked about rows of this batch before it was complete; its cost is counted here.
        kwargs: ignored.

    Returns:
        One score a completion.

    Raises:
        RowsFailed: rows without a verdict; its cause is `BudgetSpent` where the budget is.
        ValueError: an argument is wrong, or the environment lacks the key.
        JudgeServerError: the server refuses the request.

    Source: Zheng et al. 2023 (arXiv:2306.05685), grading a single answer; the cheats of `rewards.testing`.

    >>> import asyncio
    >>> judge = {"rubric": "Polite.", "model": "qwen3", "base_url": "http://localhost:11434/v1", "cache": ":memory:"}
    >>> asyncio.run(judge_reward(["  "], ["Say hello."], **judge))  # nothing is said, so nothing is sent
    [0.0]
    """
    budget, price = _checked(base_url, budget, usd_per_million)
    key = _key(key_from)
    rows = visible_texts(completions, prompts, prefilled)
    tasks = [completion_text(prompt) for prompt in prompts] if prompts is not None else [""] * len(rows)
    references = [str(gold) for gold in answer] if show_answer and answer is not None else [None] * len(rows)
    judge = {"base_url": base_url, "model": model, "rubric": rubric}
    settings = {"model": model, **_SETTINGS, **(request or {})}
    settings = {name: value for name, value in settings.items() if value is not None}
    counts = {"cached": 0.0, "saved": 0.0}

    def open_session() -> _Judging:
        client, pace = ChatClient(base_url, key, timeout_s), _pace(base_url, per_minute)
        questions: Questions[str] = Questions(concurrency=concurrency, timeout_s=timeout_s, retries=retries, pace=pace)
        file = Path(cache).expanduser() if cache else None
        return _Judging(client, Ledger(file, judge, budget), questions, price or ())

    scores: list[float | None] = [0.0 if not text.strip() else None for text in rows]
    requests: dict[str, dict[str, Any]] = {}
    asked: dict[str, list[int]] = {}  # rows by request: a group often says the same twice
    spared: set[str] = set()
    async with shared(head_start, open_session) as judging:
        for row, text in enumerate(rows):
            if scores[row] is not None:
                continue
            request = {**settings, "messages": messages(rubric, tasks[row], text, references[row])}
            name = digest({"base_url": base_url, **request})
            known = judging.known(name)
            if passed_gate is not None and not passed_gate[row]:
                scores[row] = 0.0
                spared |= {name} if known is None else set()
            elif known is None:
                requests[name] = request
                asked.setdefault(name, []).append(row)
            else:
                scores[row] = known / TOP
                counts["cached"] += 1
        counts["saved"] = float(len(spared - asked.keys()))
        try:
            await judging.questions.answer(scores, asked, lambda name: judging.verdict(name, requests[name]))
        finally:
            if log_metric is not None:
                for name, value in {**counts, **judging.counts}.items():
                    log_metric(f"judge/{name}", value)
    return scores


class _Judging:
    """What the calls about one batch share: the connection, the verdicts on disk, the questions and what they cost."""

    def __init__(self, client: ChatClient, ledger: Ledger, questions: Questions[str], price: Sequence[float]) -> None:
        self.client, self.questions, self.price = client, questions, price
        self.counts = dict.fromkeys(("calls", "retries", "tokens", "usd"), 0.0)
        self._tried: set[str] = set()
        self._open = AsyncExitStack()
        self.ledger = self._open.enter_context(ledger)
        self._open.push_async_exit(client)

    def known(self, name: str) -> int | None:
        """Return the score of a request that was answered before these calls; None for one that they have asked."""
        return None if name in self.questions else self.ledger.known(name)

    async def verdict(self, name: str, request: dict[str, Any]) -> float:
        """Ask once; keep the verdict, and count the call before it is made, and what it has cost after."""
        self.ledger.begin_call()
        self.counts["calls"] += 1
        self.counts["retries"] += name in self._tried
        self._tried.add(name)
        reply = await self.client.ask(request)
        tokens, usd = _cost(reply, self.ledger.budget, self.price)
        self.ledger.add(tokens, usd)
        self.counts["tokens"] += tokens
        self.counts["usd"] += usd
        try:
            score, reason = read_verdict(reply.content)
        except NoVerdict as error:
            raise TryAgain(f"the judge's answer is no verdict: {error}") from None
        self.ledger.keep(name, score, reason)
        return score / TOP

    def cancel(self) -> None:
        self.questions.cancel()

    async def close(self) -> None:
        """Stop asking, and close the connection and the file."""
        await self.questions.close()
        await self._open.aclose()


@cache
def _pace(base_url: str, per_minute: float | None) -> Pace:
    """Return one pace per server, which lasts from batch to batch."""
    return Pace(per_minute)


def _cost(reply: Reply, budget: Mapping[str, float], price: Sequence[float]) -> tuple[int, float]:
    """Return the tokens and US dollars of a reply; a budget of them needs a server that counts.

    Raises:
        ValueError: the server does not count, and the budget is in tokens or money.
    """
    if reply.prompt_tokens is None or reply.completion_tokens is None:
        if "tokens" in budget or "usd" in budget:
            raise ValueError(
                "judge_reward: the server does not say how many tokens a call took, so a budget of tokens or usd "
                "cannot be kept. Give a budget of calls."
            )
        return 0, 0.0
    per_prompt, per_answer = price or (0.0, 0.0)
    usd = (reply.prompt_tokens * per_prompt + reply.completion_tokens * per_answer) / 1e6
    return reply.prompt_tokens + reply.completion_tokens, usd


def _checked(
    base_url: str, budget: Mapping[str, float] | None, price: Sequence[float] | None
) -> tuple[dict[str, float], Sequence[float] | None]:
    if not re.match(r"https?://[^\s/@]+(/|$)", str(base_url)):
        raise ValueError(
            f"judge_reward: base_url {base_url!r} is given; write http://host:port/v1, without a name or a password"
        )
    limits = {key: value for key, value in (budget or {}).items() if value is not None}
    if strange := [key for key in limits if key not in BUDGET_KEYS]:
        raise ValueError(f"judge_reward: budget has {strange[0]!r}; allowed are {', '.join(BUDGET_KEYS)}")
    if price is not None and (len(price) != 2 or any(not 0 <= value < 1e6 for value in price)):
        raise ValueError(
            f"judge_reward: usd_per_million {price!r} is given; write the prices of a million tokens of the prompt "
            "and of the answer, as [0.15, 0.60]"
        )
    if "usd" in limits and price is None:
        raise ValueError("judge_reward: a budget in usd needs usd_per_million, the prices of prompt and answer")
    return limits, price


def _key(variable: str | None) -> str | None:
    """Return the key that an environment variable holds; the name only is ever shown."""
    if variable is None:
        return None
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", variable):
        raise ValueError(
            "judge_reward: key_from is the NAME of an environment variable, such as JUDGE_API_KEY, not the key"
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"judge_reward: the environment variable {variable} (key_from) is not set. Export the key.")
    return key
