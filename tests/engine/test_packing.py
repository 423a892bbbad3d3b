"""Packing: what goes into a packed row, and that nothing is lost, whatever the shapes."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lite.engine.attention import PackedLayout, Rule, packed_attention
from grpo_lite.engine.packing import (
    PackedBatch,
    PaddedBatch,
    pack,
    pack_rows,
    plan_microbatches,
    read_padded_batch,
    token_weights,
    unpack,
)


@st.composite
def padded_batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Left-padded prompts, right-padded completions, rows in any order, empty completions and extra padding allowed.

    With few different tokens many completions begin alike, or are equal.
    """
    prompts = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=4))
    rows = draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=10))
    tokens = st.integers(1, draw(st.sampled_from([2, 3, 50])))
    completions = [draw(st.lists(tokens, max_size=5)) for _ in rows]
    lengths = [len(completion) for completion in completions]
    width = max(map(len, prompts)) + draw(st.integers(0, 2))
    longest = max(1, max(lengths)) + draw(st.integers(0, 2))
    ids = torch.zeros((len(rows), width + longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (index, length) in enumerate(zip(rows, lengths, strict=True)):
        prompt = prompts[index]
        ids[row, width - len(prompt) : width] = torch.tensor(prompt)
        ids[row, width : width + length] = torch.tensor(completions[row])
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
    """The budget counts each completion that is laid out, as the memory plan does: shared tokens are not taken off."""
    batch = read(case)
    for pieces in plan_microbatches(batch, range(len(batch.prompt_lengths)), budget):
        branches = {tuple(prompt): longest(own) for prompt, own in by_prompt(batch, pieces).items()}
        tokens = sum(len(prompt) + sum(map(len, own)) for prompt, own in branches.items())
        assert pack(batch, pieces).num_tokens <= tokens
        if tokens > budget:
            assert len(branches) == 1
            assert all(len(own) == 1 for own in branches.values())


@settings(max_examples=100, deadline=None)
@given(padded_batches())
def test_each_predictor_is_the_token_before_its_target(case: tuple[torch.Tensor, torch.Tensor, int]):
    batch = read(case)
    for pieces in plan_microbatches(batch, range(len(batch.prompt_lengths)), None):
        packed = pack(batch, pieces)
        tokens, positions = packed.input_ids[0].tolist(), packed.position_ids[0].tolist()
        width = batch.completion_width
        predictors = packed.predictors[packed.scored].tolist()
        for predictor, place in zip(predictors, packed.scatter.tolist(), strict=True):
            row, column = divmod(place, width)
            before = batch.input_ids[row, batch.prompt_width + column - 1].item()
            assert tokens[predictor] == before
            assert positions[predictor] == batch.prompt_lengths[row] + column - 1


@settings(max_examples=100, deadline=None)
@given(padded_batches(), st.one_of(st.none(), st.integers(1, 40)))
def test_the_tokens_that_predict_a_completion_are_its_prompt_and_itself_in_one_branch(
    case: tuple[torch.Tensor, torch.Tensor, int], budget: int | None
):
    batch = read(case)
    for pieces in plan_microbatches(batch, range(len(batch.prompt_lengths)), budget):
        packed = pack(batch, pieces)
        branches = list(branches_of(packed))
        for row in (row for piece in pieces for row in piece):
            places = packed.scatter // batch.completion_width == row
            path = packed.predictors[packed.scored[places]].tolist()
            prompt_length = batch.prompt_lengths[row]
            assert any(path == branch[prompt_length - 1 :][: len(path)] for branch in branches)


@settings(max_examples=50, deadline=None)
@given(padded_batches())
def test_a_group_is_divided_into_the_pieces_that_have_the_fewest_tokens(
    case: tuple[torch.Tensor, torch.Tensor, int],
):
    """Compared with every way to divide its distinct completions."""
    batch = read(case)
    for group in batch.groups:
        found = sum(pack(batch, pieces).num_tokens for pieces in plan_microbatches(batch, group, None))
        ((prompt, completions),) = by_prompt(batch, [group]).items()
        distinct = longest(completions)
        if not 2 <= len(distinct) <= 6:
            continue
        tokens = [
            sum(len(prompt) + sum(map(len, part)) - (len(part) - 1) * common(part) for part in parts)
            for parts in divisions(distinct)
        ]
        assert found == min(tokens)


@settings(max_examples=100, deadline=None)
@given(padded_batches(), st.one_of(st.none(), st.integers(1, 40)))
def test_a_token_weighs_as_much_as_the_rows_that_have_it(
    case: tuple[torch.Tensor, torch.Tensor, int], budget: int | None
):
    """Counted by token and position, over all micro-batches."""
    batch = read(case)
    microbatches = plan_microbatches(batch, range(len(batch.prompt_lengths)), budget, every_prompt=True)
    found: dict[tuple[int, int], float] = {}
    for pieces, weights in zip(microbatches, token_weights(batch, microbatches), strict=True):
        packed = pack(batch, pieces)
        keys = zip(packed.position_ids[0].tolist(), packed.input_ids[0].tolist(), strict=True)
        for key, weight in zip(keys, weights.tolist(), strict=True):
            found[key] = found.get(key, 0.0) + weight
    expected: dict[tuple[int, int], float] = {}
    for ids, mask in zip(case[0].tolist(), case[1].bool(), strict=True):
        for key in enumerate(torch.tensor(ids)[mask].tolist()):
            expected[key] = expected.get(key, 0.0) + 1.0
    assert found == expected


def by_prompt(batch: PaddedBatch, pieces: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
    """Return the completions of pieces' rows, those without tokens left out, by their prompts."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for row in (row for piece in pieces for row in piece):
        begin, end = batch.prompt_width - batch.prompt_lengths[row], batch.prompt_width + batch.completion_lengths[row]
        ids = batch.input_ids[row, begin:end].tolist()
        own = found.setdefault(tuple(ids[: batch.prompt_lengths[row]]), [])
        own += [tuple(ids[batch.prompt_lengths[row] :])] if batch.completion_lengths[row] else []
    return found


def longest(completions: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the distinct completions with which no other begins."""
    return [a for a in set(completions) if not any(a != b and b[: len(a)] == a for b in completions)]


def common(completions: Sequence[tuple[int, ...]]) -> int:
    """Return what all have in common and their prompt besides, which is counted by the caller but once."""
    return next((i for i, column in enumerate(zip(*completions, strict=False)) if len(set(column)) > 1), 0)


def divisions(items: Sequence[tuple[int, ...]]) -> Iterator[list[list[tuple[int, ...]]]]:
    """Return every way to divide items into parts."""
    if not items:
        yield []
        return
    first, *others = items
    for parts in divisions(others):
        yield [[first], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [first, *part], *parts[i + 1 :]]


def branches_of(packed: PackedBatch) -> Iterator[list[int]]:
    """Return the places in T of each sequence that attention reads."""
    offset = 0
    for root, tails in packed.segments:
        shared = list(range(offset, offset + root))
        offset += root
        yield shared
        for length in tails:
            yield shared + list(range(offset, offset + length))
            offset += length


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
    ids = torch.tensor([[1, 1, 2, 2, 2], [1, 1, 3, 3, 3], [1, 1, 4, 4, 4]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert plan_microbatches(read((ids, mask, 3)), range(3), 8) == [[[0, 1]], [[2]]]


def test_what_all_completions_begin_with_is_laid_out_once_behind_the_prompt():
    # Prompt 5 6; completions 7 8 1, 7 8 2 3 and 7: the last ends inside what the others share.
    ids = torch.tensor([[5, 6, 7, 8, 1, 0], [5, 6, 7, 8, 2, 3], [5, 6, 7, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    batch = read((ids, mask, 4))
    microbatches = plan_microbatches(batch, range(3), None)
    assert microbatches == [[[0, 1, 2]]]
    packed = pack(batch, microbatches[0])
    assert packed.segments == ((4, (1, 2)),)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 1, 2, 3]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 5]]
    assert packed.targets.tolist() == [7, 8, 1, 2, 3]  # each is predicted once …
    assert packed.predictors.tolist() == [1, 2, 3, 3, 5]
    values = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], requires_grad=True)
    scattered = unpack(values, packed, torch.zeros(3, 4))
    expected = torch.tensor([[0.1, 0.2, 0.3, 0.0], [0.1, 0.2, 0.4, 0.5], [0.1, 0.0, 0.0, 0.0]])
    assert torch.equal(scattered, expected)  # … and scored for each row,
    (scattered * torch.tensor([[1.0], [10.0], [100.0]])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [111.0, 11.0, 1.0, 10.0, 10.0]  # whose gradients add up
    assert token_weights(batch, microbatches)[0].tolist() == [3, 3, 3, 2, 1, 1, 1]


def test_equal_completions_are_laid_out_once_and_always_together():
    # Prompt of 1, completions 2 3, 4 4, 2 3, 2 3: 1 + 2 + 2 tokens, and two that fit into 3 tokens on their own.
    ids = torch.tensor([[1, 2, 3], [1, 4, 4], [1, 2, 3], [1, 2, 3]])
    batch = read((ids, torch.ones_like(ids), 2))
    assert pack(batch, plan_microbatches(batch, range(4), None)[0]).num_tokens == 5
    assert plan_microbatches(batch, range(4), 3) == [[[0, 2, 3]], [[1]]]
    assert pack(batch, [[0, 2, 3]]).segments == ((1, (2,)),)


def test_completions_of_two_beginnings_become_two_pieces_where_that_is_fewer_tokens():
    # Behind a prompt of 1 two begin with 2 2 2, two with 3 3 3: 1 + 4 × 4 tokens in one piece, 2 × (1 + 3 + 2) in two.
    ids = torch.tensor([[1, 2, 2, 2, 4], [1, 3, 3, 3, 4], [1, 2, 2, 2, 5], [1, 3, 3, 3, 5]])
    batch = read((ids, torch.ones_like(ids), 4))
    assert plan_microbatches(batch, range(4), None) == [[[0, 2], [1, 3]]]
    assert pack(batch, [[0, 2], [1, 3]]).segments == ((4, (1, 1)), (4, (1, 1)))


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
