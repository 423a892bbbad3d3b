"""Count the bytes of live tensors of this project's own compute, on real model shapes, without a GPU or memory.

The model, the packed forward and backward and the decoding steps are the real code; the tensors are fake (shapes
without storage), and a dispatch mode counts each storage from its birth to its death, rounded up as PyTorch's CUDA
allocator does. What kernels take for themselves is invisible here. 4-bit layers are a stand-in with bitsandbytes' bytes
and its dequantised weight. Where the code tells a CPU from a GPU, it is made to take the GPU's way.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_lite.engine import attention, blockwise, decoding_layers, recompute
from grpo_lite.engine import score as logprobs
from grpo_lite.engine.decode import Sampling
from grpo_lite.engine.decoding_layers import DecodingLayers
from grpo_lite.engine.graphs import Switch
from grpo_lite.engine.lora import shorten_lora
from grpo_lite.engine.packing import PackedBatch, PaddedBatch, pack
from grpo_lite.engine.score import Scoring, score
from grpo_lite.engine.static_decode import Batch, Job, _Kept, _Slot
from grpo_lite.models.lora_targets import choose_targets

BLOCK = 512  # bytes; the CUDA caching allocator rounds every request up to it


class LiveBytes(TorchDispatchMode):
    """Counts live storages of tensors made inside it; `current`, `peak`, and where the peak was."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.at: str = ""
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf, str(func))
        return out

    def _add(self, tensor: torch.Tensor, op: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._seen[key] = weakref.finalize(storage, self._forget, key, size)
        self.current += size
        self._note(0, op)

    def _note(self, extra: float, op: str) -> None:
        if self.current + extra > self.peak:
            self.peak, self.at = int(self.current + extra), op

    def _forget(self, key: int, size: int) -> None:
        if self._seen.pop(key, None) is not None:
            self.current -= size

    def reset(self) -> None:
        """Forget the peak so far."""
        self.peak = self.current


@contextlib.contextmanager
def pretend_cuda() -> Iterator[None]:
    """Take the GPU's way: PEFT's under autocast, the output head's larger chunks, attention by calls of a kernel."""
    real, chunk = torch.is_autocast_enabled, logprobs.CHUNK_ELEMENTS_CPU
    norms, decoding_layers._can_be_fused = decoding_layers._can_be_fused, lambda norm, dtype: False  # no numbers here
    torch.is_autocast_enabled = lambda device="cpu": real(device)  # type: ignore[assignment]
    logprobs.CHUNK_ELEMENTS_CPU = logprobs.CHUNK_ELEMENTS_GPU
    blocks, blockwise.serves = blockwise.serves, lambda query: False
    numbers, recompute.CHUNK_ELEMENTS_CPU = recompute.CHUNK_ELEMENTS_CPU, recompute.CHUNK_ELEMENTS_GPU
    try:
        yield
    finally:
        torch.is_autocast_enabled, logprobs.CHUNK_ELEMENTS_CPU = real, chunk
        decoding_layers._can_be_fused, blockwise.serves, recompute.CHUNK_ELEMENTS_CPU = norms, blocks, numbers


def build_model(config: dict[str, Any], load_in: str, rank: int, dtype: torch.dtype, checkpointing: bool) -> Any:
    """Return a PEFT model of a config.json on the meta device, all-linear LoRA in float32, as the trainer has it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.device("meta"):
        only_eager = config["model_type"] in ("gemma2", "gpt_oss")  # whose scores SDPA does not compute
        implementation = "eager" if only_eager else "sdpa"
        model = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation=implementation)
        model.requires_grad_(False)
        if load_in == "4bit":
            for name, module in list(model.named_modules()):
                if isinstance(module, nn.Linear) and name != "lm_head":
                    parent = model.get_submodule(name.rpartition(".")[0])
                    setattr(parent, name.rpartition(".")[2], _FourBit(module))
        lora = LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        choose_targets(lora, model)
        model = get_peft_model(model, lora)
    shorten_lora(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    attention.install(model.get_base_model())
    return model.train()


def materialise(model: nn.Module) -> None:
    """Replace the meta tensors by fake ones that are counted; tied weights stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    dtype = torch.float32 if old.requires_grad else old.dtype
                    new = torch.empty(old.shape, dtype=dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = made[id(old)]


class _FourBitProduct(torch.autograd.Function):
    """bitsandbytes 0.50's product with many rows: it dequantises the weight in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: _FourBit) -> torch.Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dequantized(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dequantized(grad.dtype), None


class _FourBit(nn.Linear):
    """A linear layer with the bytes of NF4 with double quantisation; bitsandbytes' own refuses fake tensors."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weights = self.in_features * self.out_features
        self.weight = nn.Parameter(torch.empty((weights // 2, 1), dtype=torch.uint8), requires_grad=False)
        self.bias = linear.bias
        scales = -(-weights // 64)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        self.register_buffer("nested", torch.empty(-(-scales // 256)))
        self.register_buffer("tables", torch.empty(16 + 256 + 1))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        scales = torch.empty(len(self.scales), dtype=torch.float32)
        weight = torch.empty((self.out_features, self.in_features), dtype=dtype)
        del scales
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return _FourBitProduct.apply(x.to(dtype), self)


@dataclass(frozen=True)
class Traced:
    """Bytes counted: weights, adapter and gradients, and on top of them the peaks of forward and backward."""

    static: int
    forward: int
    backward: int
    kept: int  # alive between forward and backward


def trace_training(
    config: dict[str, Any],
    prompt: int,
    completion: int,
    rows: int,
    *,
    group: int | None = None,
    load_in: str = "4bit",
    rank: int = 16,
    checkpointing: bool = True,
    common: int = 0,
) -> Traced:
    """Count one micro-batch: `rows` completions of one length behind prompts of one length, in bfloat16 autocast.

    Those of a prompt begin with so many tokens in common.
    """
    model = build_model(config, load_in, rank, torch.bfloat16, checkpointing)
    if not checkpointing:
        recompute.keep_less(model)
    group = group or rows
    groups = [list(range(start, min(start + group, rows))) for start in range(0, rows, group)]
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, pretend_cuda():
        static = static_bytes(model, live)
        ids = torch.zeros((rows, prompt + completion), dtype=torch.long)
        distinct = [[rows] * common + [row] * (completion - common) for row in range(rows)]
        packed = pack(PaddedBatch(ids, [prompt] * rows, distinct, prompt, groups), groups)
        return trace_passes(
            live, static, lambda: score(model, packed, Scoring(1.0), lambda: torch.autocast("cpu", torch.bfloat16))
        )


def trace_packed_warmup(
    config: dict[str, Any],
    prompt: int,
    completion: int,
    rows: int,
    *,
    load_in: str = "4bit",
    rank: int = 16,
    checkpointing: bool = True,
) -> Traced:
    """Count a part of a warm-up's step: `rows` rows that share no prompt, laid out as `pack_rows` does."""
    model = build_model(config, load_in, rank, torch.bfloat16, checkpointing)
    if not checkpointing:
        recompute.keep_less(model)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, pretend_cuda():
        static = static_bytes(model, live)
        ids, scored = torch.zeros((1, rows * (prompt + completion)), dtype=torch.long), rows * completion
        places = torch.zeros(scored, dtype=torch.long)
        segments = tuple((prompt, (completion,)) for _ in range(rows))
        tokens = dict.fromkeys(("predictors", "targets", "scatter", "scored"), places)
        packed = PackedBatch(ids, ids, segments, **tokens, padded_width=0)
        top1 = torch.zeros(scored, dtype=torch.bool)
        return trace_passes(
            live,
            static,
            lambda: score(model, packed, Scoring(1.0), lambda: torch.autocast("cpu", torch.bfloat16), top1),
        )


def static_bytes(model: Any, live: LiveBytes) -> int:
    """Put a model's weights, and the gradients of an earlier micro-batch, and return the bytes that are there then."""
    materialise(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty(parameter.shape)
    return live.current


def trace_passes(live: LiveBytes, static: int, run: Callable[[], tuple[Any, ...]]) -> Traced:
    """Count a forward pass, whose results (log-probabilities first) all stay alive, and the backward pass."""
    live.reset()
    scored = run()
    forward, kept = live.peak - static, live.current - static
    live.reset()
    scored[0].sum().backward()
    return Traced(static, forward, live.peak - static, kept)


def trace_rollout(config: dict[str, Any], prompt: int, completion: int, rows: int, group: int, rank: int = 16) -> int:
    """Count reading the prompts and a decoding step of static rows, sampling in bfloat16."""
    return _trace_rows(config, prompt, completion, rows, group, Sampling(True, 1.0, 1.0), rank)


def trace_evaluation(config: dict[str, Any], prompt: int, completion: int, rows: int, rank: int = 16) -> int:
    """Count a greedy evaluation: as many prompts as rows."""
    return _trace_rows(config, prompt, completion, rows, 1, Sampling(False, 1.0, 1.0), rank)


def trace_turns(config: dict[str, Any], prompt: int, completion: int, rows: int, new: int) -> int:
    """Count a rollout of two turns: the second reads so many new tokens of each row."""
    return _trace_rows(config, prompt, completion, rows, rows, Sampling(True, 1.0, 1.0), 16, new)


def _trace_rows(
    config: dict[str, Any],
    prompt: int,
    completion: int,
    rows: int,
    group: int,
    sampling: Sampling,
    rank: int,
    new: int = 0,
) -> int:
    dtype = torch.bfloat16
    model = build_model(config, "4bit", rank, dtype, checkpointing=False)
    inner = model.get_base_model()
    prompts = {(index, *[0] * (prompt - 1)): list(range(index * group, (index + 1) * group)) for index in range(rows)}
    prompts = {ids: [row for row in members if row < rows] for ids, members in prompts.items()}
    job = Job({ids: members for ids, members in prompts.items() if members}, rows, completion, (2,), sampling)
    slots = {row: _Slot.of(job, ids, row) for ids, members in job.prompts.items() for row in members}
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, pretend_cuda(), torch.no_grad():
        materialise(model)
        layers = DecodingLayers(inner, dtype)
        batch = Batch(inner, job, dtype, Switch(False))
        with layers.installed():
            batch._begin(inner, slots, {}, None, _Kept())
            batch._step(inner, sampling, rows, batch.cache.length, freezes=False)
            if new:
                held = {row: (row, prompt + completion - new) for row in slots}
                ids = tuple([0] * (prompt + completion))
                later = {row: _Slot(ids[:prompt], ids, row, 1) for row in slots}
                batch._begin(inner, later, held, None, _Kept())
                batch._step(inner, sampling, rows, batch.cache.length, freezes=True)
    return live.peak
