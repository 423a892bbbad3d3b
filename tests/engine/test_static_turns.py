"""Turns in static rows: what was read stays in the buffers, and only what is new is read."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from grpo_lite.engine import static_decode
from grpo_lite.engine.conversations import Conversations
from grpo_lite.engine.decode import GroupDecoder
from grpo_lite.engine.static_decode import StaticDecoder, engine_of
from tests.engine.test_conversations import CAP, assert_only_new_tokens_are_read, play, prepared, prompts, turn

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")


def is_static(model: Any) -> bool:
    engine = engine_of(model.get_base_model())
    return engine.is_checked and engine.obstacle is None


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        pytest.param("qwen3", marks=[pytest.mark.slow, pytest.mark.matrix]),
        pytest.param("gemma", marks=[pytest.mark.slow, pytest.mark.matrix]),
        "lfm2",
        pytest.param("qwen3_5", marks=pytest.mark.slow),
    ],
)
def test_a_turn_continues_as_if_the_whole_conversation_were_read(kind: str) -> None:
    model = prepared(kind)
    conversations, read = play(model, decoder=StaticDecoder)
    assert len(read) == 4
    assert conversations.reused_tokens > 0
    assert conversations.reread_rows == conversations.changed_rows == 0
    assert is_static(model)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("mistral", {"sliding_window": 9}, id="window in every layer"),
        pytest.param("gemma2", {"sliding_window": 7, "attn_implementation": "eager"}, id="window, capped scores"),
    ],
)
def test_windows_move_with_each_rows_own_tokens(kind: str, settings: dict[str, Any]) -> None:
    model = prepared(kind, **settings)
    conversations, read = play(model, decoder=StaticDecoder)
    assert len(read) == 4
    assert conversations.reused_tokens > 0
    assert is_static(model)


def test_only_new_tokens_are_read() -> None:
    assert_only_new_tokens_are_read(StaticDecoder)


@pytest.mark.parametrize("read_at_once", [7, pytest.param(30, marks=pytest.mark.slow)])
def test_new_tokens_are_read_in_passes_of_a_bounded_size(read_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long result is divided, too; the tokens that follow are the same."""
    passes: list[int] = []
    read = static_decode._read_behind

    def watched(model: Any, cache: Any, new: Any) -> Any:
        passes.append(len(new) * max(len(ids) for *_, ids in new))
        return read(model, cache, new)

    monkeypatch.setattr(static_decode, "READ_AT_ONCE", read_at_once)
    monkeypatch.setattr(static_decode, "_read_behind", watched)
    play(prepared("lfm2"), turns=3, decoder=StaticDecoder)
    assert 1 < max(passes[1:]) <= read_at_once  # the first one is the self-check's


def test_the_same_tokens_are_drawn_as_if_every_turn_were_read_whole() -> None:
    """Rows that moved when the batch was halved stand in their order again."""
    model, drawn = prepared(), []
    for keeps in (True, False):
        conversations, rows, found = Conversations(CAP), prompts(groups=4, size=5), []
        starts = [len(row) for row in rows]
        torch.manual_seed(3)
        for _ in range(3):
            kept = conversations if keeps else Conversations(CAP)
            if not keeps:
                kept._starts = conversations._starts = conversations._starts or sorted(
                    set(map(tuple, rows)), key=len, reverse=True
                )
            answers = turn(model, rows, CAP, StaticDecoder(nullcontext, conversations=kept), do_sample=True, top_k=0)
            found.append(answers)
            going = [i for i, answer in enumerate(answers) if len(rows[i]) + len(answer) < starts[i] + 40]
            starts = [starts[i] for i in going]
            rows = [rows[i] + answers[i] + [5, 6] for i in going]
        drawn.append(found)
        assert (conversations.reused_tokens > 0) == keeps
    assert drawn[0] == drawn[1]
    assert len(drawn[0][1]) > 5


