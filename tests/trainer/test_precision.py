"""4-bit bases, autocast and loss scaling: packed compute under each, and bitsandbytes' traps."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import GRPOTrainer

from grpo_lite.engine.attention import install
from grpo_lite.engine.options import EngineOptions
from grpo_lite.engine.quantised import keep_weights_unpacked
from grpo_lite.engine.rollout_weights import rollout_weights
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.tiny import relative_difference, tiny_args, tiny_lora, tiny_model, tiny_prompts, train_fixed

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
QUANTIZED = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # bitsandbytes wants multiples of 64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model(dtype=torch.bfloat16, **QUANTIZED).save_pretrained(folder)
    return folder


def nf4(base: Path, compute: torch.dtype = torch.bfloat16) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return tiny_lora(AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=compute))


def gradients(trainer_class: type[GRPOTrainer], tmp_path: Path, model: Any, **settings: Any) -> dict[str, torch.Tensor]:
    extra = {"options": EngineOptions(tokens_per_microbatch=60)} if trainer_class is PackedGRPOTrainer else {}
    trainer, kept = train_fixed(trainer_class, model, tiny_args(tmp_path, loss_type="grpo", **settings), **extra)
    if isinstance(trainer, PackedGRPOTrainer):
        assert set(trainer.support.decided.values()) == {True}
    return kept.steps[0]


def test_nf4_base_in_fp32_gives_the_same_gradient(base: Path, tmp_path: Path):
    found = [gradients(kind, tmp_path, nf4(base, torch.float32)) for kind in (GRPOTrainer, PackedGRPOTrainer)]
    # TRL casts the adapter of a 4-bit base to bf16, so the gradients are rounded to 8 bits.
    assert relative_difference(found[1], found[0]) < 5e-3


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("autocast", [pytest.param(False, marks=pytest.mark.slow), True])
def test_nf4_base_in_bf16_is_as_near_to_fp32_as_plain_trl(
    base: Path, tmp_path: Path, autocast: bool, checkpointing: bool
):
    exact = gradients(GRPOTrainer, tmp_path, nf4(base, torch.float32))
    settings = {"bf16": autocast, "gradient_checkpointing": checkpointing}
    errors = [
        relative_difference(gradients(kind, tmp_path, nf4(base), **settings), exact)
        for kind in (GRPOTrainer, PackedGRPOTrainer)
    ]
    assert errors[0] > 1e-3, "plain TRL should show bf16 noise"
    assert errors[1] < 1.5 * errors[0]


def test_autocast_on_an_fp32_model_is_as_near_to_fp32_as_plain_trl(tmp_path: Path):
    exact = gradients(GRPOTrainer, tmp_path, tiny_lora(tiny_model()))
    errors = [
        relative_difference(gradients(kind, tmp_path, tiny_lora(tiny_model()), bf16=True), exact)
        for kind in (GRPOTrainer, PackedGRPOTrainer)
    ]
    assert errors[0] > 1e-3, "plain TRL should show bf16 noise"
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("budget", [pytest.param(None, marks=pytest.mark.slow), 40])
def test_a_scaled_loss_gives_scaled_gradients_in_every_microbatch(budget: int | None, tmp_path: Path):
    """fp16 needs a GPU in accelerate, so the scaler is put in by hand: all backward passes must go through it."""

    class Scaled(PackedGRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    plain = gradients(GRPOTrainer, tmp_path, tiny_lora(tiny_model()))
    args = tiny_args(tmp_path, loss_type="grpo")
    _, kept = train_fixed(Scaled, tiny_lora(tiny_model()), args, options=EngineOptions(tokens_per_microbatch=budget))
    scaled = {name: gradient / 1024 for name, gradient in kept.steps[0].items()}
    assert relative_difference(scaled, plain) < 1e-4


def test_fp16_compute_is_as_near_to_fp32_as_plain_trl(base: Path, tmp_path: Path):
    exact = gradients(GRPOTrainer, tmp_path, nf4(base, torch.float32))
    errors = [
        relative_difference(gradients(kind, tmp_path, nf4(base, torch.float16)), exact)
        for kind in (GRPOTrainer, PackedGRPOTrainer)
    ]
    assert errors[1] < max(1.5 * errors[0], 1e-2)


def test_copies_for_a_rollout_compute_what_the_4_bit_layers_do_and_leave_no_trace(base: Path):
    model = nf4(base)
    keep_weights_unpacked(model)
    install(model.get_base_model())
    ids = torch.arange(3, 23).unsqueeze(0)
    stored = copy.deepcopy({name: tensor.clone() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        expected = model(ids).logits
        with rollout_weights(model.get_base_model(), nullcontext) as active:
            assert active
            found = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    assert not [module for module in model.modules() if "forward" in module.__dict__]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_evaluation_between_steps_does_not_cut_the_gradient(base: Path, tmp_path: Path):
    """On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights in eval mode and then has no backward for them."""
    found = []
    for evaluate in (False, True):
        settings = {"eval_strategy": "steps", "eval_on_start": True, "eval_steps": 100} if evaluate else {}
        args = tiny_args(tmp_path, loss_type="grpo", per_device_eval_batch_size=8, **settings)
        extra = {"eval_dataset": tiny_prompts(4)} if evaluate else {}
        model = nf4(base)
        if evaluate:
            for module in model.modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = True
        lengths = [5, 9, 3, 12, 7, 7, 1, 4]
        _, kept = train_fixed(PackedGRPOTrainer, model, args, lengths=lengths, same_completions=True, **extra)
        found.append(kept.steps[0])
    assert relative_difference(found[1], found[0]) < 1e-6
