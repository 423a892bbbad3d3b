"""Packing: what goes into a packed row, and that nothing is lost, whatever the shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lite.engine.attention import PackedLayout, Rule, packed_attention
from grpo_lite.engine.packing import PaddedBatch, pack, pack_rows, plan_microbatches, read_padded_batch, unpack


@st.composite
def padded_batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Left-padded prompts, right-padded completions, rows in any order, empty completions and extra padding allowed."""
    prompts = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=4))
    rows = draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=10))
    lengths = [draw(st.integers(0, 5)) for _ in rows]
    width = max(map(len, prompts)) + draw(st.integers(0, 2))
    longest = max(1, max(lengths)) + draw(st.integers(0, 2))
    ids = torch.zeros((len(rows), width + longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (index, length) in enumerate(zip(rows, lengths, strict=True)):
        prompt = prompts[index]
        ids[row, width - len(prompt) : width] = torch.tensor(prompt)
        ids[row, width : width + length] = torch.arange(length) + 10 * (row + 1)
        mask[row, width - len(prompt) : width + length] = 1
    return ids, mask, longest


def read(case: tuple[torch.Tensor, torch.Tensor, int]) -> PaddedBatch:
    batch = read_padded_batch(*case)
    assert batch is not None
    return batch


@settings(max_examples=200, deadline=None)
@given(padded_batches(), st.one_of(st.none(), st.integers(1, 40)))
def test_every_completion_token_is_scored_exactly_once(
    case: tuple[torch.Tensor, torch.Tensor, int], budget: int | None
):
    ids, mask, longest = case
    batch = read(case)
    seen = torch.zeros((ids.size(0), longest), dtype=torch.long)
    for pieces in plan_microbatches(batch, range(ids.size(0)), budget):
        packed = pack(batch, pieces)
        seen = unpack(torch.ones_like(packed.targets), packed, torch.zeros_like(seen)) + seen
        found = unpack(packed.targets, packed, torch.full_like(seen, -1))
        assert torch.equal(found[found >= 0], ids[:, -longest:][found >= 0])
    assert torch.equal(seen, mask[:, -longest:])


@settings(max_examples=200, deadline=None)
@given(padded_batches(), st.integers(1, 40))
def test_a_microbatch_exceeds_the_budget_only_for_a_single_completion(
    case: tuple[torch.Tensor, torch.Tensor, int], budget: int
):
    batch = read(case)
    for pieces in plan_microbatches(batch, range(len(batch.prompt_lengths)), budget):
        if pack(batch, pieces).num_tokens > budget:
            assert len(pieces) == 1
            assert len(pieces[0]) == 1


@settings(max_examples=100, deadline=None)
@given(padded_batches())
def test_each_predictor_is_the_token_before_its_target(case: tuple[torch.Tensor, torch.Tensor, int]):
    batch = read(case)
    for pieces in plan_microbatches(batch, range(len(batch.prompt_lengths)), None):
        packed = pack(batch, pieces)
        tokens, positions = packed.input_ids[0].tolist(), packed.position_ids[0].tolist()
        width = batch.completion_width
        for predictor, place in zip(packed.predictors.tolist(), packed.scatter.tolist(), strict=True):
            row, column = divmod(place, width)
            before = batch.input_ids[row, batch.prompt_width + column - 1].item()
            assert tokens[predictor] == before
            assert positions[predictor] == batch.prompt_lengths[row] + column - 1


@settings(max_examples=100, deadline=None)
@given(padded_batches(), st.booleans(), st.one_of(st.none(), st.integers(1, 6)))
def test_attention_equals_each_sequence_on_its_own(
    case: tuple[torch.Tensor, torch.Tensor, int], dense: bool, window: int | None
):
    batch = read(case)
    generator = torch.Generator().manual_seed(0)
    for pieces in plan_microbatches(batch, range(len(batch.prompt_lengths)), None):
        packed = pack(batch, pieces)
        layout = layout_of(packed.segments, dense)
        query = torch.randn((1, 4, packed.num_tokens, 8), generator=generator, dtype=torch.float64)
        key, value = torch.randn((2, 1, 2, packed.num_tokens, 8), generator=generator, dtype=torch.float64)
        found = packed_attention(query, key, value, layout, Rule(window=window))[0].transpose(0, 1)  # (heads, T, D)
        offset = 0
        for prompt, completions in packed.segments:
            shared = list(range(offset, offset + prompt))
            offset += prompt
            for length in completions:
                tokens = shared + list(range(offset, offset + length))
                offset += length
                expected = causal(query, key, value, tokens, window)
                torch.testing.assert_close(found[:, tokens], expected, rtol=1e-9, atol=1e-9)


def layout_of(segments: tuple[tuple[int, tuple[int, ...]], ...], dense: bool) -> PackedLayout:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_lite.engine.attention.DENSE_TOKENS", 10**6 if dense else 0)
        return PackedLayout(segments, torch.device("cpu"))


def causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: list[int], window: int | None
) -> torch.Tensor:
    q, k, v = (states[0, :, tokens] for states in (query, key, value))
    k, v = k.repeat_interleave(2, dim=0), v.repeat_interleave(2, dim=0)
    scores = q @ k.transpose(1, 2) / 8**0.5
    distance = torch.arange(len(tokens)).unsqueeze(1) - torch.arange(len(tokens))
    hidden = (distance < 0) | (distance >= (window or len(tokens)))
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def test_rows_with_the_same_prompt_form_a_group_wherever_they_stand():
    ids = torch.tensor([[0, 5, 7], [4, 5, 7], [0, 5, 8], [4, 5, 9]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]])
    batch = read((ids, mask, 1))
    assert batch.groups == [[0, 2], [1, 3]]


