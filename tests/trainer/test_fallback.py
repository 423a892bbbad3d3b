"""Where packed compute would be wrong, plain TRL compute takes over, with one line that says why."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from peft import PromptTuningConfig, get_peft_model
from torch._inductor.exc import InductorError
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl import GRPOTrainer

from grpo_lite.engine import attention
from grpo_lite.engine.score import base_model
from grpo_lite.trainer.gradients import Gradients
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.tiny import fixed_completions, relative_difference, tiny_args, tiny_lora, tiny_model, train_fixed

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")


def attend_without_keywords(model: Any) -> Any:
    """Replace every attention as projects that patch models do: it computes right, but knows no `packed_layout`."""
    for layer in model.model.layers:
        forward = layer.self_attn.forward

        def patched(*args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
            kwargs.pop("packed_layout", None)
            return _forward(*args, **kwargs)

        layer.self_attn.forward = patched
    return model


def attend_to_everything(model: Any) -> Any:
    """An architecture with a bias between tokens that no configuration announces."""
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, out: (out[0] + out[0].mean(1, keepdim=True), *out[1:]))
    return model


def with_another_window(model: Any) -> Any:
    """Its layers may pass on either number."""
    model.model.layers[0].self_attn.sliding_window = 5
    return model


def convolve_by_own_code(model: Any) -> Any:
    """Make the recurrent layer one of a class that comes with a checkpoint, not with transformers."""
    conv = model.model.layers[0].conv
    conv.__class__ = type("OwnShortConv", (type(conv),), {})
    return model


CASES = {
    "learned positions": (lambda: tiny_model("gpt2"), "positions are not rotary"),
    "recurrent layers that are not served": (
        lambda: convolve_by_own_code(tiny_model("lfm2")),
        "recurrent layers (OwnShortConv) are not known",
    ),
    "an attention function that is not SDPA": (lambda: tiny_model("llama", attn_implementation="eager"), "eager"),
    "attention dropout": (lambda: tiny_model("llama", attention_dropout=0.1), "attention dropout"),
    "rotary scaling that depends on the length": (
        lambda: tiny_model(
            "llama",
            max_position_embeddings=16,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        ),
        "for batches that reach or cross 16 tokens, TRL's own is used: LlamaForCausalLM changes its rotary",
    ),
    "windows of different lengths": (
        lambda: with_another_window(tiny_model("mistral", sliding_window=8)),
        "attention windows of different lengths",
    ),
    "patched attention": (lambda: attend_without_keywords(tiny_model("llama")), "attention interface"),
    "unannounced bias": (lambda: attend_to_everything(tiny_model("llama")), "differ from padded ones"),
}


@pytest.mark.parametrize(("build", "reason"), CASES.values(), ids=CASES)
def test_model(build: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    found = []
    for trainer_class in (GRPOTrainer, PackedGRPOTrainer):
        torch.manual_seed(0)
        settings = {"disable_dropout": True} if "gpt2" in str(type(build())).lower() else {}
        _, gradients = train_fixed(trainer_class, build(), tiny_args(tmp_path, max_steps=2, **settings))
        found.append(gradients.steps)
    lines = [record.message for record in caplog.records if record.name.startswith("grpo_lite")]
    assert len(lines) == 1
    assert reason in lines[0]
    if reason != "attention dropout":
        for mine, theirs in zip(found[1], found[0], strict=True):
            assert relative_difference(mine, theirs) < 1e-6


def test_prompt_tuning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    trainer, gradients = train_fixed(PackedGRPOTrainer, model, tiny_args(tmp_path))
    assert set(trainer.support.decided.values()) == {False}
    assert "prompt-learning" in caplog.text
    assert len(gradients.steps) == 1


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with every packed loss."""
    calls: list[int] = []
    loss = Gradients.loss
    monkeypatch.setattr(Gradients, "loss", lambda *a: calls.append(1) or loss(*a))
    return calls


@pytest.mark.parametrize("window", [5, 200], ids=["shorter than prompts and completions", "never reached"])
def test_a_sliding_window_is_trained_packed(
    window: int, tmp_path: Path, packed: list[int], caplog: pytest.LogCaptureFixture
):
    found = []
    for trainer_class in (GRPOTrainer, PackedGRPOTrainer):
        model = tiny_lora(tiny_model("mistral", sliding_window=window))
        _, gradients = train_fixed(trainer_class, model, tiny_args(tmp_path))
        found.append(gradients.steps[0])
    assert packed == [1]
    assert not own_lines(caplog)
    assert relative_difference(found[1], found[0]) < 1e-4


