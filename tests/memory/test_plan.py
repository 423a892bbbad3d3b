"""The planner: exact on weights, within 10 % of counted tensor bytes and never under them by more than 3 %."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils

from grpo_lite.engine import recompute, row_cache, static_decode
from grpo_lite.engine import score as logprobs
from grpo_lite.engine.cache import GroupCache
from grpo_lite.engine.decode import Sampling
from grpo_lite.errors import MemoryBudgetError, ModelError
from grpo_lite.evaluation.statistics import chance_to_find
from grpo_lite.memory.evaluation import evaluation_phase
from grpo_lite.memory.job import recipe_job
from grpo_lite.memory.phases import (
    CHUNK_ELEMENTS,
    GIB,
    PLAIN_TOKENS,
    PLAIN_VOCABULARY,
    READ_AT_ONCE,
    RECOMPUTED_ELEMENTS,
    ROW_STEPS,
    SCORED_AT_ONCE,
    WORKSPACE_BYTES,
    Job,
    cache_capacity,
    rollout_phase,
    row_length,
    trained_parameters,
    training_phase,
    wave,
    weight_bytes,
)
from grpo_lite.memory.plan import (
    _warmup_bytes,
    advice,
    cheapest_changes,
    largest_completion,
    needed_bytes,
    plan_memory,
    require_fit,
)
from grpo_lite.memory.report import (
    all_cards_table,
    all_cards_tables,
    budget_table,
    hours_table,
    least_card_gb,
    plan_recipe,
    report_lines,
)
from grpo_lite.memory.warmup import warmup_parts, warmup_phase, warmup_tokens
from grpo_lite.models.config import KNOWN, known_config, model_shape
from grpo_lite.models.device import CARDS, find_card
from grpo_lite.models.shape import ModelShape, read_shape
from grpo_lite.recipe.load import load_recipe, recipe_names
from tests.memory import memory_trace
from tests.memory.known_models import job_of, known_base
from tests.memory.memory_trace import (
    trace_evaluation,
    trace_packed_warmup,
    trace_rollout,
    trace_training,
    trace_turns,
)
from tests.memory.plain_trace import trace_generate, trace_plain_training, trace_warmup

# As the models' cards on the Hub count them.
EVERY = [pytest.mark.slow, pytest.mark.matrix]  # shapes beyond the first: `make test-all`

PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-4b": 4_022_468_096,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "gemma-3-1b": 999_885_952,
    "smollm2-135m": 134_515_008,
}


def shape(name: str) -> ModelShape:
    return read_shape(KNOWN[name], name)


def job(name: str, **settings: Any) -> Job:
    return Job(shape(name), **({"prompt": 200, "completion": 512, "batch": 8} | settings))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_model_card(name: str) -> None:
    assert shape(name).parameters == PUBLISHED[name]


@pytest.mark.parametrize(
    "model_id, name",
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", "qwen2.5-1.5b"),
        ("Qwen/Qwen2.5-Coder-1.5B-Instruct", "qwen2.5-1.5b"),
        ("unsloth/Qwen2.5-3B-Instruct-unsloth-bnb-4bit", "qwen2.5-3b"),
        ("unsloth/gemma-3-1b-it", "gemma-3-1b"),
        ("meta-llama/Llama-3.2-3B-Instruct", "llama-3.2-3b"),
        ("Qwen/Qwen3-4B-Base", "qwen3-4b"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b"),
    ],
)
def test_a_repackaged_model_is_recognised(model_id: str, name: str) -> None:
    assert known_config(model_id) is KNOWN[name]


def test_an_unknown_model_without_its_config_says_what_is_known() -> None:
    with pytest.raises(ModelError, match=r"model\.id: nothing-9b has no config\.json here .*qwen2\.5-0\.5b"):
        model_shape("nothing-9b")


def test_a_local_config_is_read(tiny_dir: Any) -> None:
    found, source = model_shape(str(tiny_dir))
    assert found.hidden == 64
    assert source == "its config.json"


def shallow(name: str, layers: int = 3) -> dict[str, Any]:
    config = KNOWN[name] | {"num_hidden_layers": layers}
    if "layer_types" in config:
        config["layer_types"] = [*config["layer_types"][: layers - 1], "full_attention"]
    if "num_kv_shared_layers" in config:
        config["num_kv_shared_layers"] = 0
    return config


def compare_training(config: dict[str, Any], prompt: int, completion: int, rows: int, **settings: Any) -> float:
    """Return planned over counted bytes of a micro-batch, without the constants for what cannot be counted here."""
    plain = settings.get("compute") == "plain"
    trace = trace_plain_training if plain else trace_training
    traced = trace(config, prompt, completion, rows, **{k: v for k, v in settings.items() if k != "compute"})
    settings = {"group": rows} | {key: value for key, value in settings.items() if key != "common"}
    planned = Job(read_shape(config, "x"), prompt=prompt, completion=completion, rows=rows, batch=rows, **settings)
    uncounted = WORKSPACE_BYTES + int(8 * trained_parameters(planned))
    exact = weight_bytes(planned) + 8 * trained_parameters(planned)
    assert traced.static == pytest.approx(exact, rel=2e-3)
    if not plain:
        uncounted += 2 * trained_parameters(planned)  # the adapter's copy for decoding
    return (training_phase(planned).total - uncounted) / (traced.static + max(traced.forward, traced.backward))


def compare_rollout(config: dict[str, Any], prompt: int, completion: int, rows: int, group: int) -> float:
    counted = trace_rollout(config, prompt, completion, rows, group)
    planned = Job(read_shape(config, "x"), prompt=prompt, completion=completion, group=group, rows=rows, batch=rows)
    return (rollout_phase(planned).total - WORKSPACE_BYTES - int(8 * trained_parameters(planned))) / counted


@pytest.mark.parametrize(
    "name, prompt, completion, rows, settings",
    [
        ("qwen2.5-0.5b", 200, 4096, 1, {}),
        pytest.param("qwen2.5-1.5b", 200, 512, 8, {}, marks=pytest.mark.slow),
        ("qwen2.5-0.5b", 200, 256, 16, {"group": 8, "load_in": "16bit", "rank": 64}),
        pytest.param("qwen3-4b", 256, 1024, 2, {"group": 8}, marks=EVERY),
        pytest.param("llama-3.2-3b", 300, 400, 4, {"checkpointing": False}, marks=EVERY),
        ("gemma-3-1b", 200, 300, 4, {}),
        ("gemma-2-2b", 200, 512, 8, {}),
        pytest.param("gemma-2-2b", 200, 512, 4, {"checkpointing": False}, marks=EVERY),
        pytest.param("gemma-4-e2b", 200, 512, 8, {}, marks=EVERY),
        pytest.param("gemma-4-e2b", 100, 1024, 2, {"load_in": "16bit"}, marks=EVERY),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_training_is_planned_as_counted(
    name: str, prompt: int, completion: int, rows: int, settings: dict[str, Any]
) -> None:
    assert 0.97 <= compare_training(shallow(name), prompt, completion, rows, **settings) <= 1.10


@pytest.mark.parametrize(
    "name, prompt, completion, rows, group",
    [
        ("qwen2.5-0.5b", 200, 512, 16, 8),
        ("llama-3.2-3b", 100, 2048, 4, 4),
        ("gemma-2-2b", 600, 512, 4, 4),
        pytest.param("gemma-4-e2b", 200, 512, 16, 8, marks=pytest.mark.slow),
    ],
)
def test_a_rollout_is_planned_as_counted(name: str, prompt: int, completion: int, rows: int, group: int) -> None:
    assert 0.97 <= compare_rollout(shallow(name), prompt, completion, rows, group) <= 1.10


@pytest.mark.parametrize(
    "name, rows, new",
    [
        pytest.param("qwen2.5-0.5b", 4, 256, id="plain"),
        pytest.param("qwen2.5-0.5b", 16, 16, id="little that is new"),
        pytest.param("gemma-2-2b", 4, 256, id="capped scores", marks=pytest.mark.slow),
    ],
)
def test_turns_are_planned_as_counted(name: str, rows: int, new: int) -> None:
    """The rows of the turn before are those that the plan counts anyway."""
    config, prompt, completion = shallow(name), 100, 924
    counted = trace_turns(config, prompt, completion, rows, new)
    planned = Job(
        read_shape(config, "x"), prompt=prompt, completion=completion, group=rows, rows=rows, batch=rows, has_turns=True
    )
    found = rollout_phase(planned).total - WORKSPACE_BYTES - int(8 * trained_parameters(planned))
    assert 0.97 <= found / counted <= 1.10


PLAIN = [(200, 256, 4, {}), (200, 512, 8, {}), (200, 4096, 1, {}), (200, 512, 4, {"checkpointing": False})]


@pytest.mark.skipif(not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="TRL before 1.16 has another head")
@pytest.mark.parametrize(
    "name, row",
    [
        ("qwen2.5-1.5b", 0),
        ("qwen3-4b", 3),
        ("lfm2.5-1.2b", 1),
        pytest.param("qwen3.5-0.8b", 1, marks=EVERY),
        pytest.param("phi-4-mini", 1, marks=[pytest.mark.slow, pytest.mark.matrix]),
        pytest.param("gemma-2-2b", 1, marks=pytest.mark.slow),
        pytest.param("gemma-4-e2b", 3, marks=EVERY),
        pytest.param("falcon-h1-0.5b", 1, marks=EVERY),
    ],
    ids=lambda value: str(value),
)
def test_plain_compute_is_planned_as_counted(name: str, row: int) -> None:
    prompt, completion, rows, settings = PLAIN[row]
    layers = 4 if name.startswith("qwen3.5") else 3  # the fourth attends
    assert (
        0.97 <= compare_training(shallow(name, layers), prompt, completion, rows, compute="plain", **settings) <= 1.10
    )


MIXTURES = {
    "mixtral": {"intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "head_dim": 128,
    },
    "gpt_oss": {"intermediate_size": 2880, "num_local_experts": 4, "num_experts_per_tok": 4, "head_dim": 64},
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="TRL before 1.16 has another head")
@pytest.mark.parametrize("compute", ["packed", pytest.param("plain", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_of_experts_is_planned_as_counted(kind: str, compute: str) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
    config = {"model_type": kind, "hidden_size": 2048, **sizes, **MIXTURES[kind]}
    ratio = compare_training(config, 200, 512, 8, load_in="16bit", compute=compute)
    assert 0.97 <= ratio <= 1.10


@pytest.mark.slow
def test_packed_delta_nets_are_planned_as_counted_on_real_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed row is cut by its contents, which fake tensors lack; so a small layer with heads of the real size."""
    real = memory_trace.materialise

    def filled(model: torch.nn.Module) -> None:
        real(model)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)

    monkeypatch.setattr(memory_trace, "FakeTensorMode", lambda **settings: contextlib.nullcontext())
    monkeypatch.setattr(memory_trace, "materialise", filled)
    config = shallow("qwen3.5-0.8b", 1) | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
    config |= {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "num_attention_heads": 2}
    assert 0.95 <= compare_training(config, 96, 160, 8, load_in="16bit") <= 1.2


