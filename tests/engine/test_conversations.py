"""Rows of several turns: the tokens of `generate` on the whole conversation, though only what is new is read."""

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from grpo_lite.engine import attention
from grpo_lite.engine.conversations import Conversations
from grpo_lite.engine.decode import GroupDecoder, hidden_states, state_tokens
from grpo_lite.engine.generate import left_padded
from grpo_lite.engine.static_decode import StaticDecoder
from tests.tiny import tiny_lora, tiny_model

ENDS = list(range(200, 260))  # 60 of 320 tokens end a turn, so that rows end theirs at different steps
CAP = 60
Rows = list[list[int]]


def prepared(kind: str = "llama", **overrides: Any) -> Any:
    model = tiny_lora(tiny_model(kind, **({"tie_word_embeddings": False} | overrides)))
    attention.install(model.get_base_model())
    return model


def prompts(groups: int = 3, size: int = 4, seed: int = 0) -> Rows:
    """Return the prompts of all rows, of different lengths."""
    rng = random.Random(seed)
    made = [[rng.randrange(3, 199) for _ in range(5 + 7 * group)] for group in range(groups)]
    return [made[group] for group in range(groups) for _ in range(size)]


def turn(model: Any, rows: Rows, cap: int, decoder: GroupDecoder | None = None, **settings: Any) -> Rows:
    """Return what follows each row, up to the end of its turn."""
    ids, mask = left_padded(rows, 2, torch.device("cpu"))
    defaults = {"max_new_tokens": cap, "pad_token_id": 2, "eos_token_id": ENDS, "do_sample": False}
    custom = {} if decoder is None else {"custom_generate": decoder}
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, **(defaults | settings), **custom)
    answers = []
    for row in out[:, ids.size(1) :].tolist():
        end = next((i for i, token in enumerate(row) if token in ENDS), len(row) - 1)
        answers.append(row[: end + 1])
    return answers


def play(
    model: Any,
    turns: int = 4,
    kv_tokens: int | None = None,
    change: int | None = None,
    first: Rows | None = None,
    decoder: Any = GroupDecoder,
) -> tuple[Conversations, list[int]]:
    """Play turns with conversations kept, compare each with `generate`; return them and the tokens read by turn.

    Args:
        model: plays.
        turns: how many.
        kv_tokens: the budget.
        change: the turn before which a row's own token is replaced.
        first: the prompts.
        decoder: the class of the decoder.
    """
    rng = random.Random(1)
    conversations, rows, read = Conversations(CAP), [list(row) for row in first or prompts()], []
    starts = [len(row) for row in rows]
    for number in range(turns):
        if number == change:
            rows[0][starts[0] + 1] = 4
        ours = decoder(nullcontext, kv_tokens, conversations=conversations)
        answers = turn(model, rows, CAP, ours)
        lengths = [len(values) for values in ours.rollout.entropies]
        answers = [answer[:length] for answer, length in zip(answers, lengths, strict=True)]
        read.append(ours.rollout.prefill_tokens)
        left = [CAP + start - len(row) for start, row in zip(starts, rows, strict=True)]
        expected = [answer[:rest] for answer, rest in zip(turn(model, rows, CAP), left, strict=True)]
        assert answers == expected, f"turn {number}"
        going = [i for i, answer in enumerate(answers) if len(answer) < left[i] - 16 and rng.random() < 0.8]
        suffixes = [[rng.randrange(3, 199) for _ in range(rng.randrange(1, 12))] for _ in going]
        rows = [rows[i] + answers[i] + suffix for i, suffix in zip(going, suffixes, strict=True)]
        starts = [starts[i] for i in going]
        if not rows:
            break
    return conversations, read


KINDS = [
    "llama",
    pytest.param("qwen3", marks=[pytest.mark.slow, pytest.mark.matrix]),
    pytest.param("gemma", marks=[pytest.mark.slow, pytest.mark.matrix]),
    "lfm2",
    "qwen3_5",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_continues_as_if_the_whole_conversation_were_read(kind: str):
    conversations, read = play(prepared(kind))
    assert len(read) == 4
    assert conversations.reused_tokens > 0
    assert conversations.reread_rows == conversations.changed_rows == 0


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("mistral", {"sliding_window": 9}, id="window in every layer"),
        pytest.param("gemma2", {"sliding_window": 7, "attn_implementation": "eager"}, id="window, capped scores"),
    ],
)
def test_windows_move_with_each_rows_own_tokens(kind: str, settings: dict[str, Any]):
    conversations, read = play(prepared(kind, **settings))
    assert len(read) == 4
    assert conversations.reused_tokens > 0


def assert_only_new_tokens_are_read(kind: type[GroupDecoder] | type[StaticDecoder]) -> None:
    model, rows = prepared(), prompts()
    conversations = Conversations(CAP)
    decoder = kind(nullcontext, conversations=conversations)
    answers = turn(model, rows, CAP, decoder)
    assert decoder.rollout.prefill_tokens == sum(map(len, set(map(tuple, rows))))
    going = [i for i, answer in enumerate(answers) if len(answer) < CAP]
    assert len(going) > 1
    following = [rows[i] + answers[i] + [7] * (1 + i) for i in going]
    decoder = kind(nullcontext, conversations=conversations)
    turn(model, following, CAP, decoder)
    # The last token of a turn has not been through the model yet.
    assert decoder.rollout.prefill_tokens == sum(1 + 1 + i for i in going)
    assert conversations.reused_tokens == sum(map(len, following)) - decoder.rollout.prefill_tokens