def test_a_group_is_laid_out_as_prompt_then_completions_with_restarting_positions():
    ids = torch.tensor([[0, 5, 6, 7, 8], [0, 5, 6, 9, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    packed = pack(read((ids, mask, 2)), [[0, 1]])
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert packed.predictors.tolist() == [1, 2, 1]  # both first tokens are predicted by the prompt's last
    assert packed.targets.tolist() == [7, 8, 9]


def test_a_group_longer_than_the_budget_repeats_its_prompt():
    # Prompt of 2, completions of 3, 3, 2: two fit into 8 tokens (2 + 3 + 3), the third takes the prompt again.
    ids = torch.ones((3, 5), dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert plan_microbatches(read((ids, mask, 3)), range(3), 8) == [[[0, 1]], [[2]]]


def test_rows_left_out_or_without_tokens_cost_nothing():
    ids = torch.ones((3, 4), dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    assert plan_microbatches(read((ids, mask, 2)), [1, 2], None) == [[[2]]]


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param([[1, 0, 1, 1]], id="padding inside the prompt"),
        pytest.param([[1, 1, 0, 1]], id="padding inside the completion"),
        pytest.param([[0, 0, 1, 1]], id="no prompt"),
    ],
)
def test_a_batch_that_cannot_be_packed_is_refused(mask: list[list[int]]):
    assert read_padded_batch(torch.ones((1, 4), dtype=torch.long), torch.tensor(mask), 2) is None


def test_the_attention_mask_of_long_rows_does_not_grow_with_the_square_of_the_row():
    layout = layout_of(((150, (1000, 1000, 1000, 1000)),), dense=False)
    mask = layout.causal_mask(1000, 150, torch.float32)
    assert mask.untyped_storage().nbytes() == 4 * 1000 * 1150  # against 4 * 4150**2 for the whole row


def test_rows_of_their_own_prompts_are_laid_out_as_groups_of_one():
    """Prompts of 3, 1 and 2 tokens, completions of 2, 4 and 1, once padded on both sides and once on the right."""
    prompts, completions = [[11, 12, 13], [21], [31, 32]], [[14, 15], [22, 23, 24, 25], [33]]
    ids, mask, labels = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 5), torch.full((3, 5), -100)
    both, both_mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        ids[i, :end], mask[i, :end] = torch.tensor(prompt + completion), 1
        labels[i, len(prompt) : end] = torch.tensor(completion)
        both[i, 3 - len(prompt) : 3 + len(completion)] = torch.tensor(prompt + completion)
        both_mask[i, 3 - len(prompt) : 3 + len(completion)] = 1
    batch = read_padded_batch(both, both_mask, 4)
    assert batch is not None
    expected, packed = pack(batch, [[0], [1], [2]]), pack_rows(ids, mask, labels)
    for name in ("input_ids", "position_ids", "predictors", "targets"):
        assert torch.equal(getattr(packed, name), getattr(expected, name)), name
    assert packed.segments == expected.segments
    assert torch.equal(unpack(packed.targets, packed, torch.full((3, 5), -100)), labels)