@pytest.mark.skipif(not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="TRL before 1.16 has another head")
def test_the_tile_of_trl_s_head_is_the_one_that_is_planned() -> None:
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    assert (PLAIN_TOKENS, PLAIN_VOCABULARY) == (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)


@pytest.mark.skipif(not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="TRL before 1.16 has another head")
@pytest.mark.parametrize(
    "name, prompt, completion, rows, settings",
    [
        pytest.param("qwen2.5-0.5b", 36, 28, 16, {}, marks=pytest.mark.slow),
        ("qwen2.5-1.5b", 100, 900, 4, {"checkpointing": False}),
        pytest.param("qwen3-4b", 100, 900, 4, {"load_in": "16bit"}, marks=EVERY),
        pytest.param("llama-3.2-1b", 500, 500, 8, {}, marks=pytest.mark.slow),
        pytest.param("qwen2.5-0.5b", 36, 28, 16, {"compute": "plain"}, marks=pytest.mark.slow),
        pytest.param("qwen2.5-1.5b", 100, 900, 4, {"compute": "plain", "checkpointing": False}, marks=EVERY),
        pytest.param("qwen3-4b", 100, 900, 4, {"compute": "plain", "load_in": "16bit"}, marks=EVERY),
        pytest.param("llama-3.2-1b", 500, 500, 8, {"compute": "plain"}, marks=EVERY),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_warm_up_is_planned_as_counted(
    name: str, prompt: int, completion: int, rows: int, settings: dict[str, Any]
) -> None:
    config, row = shallow(name), prompt + completion
    trace = trace_warmup if settings.get("compute") == "plain" else trace_packed_warmup
    traced = trace(config, prompt, completion, rows, **{k: v for k, v in settings.items() if k != "compute"})
    planned = Job(read_shape(config, "x"), warmup_row=row, warmup_step=rows * row, **settings)
    uncounted = WORKSPACE_BYTES + int(8 * trained_parameters(planned))
    counted = traced.static + max(traced.forward, traced.backward)
    assert 0.97 <= (warmup_phase(planned).total - uncounted) / counted <= 1.10


def test_a_warm_up_takes_more_the_more_goes_through_at_once() -> None:
    planned = Job(shape("qwen3-4b"), warmup_row=700, warmup_step=5000)
    sizes = [warmup_phase(replace(planned, warmup_tokens=tokens)).total for tokens in range(700, 5001, 50)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)


def test_a_step_of_a_warm_up_is_divided_until_it_fits() -> None:
    planned = job_of(load_recipe("unsloth-qwen3-4b", ["memory.tokens_per_microbatch=3000", "model.backend=hf"]))
    assert planned.warmup_tokens == 3000  # an upper bound for both stages
    small = next(size for size in range(4 * GIB, 16 * GIB, GIB // 4) if plan_memory(planned, size).fits)
    plan = plan_memory(planned, small)
    assert plan.warmup is not None
    assert warmup_tokens(plan.job) < 3000
    assert _warmup_bytes(plan.job, small) <= small
    assert not any("warm" in key for key in plan.chosen), "not a key that a recipe has"


def test_the_plan_of_a_warm_up_is_shown_in_the_words_of_the_other_stage() -> None:
    recipe, card = load_recipe("unsloth-qwen3-4b"), find_card("t4")
    plan = plan_recipe(recipe, card)
    lines = list(report_lines(recipe, card, plan))
    assert plan.fits
    assert any(line.startswith("warm-up, rows up to ") for line in lines)
    tokens = warmup_tokens(plan.job)
    assert f"one micro-batch of the warm-up: {tokens} tokens ({warmup_parts(plan.job)} a step)" in lines


def test_a_run_divides_a_step_of_the_warm_up_as_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_lite.memory import fit as budgets
    from grpo_lite.models.device import Device

    monkeypatch.setattr(budgets, "free_bytes", lambda: 5 * GIB // 2)
    device = Device("cuda", "a small card", 3 * GIB, bfloat16=False, compute_capability=(7, 5))
    recipe = load_recipe("gsm8k", ["warmup={source: self, tokens_per_step: 8000}", "eval.enabled=false"])
    lines: list[str] = []
    fit = budgets.fit_to_device(recipe, known_base(recipe, device, tmp_path), 300, lines.append, warmup_row=600)
    assert fit.options.warmup_tokens is not None
    assert 600 <= fit.options.warmup_tokens < 8000
    assert f" parts of at most {fit.options.warmup_tokens} tokens" in lines[0]
    whole = budgets.engine_options(load_recipe("gsm8k", ["warmup={source: self, tokens_per_step: 8000}"]))
    assert whole.warmup_tokens == 10_000  # where nothing is planned, a step with a quarter of padding


def compare_generate(config: dict[str, Any], prompt: int, completion: int, rows: int, sampling: bool) -> float:
    """Return planned over counted bytes of `generate`, in a rollout (sampling) or an evaluation (greedy)."""
    counted = trace_generate(config, prompt, completion, rows, sampling=sampling)
    planned = Job(read_shape(config, "x"), prompt=prompt, completion=completion, group=rows, rows=rows, batch=rows)
    planned = replace(planned, rollout="generate", eval_rows=rows, eval_completion=completion)
    if sampling:
        return (rollout_phase(planned).total - WORKSPACE_BYTES - int(8 * trained_parameters(planned))) / counted
    return (evaluation_phase(planned).total - WORKSPACE_BYTES) / counted


@pytest.mark.parametrize(
    "name, prompt, completion, rows, sampling",
    [("qwen2.5-1.5b", 600, 64, 16, True), ("llama-3.2-3b", 200, 256, 64, False)],
    ids=["rollout", "evaluation"],
)
def test_generate_is_planned_as_counted(name: str, prompt: int, completion: int, rows: int, sampling: bool) -> None:
    assert 0.97 <= compare_generate(shallow(name), prompt, completion, rows, sampling) <= 1.10


def compare_evaluation(config: dict[str, Any], prompt: int, completion: int, rows: int) -> float:
    counted = trace_evaluation(config, prompt, completion, rows)
    planned = Job(read_shape(config, "x"), prompt=prompt, eval_rows=rows, eval_completion=completion)
    return (evaluation_phase(planned).total - WORKSPACE_BYTES) / counted


@pytest.mark.parametrize(
    "name, prompt, completion, rows",
    [("qwen2.5-1.5b", 200, 512, 64), pytest.param("llama-3.2-3b", 100, 2048, 8, marks=pytest.mark.slow)],
)
def test_an_evaluation_is_planned_as_counted(name: str, prompt: int, completion: int, rows: int) -> None:
    """Once its reading of the prompts is the peak, once the decoding behind full buffers."""
    assert 0.97 <= compare_evaluation(shallow(name), prompt, completion, rows) <= 1.10


GRID = [
    (name, prompt, completion, rows, load_in)
    for name in ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b")
    for prompt, completion, rows in ((200, 256, 4), (200, 512, 8), (400, 1024, 8), (200, 4096, 1))
    for load_in in ("4bit", "16bit")
]


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("name, prompt, completion, rows, load_in", GRID)
def test_the_grid_of_real_shapes(name: str, prompt: int, completion: int, rows: int, load_in: str) -> None:
    assert 0.97 <= compare_training(KNOWN[name], prompt, completion, rows, load_in=load_in) <= 1.10


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"])
@pytest.mark.parametrize("prompt, completion, rows", [(200, 256, 8), (200, 512, 32), (200, 4096, 8)])
def test_the_grid_of_rollouts(name: str, prompt: int, completion: int, rows: int) -> None:
    assert 0.97 <= compare_rollout(KNOWN[name], prompt, completion, rows, 8) <= 1.10


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.skipif(not hasattr(trl.trainer.utils, "add_fused_lm_head"), reason="TRL before 1.16 has another head")
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"])
@pytest.mark.parametrize("row", range(len(PLAIN)))
def test_the_grid_of_plain_compute(name: str, row: int) -> None:
    prompt, completion, rows, settings = PLAIN[row]
    assert 0.97 <= compare_training(KNOWN[name], prompt, completion, rows, compute="plain", **settings) <= 1.10


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"])
@pytest.mark.parametrize("prompt, completion, rows", [(200, 256, 64), (600, 64, 16), (200, 4096, 8)])
def test_the_grid_of_evaluations(name: str, prompt: int, completion: int, rows: int) -> None:
    assert 0.97 <= compare_evaluation(KNOWN[name], prompt, completion, rows) <= 1.10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "gemma-2-2b", "gemma-3-1b"])
def test_completions_that_begin_alike_take_no_more_than_is_planned(name: str) -> None:
    """The beginning, with the prompt, is longer than Gemma 3's window: it takes a mask of its own."""
    ratios = [compare_training(shallow(name), 200, 600, 4, **more) for more in ({}, {"common": 400})]
    assert 0.97 <= ratios[0] <= 1.10
    assert ratios[1] > ratios[0]


@pytest.mark.slow
@pytest.mark.matrix
def test_no_planned_constant_hides_a_larger_model() -> None:
    """The comparison could not fail if the counting followed the plan: a third of the layers must be seen."""
    right = compare_training(shallow("qwen2.5-1.5b", 9), 200, 512, 8)
    assert 0.97 <= right <= 1.10
    traced = trace_training(shallow("qwen2.5-1.5b", 9), 200, 512, 8)
    smaller = replace(job("qwen2.5-1.5b"), shape=read_shape(shallow("qwen2.5-1.5b", 6), "x"))
    planned = training_phase(smaller).total - WORKSPACE_BYTES - int(8 * trained_parameters(smaller))
    assert planned / (traced.static + max(traced.forward, traced.backward)) < 0.97


def test_the_chunks_are_those_that_are_used() -> None:
    assert CHUNK_ELEMENTS == logprobs.CHUNK_ELEMENTS_GPU
    assert RECOMPUTED_ELEMENTS == recompute.CHUNK_ELEMENTS_GPU


@pytest.mark.parametrize("completion", [2, 16, 17, 18, 33, 64, 65, 100])
def test_the_capacity_of_a_row_s_buffer_is_the_cache_s(completion: int) -> None:
    cache = GroupCache([3], torch.zeros(2, dtype=torch.long))
    cache.advance()
    one = torch.zeros(2, 1, 1, 4)
    for _ in range(completion - 1):  # the last token of a completion is never fed back
        cache._append(0, one, one)
        cache.advance()
    assert cache.completions[0][0].size(2) == cache_capacity(completion)


@pytest.mark.parametrize("kv_tokens", [None, 700, 800, 1500, 2300, 4296, 9000])
def test_the_planned_rows_are_those_that_are_decoded_at_once(kv_tokens: int | None) -> None:
    planned = job("qwen2.5-0.5b", batch=32, kv_tokens=kv_tokens)
    prompts = {(i, *range(planned.prompt - 1)): list(range(8 * i, 8 * i + 8)) for i in range(4)}
    decoded = static_decode.Job(prompts, 32, planned.completion, (), Sampling(True, 1.0, 1.0), kv_tokens)
    assert wave(planned)[0] == decoded.at_once
    assert row_length(planned.longest) == decoded.length


def test_the_steps_of_a_row_s_length_and_of_reading_are_the_decoder_s() -> None:
    assert ROW_STEPS == row_cache.LENGTH_STEPS
    assert (READ_AT_ONCE, SCORED_AT_ONCE) == (static_decode.READ_AT_ONCE, static_decode.SCORED_AT_ONCE)


# What must fit, by the plan; by measurement once a GPU is at hand.
@pytest.mark.parametrize("name, gib", [("qwen2.5-1.5b", 4), ("qwen2.5-3b", 6), ("qwen2.5-7b", 10)])
def test_g8_with_512_tokens_fits(name: str, gib: int) -> None:
    plan = plan_memory(job(name), gib * GIB)
    assert plan.fits
    assert plan.peak <= gib * GIB


def test_4096_tokens_on_a_t4_fit() -> None:
    assert plan_memory(job("qwen2.5-1.5b", completion=4096), CARDS["t4"].memory_bytes).fits


def test_budgets_are_the_largest_that_fit() -> None:
    planned = job("qwen2.5-3b", rows=32, batch=256)
    plan = plan_memory(planned, 5 * GIB)
    assert plan.fits
    assert set(plan.chosen) == {"memory.tokens_per_microbatch", "memory.rollout_kv_tokens"}
    assert plan.needed <= 5 * GIB
    for key in ("tokens", "kv_tokens"):
        more = {key: getattr(plan.job, key) + 256}
        assert needed_bytes(replace(plan.job, **more), 5 * GIB) > 5 * GIB * 0.99


def test_a_card_with_room_changes_nothing() -> None:
    planned = job("qwen2.5-1.5b", rows=32, batch=64)
    plan = plan_memory(planned, CARDS["h100"].memory_bytes)
    assert plan.fits
    assert plan.chosen == {}
    assert plan.job == planned


def test_a_budget_of_the_recipe_is_an_upper_bound() -> None:
    plan = plan_memory(job("qwen2.5-3b", rows=32, batch=64, tokens=1500, kv_tokens=3000), 10 * GIB)
    assert (plan.job.tokens, plan.job.kv_tokens) == (1500, 3000)
    lower = plan_memory(job("qwen2.5-3b", rows=32, batch=64, tokens=30000, kv_tokens=60000), 5 * GIB)
    assert lower.fits
    assert lower.job.tokens < 30000


def test_checkpointing_is_switched_on_when_it_is_needed() -> None:
    plan = plan_memory(job("qwen2.5-1.5b", checkpointing=False), 4 * GIB)
    assert plan.fits
    assert plan.chosen["grpo.gradient_checkpointing"] is True


@pytest.mark.parametrize("seed", range(40))
def test_a_plan_that_fits_really_does_and_one_that_does_not_has_tried(seed: int) -> None:
    import random

    rng = random.Random(seed)
    planned = job(
        rng.choice(list(KNOWN)),
        load_in=rng.choice(["4bit", "8bit", "16bit"]),
        prompt=rng.randint(1, 2000),
        completion=rng.randint(1, 8000),
        group=(group := rng.choice([2, 4, 8, 16])),
        rows=rng.choice([1, 2, 8, 32]),
        batch=group * rng.choice([1, 4, 9]),
        compute=rng.choice(["packed", "plain"]),
        rollout=rng.choice(["shared", "generate", "vllm"]),
        checkpointing=rng.random() < 0.7,
        offload=rng.random() < 0.3,
        rank=rng.choice([1, 8, 64]),
    )
    memory = int(rng.uniform(1, 40) * GIB)
    plan = plan_memory(planned, memory)
    assert plan.fits == (plan.needed <= memory)
    assert all(size >= 0 for phase in (plan.rollout, plan.training) for _, size in phase.items)
    smallest = replace(planned, tokens=planned.longest, kv_tokens=planned.longest, checkpointing=True)
    if not plan.fits:
        assert needed_bytes(smallest, memory) > memory
    more = plan_memory(planned, 2 * memory)
    assert more.fits >= plan.fits


def test_every_change_that_is_offered_makes_it_fit() -> None:
    planned = job("qwen2.5-3b", load_in="16bit", completion=8192)
    memory = 8 * GIB
    assert not plan_memory(planned, memory).fits
    offered = list(cheapest_changes(planned, memory))
    assert len(offered) >= 2
    settings = {"model.load_in": "load_in", "grpo.max_completion_length": "completion", "lora.r": "rank"}
    tried = 0
    for text in offered:
        key, _, value = text.split()[0].partition("=")
        if key in settings:
            given: Any = value if key == "model.load_in" else int(value)
            assert plan_memory(replace(planned, **{settings[key]: given}), memory).fits, text
            tried += 1
    assert tried


def test_a_refusal_says_what_is_needed_and_three_changes() -> None:
    plan = plan_memory(job("qwen2.5-7b", load_in="16bit"), CARDS["t4"].memory_bytes)
    with pytest.raises(MemoryBudgetError) as caught:
        require_fit(plan, "my recipe on Tesla T4")
    text = str(caught.value)
    assert text.startswith("my recipe on Tesla T4: needs ")
    assert "model.load_in=4bit" in text
    assert len(advice(plan).splitlines()) <= 4


def test_the_largest_length_fits_and_the_next_does_not() -> None:
    planned = job("qwen2.5-1.5b")
    memory = CARDS["t4"].memory_bytes
    longest = largest_completion(planned, memory, whole_groups=True)
    assert longest is not None
    for length, expected in ((longest, True), (longest + 64, False)):
        tokens = 200 + 8 * length
        tried = replace(planned, completion=length, tokens=tokens, kv_tokens=tokens)
        assert (needed_bytes(tried, memory) <= memory) is expected
    divided = largest_completion(planned, memory, whole_groups=False)
    assert divided is not None
    assert divided > longest


UNPLANNED = {"smoke"}  # a random model


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in UNPLANNED])
def test_every_recipe_names_the_smallest_gpu_of_its_plan_and_one_that_holds_it_well(name: str) -> None:
    recipe = load_recipe(name)
    least, cards = least_card_gb(recipe), {"8 GB": "rtx4060-8", "T4 16 GB": "t4"}
    named, _, recommended = recipe.least_gpu.partition("; recommended: ")
    if not named.startswith("none"):
        assert named == f"{least} GB"
    assert least is not None
    assert least <= 16
    card = find_card(cards[recommended] if recommended else "8GiB")
    plan = plan_recipe(recipe, card)
    assert plan.fits
    text = "\n".join(report_lines(recipe, card, plan))
    assert "to spare" in text
    assert "not yet measured on a GPU" in text


def test_the_readme_states_the_least_gpu_of_each_recipe(root: Any) -> None:
    page = (root / "README.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    stated = {row[0].strip("`"): row[-1] for row in rows if row[0].strip("`") in recipe_names() and len(row) == 5}
    for name in recipe_names():
        least = load_recipe(name).least_gpu
        assert stated[name] == ("none" if least.startswith("none") else least), name


def test_the_smallest_gpu_holds_the_plan_and_the_next_smaller_one_does_not() -> None:
    """A 3B base: 1.7 GB of NF4 weights and 8-bit states, 4.6 GiB in all; of a card of 4 GB 3.6 GiB are counted on."""
    recipe = load_recipe("countdown", ["grpo.per_device_train_batch_size=2"])  # 32 completions a round
    assert least_card_gb(recipe) == 6
    assert plan_recipe(recipe, find_card("5.4GiB")).fits
    assert not plan_recipe(recipe, find_card("3.6GiB")).fits


def test_the_table_marks_what_does_not_fit() -> None:
    lines = list(all_cards_table([load_recipe("unsloth-qwen3-4b"), load_recipe("quickstart")]))
    assert "out of memory" in lines[2]
    assert "out of memory" not in lines[3]
    assert len(lines[0].split("|")) == len(lines[2].split("|")) == len(CARDS) + 5


@pytest.mark.parametrize("text, gib", [("11GiB", 11), ("11", 11), ("12gb", 12e9 / GIB), ("T4", 14.56)])
def test_a_card_is_found_by_name_or_size(text: str, gib: float) -> None:
    assert find_card(text).memory_bytes == pytest.approx(gib * GIB, rel=1e-3)


@pytest.mark.parametrize("text", ["t5", "0", "-3GiB", "nan", "1e9", ""])
def test_an_unknown_card_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="allowed: t4, rtx3060-12"):
        find_card(text)


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from grpo_lite.cli import main; "
        "main(['plan', 'gsm8k', '--gpu', 't4'], standalone_mode=False); "
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "keys and values" in done.stdout


def test_a_long_prompt_of_the_data_counts_instead_of_the_cap() -> None:
    recipe = load_recipe("gsm8k")
    short, long = (job_of(recipe, prompt=tokens) for tokens in (10, 3000))
    assert training_phase(short).total < training_phase(long).total
    assert rollout_phase(short).total < rollout_phase(long).total


def test_rollouts_across_the_border_of_longrope_are_planned_as_generate_decodes_them() -> None:
    """Phi-4-mini rotates otherwise beyond 4,096 tokens; training stays packed (Support.has_one_rope)."""
    planned = job("phi-4-mini", prompt=96, completion=4000)
    assert (planned.is_packed, planned.is_shared) == (True, True)
    across = replace(planned, completion=4001)
    assert (across.is_packed, across.is_shared) == (True, False)
    by_generate = replace(across, rollout="generate")
    assert rollout_phase(across) == rollout_phase(by_generate)
    _, notes = recipe_job(load_recipe("gsm8k", ["grpo.max_completion_length=5000"]), shape("phi-4-mini"))
    assert any("rollouts by `generate`, as rows may cross 4096 tokens" in note for note in notes)


def test_capped_scores_are_planned_in_the_square_of_the_row() -> None:
    """Gemma 2 keeps 14 bytes of each score, in 8 heads of 26 layers; SDPA keeps none."""
    gemma = job("gemma-2-2b", prompt=100, completion=4000, rows=2, batch=2, group=2, checkpointing=False)
    plain = replace(gemma, shape=replace(gemma.shape, softcap=False))
    capped, uncapped = (dict(training_phase(each).items)["activations of all layers"] for each in (gemma, plain))
    assert capped - uncapped == 26 * 8 * 14 * (100**2 + 2 * 4000 * 4100)


def test_sequences_beyond_the_attention_window_are_planned_as_they_are_computed() -> None:
    """Gemma 3 looks back 512 tokens: longer ones take a second set of masks, and share their prompts all the same."""
    inside, outside = (job("gemma-3-1b", completion=length, rows=8, batch=8) for length in (312, 313))
    assert outside.step_tokens == 200 + 8 * 313
    inside_masks, outside_masks = (dict(training_phase(each).items)["attention masks"] for each in (inside, outside))
    # In 16 bit, of eight completions: 313 tokens behind a prompt of 200, for layers that see all and for the others.
    assert outside_masks == 2 * 2 * 8 * 313 * 513
    assert inside_masks == 2 * 8 * 312 * 512
    longer = replace(outside, prompt=600)  # of which a completion sees 511, and a mask for the prompt itself
    masks = dict(training_phase(longer).items)["attention masks"]
    assert masks == 2 * (8 * 313 * (600 + 313) + 8 * 313 * (511 + 313) + 600**2)
    planned, notes = recipe_job(load_recipe("unsloth-gemma3-1b"), shape("gemma-3-1b"))
    assert planned.is_packed
    assert not [note for note in notes if "TRL's own compute" in note]


def test_a_window_that_no_layer_uses_is_none() -> None:
    config = KNOWN["mistral-7b-v0.3"] | {"sliding_window": 4096}
    assert read_shape(config, "x").sliding_window == 4096
    assert read_shape(config | {"layer_types": ["full_attention"] * 32}, "x").sliding_window is None
    assert read_shape(config | {"layer_types": ["full_attention", "sliding_attention"]}, "x").sliding_window == 4096
    assert read_shape(KNOWN["qwen2.5-7b"] | {"sliding_window": 131072}, "x").sliding_window is None


def test_a_float32_card_is_offered_4_bit_only_where_float32_fits_too() -> None:
    """Gemma 3 on a card without bfloat16 computes in float32, whatever its weights are stored in."""
    recipe = load_recipe("unsloth-gemma3-1b", ["model.load_in=32bit", "grpo.max_completion_length=6000"])
    planned = job_of(recipe, bfloat16=False)
    for gib in range(4, 40, 2):
        for text in cheapest_changes(planned, gib * GIB):
            if text.startswith("model.load_in=4bit"):
                again = job_of(
                    load_recipe("unsloth-gemma3-1b", ["model.load_in=4bit", "grpo.max_completion_length=6000"]),
                    bfloat16=False,
                )
                assert plan_memory(again, gib * GIB).fits, gib


def test_a_vllm_server_takes_no_share_of_this_card() -> None:
    keys = ["model.load_in=16bit", "grpo.use_vllm=true", "grpo.vllm_gpu_memory_utilization=0.4"]
    shared, own = (job_of(load_recipe("gsm8k", [*keys, f"grpo.vllm_mode={m}"])) for m in ("colocate", "server"))
    assert needed_bytes(shared, 16 * GIB) - needed_bytes(own, 16 * GIB) == int(0.4 * 16 * GIB)


def test_a_rollout_by_vllm_is_never_advised_a_quantized_base() -> None:
    job = job_of(load_recipe("gsm8k", ["model.load_in=16bit", "grpo.use_vllm=true"]))
    sizes = [quarter * GIB // 4 for quarter in range(8, 48)]
    assert any("model.load_in=4bit" in cheapest_changes(replace(job, rollout="shared"), size) for size in sizes)
    assert not any("model.load_in=4bit" in cheapest_changes(job, size) for size in sizes)


def test_several_processes_plan_their_own_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_lite.memory import fit as budgets
    from grpo_lite.models.device import Device

    planned: list[Job] = []
    real = budgets.plan_memory
    monkeypatch.setattr(budgets, "plan_memory", lambda job, *rest: planned.append(job) or real(job, *rest))
    monkeypatch.setattr(budgets, "free_bytes", lambda: 14 * GIB)
    monkeypatch.setenv("WORLD_SIZE", "2")
    device = Device("cuda", "Tesla T4", 15 * GIB, bfloat16=False, compute_capability=(7, 5), count=2)
    recipe = load_recipe("gsm8k")
    budgets.fit_to_device(recipe, known_base(recipe, device, tmp_path), 300, lambda line: None)
    assert (planned[0].batch, planned[0].rows, planned[0].prompt) == (64, 8, 300)


def test_a_model_whose_blocks_are_not_counted_trains_without_a_plan_and_says_so(tmp_path: Path) -> None:
    from grpo_lite.memory import fit as budgets
    from grpo_lite.models.base import Base
    from grpo_lite.models.device import Device

    recipe = load_recipe("gsm8k")
    config = KNOWN["qwen3-4b"] | {"model_type": "jamba"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    lines: list[str] = []
    device = Device("cuda", "Tesla T4", 15 * GIB, bfloat16=False, compute_capability=(7, 5))
    fit = budgets.fit_to_device(recipe, Base(recipe.model, device, tmp_path), 300, lines.append)
    assert lines[0].startswith("memory: ")
    assert "no plan for this model (jamba): its blocks are of a kind that is not counted" in lines[0]
    assert fit.options.tokens_per_microbatch is None


def test_a_hybrid_keeps_keys_and_values_in_few_layers_and_a_state_in_the_others() -> None:
    """Qwen3.5-0.8B: 6 of 24 layers have 2 × 2 × 256 numbers a token; 18.8 MiB of state for each row and prompt."""
    planned = job("qwen3.5-0.8b", rows=8)
    items = dict(rollout_phase(planned).items)
    per_token = 6 * 2 * 2 * 256 * 2
    length = row_length(712)
    assert items["keys and values, 8 completions at once"] == 8 * length * per_token + 8 * length * 2
    assert items["states of layers that do not attend"] == (8 + 1) * planned.shape.state_bytes(2)
    longer = dict(rollout_phase(replace(planned, completion=5120)).items)
    assert longer["states of layers that do not attend"] == items["states of layers that do not attend"]


def test_the_layer_with_the_largest_working_set_decides_under_checkpointing() -> None:
    """A gated delta net saves more of a token than attention; without checkpointing both kinds add up."""
    planned = job("qwen3.5-0.8b", rows=8, load_in="16bit")
    kinds = [replace(planned.shape, blocks=((block, count),)) for block, count in planned.shape.blocks]
    delta, attention = (dict(training_phase(replace(planned, shape=kind)).items) for kind in kinds)
    both = dict(training_phase(planned).items)
    what = "one layer's working set"
    assert both[what] == pytest.approx(delta[what], rel=0.01)
    assert "output head's working set" in attention or attention[what] < delta[what]
    kept = dict(training_phase(replace(planned, checkpointing=False)).items)["activations of all layers"]
    alone = [
        dict(training_phase(replace(planned, checkpointing=False, shape=kind)).items)["activations of all layers"]
        for kind in kinds
    ]
    assert kept == pytest.approx(sum(alone), rel=1e-6)  # of which only attention rotates


def test_the_recipes_page_has_the_table_that_plan_prints(root: Any) -> None:
    page = (root / "recipes" / "README.md").read_text(encoding="utf-8")
    names = [name for name in recipe_names() if name not in UNPLANNED]
    for line in all_cards_tables([load_recipe(name) for name in names], chance_to_find):
        assert line in page, f"{line}\nWrite it anew: grpo-lite plan --all-gpus"


def test_the_table_of_hours_gives_ranges_and_leaves_out_what_cannot_be_estimated() -> None:
    lines = list(hours_table([load_recipe(name) for name in ("gsm8k", "wordle", "qwen3.5-2b", "gemma3-4b")]))
    rows = {line.split("`")[1]: [cell.strip() for cell in line.strip("| ").split("|")] for line in lines[2:4]}
    assert set(rows) == {"gsm8k", "gemma3-4b"}
    assert rows["gsm8k"][1:3] == ["37,120", "1,319"]
    assert all(re.fullmatch(r"[\d.]+ to [\d.]+ (h|min)", cell) for cell in rows["gsm8k"][3:])
    assert rows["gemma3-4b"][3] == "-"  # float32 on a T4
    assert "not measured on a GPU" in lines[-1]


def test_the_table_of_three_hours_sets_the_whole_recipe_beside_what_fits() -> None:
    recipes = [load_recipe(name) for name in ("math", "unsloth-qwen2.5-3b")]
    lines = list(budget_table(recipes, find_card("t4"), 10800, lambda rows: rows / 1000))
    assert lines[0].startswith("| recipe | whole on a Tesla T4 16 GB")
    (row,) = [line for line in lines if line.startswith("| `")]  # the other one fits whole
    assert "290 steps, 500 problems (50%), " in row
    assert "not measured on a GPU" in lines[-1]
