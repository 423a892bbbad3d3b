"""What goes wrong in episodes with tools: one small pure function each, from Evidence to a Finding or None."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from grpo_lite.commands import hint
from grpo_lite.recipe.overrides import twice_the_cap
from grpo_lite.report.evidence import FEWEST, FLAT, Evidence, Finding, mean_of
from grpo_lite.report.turns import calls_of, turns_of

Row = Mapping[str, Any]
_MARKS = ("<tool_call", "[TOOL_CALLS]", "<function=", '"arguments":', "<|python_tag|>")  # how calls begin
_LOOP = 3  # the same call so often is a loop
_LONGEST = 120  # characters of a call or an error in a sentence


def tools_never_called(e: Evidence) -> Finding | None:
    """No episode of any step calls a tool, and none tries to."""
    if not _silent(e) or calls_malformed(e):
        return None
    return Finding(
        "tools_never_called",
        f"No tool was called in {e.last_step} steps. GRPO reinforces calls that occur, and none does: say in "
        "data.system when to call which tool, show whole episodes in a warm-up (docs/tools-and-environments.md), or "
        "take a model that was trained with tools.",
    )


def calls_malformed(e: Evidence) -> Finding | None:
    """Completions hold the text of calls that cannot be read as one, so nothing is called."""
    rows = e.rows() if e.recipe.has_tools else []
    broken = [row for row in rows if any(mark in row["completion"] for mark in _MARKS) and not _ends_with_call(row)]
    if len(rows) < FEWEST or len(broken) < 0.2 * len(rows):
        return None
    share, cut = len(broken) / len(rows), sum(bool(row.get("truncated")) for row in broken)
    start = f"{share:.0%} of the completions end in the text of a call that cannot be read"
    if cut > len(broken) / 2:
        cap = e.recipe.max_completion_length
        return Finding(
            "calls_malformed", f"{start}; {cut} of {len(broken)} are cut off at {cap} tokens.", twice_the_cap(e.recipe)
        )
    text = broken[-1]["completion"]
    at = min(text.index(mark) for mark in _MARKS if mark in text)
    return Finding(
        "calls_malformed",
        f"{start}, such as {_quoted(text[at:])}. Show the form in a warm-up, or take a model that was trained with "
        f"tools; {hint('check', recipe=e.recipe.name)} shows the schemas that the model reads.",
    )


def calls_fail(e: Evidence) -> Finding | None:
    """At least half of the calls give the model an error instead of a result."""
    share = e.late("tools/failure_frequency")
    if not share >= 0.5 or not e.late("tools/calls") > 0:
        return None
    errors = Counter(text for row in e.rows() for kind, text in turns_of(row.get("turns") or ()) if kind == "failed")
    most = f", most often {_quoted(errors.most_common(1)[0][0])}" if errors else ""
    return Finding(
        "calls_fail",
        f"{share:.0%} of the calls give the model an error{most}. Names, types and docstrings of the tools are what "
        f"the model knows of them: {hint('check', recipe=e.recipe.name)} shows them.",
    )


def paid_without_call(e: Evidence) -> Finding | None:
    """Episodes without a call earn as much as those with calls, so the tools teach nothing."""
    rows = [row for row in e.rows() if row["reward"] is not None] if e.recipe.has_tools else []
    without = [row for row in rows if not _calls(row)]
    called = [row for row in rows if _calls(row)]
    if len(without) < max(FEWEST, 0.2 * len(rows)) or not (plain := mean_of(without)) > FLAT:
        return None
    if len(called) >= FEWEST and plain < mean_of(called) - FLAT:
        return None
    against = f", those with calls {mean_of(called):.2f}" if len(called) >= FEWEST else ""
    return Finding(
        "paid_without_call",
        f"{len(without) / len(rows):.0%} of the episodes call no tool and earn {plain:.2f}{against}: the task is done, "
        f"or guessed, without tools. Pay what the environment saw (`environments` in a reward, or `get_reward`); "
        f"{hint('check-env', recipe=e.recipe.name)} plays cheats against it.",
    )


def call_loops(e: Evidence) -> Finding | None:
    """Episodes make the same call again and again."""
    rows = [row for row in e.rows() if _calls(row)]
    loops = [(most, row) for row in rows if (most := Counter(_calls(row)).most_common(1)[0])[1] >= _LOOP]
    if len(rows) < FEWEST or len(loops) < 0.2 * len(rows):
        return None
    call, times = max((most for most, _ in loops), key=lambda pair: pair[1])
    enough = max(2, *(len(set(_calls(row))) for _, row in loops))
    limit = e.recipe.grpo.get("max_tool_calling_iterations")
    shorter = limit is None or enough < limit
    return Finding(
        "call_loops",
        f"{len(loops) / len(rows):.0%} of the episodes with calls repeat one {_LOOP} times or more, such as "
        f"{_quoted(call)} {times} times.",
        f"grpo.max_tool_calling_iterations={enough}" if shorter else None,
    )


def episodes_at_limit(e: Evidence) -> Finding | None:
    """Episodes end with a call that is not answered: at the limit of turns, or where no room is left."""
    rows = e.rows() if e.recipe.has_tools else []
    cut = [row for row in rows if _ends_with_call(row)]
    if len(rows) < FEWEST or len(cut) < 0.3 * len(rows) or call_loops(e):
        return None
    limit: int | None = e.recipe.grpo.get("max_tool_calling_iterations")
    start = f"{len(cut) / len(rows):.0%} of the episodes end with a call that is not answered"
    if limit is not None and sum(_turns_with_calls(row) > limit for row in cut) > len(cut) / 2:
        return Finding(
            "episodes_at_limit",
            f"{start}, because {limit} turns with calls are over (reward {mean_of(cut):.2f}).",
            f"grpo.max_tool_calling_iterations={2 * limit}",
        )
    return Finding(
        "episodes_at_limit",
        f"{start}, because the result does not fit into {e.recipe.max_completion_length} tokens (reward "
        f"{mean_of(cut):.2f}). Results of tools count too: limits.tool_result_chars is "
        f"{e.recipe.limits.tool_result_chars}.",
        twice_the_cap(e.recipe),
    )


def explains_zero(e: Evidence) -> bool:
    """Return whether a finding on the tools already explains that no episode earns anything."""
    return any(find(e) for find in (tools_never_called, calls_malformed, calls_fail, episodes_at_limit))


def _silent(e: Evidence) -> bool:
    calls = e.series("tools/calls")
    return len(calls) >= FEWEST and not any(calls)


def _calls(row: Row) -> list[str]:
    return calls_of(row.get("turns") or ())


def _turns_with_calls(row: Row) -> int:
    return sum(bool(message.get("tool_calls")) for message in row.get("turns") or ())


def _ends_with_call(row: Row) -> bool:
    turns = row.get("turns") or [{}]
    return bool(turns[-1].get("tool_calls"))


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")
