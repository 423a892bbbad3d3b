"""What a user does on a GPU, on the simulated one: `python -m tests.fake_cuda.scenarios NAME …`, a process each.

A scenario fails by an assertion. Every one ends with a look at what must hold on any card: packed compute on, static
rows on, graphs on.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRPO_LITE_TRACEBACK"] = "1"

from tests.fake_cuda import device  # isort: skip  before torch
import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen3ForCausalLM, set_seed

from grpo_lite.engine import attention, static_decode
from grpo_lite.engine.conversations import Conversations
from grpo_lite.engine.decode import GroupDecoder
from grpo_lite.engine.options import EngineOptions
from grpo_lite.engine.static_decode import StaticDecoder, engine_of
from grpo_lite.models.load import lora_to_float32
from grpo_lite.trainer import recovery
from tests.fake_cuda.models import base_on_cuda, policy_on_cuda
from tests.tiny import parity_reward, tiny_args, tiny_prompts, tiny_tokenizer
from tests.tool_model import Ledger, write_tool_model

LAUNCHES_PER_STEP = 1100  # of a decoding step at 28 layers
GROUP_LAUNCHES_PER_STEP = 2400  # of the group decoder; 2,568 if LoRA's B were cast for each token
MICRO_STEP_LAUNCHES = {10_000: 10_300, 26: 20_300}  # by tokens_per_microbatch: one micro-batch, two
SCENARIOS: dict[str, Callable[[], None]] = {}
messages: list[str] = []  # lines that our trainer and our loggers show


def scenario(run: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS[run.__name__] = run
    return run


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        messages.append(record.getMessage())


# Decoding


def decode(
    model: Any, decoder: Any, tokens: int = 34, rows: list[list[int]] | None = None, **settings: Any
) -> list[list[int]]:
    """Decode behind these rows; by default two groups of four with prompts of 9 and 12 tokens."""
    rows = rows or [list(range(5, 14))] * 4 + [list(range(7, 19))] * 4
    width = max(map(len, rows))
    ids = torch.tensor([[2] * (width - len(row)) + row for row in rows], device="cuda")
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device="cuda")
    config = GenerationConfig(
        **{"max_new_tokens": tokens, "do_sample": False, "eos_token_id": [319], "pad_token_id": 2, **settings}
    )
    device.waits.clear()
    device.launches.clear()
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, custom_generate=decoder)
    return out[:, width:].host.tolist()


def autocast_of(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: torch.autocast("cuda", dtype=dtype)


def launches_of_a_step(model: Any, decoder: StaticDecoder) -> int:
    """Launches of one step, kernel by kernel."""
    counts: list[int] = []
    engine = engine_of(model.get_base_model())
    assert engine._batch is not None
    plain = engine._batch._step

    def step(*args: Any) -> None:
        before = sum(device.launches.values())
        plain(*args)
        counts.append(sum(device.launches.values()) - before)

    engine._batch._step = step  # type: ignore[method-assign]
    engine._batch.graphs.switch.is_on = False
    decode(model, decoder)
    assert len(set(counts)) == 1, counts
    return counts[0]


def check_that_telling_costs_no_wait(model: Any, autocast: Callable[[], Any]) -> None:
    """The host hears of ended rows when it looks anyway."""
    ends = decode(model, StaticDecoder(autocast))[0][2:3]  # the first group's rows end here, the second's later
    told: dict[int, list[int]] = {}
    counts = []
    for ended in (None, None, told.__setitem__):  # other ends than before: the first lays out buffers
        completions = decode(model, StaticDecoder(autocast, ended=ended), eos_token_id=ends)
        counts.append(sum(device.waits.values()))
    assert counts[1] == counts[2], counts
    assert told, "some rows should end early"
    assert all(completions[row][: len(ids)] == ids for row, ids in told.items()), (told, completions)


def check_decoding(layers: int) -> tuple[float, int]:
    """Compare tokens with the group decoder's; return both decoders' launches a step."""
    autocast = autocast_of(torch.float16)
    model = policy_on_cuda("qwen2", torch.float16, num_hidden_layers=layers)
    expected = decode(model, GroupDecoder(autocast))
    group = sum(device.launches.values()) / 34
    check_that_telling_costs_no_wait(model, autocast)
    assert decode(model, StaticDecoder(autocast)) == expected
    assert decode(model, StaticDecoder(autocast)) == expected
    assert device.launches["graph"] == 34, device.launches["graph"]
    looks = [n for (name, where), n in device.waits.items() if name == "tolist" and where.startswith("static_decode")]
    assert max(looks) <= 34 / 8 + 1, device.waits  # of the loop
    print("waits of a rollout of 34 tokens:", sum(device.waits.values()))
    assert_all_on(model)
    return group, launches_of_a_step(model, StaticDecoder(autocast))


@scenario
def decoding() -> None:
    """Half the launches, a wait in eight tokens, the same tokens; nothing in a graph that it cannot hold."""
    device.install((7, 5))
    group, static = zip(*(check_decoding(layers) for layers in (2, 4)), strict=True)
    at_28 = [two + (four - two) / 2 * 26 for two, four in (group, static)]
    print(f"launches a step at 28 layers: {at_28[0]:.0f} group decoder, {at_28[1]:.0f} static rows")
    assert at_28[0] <= GROUP_LAUNCHES_PER_STEP
    assert at_28[1] <= LAUNCHES_PER_STEP


@scenario
def decoding_at_28_layers() -> None:
    device.install((7, 5))
    group, static = check_decoding(28)
    print(f"launches a step: {group:.0f} group decoder, {static} static rows")
    assert static <= LAUNCHES_PER_STEP


@scenario
def graphs_draw_what_the_steps_would() -> None:
    """Sampling, with an attention window: the same tokens, probabilities and random state as kernel by kernel."""
    model = policy_on_cuda("mistral", torch.bfloat16, sliding_window=12)
    sampling = {"do_sample": True, "top_k": 0, "temperature": 0.8, "eos_token_id": list(range(200, 260))}
    results = []
    for graphs in (True, False, True):
        torch.cuda.manual_seed(5)
        decoder = StaticDecoder(autocast_of(torch.bfloat16))
        engine = engine_of(model.get_base_model())
        if engine._batch is not None:
            engine._batch.graphs.switch.is_on = graphs
        tokens = decode(model, decoder, **sampling)
        results.append((tokens, decoder.rollout.logps, torch.cuda.get_rng_state().tolist()))
        assert (device.launches["graph"] > 0) == graphs
    assert results[0] == results[1] == results[2]
    assert len({len(row) for row in results[0][1]}) > 1, "rows should end at different steps"


@scenario
def decoding_of_convolutions() -> None:
    """Layers with a state in a graph, greedy and sampled: tokens and log-probabilities."""
    _decoding_of_hybrids(("lfm2", {}))


@scenario
def decoding_of_delta_nets_and_mamba() -> None:
    """The same for larger states."""
    _decoding_of_hybrids(("qwen3_5", {}), ("granite4", {"mamba_d_head": 32}))


def _decoding_of_hybrids(*families: tuple[str, dict[str, int]]) -> None:
    for kind, sizes in families:
        model = policy_on_cuda(kind, torch.float16, load_in="16bit", **sizes)
        autocast = autocast_of(torch.float16)
        expected = decode(model, GroupDecoder(autocast))
        for _ in range(2):
            assert decode(model, StaticDecoder(autocast)) == expected, kind
            assert device.launches["graph"] >= 32, (kind, device.launches["graph"])
        assert_all_on(model)
        step = launches_of_a_step(model, StaticDecoder(autocast))
        print(f"{kind}: {step} launches a step of {model.get_base_model().config.num_hidden_layers} layers")
        results = []
        for graphs in (True, False):
            torch.cuda.manual_seed(5)
            decoder = StaticDecoder(autocast)
            engine_of(model.get_base_model())._graphs.is_on = graphs
            tokens = decode(model, decoder, do_sample=True, top_k=0, eos_token_id=list(range(200, 260)))
            assert (device.launches["graph"] > 0) == graphs
            results.append((tokens, decoder.rollout.logps))
        assert results[0] == results[1], kind


@scenario
def turns_read_only_what_is_new() -> None:
    """Rows stay in their buffers between turns: tokens, tokens read, graphs, launches and waits."""
    for kind, load_in in (("qwen2", "4bit"), ("lfm2", "16bit")):
        model = policy_on_cuda(kind, torch.float16, load_in=load_in)
        autocast = autocast_of(torch.float16)
        kept = {decoder: Conversations(34) for decoder in (GroupDecoder, StaticDecoder)}
        prompts = [list(range(5 + i, 14 + 2 * i)) for i in range(6)]
        rows = [prompt for prompt in prompts for _ in range(2)]
        starts = [len(row) for row in rows]
        for number in range(3):
            answers = {}
            for kind_of, conversations in kept.items():
                decoder = kind_of(autocast, conversations=conversations)
                out = decode(model, decoder, rows=rows, eos_token_id=list(range(200, 260)))
                lengths = map(len, decoder.rollout.logps)
                answers[kind_of] = [ids[:length] for ids, length in zip(out, lengths, strict=True)]
                assert decoder.rollout.prefill_tokens == (sum(map(len, prompts)) if number == 0 else 4 * len(rows)), (
                    kind,
                    number,
                )
            assert answers[StaticDecoder] == answers[GroupDecoder], (kind, number)
            if number == 0:
                assert len({len(answer) for answer in answers[StaticDecoder]}) > 1, "rows should end at different steps"
            assert device.launches["graph"] > 0, (kind, number)
            looks = [n for (name, at), n in device.waits.items() if name == "tolist" and at.startswith("static_decode")]
            assert max(looks) <= 34 / 8 + 1, device.waits
            going = [
                i for i, answer in enumerate(answers[StaticDecoder]) if len(rows[i]) + len(answer) < starts[i] + 30
            ]
            rows, starts = (
                [rows[i] + answers[StaticDecoder][i] + [5, 6, 7] for i in going],
                [starts[i] for i in going],
            )
            assert len(rows) > 1, (kind, number)
        assert kept[StaticDecoder].reused_tokens == kept[GroupDecoder].reused_tokens > 0
        assert kept[StaticDecoder].reread_rows == 0
        assert_all_on(model)


def launches_of_reading(model: Any, rows: int) -> int:
    """Launches of a pass over new tokens of so many rows."""
    engine = engine_of(model.get_base_model())
    assert engine._batch is not None
    new = [(row, 12, (5, 6, 7)) for row in range(rows)]
    with torch.no_grad(), engine.layers().installed():
        before = sum(device.launches.values())
        static_decode._read_behind(model.get_base_model(), engine._batch.cache, new)
    return sum(device.launches.values()) - before


@scenario
def new_tokens_of_all_rows_are_read_at_once() -> None:
    """The launches of a pass do not depend on how many rows it reads."""
    model = policy_on_cuda("qwen2", torch.float16)
    decode(model, StaticDecoder(autocast_of(torch.float16)))
    two, eight = (launches_of_reading(model, rows) for rows in (2, 8))
    print(f"launches of a pass over new tokens of 2 layers: {two}; a step: ", end="")
    print(launches_of_a_step(model, StaticDecoder(autocast_of(torch.float16))))
    assert two == eight


@scenario
def episodes_on_a_card() -> None:
    """Training with tools in float32: the same tokens and gradients as where every turn is read whole."""
    with tempfile.TemporaryDirectory() as folder:
        write_tool_model(Path(folder))
        bases = [Qwen3ForCausalLM.from_pretrained(folder) for _ in range(2)]
        words = AutoTokenizer.from_pretrained(folder)
    device.install((7, 5))
    found = []
    keep = Conversations.keep
    for base, keeps in zip(bases, (True, False), strict=True):
        if not keeps:
            Conversations.keep = lambda self, prompt, tokens, contents: self.drop(prompt, tokens)  # type: ignore[method-assign]
        found.append(_episodes(device.move(base), words))
    Conversations.keep = keep  # type: ignore[method-assign]
    (ids, read, adapter), (expected, whole, other) = found
    print(f"tokens read: {whole} with every turn whole, {read} with rows kept")
    assert torch.equal(ids, expected)
    assert read < 0.75 * whole
    difference = max(float((adapter[name] - other[name]).abs().max()) for name in adapter)
    assert difference < 1e-4, difference


def _episodes(base: Any, words: Any) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
    """Train a step on episodes; return their tokens, how many were read in the rollout, and the adapter."""
    from datasets import Dataset
    from peft import LoraConfig

    from grpo_lite.trainer.trainer import PackedGRPOTrainer

    settings = {"max_completion_length": 90, "max_tool_calling_iterations": 2, "optim": "sgd", "use_cpu": False}
    settings |= {"learning_rate": 0.1, "bf16": False, "fp16": False}
    set_seed(0)
    trainer = PackedGRPOTrainer(
        model=base,
        args=tiny_args(tempfile.mkdtemp(), **settings),
        reward_funcs=lambda completions, **_: [len(str(messages)) % 7 / 7 for messages in completions],
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": f"Count {i}."}]} for i in range(2)]),
        processing_class=words,
        environment_factory=Ledger,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        show=messages.append,
    )
    scored: list[Any] = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: scored.append(score(inputs)) or scored[-1]
    device.launches.clear()
    trainer.train()
    assert device.launches["graph"] > 0
    assert_all_on(trainer.model)
    assert trainer.state.log_history[0]["tools/call_frequency"] >= 1
    assert trainer.rollouts.last is not None, "a turn was not ours"
    return scored[0]["completion_ids"].host, trainer.rollouts.last.prefill_tokens, adapter_of(trainer)


@scenario
def a_step_that_a_graph_cannot_hold() -> None:
    """A host copy in the step (planted): graphs are off, one line says so, and the tokens are the same."""
    from grpo_lite.engine.row_cache import RowCache

    model = policy_on_cuda("llama", torch.float16)
    expected = decode(model, GroupDecoder(autocast_of(torch.float16)))
    plain = RowCache.begin_step

    def begin_step(self: RowCache, *given: Any) -> None:
        torch.tensor([0], device="cuda")
        plain(self, *given)

    RowCache.begin_step = begin_step  # type: ignore[method-assign]
    assert decode(model, StaticDecoder(autocast_of(torch.float16))) == expected
    assert device.launches["graph"] == 0
    assert [line for line in messages if "CUDA graphs are off" in line and "copies from the host" in line], messages
    assert engine_of(model.get_base_model()).obstacle is None


@scenario
def memory_runs_out_while_a_graph_is_captured() -> None:
    """It is the rollout's overflow, as any other: raised to the caller, and the next rollout works."""
    model = policy_on_cuda("llama", torch.float16)
    decoder = StaticDecoder(autocast_of(torch.float16))
    expected = decode(model, decoder)
    engine_of(model.get_base_model()).release()
    plain = device.CUDAGraph.__init__

    def overflow(self: device.CUDAGraph) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    device.CUDAGraph.__init__ = overflow  # type: ignore[method-assign]
    try:
        decode(model, decoder)
    except torch.OutOfMemoryError:
        pass
    else:
        raise AssertionError("the overflow was swallowed")
    device.CUDAGraph.__init__ = plain  # type: ignore[method-assign]
    assert decode(model, decoder) == expected


