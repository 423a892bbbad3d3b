"""The short way through LoRA layers: PEFT's result, and PEFT itself wherever a layer is not a vanilla one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import GRPOTrainer

from grpo_lite.engine.lora import shorten_lora
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.tiny import relative_difference, tiny_args, tiny_lora, tiny_model, train_fixed

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def backward(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(IDS).logits
    logits.float().square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_outputs_and_gradients_are_those_of_peft():
    model = tiny_lora(tiny_model())
    expected, gradients = backward(model)
    assert shorten_lora(model) == 14  # 7 linear layers in each of 2 blocks
    found, mine = backward(model)
    torch.testing.assert_close(found, expected)
    assert relative_difference(mine, gradients) < 1e-5


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_as_near_to_fp32_as_peft(adapter_dtype: torch.dtype):
    def build() -> Any:
        model = tiny_lora(tiny_model())
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        return model

    _, exact = backward(build().float())
    errors = []
    for short in (False, True):
        model = build().to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
        if short:
            shorten_lora(model)
        with torch.autocast("cpu", torch.bfloat16):
            _, gradients = backward(model)
        errors.append(relative_difference({k: v.float() for k, v in gradients.items()}, exact))
    assert errors[0] > 1e-3
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.filterwarnings("ignore:Already unmerged")  # layers that the second adapter does not touch
def test_disabling_merging_and_switching_adapters_work_as_before():
    plain, short = tiny_lora(tiny_model()), tiny_lora(tiny_model())
    for model in (plain, short):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    short.load_state_dict(plain.state_dict())
    shorten_lora(short)

    def same() -> None:
        with torch.no_grad():
            torch.testing.assert_close(short(IDS).logits, plain(IDS).logits)

    same()
    with plain.disable_adapter(), short.disable_adapter():
        same()
    for model in (plain, short):
        model.set_adapter("other")
    same()
    for model in (plain, short):
        model.merge_adapter()
    same()
    for model in (plain, short):
        model.unmerge_adapter()
    same()


@pytest.mark.filterwarnings("ignore:.*lora_bias", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"use_dora": True}, id="DoRA"),
        pytest.param({"lora_bias": True}, id="bias"),
        pytest.param({"lora_dropout": 0.5}, id="dropout"),
        pytest.param({"target_modules": ["embed_tokens", "q_proj"]}, id="embedding"),
    ],
)
def test_layers_that_are_not_vanilla_are_left_to_peft(settings: dict[str, Any]):
    config = LoraConfig(**({"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | settings))
    outputs = []
    for short in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), config)
        if short:
            shorten_lora(model)
        model.train()
        torch.manual_seed(1)
        outputs.append(model(IDS).logits)
    torch.testing.assert_close(outputs[1], outputs[0])


def test_a_copy_of_the_model_uses_its_own_weights():
    model = tiny_lora(tiny_model())
    shorten_lora(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(IDS).logits
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert not torch.allclose(twin(IDS).logits, expected)
        torch.testing.assert_close(model(IDS).logits, expected)


def test_a_model_without_adapters_is_left_alone():
    assert shorten_lora(tiny_model()) == 0


def test_plain_options_leave_lora_to_peft(tmp_path: Path):
    from grpo_lite.engine.options import EngineOptions

    model = tiny_lora(tiny_model())
    train_fixed(PackedGRPOTrainer, model, tiny_args(tmp_path), options=EngineOptions("plain", rollout="generate"))
    assert not [module for module in model.modules() if "forward" in module.__dict__ and hasattr(module, "lora_A")]
    assert issubclass(PackedGRPOTrainer, GRPOTrainer)
