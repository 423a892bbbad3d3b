"""A CPU's copies of weights for a rollout: the same numbers, few products, and no trace of them afterwards."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo_lite.engine import attention, rollout_weights
from grpo_lite.engine.cache import GroupCache
from grpo_lite.engine.decode import GroupDecoder, hidden_states, next_logits
from grpo_lite.engine.decoding_layers import given_together, sharing
from grpo_lite.engine.lora import shorten_lora
from grpo_lite.engine.quantised import keep_weights_unpacked
from tests.engine import test_families, test_hybrid
from tests.engine.families import generate, prompt_rows
from tests.tiny import tiny_lora, tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # bitsandbytes wants multiples of 64
FAMILIES = {**test_families.FAMILIES, **test_hybrid.FAMILIES}


def logits(model: Any) -> Tensor:
    """Return what a decoding step of three rows of two prompts computes, (3, V)."""
    with torch.no_grad():
        cache = GroupCache([4, 3], torch.tensor([0, 0, 1]))
        ids, positions = torch.tensor([[5, 6, 7, 8, 9, 10, 11]]), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
        hidden_states(model, ids, positions, cache)
        return next_logits(model, hidden_states(model, ids[:, :3].T, torch.tensor([[4], [4], [3]]), cache)[:, 0])


def adapted(model: Any) -> Any:
    """Return a model in float64 with an adapter on every linear layer that PEFT lets have one."""
    leaves_out = model.config.model_type in ("falcon_h1", "nemotron_h")
    torch.manual_seed(1)
    settings = {"exclude_modules": ["out_proj"]} if leaves_out else {}
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)).double()
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    return wrapped.eval()


def in_four_bits(folder: Path, **settings: Any) -> Any:
    """Return the causal language model with an adapter around its 4-bit layers, which compute in float32."""
    tiny_model(**(SIZES | settings)).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = tiny_lora(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32))
    keep_weights_unpacked(model)
    shorten_lora(model)
    attention.install(model.get_base_model())
    return model


def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the products with copies; the list gets how wide each is."""
    made: list[int] = []
    plain = rollout_weights._multiplier

    def counted(weight: Tensor, bias: Tensor | None) -> Any:
        multiply = plain(weight, bias)

        def forward(x: Tensor) -> Tensor:
            made.append(weight.size(0))
            return multiply(x)

        return forward

    monkeypatch.setattr(rollout_weights, "_multiplier", counted)
    return made


@pytest.mark.parametrize("kind", ["llama", "qwen2"], ids=["no bias", "biases on some"])
def test_layers_given_one_tensor_share_a_product_and_compute_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_four_bits(tmp_path, kind=kind)
    base = model.get_base_model()
    expected = logits(base)
    made = products(monkeypatch)
    with rollout_weights.rollout_weights(base, nullcontext) as active:
        assert active
        found = logits(base)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Two passes of two layers: queries, keys and values; the attention's output; gate and up; down. LoRA has rank 4.
    assert made == [64 + 32 + 32 + 12, 64 + 4, 128 + 128 + 8, 64 + 4] * 4
    torch.testing.assert_close(logits(base), expected, rtol=0, atol=0)


def test_a_second_rollout_reads_the_trained_adapter(tmp_path: Path) -> None:
    model = in_four_bits(tmp_path)
    base = model.get_base_model()
    with rollout_weights.rollout_weights(base, nullcontext):
        before = logits(base)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(0.1)
    with rollout_weights.rollout_weights(base, nullcontext):
        found = logits(base)
    torch.testing.assert_close(found, logits(base), rtol=1e-5, atol=1e-5)
    assert (found - before).abs().max() > 1e-2


def test_an_adapter_that_is_off_is_not_computed(tmp_path: Path) -> None:
    model = in_four_bits(tmp_path)
    base = model.get_base_model()
    adapted = logits(base)
    with model.disable_adapter():
        expected = logits(base)
        with rollout_weights.rollout_weights(base, nullcontext):
            torch.testing.assert_close(logits(base), expected, rtol=1e-5, atol=1e-5)
    assert (adapted - expected).abs().max() > 1e-2


