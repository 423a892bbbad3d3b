"""Static rows: token for token what `generate` does, greedy and sampled, whatever is refilled, halved or divided."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from grpo_lite.engine import attention
from grpo_lite.engine.decode import GroupDecoder
from grpo_lite.engine.static_decode import StaticDecoder, engine_of
from tests.engine.test_decode import ENDS, batch, prepared, run

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")


def static(kv_tokens: int | None = None, **settings: Any) -> StaticDecoder:
    return StaticDecoder(nullcontext, kv_tokens, **settings)


def is_static(model: Any) -> bool:
    engine = engine_of(model.get_base_model())
    return engine.is_checked and engine.obstacle is None


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma", "mistral"])
def test_greedy_output_is_that_of_generate(kind: str) -> None:
    model = prepared(kind)
    assert torch.equal(run(model, static()), run(model))
    assert is_static(model)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="temperature 1"),
        pytest.param({"temperature": 0.7}, id="temperature"),
        pytest.param({"top_k": 5}, id="top-k"),
        pytest.param({"top_p": 0.7}, id="top-p"),
        pytest.param({"min_p": 0.05}, id="min-p"),
    ],
)
def test_sampled_output_is_that_of_generate(settings: dict[str, Any]) -> None:
    """Both draw an exponential variate a token of the vocabulary, and from the same state the same ones."""
    model = prepared()
    config = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 20, "eos_token_id": None, **settings}
    torch.manual_seed(7)
    expected = run(model, **config)
    torch.manual_seed(7)
    assert torch.equal(run(model, static(), **config), expected)
    assert is_static(model)


@pytest.mark.parametrize("kv_tokens", [1, 130, 300, 700])
def test_rows_that_wait_for_a_place_come_out_the_same(kv_tokens: int) -> None:
    model = prepared()
    decoder = static(kv_tokens)
    assert torch.equal(run(model, decoder), run(model))
    assert engine_of(model.get_base_model())._batch.rows == max(1, kv_tokens // 64)  # type: ignore[union-attr]


def test_each_prompt_is_read_once_and_ended_rows_stop_costing() -> None:
    decoder = static(64 * 12)
    completions = run(prepared(), decoder, repeats=8)[:, batch(8)["input_ids"].size(1) :]
    needed = sum(map(len, decoder.rollout.entropies))
    assert decoder.rollout.prefill_tokens == int(batch(1)["attention_mask"].sum())
    assert needed <= decoder.rollout.decode_tokens <= 0.75 * completions.numel()


@pytest.mark.parametrize("settings", [{"max_new_tokens": 1}, {"max_new_tokens": 70, "eos_token_id": 3}])
def test_lengths(settings: dict[str, Any]) -> None:
    model = prepared()
    assert torch.equal(run(model, static(), **settings), run(model, **settings))


def test_notes_are_those_of_the_group_decoder() -> None:
    model = prepared()
    notes = []
    for decoder in (static(), GroupDecoder(nullcontext)):
        run(model, decoder)
        notes.append((decoder.rollout.entropies, decoder.rollout.logps))
    for ours, theirs in zip(*notes, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", [StaticDecoder, GroupDecoder])
def test_the_first_row_is_streamed(decoder: Any) -> None:
    pieces: list[list[int]] = []
    streaming = decoder(nullcontext, stream=pieces.append)
    out = run(prepared(), streaming, eos_token_id=None)
    assert [token for piece in pieces for token in piece] == out[0, -24:].tolist()
    assert len(pieces) == (3 if decoder is StaticDecoder else 24)


@pytest.mark.parametrize("kv_tokens", [None, 300])
def test_rows_that_have_ended_are_told_at_the_next_look(kv_tokens: int | None) -> None:
    told: dict[int, list[int]] = {}
    decoder = static(kv_tokens)

    def ended(row: int, ids: list[int]) -> None:
        assert row not in told
        told[row] = ids

    decoder.ended = ended
    model = prepared()
    completions = run(model, decoder)[:, batch()["input_ids"].size(1) :].tolist()
    assert is_static(model)
    lengths = [len(row) for row in decoder.rollout.entropies]
    assert told == {row: completions[row][: lengths[row]] for row in told}
    # Of 24 tokens the host looks after 8, 16 and 24, and hears of rows that ended by the look before.
    early = {row for row, length in enumerate(lengths) if length <= 16}
    assert told.keys() >= early if kv_tokens else told.keys() == early
    assert 0 < len(told) < len(lengths)


def test_buffers_stay_where_they_are_and_follow_the_adapter() -> None:
    model = prepared()
    first = run(model, static())
    batch_before = engine_of(model.get_base_model())._batch
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.7)
    expected = run(model)
    assert not torch.equal(expected, first), "the adapter should matter"
    assert torch.equal(run(model, static()), expected)
    assert engine_of(model.get_base_model())._batch is batch_before


def test_a_smaller_batch_in_the_same_buffers_is_not_disturbed_by_the_larger_one() -> None:
    """Rows of the buffers that it does not use must not write what the last batch left in them."""
    model = prepared()
    decoder = static(64 * 6)
    run(model, decoder, repeats=8)
    buffers = engine_of(model.get_base_model())._batch
    assert buffers is not None
    buffers.owner.copy_(torch.tensor([0, 1, 2, 3, 1, 2]))  # as a refill may leave them
    buffers.count.fill_(17)
    for repeats in (1, 2):
        again = static(64 * 6)
        expected = run(model, repeats=repeats)
        assert torch.equal(run(model, again, repeats=repeats), expected)
        ends = torch.isin(expected[:, -24:], torch.tensor(ENDS))
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, 24).tolist()
        assert [len(row) for row in again.rollout.logps] == lengths
        assert engine_of(model.get_base_model())._batch is buffers


def test_dropout_leaves_training_to_the_group_decoder_and_evaluation_to_static_rows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = prepared()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.5)
    model.train()
    run(model, static())
    run(model, static())
    assert caplog.text.count("not plain LoRA without dropout") == 1
    model.eval()
    assert torch.equal(run(model, static()), run(model))
    assert is_static(model)


def test_an_adapter_on_the_embedding_goes_to_the_group_decoder(caplog: pytest.LogCaptureFixture) -> None:
    from peft import LoraConfig, get_peft_model

    from tests.tiny import tiny_model

    model = get_peft_model(tiny_model(tie_word_embeddings=False), LoraConfig(r=2, target_modules=["embed_tokens"]))
    attention.install(model.get_base_model())
    assert torch.equal(run(model, static()), run(model))
    assert "an adapter is on Embedding, not on a linear layer" in caplog.text


def test_without_the_adapter_it_is_the_base() -> None:
    model = prepared()
    run(model, static())
    with model.disable_adapter():
        assert torch.equal(run(model, static()), run(model))
    assert torch.equal(run(model, static()), run(model))
    assert is_static(model)


def test_what_it_does_not_know_goes_to_the_group_decoder() -> None:
    model = prepared()
    settings = {"repetition_penalty": 1.4}
    assert torch.equal(run(model, static(), **settings), run(model, **settings))
    assert engine_of(model.get_base_model()).obstacle is None


@pytest.mark.parametrize("where", ["in the self-check", "in a step"])
def test_a_step_that_fails_is_said_once_and_the_group_decoder_takes_over(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from grpo_lite.engine import static_decode
    from grpo_lite.engine.row_cache import RowCache

    model = prepared()
    if where == "in a step":

        def fail(*_: Any) -> None:
            raise RuntimeError("no such kernel")

        run(model, static())
        monkeypatch.setattr(static_decode.Batch, "_step", fail)
    else:
        plain = RowCache.attend

        def wrong(self: Any, layer: int, query: Any, key: Any, value: Any, scaling: Any) -> Any:
            return 1.5 * plain(self, layer, query, key, value, scaling)

        monkeypatch.setattr(RowCache, "attend", wrong)
    expected = run(model)
    assert torch.equal(run(model, static()), expected)
    assert torch.equal(run(model, static()), expected)
    assert caplog.text.count("Decoding without CUDA graphs") == 1
    assert not is_static(model)


def test_memory_that_runs_out_is_the_callers_to_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_lite.engine import static_decode

    model = prepared()
    run(model, static())

    def overflow(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(static_decode.Batch, "_step", overflow)
        with pytest.raises(torch.OutOfMemoryError):
            run(model, static())
    engine = engine_of(model.get_base_model())
    assert engine._batch is None
    assert engine.obstacle is None
    assert torch.equal(run(model, static(200)), run(model))


def test_probabilities_that_are_not_numbers_end_the_rollout() -> None:
    model = prepared()
    run(model, static())
    with torch.no_grad():
        model.get_base_model().get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(RuntimeError, match="contain inf or nan"):
        run(model, static(), do_sample=True, top_k=0)


def test_layers_are_left_as_they_were() -> None:
    model = prepared()
    before = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    run(model, static())
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == before


def test_layers_given_the_same_tensor_share_a_product() -> None:
    def place(copy: torch.Tensor) -> int:
        return copy.untyped_storage().data_ptr()

    model = prepared()
    run(model, static())
    engine = engine_of(model.get_base_model())
    adapters = engine.layers()._adapters
    products = {place(adapter.down_copy) for adapter in adapters}
    layers = model.config.num_hidden_layers
    assert len(adapters) == 7 * layers
    assert len(products) == 4 * layers  # queries, keys and values; output; gate and up; down
    with model.disable_adapter():
        run(model, static())
    run(model, static())
    assert len({place(adapter.down_copy) for adapter in engine.layers()._adapters}) == 4 * layers


def test_norms_that_multiply_differently_are_left_alone() -> None:
    from grpo_lite.engine.decoding_layers import _can_be_fused

    def norms(kind: str) -> list[nn.Module]:
        modules = prepared(kind).modules()
        return [m for m in modules if type(m).__name__.endswith("RMSNorm")]

    for norm in norms("gemma"):
        nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    assert all(_can_be_fused(norm, torch.float32) for norm in norms("llama"))
    assert not any(_can_be_fused(norm, torch.float32) for norm in norms("gemma"))


def test_the_first_use_may_be_in_inference_mode() -> None:
    model = prepared()
    with torch.inference_mode():
        first = run(model, static())
    assert is_static(model)
    assert torch.equal(run(model, static()), first)


@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), TypeError("no such argument"), AssertionError()])
def test_an_error_in_the_self_check_is_a_step_down_too(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_lite.engine.row_cache import RowCache

    def fail(*_: Any) -> None:
        raise error

    model = prepared()
    monkeypatch.setattr(RowCache, "attend", fail)
    assert torch.equal(run(model, static()), run(model))
    assert engine_of(model.get_base_model()).obstacle is not None
    fresh = prepared()
    rehearsed = [[5, 6, 7]] * 4
    static().rehearse(fresh.get_base_model(), rehearsed, 8, 16)
    assert engine_of(fresh.get_base_model()).obstacle is not None


def test_what_is_drawn_does_not_depend_on_what_was_decoded_before() -> None:
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 20}

    def sampled(*repeats: int) -> torch.Tensor:
        model = prepared()
        for count in repeats:
            torch.manual_seed(1)
            out = run(model, static(), repeats=count, **settings)
        return out

    assert torch.equal(sampled(5), sampled(8, 5))


def test_rehearsing_leaves_the_random_state_and_no_buffers() -> None:
    model = prepared()
    before = torch.get_rng_state()
    static().rehearse(model.get_base_model(), [[5, 6, 7]] * 4, 8, 16)
    assert torch.equal(torch.get_rng_state(), before)
    engine = engine_of(model.get_base_model())
    assert engine._batch is None
    assert engine.obstacle is None


def test_weights_at_another_address_get_new_buffers() -> None:
    model = prepared()
    run(model, static())
    before = engine_of(model.get_base_model())._batch
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    assert torch.equal(run(model, static()), run(model))
    assert engine_of(model.get_base_model())._batch is not before


def test_a_model_that_has_decoded_is_copied_pickled_and_freed() -> None:
    import copy
    import pickle
    import weakref

    model = prepared().get_base_model()
    with torch.no_grad():
        StaticDecoder(nullcontext).rehearse(model, [[5, 6, 7]] * 4, 8, 16)
        model.generate(**batch(1), max_new_tokens=4, do_sample=False, custom_generate=static())
    assert copy.deepcopy(model).__dict__["_static_rows"] is None
    engine = engine_of(model)
    assert pickle.loads(pickle.dumps(engine)) is None
    assert engine._reference() is model
    alive = weakref.ref(engine)
    del engine
    del model.__dict__["_static_rows"]
    assert alive() is None, "only the model holds its engine"


def test_a_stream_is_not_repeated_when_the_group_decoder_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_lite.engine import static_decode

    model = prepared()
    expected = run(model, eos_token_id=None)[0, -24:].tolist()
    run(model, static())
    plain = static_decode.Batch._step
    calls: list[int] = []

    def fail_later(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 12:
            raise RuntimeError("no such kernel")
        plain(self, *args)

    monkeypatch.setattr(static_decode.Batch, "_step", fail_later)
    pieces: list[list[int]] = []
    run(model, static(stream=pieces.append), eos_token_id=None)
    assert [token for piece in pieces for token in piece] == expected


def test_a_graph_that_computes_no_number_is_noticed() -> None:
    from grpo_lite.engine.graphs import _relative_difference

    numbers = torch.tensor([1.0, -200.0, float("nan")])
    assert _relative_difference(numbers, numbers.clone()) == 0.0
    assert _relative_difference(numbers, torch.tensor([1.0, -199.0, float("nan")])) == pytest.approx(1 / 199)
    assert _relative_difference(torch.full((2,), float("nan")), torch.ones(2)) == float("inf")
    assert _relative_difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