@scenario
def one_attention_call_a_layer() -> None:
    """Packed attention by a varlen kernel: output, gradients, and how many kernels forward and backward take."""
    from grpo_lite.engine import varlen
    from grpo_lite.engine.attention import PackedLayout, Rule, packed_attention

    segments = [(150, (40, 64, 30, 50)), (90, (64, 20, 64, 33))]
    tokens = sum(prompt + sum(lengths) for prompt, lengths in segments)
    for dtype, expected in ((torch.float16, varlen.efficient), (torch.bfloat16, varlen.flash)):
        device.install((7, 5) if dtype == torch.float16 else (8, 6))
        varlen._tried.cache_clear()
        torch.manual_seed(0)
        drawn = [torch.randn(1, heads, tokens, 16, device="cuda", dtype=dtype) for heads in (4, 2, 2)]
        weight = torch.randn(1, tokens, 4, 16, device="cuda", dtype=dtype)
        assert varlen.choose_kernel(*drawn[:2], None) is expected
        results, counts = [], []
        for kernel in (expected, None):
            varlen.choose_kernel, plain = lambda *_, kernel=kernel: kernel, varlen.choose_kernel
            layout = PackedLayout(segments, torch.device("cuda", 0))
            packed_attention(*drawn, layout, Rule())  # builds the index
            states = [tensor.detach().requires_grad_() for tensor in drawn]
            device.launches.clear()
            out = packed_attention(*states, layout, Rule())
            forward = sum(device.launches.values())
            gradients = torch.autograd.grad(out, states, weight)
            counts.append((forward, sum(device.launches.values()) - forward))
            results.append([out, *gradients])
            varlen.choose_kernel = plain
        for one, other in zip(*results, strict=True):
            difference = float((one.float() - other.float()).abs().max() / other.float().abs().max())
            assert difference < 0.02, difference
        print(f"{expected.__name__}: launches forward and backward {counts[1]} one by one, {counts[0]} in one call")
        assert sum(counts[0]) <= sum(counts[1]) / 2