def test_an_adapter_with_dropout_is_left_to_peft_and_watching_draws_nothing(tmp_path: Path) -> None:
    model = in_four_bits(tmp_path)
    base = model.get_base_model()
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = nn.Dropout(0.5)
    model.train()
    torch.manual_seed(0)
    expected = logits(base)
    torch.manual_seed(0)
    with rollout_weights.rollout_weights(base, nullcontext):
        torch.testing.assert_close(logits(base), expected, rtol=1e-5, atol=1e-5)


def test_weights_that_two_layers_share_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_four_bits(tmp_path)
    base = model.get_base_model()
    base.model.layers[1].mlp = base.model.layers[0].mlp
    expected = logits(base)
    made = products(monkeypatch)
    with rollout_weights.rollout_weights(base, nullcontext):
        torch.testing.assert_close(logits(base), expected, rtol=1e-5, atol=1e-5)
    assert made == [140, 68, 132, 132, 68] * 4


def test_what_layers_share_is_computed_once_and_again_where_a_layer_asks_twice_or_for_another_tensor() -> None:
    computed: list[Tensor] = []

    def compute(x: Tensor) -> tuple[Tensor, Tensor]:
        computed.append(x)
        return x + 1, x + 2

    one, other = sharing(2, compute)
    x, y = torch.zeros(1), torch.ones(1)
    assert [float(one(x)), float(other(x)), len(computed)] == [1, 2, 1]
    assert [float(one(x)), float(one(x)), float(other(x)), len(computed)] == [1, 1, 2, 3]
    assert [float(one(x)), float(one(y)), float(other(y)), len(computed)] == [1, 2, 3, 5]


def test_layers_given_one_tensor_are_grouped_but_those_called_twice_stay_alone() -> None:
    x, y = torch.zeros(1), torch.zeros(1)
    calls = [("q", x), ("k", x), ("up", y), ("twice", y), ("down", y), ("o", x), ("twice", x)]
    assert given_together(calls) == [["q", "k"], ["up"], ["down"], ["o"], ["twice"]]


def test_without_memory_for_them_there_are_no_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = in_four_bits(tmp_path).get_base_model()
    made = products(monkeypatch)
    monkeypatch.setattr(rollout_weights, "MEMORY_SHARE", 0.0)
    with rollout_weights.rollout_weights(base, nullcontext) as active:
        assert not active
        logits(base)
    assert not made


@pytest.mark.parametrize("has_adapter", [False, True], ids=["alone", "adapter in float32"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"], ids=["no bias", "biases on some"])
def test_a_model_in_16_bits_gets_copies_where_the_cpu_multiplies_them(kind: str, has_adapter: bool) -> None:
    model: Any = tiny_model(kind, dtype=torch.bfloat16, **SIZES).eval()
    if has_adapter:
        shorten_lora(tiny_lora(model))
    attention.install(model)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    with autocast():
        expected = logits(model)
        with rollout_weights.rollout_weights(model, autocast) as active:
            assert active is bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
            found = logits(model)
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("Mixtral", "qwen3_5") else (pytest.mark.slow, pytest.mark.matrix))
        for name in FAMILIES
    ],
)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # PEFT's own, for experts
def test_greedy_completions_of_a_family_stay_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every CPU laid out every weight."""
    monkeypatch.setattr(rollout_weights, "_has_layout", lambda weight: weight.is_floating_point())
    model = adapted(FAMILIES[name]())
    base = model.get_base_model()
    attention.install(base)
    rows = prompt_rows((11, 3, 7), 2)
    expected = generate(base, rows, GroupDecoder(nullcontext))
    made = products(monkeypatch)
    with rollout_weights.rollout_weights(base, nullcontext):
        assert torch.equal(generate(base, rows, GroupDecoder(nullcontext)), expected)
    assert made