def test_only_new_tokens_are_read():
    assert_only_new_tokens_are_read(GroupDecoder)


def test_a_row_that_ended_at_once_does_not_take_the_place_of_a_longer_one():
    """What is held of a row of one token is empty: every row of its group begins with that."""
    model, rows = prepared(), prompts(groups=1, size=12)
    conversations = Conversations(CAP)
    torch.manual_seed(0)
    answers = turn(model, rows, 20, GroupDecoder(nullcontext, conversations=conversations), do_sample=True, top_k=0)
    answers.sort(key=len, reverse=True)
    assert len(answers[-1]) == 1 < len(answers[0])
    decoder = GroupDecoder(nullcontext, conversations=conversations)
    following = [row + answer + [7] for row, answer in zip(rows, answers, strict=True)]
    turn(model, following, 20, decoder)
    assert decoder.rollout.prefill_tokens == 2 * len(rows)  # each row's last token and what it was answered
    assert conversations.changed_rows == 0


def test_a_row_that_comes_back_as_anothers_prompt_is_read_whole():
    model, short = prepared(), [5, 6, 7, 8, 9]
    conversations = Conversations(CAP)
    (answer,) = turn(model, [short], CAP)
    longer = short + answer[:1] + [11]
    turn(model, [short, longer], 20, GroupDecoder(nullcontext, conversations=conversations))
    decoder = GroupDecoder(nullcontext, conversations=conversations)
    assert turn(model, [longer], CAP, decoder) == turn(model, [longer], CAP)


@pytest.mark.parametrize(
    ("kind", "kv_tokens"),
    [("llama", 150), ("lfm2", 150), pytest.param("llama", 1, marks=[pytest.mark.slow, pytest.mark.matrix])],
)
def test_rows_dropped_for_want_of_room_are_read_again(kind: str, kv_tokens: int):
    conversations, read = play(prepared(kind), kv_tokens=kv_tokens)
    assert conversations.reread_rows > 0
    assert conversations.changed_rows == 0  # nothing was rewritten, and no dropped row takes another's place
    assert len(read) > 2


@pytest.mark.parametrize("kind", ["llama", "qwen3_5"])
def test_what_is_kept_and_what_is_read_stay_within_the_budget(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Recurrent states of a row that waits count as those of one that decodes."""
    made: list[Conversations] = []
    held: list[int] = []
    begin = Conversations.begin
    monkeypatch.setattr(Conversations, "begin", lambda self, rows: made.append(self) or begin(self, rows))
    model = prepared(kind)
    with torch.no_grad():
        of_a_row = state_tokens(model.get_base_model()) if kind == "qwen3_5" else 0

    def watched(model: Any, ids: Any, positions: Any, cache: Any) -> Any:
        rows = [*made[-1]._ended, *made[-1]._waiting.values()]
        kept = sum(map(len, made[-1]._prompts)) + sum(len(row.tokens) + of_a_row for row in rows)
        held.append(kept + cache.tokens + of_a_row * len(cache.groups))
        return hidden_states(model, ids, positions, cache)

    monkeypatch.setattr("grpo_lite.engine.decode.hidden_states", watched)
    play(model, kv_tokens=150, first=prompts(groups=4, size=4, seed=2))
    budget = 150 + of_a_row  # one row of the longest, 26 + 60 tokens, and its state
    assert 100 < max(held) <= budget


def test_rows_of_several_waves_stay_while_there_is_room():
    conversations, _ = play(prepared(), kv_tokens=400)  # 12 rows of up to 60 tokens: three waves or more
    assert conversations.reread_rows == 0
    assert conversations.reused_tokens > 0


@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_a_changed_turn_is_read_again_from_where_it_differs(kind: str, caplog: pytest.LogCaptureFixture):
    conversations, _ = play(prepared(kind), change=2)
    assert conversations.changed_rows == 1
    assert "1 rows came back from a tool with earlier turns changed" in caplog.text


def test_what_is_noted_in_a_later_turn_is_what_the_model_computes():
    model, rows = prepared(), prompts()
    conversations = Conversations(CAP)
    for _ in range(3):
        decoder = GroupDecoder(nullcontext, conversations=conversations, temperature=0.7)
        torch.manual_seed(3)
        answers = turn(model, rows, CAP, decoder, do_sample=True, temperature=0.7, top_k=0)
        for row, answer, logps, entropies in zip(
            rows, answers, decoder.rollout.logps, decoder.rollout.entropies, strict=True
        ):
            ids = torch.tensor([row + answer[: len(logps)]])
            with torch.no_grad():
                log_p = torch.log_softmax(model(input_ids=ids).logits[0, len(row) - 1 : -1] / 0.7, dim=-1)
            own = log_p.gather(1, ids[0, len(row) :].unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(torch.tensor(logps), own, atol=1e-4, rtol=0)
            torch.testing.assert_close(torch.tensor(entropies), -(log_p.exp() * log_p).sum(-1), atol=1e-4, rtol=0)
        rows = [row + answer + [9, 8, 7] for row, answer in zip(rows, answers, strict=True) if len(answer) < 12]
    assert conversations.reused_tokens > 0