@pytest.mark.parametrize(
    ("kind", "kv_tokens"),
    [("llama", 4 * 128), ("lfm2", 4 * 128), pytest.param("llama", 1, marks=[pytest.mark.slow, pytest.mark.matrix])],
)
def test_rows_whose_place_was_given_away_are_read_again(kind: str, kv_tokens: int) -> None:
    """Twelve rows in four places, or in one."""
    model = prepared(kind)
    conversations, read = play(model, kv_tokens=kv_tokens, decoder=StaticDecoder)
    assert conversations.reread_rows > 0
    assert conversations.changed_rows == 0
    assert conversations.reused_tokens > 0
    assert len(read) > 2
    batch = engine_of(model.get_base_model())._batch
    assert batch is not None
    assert batch.rows == max(1, kv_tokens // 128)
    assert is_static(model)


@pytest.mark.parametrize("kind", ["llama", pytest.param("lfm2", marks=pytest.mark.slow)])
def test_a_changed_turn_is_read_again_from_where_it_differs(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    conversations, _ = play(prepared(kind), change=2, decoder=StaticDecoder)
    assert conversations.changed_rows == 1
    assert "1 rows came back from a tool with earlier turns changed" in caplog.text


def test_what_is_noted_in_a_later_turn_is_what_the_model_computes() -> None:
    model, rows = prepared(), prompts()
    conversations = Conversations(CAP)
    for _ in range(3):
        decoder = StaticDecoder(nullcontext, conversations=conversations, temperature=0.7)
        torch.manual_seed(3)
        answers = turn(model, rows, CAP, decoder, do_sample=True, temperature=0.7, top_k=0)
        for row, answer, logps in zip(rows, answers, decoder.rollout.logps, strict=True):
            ids = torch.tensor([row + answer[: len(logps)]])
            with torch.no_grad():
                log_p = torch.log_softmax(model(input_ids=ids).logits[0, len(row) - 1 : -1] / 0.7, dim=-1)
            own = log_p.gather(1, ids[0, len(row) :].unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(torch.tensor(logps), own, atol=1e-4, rtol=0)
        rows = [row + answer + [9, 8, 7] for row, answer in zip(rows, answers, strict=True) if len(answer) < 12]
    assert conversations.reused_tokens > 0
    assert is_static(model)


@pytest.mark.parametrize("what", ["other rows", "given back", "another decoder"])
def test_rows_that_lie_there_no_more_are_read_whole(what: str) -> None:
    """Other rows were decoded in their buffers, the buffers were given back, or the decoder stepped aside."""
    model, rows = prepared(), prompts(groups=2, size=3)
    conversations = Conversations(CAP)
    answers = turn(model, rows, CAP, StaticDecoder(nullcontext, conversations=conversations))
    following = [row + answer + [7] for row, answer in zip(rows, answers, strict=True) if len(answer) < CAP]
    assert following
    engine = engine_of(model.get_base_model())
    decoder: Any = StaticDecoder(nullcontext, conversations=conversations)
    if what == "other rows":
        turn(model, [[5, 6, 7, 8]], 20, StaticDecoder(nullcontext))
    elif what == "given back":
        engine.release()
    else:
        decoder = GroupDecoder(nullcontext, conversations=conversations)
    whole = turn(model, following, CAP)
    left = [CAP + len(conversations.start(tuple(row))) - len(row) for row in following]
    assert turn(model, following, CAP, decoder)[0][: left[0]] == whole[0][: left[0]]
    assert conversations.reused_tokens == 0
    assert conversations.reread_rows == len(following)


@pytest.mark.slow
def test_a_step_that_fails_in_a_later_turn_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = prepared(), []
    read = static_decode._read_behind

    def fail_later(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no such kernel")
        return read(*given)

    monkeypatch.setattr(static_decode, "_read_behind", fail_later)
    conversations, turns = play(model, decoder=StaticDecoder)
    assert len(turns) == 4
    assert engine_of(model.get_base_model()).obstacle == "RuntimeError: no such kernel"
    assert conversations.reused_tokens > 0


def test_memory_that_runs_out_in_a_later_turn_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = prepared(), prompts(groups=2, size=3)
    conversations = Conversations(CAP)
    answers = turn(model, rows, CAP, StaticDecoder(nullcontext, conversations=conversations))
    following = [row + answer + [7] for row, answer in zip(rows, answers, strict=True) if len(answer) < CAP]

    def overflow(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(static_decode, "_read_behind", overflow)
        with pytest.raises(torch.OutOfMemoryError):
            turn(model, following, CAP, StaticDecoder(nullcontext, conversations=conversations))
    engine = engine_of(model.get_base_model())
    assert engine._batch is None
    conversations.clear()
    decoder = StaticDecoder(nullcontext, 128, conversations=conversations)
    turn(model, following, CAP, decoder)
    assert decoder.rollout.prefill_tokens >= sum(len(row) - len(conversations.start(tuple(row))) for row in following)
    assert is_static(model)
