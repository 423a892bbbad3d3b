"""Hybrid models: recurrent layers packed and decoded from their prompt's state compute what transformers computes."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import Cache

from grpo_lite.engine import attention, states
from grpo_lite.engine.decode import GroupDecoder, state_tokens
from grpo_lite.engine.row_cache import RowCache
from grpo_lite.engine.static_decode import StaticDecoder, engine_of
from tests.conftest import ROOT
from tests.engine.families import (
    LONG_COMPLETIONS,
    LONG_PROMPTS,
    SIZES,
    build,
    check_greedy_equals_generate,
    check_loss_with_kl,
    check_packed_equals_plain,
    check_router_loss,
    check_sampled_logps,
    check_self_check,
)

SLOW = pytest.mark.slow
MATRIX = [pytest.mark.slow, pytest.mark.matrix]

DELTA = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_EXPERTS = {**EXPERTS, "shared_expert_intermediate_size": 16}
MAMBA = {
    "num_hidden_layers": 3,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
CONV = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
# The multipliers of the released models, where they differ from 1.
FALCON = {
    "mamba_d_ssm": 64,
    "mamba_rms_norm": False,
    "lm_head_multiplier": 0.3,
    "embedding_multiplier": 5.7,
    "key_multiplier": 0.39,
    "attention_out_multiplier": 0.94,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.24,
    "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.31],
    "mlp_multipliers": [0.88, 0.27],
}
NEMOTRON = {
    "num_hidden_layers": None,  # follows from the kinds
    "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention", "moe"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
}
FAMILIES: dict[str, Any] = {
    "lfm2": partial(build, "Lfm2Config", "Lfm2ForCausalLM", **CONV, block_auto_adjust_ff_dim=False),
    "lfm2_moe": partial(build, "Lfm2MoeConfig", "Lfm2MoeForCausalLM", **CONV, **EXPERTS, num_dense_layers=1),
    "lfm3": partial(
        build,
        "Lfm3Config",
        "Lfm3ForCausalLM",
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "sliding_attention"],
        sliding_window=6,
    ),
    "qwen3_5": partial(build, "Qwen3_5TextConfig", "Qwen3_5ForCausalLM", **DELTA),
    "qwen3_5_moe": partial(build, "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", **DELTA, **SHARED_EXPERTS),
    "qwen3_next": partial(build, "Qwen3NextConfig", "Qwen3NextForCausalLM", **DELTA, **SHARED_EXPERTS),
    "olmo_hybrid": partial(build, "OlmoHybridConfig", "OlmoHybridForCausalLM", **DELTA),
    "granite": partial(
        build,
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        **MAMBA,
        layer_types=DELTA["layer_types"],
        num_local_experts=4,
        shared_intermediate_size=24,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.25,
        logits_scaling=8.0,
    ),
    "bamba": partial(build, "BambaConfig", "BambaForCausalLM", **MAMBA, attn_layer_indices=[1]),
    "falcon_h1": partial(build, "FalconH1Config", "FalconH1ForCausalLM", **MAMBA, **FALCON),
    "nemotron_h": partial(build, "NemotronHConfig", "NemotronHForCausalLM", **NEMOTRON),
}


def model_of(family: str, dtype: torch.dtype = torch.float64) -> Any:
    config = FAMILIES[family].args[0]
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    return FAMILIES[family](dtype=dtype)


REST = "nemotron_h qwen3_next olmo_hybrid lfm3 lfm2_moe qwen3_5_moe bamba"  # `make test-all` runs them


def cases(default: str, slow: str, matrix: str = "") -> list[Any]:
    return [
        *default.split(),
        *(pytest.param(name, marks=SLOW) for name in slow.split()),
        *(pytest.param(name, marks=MATRIX) for name in matrix.split()),
    ]


@pytest.mark.parametrize(
    "family",
    cases("lfm2 qwen3_5 granite", "falcon_h1 nemotron_h qwen3_next olmo_hybrid lfm3", "lfm2_moe qwen3_5_moe bamba"),
)
def test_packed_log_probabilities_and_gradients_are_the_plain_ones(family: str):
    check_packed_equals_plain(model_of(family))


@pytest.mark.parametrize("family", cases("lfm2", "qwen3_5 granite falcon_h1", REST))
def test_with_checkpointing_and_groups_that_repeat_their_prompt(family: str):
    check_packed_equals_plain(model_of(family), budget=30, checkpointing=True)


@pytest.mark.parametrize("family", cases("qwen3_5", "lfm2 granite", f"falcon_h1 {REST}"))
def test_in_float32(family: str):
    check_packed_equals_plain(model_of(family, torch.float32), dense=True)


@pytest.mark.parametrize("family", cases("qwen3_5", f"lfm2 granite falcon_h1 {REST}"))
def test_a_loss_with_a_kl_term_is_that_of_plain_rows(family: str):
    check_loss_with_kl(model_of(family))


@pytest.mark.parametrize("family", cases("granite", "qwen3_5_moe", "qwen3_next lfm2_moe"))
def test_the_routers_loss_is_that_of_the_padded_rows(family: str):
    check_router_loss(model_of(family))
    check_router_loss(model_of(family, torch.float32), budget=None)


@SLOW
@pytest.mark.parametrize("family", cases("qwen3_5 granite", "", f"lfm2 falcon_h1 {REST}"))
def test_prompts_and_completions_across_chunk_borders(family: str):
    check_packed_equals_plain(model_of(family), LONG_PROMPTS, LONG_COMPLETIONS)


@SLOW
@pytest.mark.parametrize("family", cases("qwen3_5", "", f"lfm2 granite falcon_h1 {REST}"))
def test_completions_from_prompts_on_both_sides_of_a_chunk_border_are_those_of_generate(family: str):
    check_greedy_equals_generate(model_of(family, torch.float32), prompts=(63, 64, 65, 130), max_new_tokens=8)


@pytest.mark.parametrize(
    "family",
    cases("lfm2 qwen3_5", "granite falcon_h1 nemotron_h", "qwen3_next olmo_hybrid lfm3 lfm2_moe qwen3_5_moe bamba"),
)
def test_greedy_output_is_that_of_generate(family: str):
    check_greedy_equals_generate(model_of(family, torch.float32))


@pytest.mark.parametrize("family", cases("qwen3_5", "lfm2 granite falcon_h1", REST))
def test_noted_log_probabilities_are_those_of_a_forward_pass(family: str):
    check_sampled_logps(model_of(family, torch.float32))


@pytest.mark.parametrize("family", cases("lfm2", "qwen3_5 granite", f"falcon_h1 {REST}"))
def test_the_trainer_accepts_the_model(family: str):
    model = model_of(family, torch.float32)
    assert attention.obstacle(model) is None
    check_self_check(model)


@pytest.mark.parametrize("name", cases("lfm2.5-1.2b-instruct qwen3.5-0.8b", "granite-4.0-micro"))
def test_the_flags_of_a_released_checkpoint(name: str):
    """Its config.json with smaller sizes; tests/data/configs says where each was read."""
    released = json.loads((ROOT / "tests" / "data" / "configs" / f"{name}.json").read_text())
    released |= released.pop("text_config", {}) | {"dtype": None}
    if name.startswith("granite"):
        released["mamba_n_heads"] = 4  # its layers all attend; the class demands a divisor all the same
    architecture = released.pop("architectures")[0].replace("ConditionalGeneration", "CausalLM")
    config = type(transformers.AutoConfig.for_model(released.pop("model_type"))).__name__
    sizes = SIZES | {name: DELTA[name] for name in DELTA if name.startswith("linear_")}
    sizes |= {"num_hidden_layers": 4, "layer_types": released["layer_types"][:4], "block_ff_dim": 48}
    model = build(config, architecture, **(released | {name: sizes[name] for name in sizes if name in released}))
    assert attention.obstacle(model) is None
    check_packed_equals_plain(model)


def served_classes() -> Iterator[Any]:
    names = "lfm2 lfm2_moe lfm3 qwen3_5 qwen3_5_moe qwen3_next olmo_hybrid granitemoehybrid bamba falcon_h1 nemotron_h"
    for name in names.split():
        if hasattr(transformers.models, name):
            module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["x"])
            yield from (c for key, c in vars(module).items() if key in states.SERVED)


def test_the_installed_layers_use_nothing_of_a_cache_but_what_stands_in_for_it():
    known = {name for name in dir(states.States()) if not name.startswith("__")}
    found = set()
    for layer in served_classes():
        found.add(layer.__name__)
        parameters = list(inspect.signature(layer.forward).parameters)
        assert parameters[1] == "hidden_states"
        assert "attention_mask" in parameters
        (cache,) = set(states.CACHE_ARGUMENTS) & set(parameters)
        source = inspect.getsource(layer.forward)
        assert f"{cache}.update_conv_state(" in source
        used = set(re.findall(rf"{cache}(?:\.layers\[self\.layer_idx\])?\.(\w+)", source))
        assert used <= known, (layer.__name__, used - known)
        # The layer around it hands on keyword arguments, and so the layout.
        block = inspect.getsource(inspect.getmodule(layer))
        handed = rf"({'|'.join(states.CACHE_ARGUMENTS)})=\w+,\s+attention_mask=\w+,\s+(\*\*kwargs|seq_idx=kwargs)"
        assert re.search(handed, block), layer.__name__
    newer = set() if hasattr(Cache, "get_conv_state") else {"Lfm3ShortConv"}  # than transformers 5.17
    assert found == states.SERVED - newer


def test_what_stands_in_for_a_cache_takes_its_arguments():
    for name in ("get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state"):
        if hasattr(Cache, name):  # 5.17 has no get_…
            theirs = [p for p in inspect.signature(getattr(Cache, name)).parameters if p not in ("self", "kwargs")]
            ours = list(inspect.signature(getattr(states.States, name)).parameters)[1:]
            assert ours[: len(theirs)] == theirs, name
    assert "layer_idx" in inspect.signature(Cache.has_previous_state).parameters


def test_a_recurrent_layer_that_is_not_served_is_named():
    model = build(
        "JambaConfig", "JambaForCausalLM", torch.float32, attn_layer_period=2, attn_layer_offset=1, num_experts=1
    )
    assert attention.obstacle(model) == "its recurrent layers (JambaMambaMixer) are not known to packed compute"
    lfm2 = model_of("lfm2")
    lfm2.config.layer_types = ["conv", "full_attention", "full_attention"]  # one layer fewer than there are
    assert attention.obstacle(lfm2) == "it has conv layers"


def test_installing_leaves_copies_pickles_and_other_calls_as_they_were():
    model = model_of("lfm2")
    ids = torch.arange(3, 12).unsqueeze(0)
    expected = model(input_ids=ids).logits
    attention.install(model)
    attention.install(model)
    assert torch.equal(model(input_ids=ids).logits, expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(input_ids=ids).logits, expected)
        (first, *_) = states.mixers(twin)
        assert first.forward.args[0] is first


@pytest.mark.parametrize("family", cases("granite", "falcon_h1 nemotron_h"))
def test_plain_training_does_not_pass_over_the_output_projection(family: str, monkeypatch: pytest.MonkeyPatch):
    model = model_of(family).train()
    ids = torch.arange(3, 40).unsqueeze(0)
    expected = model(input_ids=ids, use_cache=False).logits
    attention.install(model)
    (mixer, *_) = states.mixers(model)
    # Of mamba_ssm; in its absence transformers' own returns None.
    fused = lambda *args, **kwargs: pytest.fail("the fused kernel was called")  # noqa: E731
    monkeypatch.setattr(inspect.getmodule(type(mixer)), "mamba2_split_conv1d_scan_combined", fused)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)


def test_a_wave_counts_what_a_row_keeps_besides_its_tokens():
    model = model_of("qwen3_5", torch.float32)
    attention.install(model)
    with torch.no_grad():
        tokens = state_tokens(model)
    # A row: 2 layers with 4 heads of 8 x 8 and 4 inputs of a convolution over 2 * 16 + 32 channels, in 4 bytes.
    # A token: 1 layer with keys and values of 2 heads of 8.
    assert tokens == -(-2 * (4 * 8 * 8 + 4 * 64) // (2 * 2 * 8)) == 32
    # Rows of 10 + 10 tokens: 60 tokens hold three at full length, and so three states. Five rows that share a prompt
    # would fit into 60 tokens but for their states: 10 + 3 * (10 + 32) of 60 + 3 * 32, and a fourth does not.
    prompt = tuple(range(10))
    waves = GroupDecoder(nullcontext, 60)._waves(model, {prompt: [0, 1, 2, 3, 4]}, 10)
    assert [rows for ((_, rows),) in waves] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("family", cases("lfm2", "qwen3_5 granite falcon_h1", REST))
def test_static_rows_decode_what_generate_does(family: str):
    """All rows at once, and in three places, where rows wait for one and find their prompt's state kept."""
    model = model_of(family, torch.float32)
    decoders = [StaticDecoder(nullcontext), StaticDecoder(nullcontext, 3 * 64)]
    check_greedy_equals_generate(model, decoders, max_new_tokens=10)
    assert engine_of(model).is_checked
    assert engine_of(model).obstacle is None


@pytest.mark.parametrize("family", cases("qwen3_5", "lfm2 granite", f"falcon_h1 {REST}"))
def test_what_static_rows_note_is_what_a_forward_pass_gives(family: str):
    check_sampled_logps(model_of(family, torch.float32), StaticDecoder(nullcontext))


def test_rows_that_move_take_their_states_with_them(monkeypatch: pytest.MonkeyPatch):
    """Thirty rows, of which those of two prompts end at once: the rest is moved together."""
    model, moved = model_of("lfm2", torch.float32), []
    move = RowCache.move
    monkeypatch.setattr(RowCache, "move", lambda *given: moved.append(1) or move(*given))
    ends = [35, 69]  # of which this model writes one behind the second prompt, the other behind the third
    check_greedy_equals_generate(model, [StaticDecoder(nullcontext)], repeats=10, eos_token_id=ends)
    assert moved
    assert engine_of(model).obstacle is None