# Training


def trainer_on_cuda(
    kind: str = "qwen2",
    dtype: torch.dtype = torch.float16,
    load_in: str = "4bit",
    options: EngineOptions | None = None,
    out: str | None = None,
    base: Any = None,
    **settings: Any,
) -> Any:
    """Return our trainer with a tiny policy on the device, as `train` builds it.

    The first call installs the device; bases for further ones must have been made before.
    """
    from peft import LoraConfig

    from grpo_lite.trainer.trainer import PackedGRPOTrainer

    base = base_on_cuda(kind, dtype, load_in) if base is None else base
    if not device.is_installed():
        device.install((7, 5) if dtype == torch.float16 else (8, 6))
    device.move(base)
    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 24,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "use_cpu": False,
        "gradient_checkpointing": True,
        "max_steps": 2,
        "optim": "adamw_torch_fused",
    }
    set_seed(0)
    trainer = PackedGRPOTrainer(
        model=base,
        args=tiny_args(out or tempfile.mkdtemp(), **(defaults | settings)),
        reward_funcs=parity_reward,
        train_dataset=tiny_prompts(8),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        options=options or EngineOptions(tokens_per_microbatch=60),
        show=messages.append,
    )
    lora_to_float32(trainer.model)
    return trainer


def adapter_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().host.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_trained(trainer: Any, before: dict[str, torch.Tensor]) -> None:
    after = adapter_of(trainer)
    assert all(p.dtype == torch.float32 for p in after.values())
    assert all(torch.isfinite(p).all() for p in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in after), "the adapter did not move"
    assert trainer.state.global_step == trainer.args.max_steps


