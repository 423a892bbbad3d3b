"""Attention windows, soft caps, sinks, logit scales, long-context positions and experts, packed and shared.

One row of `FAMILIES` for each family whose layers all attend; those with recurrent layers are in `test_hybrid.py`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from grpo_lite.engine import attention
from grpo_lite.engine.decode import GroupDecoder
from grpo_lite.engine.static_decode import StaticDecoder, engine_of
from tests.engine.families import (
    build,
    check_greedy_equals_generate,
    check_loss_with_kl,
    check_packed_equals_plain,
    check_router_loss,
    check_sampled_logps,
    check_self_check,
    padded_rows,
)

# Shorter than prompts and completions, so that it hides tokens of both.
WINDOW = 5
TWO_KINDS = ["sliding_attention", "full_attention"]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
SMALL_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES: dict[str, Any] = {
    "Llama": partial(build, "LlamaConfig", "LlamaForCausalLM"),
    "Qwen2": partial(build, "Qwen2Config", "Qwen2ForCausalLM"),
    "Qwen3": partial(build, "Qwen3Config", "Qwen3ForCausalLM"),
    "Gemma": partial(build, "GemmaConfig", "GemmaForCausalLM"),
    "Mixtral": partial(build, "MixtralConfig", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "Mistral": partial(build, "MistralConfig", "MistralForCausalLM", sliding_window=WINDOW),
    "Ministral": partial(
        build, "MinistralConfig", "MinistralForCausalLM", sliding_window=WINDOW, layer_types=TWO_KINDS
    ),
    "OLMo 3": partial(build, "Olmo3Config", "Olmo3ForCausalLM", sliding_window=WINDOW, layer_types=TWO_KINDS),
    "SmolLM3": partial(
        build,
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        use_sliding_window=True,
        sliding_window=WINDOW,
        no_rope_layers=[1, 0],  # the last layer knows no positions, and slides
    ),
    "Gemma 3 (text)": partial(
        build,
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        sliding_window=WINDOW,
        layer_types=TWO_KINDS,
        query_pre_attn_scalar=8,
    ),
    "Gemma 2": partial(
        build,
        "Gemma2Config",
        "Gemma2ForCausalLM",
        sliding_window=WINDOW,
        layer_types=TWO_KINDS,
        query_pre_attn_scalar=8,
        attn_implementation="eager",  # transformers 5.17 takes SDPA otherwise, which leaves out the cap
        attn_logit_softcapping=0.7,
        final_logit_softcapping=1.5,
    ),
    "Gemma 4 (text)": partial(
        build,
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        num_hidden_layers=4,
        num_kv_shared_layers=2,  # the last two layers attend to the keys of the first two
        layer_types=TWO_KINDS * 2,
        sliding_window=WINDOW,
        global_head_dim=16,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        final_logit_softcapping=1.5,
    ),
    "Cohere 2": partial(
        build,
        "Cohere2Config",
        "Cohere2ForCausalLM",
        sliding_window=WINDOW,
        layer_types=TWO_KINDS,
        logit_scale=0.3,
    ),
    "Granite": partial(
        build,
        "GraniteConfig",
        "GraniteForCausalLM",
        logits_scaling=3.0,
        embedding_multiplier=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.4,
    ),
    "Phi 3 and 4 (longrope)": partial(
        build,
        "Phi3Config",
        "Phi3ForCausalLM",
        sliding_window=WINDOW,
        rope_parameters=LONGROPE,
        original_max_position_embeddings=64,
    ),
    "gpt-oss": partial(
        build,
        "GptOssConfig",
        "GptOssForCausalLM",
        sliding_window=WINDOW,
        layer_types=TWO_KINDS,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "Qwen3-MoE": partial(build, "Qwen3MoeConfig", "Qwen3MoeForCausalLM", num_experts=4, **SMALL_EXPERTS),
}
LONG_TESTED = ("Llama", "Qwen2", "Qwen3", "Gemma", "Mixtral")  # by test_equivalence.py, test_decode.py and others too


def families(*quick: str) -> Any:
    """Run a test on all families, those that are not named here among the slow tests."""
    rows = [pytest.param(name, id=name, marks=[] if name in quick else pytest.mark.slow) for name in FAMILIES]
    return pytest.mark.parametrize("name", rows)


every_family = families(*(name for name in FAMILIES if name not in LONG_TESTED))
most_different = families("Gemma 3 (text)", "Gemma 4 (text)", "gpt-oss")


@every_family
def test_packed_rows_are_plain_ones_in_float64(name: str) -> None:
    """Segment by segment, all groups in one row, activations recomputed."""
    check_packed_equals_plain(FAMILIES[name](), checkpointing=True)


@every_family
def test_packed_rows_are_plain_ones_in_float32(name: str) -> None:
    """By one masked call over whole groups, in micro-batches that divide a group."""
    check_packed_equals_plain(FAMILIES[name](dtype=torch.float32), dense=True, budget=36)


@pytest.mark.slow
@pytest.mark.matrix
@families()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("budget", [None, 30])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_are_plain_ones(
    name: str, dtype: torch.dtype, dense: bool, budget: int | None, checkpointing: bool
) -> None:
    model = FAMILIES[name](dtype=dtype)
    check_packed_equals_plain(model, dense=dense, budget=budget, checkpointing=checkpointing)


@most_different
def test_greedy_completions_are_those_of_generate(name: str) -> None:
    """By shared prompts, in waves too, and by rows of a fixed size."""
    model = FAMILIES[name](dtype=torch.float32)
    decoders = [GroupDecoder(nullcontext), GroupDecoder(nullcontext, kv_tokens=60), StaticDecoder(nullcontext)]
    check_greedy_equals_generate(model, decoders)
    assert engine_of(model).is_checked
    assert engine_of(model).obstacle is None


@most_different
@pytest.mark.parametrize("decoder", [GroupDecoder, StaticDecoder])
def test_noted_log_probabilities_are_those_of_a_forward_pass(name: str, decoder: Any) -> None:
    check_sampled_logps(FAMILIES[name](dtype=torch.float32), decoder(nullcontext))


@families("Mistral")
def test_a_loss_with_a_kl_term_is_that_of_plain_rows(name: str) -> None:
    check_loss_with_kl(FAMILIES[name]())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "gpt-oss"])
def test_the_routers_loss_is_that_of_the_padded_rows(name: str, dtype: torch.dtype) -> None:
    check_router_loss(FAMILIES[name](dtype=dtype))


@every_family
def test_nothing_in_the_configuration_is_refused_and_the_self_check_passes(name: str) -> None:
    model = FAMILIES[name]()
    assert attention.obstacle(model) is None
    check_self_check(model)


@pytest.mark.parametrize("prompts", [(2, 3), (9, 30)], ids=["short of the window", "longer"])
def test_of_a_prompt_a_sliding_layer_holds_what_its_window_can_still_see(
    prompts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four tokens for the first completion token, none once the completions are as long as the window."""
    from grpo_lite.engine.cache import GroupCache

    widths: list[dict[int, int]] = []
    advance = GroupCache.advance

    def noted(self: GroupCache) -> None:
        advance(self)
        widths.append({layer: keys.size(2) for layer, (keys, _) in self.prompts.items()})

    monkeypatch.setattr(GroupCache, "advance", noted)
    model = FAMILIES["Ministral"](dtype=torch.float32)
    check_greedy_equals_generate(model, [GroupDecoder(nullcontext)], prompts, repeats=1, max_new_tokens=8)
    endless = widths[-8:]  # the last of its rollouts, where no row ends before the cap
    assert endless[0] == {0: min(max(prompts), WINDOW - 1), 1: max(prompts)}
    assert endless[WINDOW - 1].keys() == {0, 1}
    assert endless[WINDOW].keys() == {1}


