"""Norms and gated products that are computed again in backward: the same gradients, and half of the bytes kept."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_lite.engine import recompute
from grpo_lite.engine.lora import shorten_lora
from grpo_lite.engine.recompute import keep_less, recomputed
from tests.tiny import relative_difference, tiny_lora, tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 10, 11, 12, 13]])
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
}
FAMILIES = {  # modules that keep less in two layers: norms, those of queries and keys, MLPs
    "llama": (SMALL, 5 + 0 + 2),
    "qwen3": (SMALL, 5 + 4 + 2),
    "gemma3_text": (SMALL, 9 + 4 + 2),
    "phi3": (SMALL, 5 + 0 + 2),
    "lfm2": (SMALL | {"layer_types": ["conv", "full_attention"]}, 5 + 2 + 2),
    "granitemoehybrid": (
        SMALL
        | {
            "layer_types": ["attention"] * 2,
            "shared_intermediate_size": 48,
            "num_local_experts": 0,
            "mamba_n_heads": 4,
        },
        5 + 0 + 2,
    ),
}


def small(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family][0])
    return tiny_lora(AutoModelForCausalLM.from_config(config).float())


def gradients(model: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
        logits = model(IDS).logits
    logits.float().square().sum().backward()
    return {name: p.grad.clone().float() for name, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model: Any) -> int:
    """Return the bytes that a forward pass keeps for backward, parameters left out."""
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS.repeat(8, 20)).logits.sum()
    del loss
    return sum(each.untyped_storage().nbytes() for each in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_family_s_own_code(
    family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
):
    model = small(family)
    expected = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    shorten_lora(model)
    assert keep_less(model) == FAMILIES[family][1]
    monkeypatch.setattr(recompute, "CHUNK_ELEMENTS_CPU", 100)  # several chunks of tokens
    assert relative_difference(gradients(model), expected) < 1e-5


def test_16_bit_gradients_are_as_near_to_float64_as_before():
    exact = gradients(small("qwen3").double())
    before = small("qwen3").bfloat16()
    errors = []
    for short in (False, True):
        model = copy.deepcopy(before)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        if short:
            shorten_lora(model)
            keep_less(model)
        errors.append(relative_difference(gradients(model, torch.bfloat16), exact))
    assert errors[0] > 1e-3
    assert errors[1] < 1.2 * errors[0]


def test_half_of_a_layer_s_bytes_are_kept():
    model = small("llama").bfloat16()
    shorten_lora(model)
    before = kept_bytes(model)
    keep_less(model)
    assert kept_bytes(model) < 0.65 * before  # the logits and attention's own are in both


def test_readers_share_what_is_computed_again_and_it_is_gone_afterwards():
    calls: list[int] = []

    def compute(x: Tensor) -> Tensor:
        calls.append(1)
        return x.exp()

    x = torch.randn(3, 4, requires_grad=True)
    made = recomputed(compute, x)
    assert recompute.is_recomputed(made)
    (computation, kept), _ = recompute.read(made), recompute.read(made)
    calls.clear()
    for _ in range(2):  # a graph may be read twice
        first, second = computation.again(kept), computation.again(kept)
        assert first is second
        torch.testing.assert_close(first, x.exp())
    assert len(calls) == 2
    assert computation._made is None


class Gated(nn.Module):
    """A gated MLP, which may do something else besides."""

    def __init__(self, factor: float = 1.0, limit: float = float("inf"), dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.factor, self.limit, self.dropout = factor, limit, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x).clamp(-self.limit, self.limit)
        out: Tensor = self.dropout(self.down_proj(nn.functional.silu(gate) * up * self.factor))
        return out


@pytest.mark.parametrize(
    ("what", "count"),
    [
        pytest.param({}, 1, id="plain"),
        pytest.param({"factor": 2.0}, 0, id="another formula"),
        pytest.param({"limit": 16.0}, 0, id="limited, as Step 3.7"),
        pytest.param({"dropout": 0.1}, 0, id="dropout, as Seed-OSS"),
    ],
)
def test_an_mlp_that_does_something_else_too_is_left_alone(what: dict[str, float], count: int):
    """A model comes from a file in eval mode, where dropout does nothing yet."""
    mlp = Gated(**what).eval()
    before = torch.get_rng_state()
    assert keep_less(mlp) == count
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in mlp.modules())


def test_a_trained_norm_is_left_alone():
    model = tiny_model()
    expected = gradients(model)
    assert keep_less(model) > 0
    assert "model.norm.weight" in expected
    assert relative_difference(gradients(model), expected) < 1e-5


def test_without_gradients_the_model_s_own_code_runs():
    model = tiny_lora(tiny_model())
    with torch.no_grad():
        expected = model(IDS).logits
        keep_less(model)
        assert torch.equal(model(IDS).logits, expected)


def test_a_copy_of_the_model_uses_its_own_weights():
    model = tiny_lora(tiny_model())
    keep_less(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "norm" in name:
                parameter.mul_(2)
        assert not torch.allclose(twin(IDS).logits, model(IDS).logits)