def assert_all_on(model: Any) -> None:
    """Packed compute and static rows serve the model, with graphs."""
    engine = engine_of(model.get_base_model())
    assert engine.is_checked
    assert engine.obstacle is None, engine.obstacle
    off = [line for line in messages if "are off" in line or "without CUDA graphs" in line]
    assert off == [], off


def train_and_check(**settings: Any) -> Any:
    trainer = trainer_on_cuda(**settings)
    before = adapter_of(trainer)
    device.launches.clear()
    trainer.train()
    assert trainer.support.decided
    assert all(trainer.support.decided.values()), messages
    assert device.launches["graph"] > 0
    assert_all_on(trainer.model)
    assert_trained(trainer, before)
    return trainer


@scenario
def train_fp16() -> None:
    """A T4: NF4 base, float32 adapter, GradScaler."""
    trainer = train_and_check()
    assert trainer.accelerator.scaler is not None


@scenario
def train_bf16_qwen3_with_kl() -> None:
    attention.DENSE_TOKENS = 0  # groups this small would be padded
    train_and_check(kind="qwen3", dtype=torch.bfloat16, beta=0.04)


@scenario
def train_16bit_llama_two_iterations() -> None:
    attention.DENSE_TOKENS = 0
    train_and_check(kind="llama", load_in="16bit", num_iterations=2)