@pytest.mark.parametrize("budget", [None, 40], ids=["whole", "divided"])
@pytest.mark.parametrize(
    "prompts, completions",
    [
        pytest.param((11, 3), ((9, 14), (6,)), id="all below the border: the short factors"),
        pytest.param((70, 66), ((9, 14), (6,)), id="all beyond it: the long ones"),
        pytest.param((11, 60), ((9, 14), (3,)), id="beyond it by padding alone: the long ones"),
        pytest.param((11, 60), ((9, 14), (30, 2)), id="on both sides: the long ones"),
        pytest.param((50, 3), ((1, 14), (3,)), id="up to it: the short ones"),
    ],
)
def test_longrope_takes_the_factors_of_the_padded_rows(
    prompts: tuple[int, ...], completions: tuple[tuple[int, ...], ...], budget: int | None
) -> None:
    model = FAMILIES["Phi 3 and 4 (longrope)"](sliding_window=None)
    check_packed_equals_plain(model, prompts, completions, budget=budget)


@pytest.mark.parametrize(
    "kind", ["OlmoHybridConfig", "Gemma3TextConfig", "NemotronHConfig"], ids=["no positions", "by layer", "not rotary"]
)
def test_other_positions_have_no_border(kind: str) -> None:
    model: Any = SimpleNamespace(config=getattr(transformers, kind)())
    assert attention.rope_border(model, 1, 10**6) is None


def test_a_rollout_beyond_the_border_of_longrope_is_that_of_generate() -> None:
    model = FAMILIES["Phi 3 and 4 (longrope)"](dtype=torch.float32, sliding_window=None)
    assert attention.rope_border(model, 65, 90) is None
    assert attention.rope_border(model, 3, 64) is None
    assert attention.rope_border(model, 64, 84) == 64
    check_greedy_equals_generate(model, [GroupDecoder(nullcontext)], (70, 66), repeats=1, max_new_tokens=8)


@pytest.mark.parametrize("name", ["Gemma 2", "gpt-oss"])
def test_a_model_without_sdpa_keeps_its_own_attention_for_other_calls(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name](dtype=torch.float32)
    ids, mask, _ = padded_rows()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        assert expected.isfinite().all()
        attention.install(model)
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    model.save_pretrained(tmp_path)
    assert "grpo_lite" not in (tmp_path / "config.json").read_text()


def test_layers_with_shared_keys_keep_their_mask_in_plain_calls() -> None:
    """Gemma 4 drops queries there where it keeps few logits; without a mask SDPA would align those left wrongly."""
    model = FAMILIES["Gemma 4 (text)"]()
    ids, _, _ = padded_rows((11,), ((9, 9),))
    with torch.no_grad():
        expected = model(input_ids=ids, logits_to_keep=9).logits
        attention.install(model)
        found = model(input_ids=ids, logits_to_keep=9).logits
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
