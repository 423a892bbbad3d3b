"""The phases of a run, and how many bytes each takes on a card, before anything is loaded. Arithmetic, no torch.

Two phases that do not overlap: the rollout (keys and values of a wave, decoding buffers) and training (gradients,
checkpointed activations, one block's working set or the output head's). Weights, adapter and optimizer lie under both.
The counts follow the code line by line (`engine.packing`, `.attention`, `.score`, `.cache`, bitsandbytes, peft), and
`tests/memory/test_plan.py` compares them with counted tensor bytes of that very code; docs/measurements/planner.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from grpo_lite.models.shape import Attention, Block, ModelShape

GIB = 1 << 30

# Not tensors, so not counted by max_memory_allocated. Not yet measured on a GPU: CUDA's context with PyTorch's and
# bitsandbytes' kernels takes 0.3-0.5 GiB on the cards people report; the allocator's blocks are never filled wholly.
CONTEXT_BYTES = int(0.45 * GIB)
FRAGMENTATION = 0.06  # of what is allocated beyond the weights, with expandable segments
# Counted, but made inside kernels: cuBLAS takes 8 MiB a handle (32 MiB on Hopper), attention's backward an fp32 copy.
WORKSPACE_BYTES = 64 << 20
CHUNK_ELEMENTS = 1 << 24  # score.CHUNK_ELEMENTS_GPU (a test compares them)
RECOMPUTED_ELEMENTS = 1 << 22  # recompute.CHUNK_ELEMENTS_GPU (a test compares them)
PLAIN_TOKENS, PLAIN_VOCABULARY = 4096, 32768  # the tile of logits of TRL 1.16's fused head (a test compares them)

# Bytes for each number that a token's recurrence computes with (Block.mixed): saved for backward, added by backward at
# its peak, and held while prompts are read. Counted on the torch code of transformers 5.23 at the sizes of Qwen3.5,
# LFM2.5 and Granite 4 H-Micro (docs/measurements/planner.md). It runs where the kernels of flash-linear-attention,
# causal-conv1d and mamba-ssm are not installed, and takes more than they do.
SAVED = {"delta": 34.0, "conv": 4.9, "mamba": 10.8}
BACKWARD = {"delta": 2.4, "conv": 2.0, "mamba": 4.4}
READING = {"delta": 19.2, "conv": 9.4, "mamba": 11.9}

# Attention score by score (attention.explicit_attention; plain: the family's own function, in 16 bits):
# (packed, capped) → bytes of each score that are saved for backward, and that one call works with on top.
SCORES = {(True, True): (14, 12), (True, False): (10, 7), (False, True): (10, 4), (False, False): (2, 2)}
READ_SCORE, READ_CAPPED_SCORE = 22, 26  # of each score of a prompt that is read, or of a decoding step
LAYER_INPUT_BYTES = 14  # of each number that Gemma 4's layers are given besides: kept, and made

READ_AT_ONCE, SCORED_AT_ONCE = 1024, 128  # static_decode's (a test compares them)
ROW_STEPS = ((512, 64), (1024, 128), (1 << 62, 256))  # row_cache.LENGTH_STEPS (a test compares them)


@dataclass(frozen=True)
class Job:
    """Everything about a run that decides its memory."""

    shape: ModelShape
    load_in: str = "4bit"  # 4bit, 8bit, 16bit, 32bit
    dtype_bytes: int = 2  # of the compute dtype
    rank: int = 16
    targets: tuple[str, ...] | None = None  # None: all linear layers
    optimizer_bytes: float = 8.0  # per trained weight
    holds_reference: bool = False  # a frozen second adapter, for KL against the start
    prompt: int = 256  # the longest, in tokens
    completion: int = 256  # the cap
    group: int = 8
    batch: int = 8  # completions generated a round
    rows: int = 8  # completions in one of TRL's micro-steps
    accumulation: int = 1  # micro-steps a step
    compute: Literal["packed", "plain"] = "packed"
    rollout: Literal["shared", "generate", "vllm"] = "shared"
    tokens: int | None = None  # memory.tokens_per_microbatch
    kv_tokens: int | None = None  # memory.rollout_kv_tokens
    checkpointing: bool = True
    offload: bool = False  # checkpointed activations in main memory
    vllm_share: float = 0.3  # vllm_gpu_memory_utilization
    has_turns: bool = False  # completions are episodes, whose rows stay in their buffers from turn to turn
    eval_rows: int = 0  # completions generated at once in an evaluation; 0: there is none
    eval_completion: int = 256  # their cap
    eval_while_training: bool = False
    warmup_row: int = 0  # tokens of the warm-up's longest row; 0: there is no warm-up
    warmup_step: int = 0  # most tokens of one of its optimizer steps that go through the model at once, with padding
    warmup_tokens: int | None = None  # most padded tokens that go through the model at once; None: the whole step

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest completion."""
        return self.prompt + self.completion

    @property
    def is_packed(self) -> bool:
        """Whether forward and backward are group-packed."""
        return self.compute == "packed"

    @property
    def recomputes(self) -> bool:
        """Whether norms and gated products are computed again in backward (engine/recompute.py)."""
        return self.is_packed and not self.checkpointing

    @property
    def is_shared(self) -> bool:
        """Whether rollouts share their prompts."""
        return self.rollout == "shared" and not self.crosses_rope(self.longest)

    def crosses_rope(self, longest: int) -> bool:
        """Whether rows of up to so many tokens may cross the original length, where `generate` decodes them."""
        return self.shape.rope_border is not None and longest > self.shape.rope_border

    @property
    def step_tokens(self) -> int:
        """Tokens of one micro-step if every completion reaches its cap."""
        if not self.is_packed:
            return self.rows * self.longest
        straddling = 0 if self.rows % self.group == 0 or self.group % self.rows == 0 else 1
        return (math.ceil(self.rows / self.group) + straddling) * self.prompt + self.rows * self.completion

    @property
    def microbatch_tokens(self) -> int:
        """Tokens that go through the model at once."""
        if self.tokens is None or not self.is_packed:
            return self.step_tokens
        return min(self.step_tokens, max(self.tokens, self.longest))

    @property
    def microbatch_rows(self) -> int:
        """Completions of capped length in the largest micro-batch."""
        if not self.is_packed:
            return self.rows
        tokens = self.microbatch_tokens
        fitting = max(1, (tokens - self.prompt) // self.completion)
        return min(self.rows, fitting)


@dataclass(frozen=True)
class PhaseBytes:
    """Where one phase's memory goes: (what, bytes), the first ones alive all along, the last ones at its peak."""

    items: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Allocated bytes at the phase's peak."""
        return sum(size for _, size in self.items)


def trained_parameters(job: Job) -> int:
    """Return how many LoRA weights are trained."""
    return job.shape.adapter_parameters(job.rank, job.targets)


def weight_bytes(job: Job) -> int:
    """Return the frozen base's bytes as bitsandbytes and transformers lay them out."""
    shape = job.shape
    linear = shape.linear_parameters
    width = job.dtype_bytes if job.load_in != "32bit" else 4
    if job.load_in == "4bit":
        # Two weights a byte; a byte of scale per 64 weights; a float of scale per 256 of those; two tables.
        linear_bytes = linear / 2 + linear / 64 + linear / 64 / 256 * 4 + shape.linear_layers * (1024 + 3 * 512)
    elif job.load_in == "8bit":
        linear_bytes = linear + 4 * shape.linear_outputs
    else:
        linear_bytes = linear * width
    heads = 1 if shape.tied else 2
    return int(linear_bytes + width * (heads * shape.embedding_parameters + shape.unquantized_parameters))


def kept_items(job: Job) -> list[tuple[str, int]]:
    """Return what lies under every phase."""
    trained = trained_parameters(job)
    items = [("base weights", weight_bytes(job)), ("adapter, float32", 4 * trained)]
    if job.holds_reference:
        items.append(("reference adapter, float32", 4 * trained))
    return [*items, ("optimizer", int(job.optimizer_bytes * trained))]


def training_phase(job: Job) -> PhaseBytes:
    """Return the peak of one micro-batch's forward and backward, every completion at its cap.

    Without the decoding buffers of the last rollout, which are given back when memory runs out.
    """
    shape, tokens, width = job.shape, job.microbatch_tokens, job.dtype_bytes
    counted = [(_block(job, block), count) for block, count in shape.blocks]
    block_inputs = shape.layers * tokens * shape.hidden * width
    rotary = 2 * tokens * shape.head_size * width
    copies = width * trained_parameters(job)  # of the adapter's weights in the compute dtype, by autocast
    items = [*kept_items(job), ("gradients", 4 * trained_parameters(job))]
    if shape.layer_inputs:
        items.append(("inputs per layer", LAYER_INPUT_BYTES * tokens * shape.layer_inputs))
    if job.is_shared:
        items.append(("adapter in the compute dtype, for decoding", width * trained_parameters(job)))
    if job.checkpointing:
        on_card = 2 * tokens * shape.hidden * width if job.offload else block_inputs
        items.append(("checkpointed activations" + (", the rest in RAM" if job.offload else ""), on_card + rotary))
        block = max(saved + backward for (saved, backward), _ in counted) + copies // shape.layers
    else:
        kept = sum(saved * count for (saved, _), count in counted)
        items.append(("activations of all layers", kept + rotary + copies))
        block = max(backward for (_, backward), _ in counted)
    head = _head(job)
    what = "one layer's working set" if block >= head else "output head's working set"
    items.append((what, max(block, head)))
    items.append(("attention masks", _masks(job)))
    items.append(("kernels' workspace", WORKSPACE_BYTES))
    return PhaseBytes(tuple(items))


def rollout_phase(job: Job) -> PhaseBytes:
    """Return the peak of generating one wave, every completion at its cap."""
    shape, width = job.shape, job.dtype_bytes
    items = kept_items(job)
    items.append(("adapter in the compute dtype", width * trained_parameters(job)))
    if job.rollout == "vllm":
        return PhaseBytes(tuple(items))  # vLLM's share of the card comes on top, in both phases: see MemoryPlan
    rows, groups = wave(job)
    if job.is_shared:
        items += static_items(job, rows, groups, job.completion)
        items.append(("kernels' workspace", WORKSPACE_BYTES))
        return PhaseBytes(tuple(items))
    attention = rows * job.longest * attended_bytes(shape, width)
    decoding = max(attention, rows * shape.vocab * 20) + 2 * shape.largest_linear
    mlp = job.prompt * width * (3 * shape.intermediate + 4 * shape.hidden)
    reading = rows * max(mlp, mixing_bytes(shape, job.prompt))
    states = rows * shape.state_bytes(width)
    prompt_kv, row_kv = (states + width * shape.cached * rows * tokens for tokens in (job.prompt, job.longest))
    items += wave_items(rows, (prompt_kv, reading), (row_kv, decoding))
    items.append(("kernels' workspace", WORKSPACE_BYTES))
    return PhaseBytes(tuple(items))


def static_items(
    job: Job, rows: int, prompts: int, completion: int, bytes_per_logit: int = 24
) -> list[tuple[str, int]]:
    """Return what decoding in rows of a fixed size takes (static_decode.Batch), its prompts read at once.

    Of every logit when sampling: itself, log-probability, probability, waiting time and their quotient in float32, and
    the output layer's own result.
    """
    shape, width = job.shape, job.dtype_bytes
    length = row_length(job.prompt + completion)
    states = (rows + prompts) * shape.state_bytes(width)
    if states:  # room for the group decoder, whose buffers double, where static rows step aside
        length = max(length, cache_capacity(completion) + math.ceil(prompts * job.prompt / rows))
    row_kv = width * shape.cached * (rows * length + (job.prompt if rows < job.batch else 0))
    # A block of a prefill: in the MLP the gate's activation, up and its sum with the adapter's, or their product.
    mlp = job.prompt * width * (3 * shape.intermediate + 5 * shape.hidden)
    reading = prompts * max(mlp, mixing_bytes(shape, job.prompt))
    if shape.scores_explicitly:  # a call for each prompt; in a step one over all rows, and their keys in float32
        score = READ_CAPPED_SCORE if shape.softcap else READ_SCORE
        heads, keys = max((each.heads, each.keys) for each in shape.attentions)
        reading = max(reading, score * heads * job.prompt**2)
        step = rows * length * (score * heads + 4 * keys)
        bytes_per_logit = max(bytes_per_logit, -(-step // (rows * shape.vocab)))
    if job.has_turns:
        reading = max(reading, _further_turn(job, rows, length))
    logits = rows * shape.vocab * bytes_per_logit
    weight = 0 if job.load_in in ("16bit", "32bit") else width * shape.largest_linear  # dequantized
    items = [(f"keys and values, {rows} completions at once", row_kv + rows * length * width)]
    if states:
        items.append(("states of layers that do not attend", states))
    if reading > logits + weight:
        return [*items, ("logits", 4 * rows * shape.vocab), ("reading the prompts", reading)]
    return [*items, ("decoding buffers", logits + weight)]


def _further_turn(job: Job, rows: int, length: int) -> int:
    """Return what reading new tokens behind rows of this length takes (static_decode._read_behind)."""
    shape, width = job.shape, job.dtype_bytes
    tokens = min(SCORED_AT_ONCE if shape.scores_explicitly else READ_AT_ONCE, rows * job.completion)
    mlp = tokens * width * (3 * shape.intermediate + 5 * shape.hidden)
    # The mask, once for each query head that shares keys, and for a window.
    seen = tokens * length * width * (1 + max((each.queries // each.keys for each in shape.attentions), default=0))
    if shape.scores_explicitly:
        score = READ_CAPPED_SCORE if shape.softcap else READ_SCORE
        seen += score * max(each.heads for each in shape.attentions) * tokens * length
    return max(mlp + seen, mixing_bytes(shape, tokens))


def mixing_bytes(shape: ModelShape, prompt: int) -> int:
    """Return what a layer that does not attend holds of a prompt of so many tokens while it is read."""
    blocks = [block for block, _ in shape.blocks]
    return max((_reading(block.recurrent, block, prompt) for block in blocks if block.recurrent), default=0)


def _reading(kind: str, block: Block, prompt: int) -> int:
    return int(READING[kind] * block.mixed * _whole_chunks(prompt, block.chunk))


def attended_bytes(shape: ModelShape, width: int) -> int:
    """Return what `generate`'s attention holds of a token: its keys and values, also for each query head."""
    return width * max((2 * each.keys + 2 * each.queries for each in shape.attentions), default=0)


def _whole_chunks(tokens: int, chunk: int) -> int:
    return -(-tokens // chunk) * chunk


def row_length(tokens: int) -> int:
    """Return how long a row's buffer is (row_cache.row_length)."""
    step = next(step for limit, step in ROW_STEPS if tokens <= limit)
    return math.ceil(tokens / step) * step


def wave_items(rows: int, prefill: tuple[int, int], decoding: tuple[int, int]) -> list[tuple[str, int]]:
    """Return the larger half of a wave: reading its prompts, or its last step; each as (keys and values, buffers)."""
    if sum(prefill) >= sum(decoding):
        return [("keys and values of the prompts", prefill[0]), ("reading the prompts", prefill[1])]
    return [(f"keys and values, {rows} completions at once", decoding[0]), ("decoding buffers", decoding[1])]


def cache_capacity(completion: int) -> int:
    """Return for how many tokens a row's buffer is laid out on a CPU: it doubles from 16 (cache.GroupCache)."""
    return max(16, 1 << max(0, completion - 2).bit_length())


def wave(job: Job) -> tuple[int, int]:
    """Return how many completions are decoded at once, and how many prompts they belong to (static_decode.Job)."""
    rows = job.batch
    if job.is_shared and job.kv_tokens is not None:
        rows = max(1, min(rows, job.kv_tokens // row_length(job.longest)))
    return rows, math.ceil(rows / job.group)


def _block(job: Job, block: Block) -> tuple[int, int]:
    """Return, for one decoder layer, what its forward saves for backward, and what its backward adds at its peak."""
    shape, tokens, width = job.shape, job.microbatch_tokens, job.dtype_bytes
    if job.recomputes:
        norms = block.norms * width * shape.hidden  # the input
        gated = (4 if block.keeps_product else 2) * width * block.mlp  # gate and up; else activation and product too
    else:
        norms = block.norms * (4 + width) * shape.hidden  # the input in float32, the output
        gated = 4 * width * block.mlp  # gate, its activation, up, their product
    adapters = 26 * job.rank * len(block.linears) // 7  # measured on blocks of seven linear layers
    routed = 2 * width * block.routed  # what experts are given, and what they give
    saved, recurrence, scoring = tokens * (norms + gated + routed + adapters), 0, 0
    if attention := block.attention:
        saved += tokens * _attention(attention, width, job.recomputes)
        attended = job.microbatch_rows * job.longest if job.is_packed else 0  # each completion with its prompt
        saved += 2 * width * attention.queries * attended
        if not job.is_packed:
            saved += width * job.rows * job.longest**2  # the mask in the compute dtype
        if shape.scores_explicitly:
            kept, work = SCORES[job.is_packed, shape.softcap]
            saved += kept * attention.heads * _scores(job)
            scoring = work * attention.heads * _scores_at_once(job)
    if block.recurrent:
        mixed = block.mixed * _chunked_tokens(job, block.chunk)
        saved += int(SAVED[block.recurrent] * mixed)
        recurrence = int(BACKWARD[block.recurrent] * mixed)
    weight = 0 if job.load_in in ("16bit", "32bit") else width * shape.largest_linear  # dequantized
    numbers = tokens * block.mlp
    elementwise, product = 2 * width * numbers, width * numbers + weight
    if job.recomputes and not block.keeps_product:  # of gate, up and product, and a chunk of what is computed again
        elementwise = 3 * width * numbers + 4 * width * min(numbers, RECOMPUTED_ELEMENTS)
    transient = max(elementwise, product, recurrence, scoring, 3 * tokens * routed // 4)
    return saved, transient + width * tokens * shape.hidden


def _chunked_tokens(job: Job, chunk: int) -> int:
    """Return the tokens of a micro-batch with every prompt and completion filled up to whole chunks."""
    rows = job.microbatch_rows
    if not job.is_packed:
        return rows * _whole_chunks(job.longest, chunk)
    prompts = math.ceil(rows / job.group) * _whole_chunks(job.prompt, chunk)
    return max(job.microbatch_tokens, prompts + rows * _whole_chunks(job.completion, chunk))


def _scores(job: Job) -> int:
    """Return how many scores a head computes in a micro-batch, those that a window hides included."""
    if not job.is_packed:
        return job.rows * job.longest**2
    groups = math.ceil(job.microbatch_rows / job.group)
    return groups * job.prompt**2 + job.microbatch_rows * job.completion * job.longest


def _scores_at_once(job: Job) -> int:
    """Return how many of them one call computes."""
    return max(job.prompt**2, job.completion * job.longest) if job.is_packed else _scores(job)


def _attention(attention: Attention, width: int, recomputes: bool) -> int:
    """Return what attention saves of a token, without its keys and values behind a prompt."""
    saved = 5 * width * attention.queries  # queries, keys and values spread over the heads, output, its contiguous copy
    if attention.has_norms:
        saved += (width if recomputes else 4) * (attention.queries + attention.keys)
    if attention.is_gated:
        saved += 2 * width * attention.queries  # the gate's sigmoid, the product
    return saved


def _head(job: Job) -> int:
    """Return the output head's working set: hidden states, the Jacobian's rows, a chunk of logits."""
    shape, tokens, width = job.shape, job.microbatch_tokens, job.dtype_bytes
    scored = job.microbatch_rows * job.completion
    # The last norm's input, in float32 where it is kept as the norm takes it, and its output.
    hidden = tokens * shape.hidden * ((width if job.recomputes else 4) + width)
    if not job.is_packed:
        tile = min(scored, PLAIN_TOKENS) * PLAIN_VOCABULARY * width
        gradient = scored * shape.hidden * (4 + width) + 2 * width * tokens * shape.hidden  # of the rows scored, of all
        return hidden + scored * shape.hidden * width + max(tile + 4 * scored * shape.hidden, gradient)
    rows = max(16, CHUNK_ELEMENTS // shape.vocab)
    chunk = min(rows, scored) * shape.vocab * (10 + 8 * shape.caps_logits)
    backward = scored * shape.hidden * (4 + width)
    return hidden + 2 * scored * shape.hidden * width + max(chunk, backward)


def _masks(job: Job) -> int:
    """Return the masks of completions behind their prompt: one per distinct length, in the compute dtype."""
    if not job.is_packed:
        return job.rows * job.longest**2  # of truth values, for all layers
    if job.group * job.completion + job.prompt <= 192:
        return 0
    distinct, window = min(job.microbatch_rows, 8), job.shape.sliding_window
    masks = distinct * job.completion * job.longest
    if window is not None and window < job.longest:  # and those of layers with a window, of a longer prompt too
        masks += distinct * job.completion * (min(job.prompt, window - 1) + job.completion)
        masks += math.ceil(distinct / job.group) * job.prompt**2 if window < job.prompt else 0
    return masks * job.dtype_bytes