@scenario
def train_with_refill_and_offload() -> None:
    options = EngineOptions(tokens_per_microbatch=60, refill=1, offload_activations=True)
    train_and_check(options=options)


@scenario
def train_plain_compute() -> None:
    """TRL's own forward and backward, our rollouts."""
    trainer = trainer_on_cuda(options=EngineOptions(compute="plain"))
    before = adapter_of(trainer)
    trainer.train()
    assert_trained(trainer, before)
    assert_all_on(trainer.model)


@scenario
def resume_is_exact() -> None:
    """Four steps at once, and two, a scrambled CUDA generator, two more: the same adapter to the bit."""
    bases = [base_on_cuda("qwen2", torch.float16) for _ in range(2)]
    whole = trainer_on_cuda(max_steps=4)
    whole.train()
    expected = adapter_of(whole)
    out = tempfile.mkdtemp()
    halves = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "out": out}
    trainer_on_cuda(base=bases[0], **halves).train()
    resumed = trainer_on_cuda(base=bases[1], **halves)
    torch.cuda.manual_seed(77)
    resumed.train(resume_from_checkpoint=str(Path(out) / "checkpoint-2"))
    found = adapter_of(resumed)
    difference = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    assert difference == 0.0, difference


def counted(counts: collections.Counter[str], name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run`, which also adds its launches and waits to the counts."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before = sum(device.launches.values()), sum(device.waits.values())
        out = run(*args, **kwargs)
        counts[f"{name}: launches"] += sum(device.launches.values()) - before[0]
        counts[f"{name}: waits"] += sum(device.waits.values()) - before[1]
        return out

    return wrapper


def counts_of_a_micro_step(layers: int, tokens_per_microbatch: int) -> collections.Counter[str]:
    """Train one step of two micro-steps; return the counts of the second, which has gradients and no rollout."""
    with device.off() if device.is_installed() else nullcontext():
        base = base_on_cuda("qwen2", torch.float16, num_hidden_layers=layers)
    options = EngineOptions(tokens_per_microbatch=tokens_per_microbatch)
    trainer = trainer_on_cuda(base=base, options=options, max_steps=1, max_completion_length=8)
    trainer.generation_config.eos_token_id = 10_000  # all rows have the same length, and an advantage
    trainer.reward_funcs = [lambda completion_ids, **_: [float(row % 2) for row in range(len(completion_ids))]]
    seen = [collections.Counter[str](), collections.Counter[str]()]
    plain, undo, faults = trainer.training_step, recovery._Undo.__init__, trainer.faults

    def training_step(*args: Any, **kwargs: Any) -> Any:
        counts = seen.pop(0)
        trainer.counts = counts
        recovery._Undo.__init__ = counted(counts, "undo", undo)  # type: ignore[method-assign]
        return counted(counts, "micro-step", plain)(*args, **kwargs)

    trainer.training_step = training_step
    check = faults.drop_step_unless_finite
    faults.drop_step_unless_finite = lambda: counted(trainer.counts, "finite", check)()
    trainer.train()
    recovery._Undo.__init__ = undo  # type: ignore[method-assign]
    counts: collections.Counter[str] = trainer.counts
    return counts


@scenario
def a_training_step() -> None:
    """Launches and waits of a micro-step: nothing waits for each parameter."""
    for tokens in MICRO_STEP_LAUNCHES:
        two, four = (counts_of_a_micro_step(layers, tokens) for layers in (2, 4))
        at_28 = {name: two[name] + (four[name] - two[name]) // 2 * 26 for name in sorted(four)}
        print(f"at 28 layers, micro-batches of {tokens} tokens: {at_28}")
        assert two["undo: waits"] == four["undo: waits"] == 0
        assert two["finite: waits"] == four["finite: waits"] <= 2  # of the loss, and of all gradients
        assert two["finite: launches"] == four["finite: launches"]
        assert two["micro-step: waits"] == four["micro-step: waits"]
        assert at_28["micro-step: launches"] <= MICRO_STEP_LAUNCHES[tokens]


@scenario
def memory_runs_out() -> None:
    """In a rollout and in a backward pass: each is repeated with less; the backward pass to the same adapter."""
    bases = [base_on_cuda("qwen2", torch.float16) for _ in range(2)]
    whole = trainer_on_cuda()
    whole.train()
    expected = adapter_of(whole)
    for phase, base in zip(("rollout", "training"), bases, strict=True):
        messages.clear()
        trainer = trainer_on_cuda(base=base)
        backward = trainer.accelerator.backward

        def fail_in_backward(*args: Any, plain: Any = backward, trainer: Any = trainer, **kwargs: Any) -> Any:
            copies = trainer.recovery._prepared[2].gradients
            is_second = any(copy is not None for copy in copies)  # micro-step, with gradients to restore
            if is_second and not any(line.startswith("out of memory") for line in messages):
                device.failures["mm"] = 3
            return plain(*args, **kwargs)

        if phase == "rollout":
            device.failures["exponential_"] = 1  # the second launch, while the graph is captured
        else:
            trainer.accelerator.backward = fail_in_backward
        trainer.train()
        assert device.failures == {}
        lines = [line for line in messages if line.startswith("out of memory in")]
        assert len(lines) == 1, messages
        assert f"in {phase} at step 1" in lines[0]
        found = adapter_of(trainer)
        assert_trained(trainer, {name: torch.zeros_like(p) for name, p in found.items()})
        if phase == "training":  # other kernels' order of summing, in float16
            difference = max(float((found[name] - expected[name]).abs().max()) for name in expected)
            assert difference < 2e-3, difference


@scenario
def planted_faults() -> None:
    """An index left on the CPU, and an adapter left in bfloat16, are found."""
    from grpo_lite.engine import score

    other = base_on_cuda("qwen2", torch.float16)
    trainer = trainer_on_cuda()
    plain = score.pack

    def pack(*args: Any) -> Any:
        batch = plain(*args)
        from dataclasses import replace

        return replace(batch, predictors=batch.predictors.cpu())

    score.pack = pack
    assert not trainer.support.is_packable(trainer.model)
    assert [line for line in messages if "same device" in line], messages
    score.pack = plain
    trainer = trainer_on_cuda(base=other)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    try:
        trainer.train()
    except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
        print("found:", type(error).__name__, error)
    else:
        raise AssertionError("an adapter in bfloat16 under GradScaler went unnoticed")


# The command line


def _load_models_there() -> None:
    """Let `from_pretrained` build on the CPU and move, as nothing can be loaded straight onto the device."""
    import peft.utils.save_and_load as peft_files
    import transformers

    from grpo_lite.engine.quantised import keep_weights_unpacked

    plain = transformers.AutoModelForCausalLM.from_pretrained.__func__
    read = peft_files.safe_load_file

    def from_pretrained(cls: Any, *args: Any, device_map: Any = None, **kwargs: Any) -> Any:
        with device.off():
            model = plain(cls, *args, device_map={"": "cpu"}, **kwargs)
        loaded = model[0] if isinstance(model, tuple) else model
        keep_weights_unpacked(loaded)
        if device_map:
            device.move(loaded)
            loaded.hf_device_map = dict(device_map)
        return model

    def safe_load_file(path: Any, device: Any = "cpu") -> Any:
        from tests.fake_cuda import device as fake

        tensors = read(path, device="cpu")
        return {key: fake.on_cuda(value) for key, value in tensors.items()} if "cuda" in str(device) else tensors

    transformers.AutoModelForCausalLM.from_pretrained = classmethod(from_pretrained)
    peft_files.safe_load_file = safe_load_file


def _commands(capability: tuple[int, int], *commands: list[str]) -> str:
    """Run commands of the command line one after the other in this process; return what they print."""
    import contextlib
    import io

    if not device.is_installed():
        device.install(capability)
        _load_models_there()
    from grpo_lite.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        for command in commands:
            main(command, standalone_mode=False)
    text = printed.getvalue()
    assert "Traceback" not in text, text
    off = [line for line in [*messages, *text.splitlines()] if "are off" in line or "without CUDA graphs" in line]
    assert off == [], off
    assert device.launches["graph"] > 0
    return text


def _whole_smoke(capability: tuple[int, int], dtype: str) -> None:
    run = str(Path(tempfile.mkdtemp()) / "run")
    train = ["train", "smoke", "--run", run, "--plain"]
    text = _commands(capability, train, ["eval", run], ["chat", run, "What is 2 + 2?"])
    assert dtype in text, text
    record = json.loads((Path(run) / "run.json").read_text())
    assert record["device"]["kind"] == "cuda"
    assert (Path(run) / "merged").is_dir()


@scenario
def whole_smoke_fp16() -> None:
    """`train`, `eval` and `chat` on a card like a T4."""
    _whole_smoke((7, 5), "float16")


@scenario
def whole_smoke_bf16() -> None:
    _whole_smoke((8, 6), "bfloat16")


WARM_UP = (
    "{data: {generator: sums, kwargs: {low: 1, high: 9}}, completion: '{answer}', tokens_per_step: 600, steps: %d}"
)
PART = ["eval.enabled=false", "merge=false", "check.enabled=false", "memory.offload_activations=true"]


def _warmed(capability: tuple[int, int], *overrides: str, run: Path | None = None, steps: int = 6) -> tuple[Path, str]:
    """Train `smoke` with a warm-up; return its directory and what is printed."""
    run = run or Path(tempfile.mkdtemp()) / "run"
    warm_up = [
        "log.sample_every=0",
        "grpo.max_steps=2",
        "grpo.gradient_checkpointing=true",
        "warmup=" + WARM_UP % steps,
    ]
    text = _commands(capability, ["train", "smoke", "--run", str(run), "--plain", *warm_up, *overrides])
    return run, text


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    with device.off():
        return load_file(folder / "adapter_model.safetensors")


def _between_stages(seen: list[int]) -> None:
    """Note what lies on the device when GRPO's trainer is about to be built."""
    import grpo_lite.train as line

    build = line.build_trainer

    def build_trainer(*args: Any, **kwargs: Any) -> Any:
        seen.append(device.memory["now"])
        return build(*args, **kwargs)

    line.build_trainer = build_trainer


def _warm_up_and_grpo(capability: tuple[int, int], dtype: str) -> None:
    seen: list[int] = []
    _between_stages(seen)
    run, text = _warmed(capability)
    assert dtype in text, text
    assert "warm-up 6/6" in text, text
    assert "GRPO starts from the warm-up's adapter" in text, text
    assert (run / "merged").is_dir()
    assert seen == [0], f"the warm-up leaves {seen} bytes on the card"
    record = json.loads((run / "run.json").read_text())
    assert record["warmup"]["steps"] == 6
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["warmup"] * 6 + ["grpo"] * 2
    assert lines[5]["loss"] < lines[0]["loss"]
    assert ("loss_scale" in lines[0]) == (dtype == "float16")
    assert all(line["memory/peak_gib"] > 0 for line in lines)


@scenario
def warm_up_fp16() -> None:
    """Both stages on a card like a T4: NF4 base, float32 adapter, GradScaler; the card is empty between them."""
    _warm_up_and_grpo((7, 5), "float16")


@scenario
def warm_up_bf16() -> None:
    _warm_up_and_grpo((8, 6), "bfloat16")


@scenario
def warm_up_resumed() -> None:
    """Paused in the warm-up by a clock, on a card with a grad scaler: the same adapter to the bit."""
    whole, _ = _warmed((7, 5), *PART)
    paused, text = _warmed((7, 5), *PART, "limits.max_minutes=0.0001")
    assert "the warm-up pauses after step 1 of 6" in text, text
    torch.cuda.manual_seed(77)
    _, text = _warmed((7, 5), *PART, run=paused)
    assert "resuming from step 1" in text, text
    for folder in ("warmup/adapter", "adapter"):
        expected, found = _weights(whole / folder), _weights(paused / folder)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), folder


@scenario
def memory_runs_out_in_the_warm_up() -> None:
    """On a card that holds less than the plan took it to hold: the step is repeated in parts, to the same adapter."""
    from grpo_lite.trainer.warmup import WarmupTrainer

    train, peaks = WarmupTrainer.train, []

    def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = device.memory["peak"] = device.memory["now"]
        device.memory["limit"] = kept + int(0.7 * (peaks[0] - kept)) if peaks else 1 << 62
        try:
            return train(self, *args, **kwargs)
        finally:
            peaks.append(device.memory["peak"])
            device.memory["limit"] = 1 << 62

    WarmupTrainer.train = limited  # type: ignore[method-assign]
    one, text = _warmed((7, 5), *PART)
    assert "out of memory" not in text, text
    two, text = _warmed((7, 5), *PART)
    assert "out of memory in step 1 of the warm-up: at most " in text, text
    assert peaks[1] < peaks[0], peaks
    expected, found = _weights(one / "warmup" / "adapter"), _weights(two / "warmup" / "adapter")
    difference = max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())
    assert difference < 2e-3, difference  # other kernels' order of summing, in float16


@scenario
def notebook_order() -> None:
    """`probe`, then `train`, in one process: the second has as much room as it would have had alone."""
    run = str(Path(tempfile.mkdtemp()) / "run")
    text = _commands((7, 5), ["probe", "smoke"], ["train", "smoke", "--run", run, "--plain"])
    assert "memory.rollout_kv_tokens" not in text, text


def main(name: str) -> None:
    torch.set_num_threads(1)
    for logger in (logging.getLogger("grpo_lite"),):
        logger.addHandler(_Lines())
        logger.setLevel(logging.INFO)
    SCENARIOS[name]()
    print("ok", name, flush=True)


def main_of_each(names: list[str]) -> bool:
    """Run each scenario in a fork of this process, where torch has computed nothing yet; return whether all ended well.

    Importing torch, transformers and TRL takes longer than most scenarios do.
    """
    statuses = []
    for name in names:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                main(name)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        statuses.append(os.waitpid(child, 0)[1])
    return not any(statuses)


if __name__ == "__main__":
    sys.exit(0 if main_of_each(sys.argv[1:]) else 1)