def test_a_window_that_a_rollout_leaves_is_decoded_by_us(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    from tests.engine.test_decode import train

    def build(kind: Any) -> Any:
        return train(kind, tmp_path, model=tiny_lora(tiny_model("mistral", sliding_window=14)))

    plain, ours = build(GRPOTrainer), build(PackedGRPOTrainer)
    assert ours.rollouts.last is not None
    assert not own_lines(caplog)
    assert relative_difference(dict(ours.model.named_parameters()), dict(plain.model.named_parameters())) < 1e-4


def attend_from(first: int) -> Any:
    """Return transformers' overlay of a window with another convention: how far it sees, itself not counted."""
    return lambda window: lambda batch, head, query, key: key > query - window - first


@pytest.mark.parametrize("first", [1, -1], ids=["one token further", "one token less"])
def test_the_self_check_finds_a_window_of_another_convention(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The window of a real model is longer than the check's rows, so the check narrows it: for both computations."""
    monkeypatch.setattr("transformers.masking_utils.sliding_window_overlay", attend_from(first))
    trainer, _ = train_fixed(
        PackedGRPOTrainer, tiny_lora(tiny_model("mistral", sliding_window=300)), tiny_args(tmp_path)
    )
    assert set(trainer.support.decided.values()) == {False}
    assert "its log-probabilities differ from padded ones" in caplog.text
    assert base_model(trainer.model).config.sliding_window == 300


def test_unsupported_decoding_settings_use_generate_and_say_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    from tests.engine.test_decode import train

    settings = {"generation_kwargs": {"num_beams": 2, "do_sample": False}, "max_steps": 2}
    plain, ours = (train(kind, tmp_path, settings=settings) for kind in (GRPOTrainer, PackedGRPOTrainer))
    lines = [record.message for record in caplog.records if record.name.startswith("grpo_lite")]
    assert lines == ["Shared rollouts are off, `generate` is used: the generation mode is beam_search."]
    assert relative_difference(dict(ours.model.named_parameters()), dict(plain.model.named_parameters())) < 1e-4


class CompilationError(Exception):
    """Stands for Triton's, which is not installed here."""


CompilationError.__module__ = "triton.compiler.errors"
NO_KERNEL = {
    "no compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    "CC names none": FileNotFoundError(2, "No such file or directory", "gcc-12"),
    "no Python.h": subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    "no libcuda": AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up"),
    "no place for the cache": PermissionError(13, "Permission denied", "/root/.triton"),
    "Triton's own": CompilationError("at 3:11:\n x"),
    "torch.compile": InductorError(RuntimeError("Failed to find C compiler."), None),
}


def failing(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def own_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("grpo_lite")]


fused_head = pytest.mark.skipif(
    not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="TRL before 1.16 has another head"
)


@fused_head
@pytest.mark.parametrize("error", NO_KERNEL.values(), ids=NO_KERNEL)
def test_without_a_compiler_for_trls_kernels_packed_compute_is_checked_all_the_same(
    error: Exception,
    tmp_path: Path,
    packed: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    # Like Triton's kernel on CUDA: TRL's padded log-probabilities cannot be computed.
    monkeypatch.setattr("trl.kernels.chunked_logprob._forward_tile", failing(error))
    _, recorded = train_fixed(PackedGRPOTrainer, tiny_lora(tiny_model()), tiny_args(tmp_path))
    assert recorded.steps
    assert packed
    (line,) = own_lines(caplog)
    assert line.startswith("Packed compute is on and needs no Triton, but plain TRL compute would fail: Triton cannot")
    assert "\n" not in line
    assert line.endswith("apt install build-essential python3-dev.")


@fused_head
def test_the_check_without_trls_kernels_finds_a_wrong_packed_compute_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("trl.kernels.chunked_logprob._forward_tile", failing(NO_KERNEL["no compiler"]))
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):  # of plain compute, the only one left
        train_fixed(PackedGRPOTrainer, attend_to_everything(tiny_model("llama")), tiny_args(tmp_path))
    assert "its log-probabilities differ from padded ones" in own_lines(caplog)[-1]


@pytest.mark.parametrize("error", NO_KERNEL.values(), ids=NO_KERNEL)
def test_a_packed_kernel_that_cannot_be_built_leaves_plain_compute(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("grpo_lite.engine.score.score", failing(error))
    _, recorded = train_fixed(PackedGRPOTrainer, tiny_lora(tiny_model()), tiny_args(tmp_path))
    assert recorded.steps
    (line,) = own_lines(caplog)
    assert "packed attention cannot run here: Triton cannot build a kernel here" in line
    assert "apt install build-essential" in line


def test_an_error_that_no_compiler_explains_ends_the_self_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo_lite.engine.score.score", failing(KeyError("layout")))
    with pytest.raises(KeyError, match="layout"):
        train_fixed(PackedGRPOTrainer, tiny_lora(tiny_model()), tiny_args(tmp_path))


def test_self_check_leaves_the_random_stream_alone(tmp_path: Path):
    # Shuffling and sampling follow torch's global generator: "the same seed" must mean the same batches.
    state = torch.random.get_rng_state()
    trainer, _ = train_fixed(PackedGRPOTrainer, tiny_lora(tiny_model()), tiny_args(tmp_path))
    trainer.support.decided.clear()
    torch.random.set_rng_state(state)
    assert trainer.support.is_supported(trainer.model)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_calls_of_a_prepared_model_are_sdpa(tmp_path: Path):
    model = tiny_model()
    ids = torch.tensor([fixed_completions(1, 12, 0, [12])[0]])
    expected = model(ids).logits
    attention.install(model)
    assert torch.equal(model(ids).logits, expected)
    assert attention.attention_forward.__module__ != sdpa_attention_forward.__module__
    model.save_pretrained(tmp_path)
    assert "grpo_lite" not in (tmp_path / "config.json").read_text()


def test_base_model_is_found_inside_an_adapter():
    model = tiny_model()
    assert base_model(model) is model
    assert base_model(tiny_lora(model)) is model
