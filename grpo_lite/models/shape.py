"""A model's sizes, layer by layer, as its config.json states them: what the plan of memory counts with. Torch-free.

A model is a stack of blocks of a few kinds. Each kind has a mixer (attention, a gated delta net, a short convolution or
Mamba-2) and an MLP or experts. `tests/models/test_shape.py` compares the counts with the real classes' own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_lite.errors import ModelError
from grpo_lite.models.positions import read_positions

Mixer = Literal["attention", "delta", "conv", "mamba"]
Linear = tuple[str, int, int]  # name, inputs, outputs

# config.json's words for a layer -> the mixer. Mamba layers are called linear_attention by transformers 5.
_MIXERS: dict[str, Mixer] = {
    "full_attention": "attention",
    "sliding_attention": "attention",
    "attention": "attention",
    "linear_attention": "delta",
    "conv": "conv",
    "mamba": "mamba",
}
# Which families have blocks other than attention with an MLP, and experts, as counted here.
_DELTA = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
_CONV = ("lfm2", "lfm2_moe")
_MAMBA = ("granitemoehybrid",)
_EXPERTS = ("qwen3_moe", "qwen3_5_moe_text", "qwen3_next", "lfm2_moe", "granitemoehybrid")
# Blocks that look like the ones counted here by their keys, and are not.
_OTHER_BLOCKS = ("gemma3n", "gemma4", "falcon_h1", "nemotron", "bamba", "zamba", "jamba", "olmo_hybrid", "gpt_oss")


@dataclass(frozen=True)
class Block:
    """One kind of decoder layer."""

    mixer: Mixer
    linears: tuple[Linear, ...]  # what is quantized, and what `all-linear` adapts
    small: int  # weights of norms, biases and convolutions
    mlp: int  # width of the MLP that a token passes through, its experts' together
    experts: int = 0  # weights of experts and their router, which are neither quantized nor adapted
    mixed: int = 0  # numbers of a token that a mixer other than attention computes with
    conv_state: int = 0  # numbers that a row keeps while it decodes, in the compute dtype
    recurrent_state: int = 0  # the same in float32

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers, without biases."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only model's sizes; of a multimodal one, its text tower's."""

    kind: str  # config.json's model_type
    hidden: int
    intermediate: int  # of the widest MLP that is not an expert
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    blocks: tuple[tuple[Block, int], ...]  # each kind, and how many layers are of it
    qk_norm: bool = False
    gated_attention: bool = False  # Qwen3.5: each head's output is scaled by a gate
    norms_per_layer: int = 2  # Gemma 2 and 3 have four
    sliding_window: int | None = None
    positions: int | None = field(default=None, compare=False)  # of the longest sequence it was made for

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return sum(count for _, count in self.blocks)

    @property
    def attention_layers(self) -> int:
        """How many of them attend, and so keep keys and values of each token."""
        return sum(count for block, count in self.blocks if block.mixer == "attention")

    @property
    def overflows_in_float16(self) -> bool:
        """Whether activations are known to leave float16's range: Gemma 3, whose residual stream passes 65,504."""
        return self.kind.startswith("gemma3")

    @property
    def linear_layers(self) -> int:
        """How many linear layers all blocks have."""
        return sum(count * len(block.linears) for block, count in self.blocks)

    @property
    def linear_parameters(self) -> int:
        """Weights of all blocks' linear layers, without biases."""
        return sum(count * block.linear_parameters for block, count in self.blocks)

    @property
    def linear_outputs(self) -> int:
        """Outputs of all blocks' linear layers: each has a scale of its own in 8 bits."""
        return sum(count * outputs for block, count in self.blocks for _, _, outputs in block.linears)

    @property
    def largest_linear(self) -> int:
        """Weights of the largest linear layer in a block, which is dequantized as a whole."""
        return max(inputs * outputs for block, _ in self.blocks for _, inputs, outputs in block.linears)

    def adapter_parameters(self, rank: int, targets: tuple[str, ...] | None = None) -> int:
        """Return the weights of a LoRA on the linear layers of these names; None: on all of them."""
        return rank * sum(
            count * (inputs + outputs)
            for block, count in self.blocks
            for name, inputs, outputs in block.linears
            if targets is None or name in targets
        )

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding (the output head has as many when it is not tied)."""
        return self.vocab * self.hidden

    @property
    def unquantized_parameters(self) -> int:
        """Norms, biases, convolutions and experts."""
        return self.hidden + sum(count * (block.small + block.experts) for block, count in self.blocks)

    @property
    def parameters(self) -> int:
        """All weights, as model cards count them; without a vision tower and heads for speculative decoding."""
        heads = 1 if self.tied else 2
        return self.linear_parameters + heads * self.embedding_parameters + self.unquantized_parameters

    def state_bytes(self, width: int) -> int:
        """Return what a row keeps in the layers that do not attend, whatever its length.

        Args:
            width: bytes of a number in the compute dtype.
        """
        return sum(count * (width * block.conv_state + 4 * block.recurrent_state) for block, count in self.blocks)


def read_shape(config: Mapping[str, Any], where: str) -> ModelShape:
    """Read the sizes off a config.json.

    Raises:
        ModelError: its blocks are not among those that are counted here.
    """
    config = text_config(config)
    kind = str(config.get("model_type", "?"))
    if fault := _unplanned(config, kind):
        raise ModelError(
            f"{where}: no plan for this model ({kind}): {fault}. Train it without a plan: memory.fit=false."
        )
    heads = config["num_attention_heads"]
    gemma3 = kind.startswith("gemma3")
    return ModelShape(
        kind=kind,
        hidden=config["hidden_size"],
        intermediate=_intermediate(config, kind),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        tied=is_tied(config),
        blocks=_blocks(config, kind),
        qk_norm=kind.startswith(("qwen3", "lfm2", "olmo2", "olmo3")) or gemma3,
        gated_attention=kind in _DELTA,
        norms_per_layer=4 if kind.startswith(("gemma2", "gemma3")) else 2,
        sliding_window=config.get("sliding_window") if _slides(config, kind) else None,
        positions=read_positions(config),
    )


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text tower's part of a multimodal model's config.json, what it inherits included."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return dict(config)
    inherited = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    return {**inherited, **text}


def layer_mixers(config: Mapping[str, Any]) -> list[Mixer]:
    """Return the mixer of each layer."""
    kind = str(config.get("model_type", "?"))
    layers = config["num_hidden_layers"]
    words = config.get("layer_types") or config.get("layers_block_type")
    if words:
        return [_mixer(word, kind) for word in words][:layers]
    if kind in _DELTA:
        interval = config.get("full_attention_interval") or 4
        return ["delta" if (layer + 1) % interval else "attention" for layer in range(layers)]
    if kind in _CONV and config.get("full_attn_idxs") is not None:
        return ["attention" if layer in config["full_attn_idxs"] else "conv" for layer in range(layers)]
    return [("mamba" if kind in _MAMBA else "attention")] * layers


def is_tied(config: Mapping[str, Any]) -> bool:
    """Tell whether the output head is the embedding; LFM2 says `tie_embedding`, and Gemma and LFM2 default to it."""
    default = str(config.get("model_type")).startswith(("gemma", "lfm2"))
    return bool(config.get("tie_embedding", config.get("tie_word_embeddings", default)))


def _unplanned(config: Mapping[str, Any], kind: str) -> str | None:
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    missing = [name for name in needed if not isinstance(config.get(name), int) or config[name] < 1]
    if kind in _EXPERTS and missing == ["intermediate_size"]:
        missing = []
    experts = next(
        (name for name in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(name)), None
    )
    if kind.startswith(_OTHER_BLOCKS):
        return "its blocks are of a kind that is not counted"
    if missing:
        return f"it lacks {', '.join(missing)}"
    if experts and kind not in _EXPERTS:
        return f"it is a mixture of experts ({experts})"
    known = {"attention": "", "delta": _DELTA, "conv": _CONV, "mamba": _MAMBA}
    words = set(config.get("layer_types") or ())
    strange = sorted(w for w in words if w not in _MIXERS or kind not in (known[_mixer(w, kind)] or (kind,)))
    return f"it has {', '.join(strange)} layers" if strange else None


def _mixer(word: str, kind: str) -> Mixer:
    return "mamba" if word == "linear_attention" and kind in _MAMBA else _MIXERS[word]


def _blocks(config: Mapping[str, Any], kind: str) -> tuple[tuple[Block, int], ...]:
    sparse = [_is_sparse(config, kind, layer) for layer in range(config["num_hidden_layers"])]
    counted = Counter(zip(layer_mixers(config), sparse, strict=False))
    return tuple((_block(config, kind, mixer, has_experts), count) for (mixer, has_experts), count in counted.items())


def _block(config: Mapping[str, Any], kind: str, mixer: Mixer, has_experts: bool) -> Block:
    mixing = {"attention": _attention, "delta": _delta, "conv": _conv, "mamba": _mamba}[mixer](config, kind)
    hidden, norms = config["hidden_size"], 4 if kind.startswith(("gemma2", "gemma3")) else 2
    linears, width, bias = _mlp(config, kind)
    experts = 0
    if has_experts:
        each, count = _expert_size(config, kind), int(config.get("num_experts") or config.get("num_local_experts") or 0)
        experts = count * (3 * each * hidden + hidden)  # gate, up, down, and a row of the router
        shared = kind in _MAMBA  # their shared MLP stands beside the experts
        linears = linears if shared else _shared_expert(config)
        width = int(config.get("num_experts_per_tok") or 1) * each + (width if shared else config.get(_SHARED) or 0)
    return Block(
        mixer,
        (*mixing.linears, *linears),
        mixing.small + norms * hidden + bias,
        width,
        experts,
        mixing.mixed,
        mixing.conv_state,
        mixing.recurrent_state,
    )


_SHARED = "shared_expert_intermediate_size"


def _attention(config: Mapping[str, Any], kind: str) -> Block:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    query, key = heads * size, (config.get("num_key_value_heads") or heads) * size
    asked = 2 * query if kind in _DELTA else query  # each head's gate beside its query
    out = "out_proj" if kind in _CONV else "o_proj"
    linears: tuple[Linear, ...] = (("q_proj", hidden, asked), ("k_proj", hidden, key), ("v_proj", hidden, key))
    if kind.startswith("phi3"):
        linears = (("qkv_proj", hidden, query + 2 * key),)
    small = 0
    if kind.startswith("qwen2") or config.get("attention_bias"):
        small += asked + 2 * key + (0 if kind.startswith("qwen2") else hidden)
    if kind.startswith(("olmo2", "olmo3")):
        small += query + key
    elif kind.startswith(("qwen3", "gemma3", "lfm2")):
        small += 2 * size
    return Block("attention", (*linears, (out, query, hidden)), small, 0)


def _delta(config: Mapping[str, Any], kind: str) -> Block:
    hidden, keys, values = config["hidden_size"], config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = keys * config["linear_key_head_dim"], values * config["linear_value_head_dim"]
    channels, kernel = 2 * key_dim + value_dim, config["linear_conv_kernel_dim"]
    linears: tuple[Linear, ...] = (
        ("in_proj_qkv", hidden, channels),
        ("in_proj_z", hidden, value_dim),
        ("in_proj_b", hidden, values),
        ("in_proj_a", hidden, values),
    )
    if kind == "qwen3_next":
        linears = (("in_proj_qkvz", hidden, channels + value_dim), ("in_proj_ba", hidden, 2 * values))
    return Block(
        "delta",
        (*linears, ("out_proj", value_dim, hidden)),
        channels * kernel + 2 * values + config["linear_value_head_dim"],  # convolution, decay and step, norm
        0,
        mixed=values * (2 * config["linear_key_head_dim"] + config["linear_value_head_dim"]),
        conv_state=channels * kernel,
        recurrent_state=values * config["linear_key_head_dim"] * config["linear_value_head_dim"],
    )


def _conv(config: Mapping[str, Any], kind: str) -> Block:
    del kind
    hidden, kernel, biased = config["hidden_size"], config.get("conv_L_cache", 3), bool(config.get("conv_bias"))
    linears: tuple[Linear, ...] = (("in_proj", hidden, 3 * hidden), ("out_proj", hidden, hidden))
    small = hidden * kernel + biased * 5 * hidden
    return Block("conv", linears, small, 0, mixed=3 * hidden, conv_state=hidden * kernel)


def _mamba(config: Mapping[str, Any], kind: str) -> Block:
    del kind
    hidden, heads, states = config["hidden_size"], config["mamba_n_heads"], config["mamba_d_state"]
    inner = int(config.get("mamba_expand", 2) * hidden)
    channels, kernel = inner + 2 * config.get("mamba_n_groups", 1) * states, config.get("mamba_d_conv", 4)
    width = inner + channels + heads
    small = channels * (kernel + bool(config.get("mamba_conv_bias", True))) + 3 * heads + inner
    if config.get("mamba_proj_bias"):
        small += width + hidden
    linears: tuple[Linear, ...] = (("in_proj", hidden, width), ("out_proj", inner, hidden))
    state = inner * states
    return Block("mamba", linears, small, 0, mixed=width, conv_state=channels * kernel, recurrent_state=state)


def _mlp(config: Mapping[str, Any], kind: str) -> tuple[tuple[Linear, ...], int, int]:
    """Return the linear layers of the MLP, its width, and the number of its biases."""
    hidden, width = config["hidden_size"], _intermediate(config, kind)
    names = ("w1", "w3", "w2") if kind in _CONV else ("gate_proj", "up_proj", "down_proj")
    linears: tuple[Linear, ...] = (
        (names[0], hidden, width),
        (names[1], hidden, width),
        (names[2], width, hidden),
    )
    if kind in _MAMBA:
        linears = (("input_linear", hidden, 2 * width), ("output_linear", width, hidden))
    if kind.startswith("phi3"):
        linears = (("gate_up_proj", hidden, 2 * width), ("down_proj", width, hidden))
    return linears, width, 2 * width + hidden if config.get("mlp_bias") else 0


def _intermediate(config: Mapping[str, Any], kind: str) -> int:
    """Return the width of the MLP."""
    if kind in _MAMBA:
        return int(config["shared_intermediate_size"])
    width = int(config.get("block_ff_dim") or config.get("intermediate_size") or config.get(_SHARED) or 0)
    # Source: transformers 5.23, Lfm2MLP.
    if kind == "lfm2" and config.get("block_auto_adjust_ff_dim", True):
        step, factor = config.get("block_multiple_of", 256), config.get("block_ffn_dim_multiplier", 1.0)
        width = int(2 * width / 3)
        width = width if factor is None else step * -(-int(factor * width) // step)
    return width


def _is_sparse(config: Mapping[str, Any], kind: str, layer: int) -> bool:
    """Tell whether a layer has experts in place of an MLP, or beside it."""
    if kind not in _EXPERTS or not (config.get("num_experts") or config.get("num_local_experts")):
        return False
    if kind == "lfm2_moe":
        return bool(layer >= config.get("num_dense_layers", 2))
    if layer in (config.get("mlp_only_layers") or ()):
        return False
    return (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0


def _expert_size(config: Mapping[str, Any], kind: str) -> int:
    return int(config["intermediate_size"] if kind in _MAMBA else config["moe_intermediate_size"])


def _shared_expert(config: Mapping[str, Any]) -> tuple[Linear, ...]:
    hidden, width = config["hidden_size"], config.get(_SHARED)
    if not width:
        return ()
    gate: Linear = ("shared_expert_gate", hidden, 1)
    return (("gate_proj", hidden, width), ("up_proj", hidden, width), ("down_proj", width, hidden), gate)


def _slides(config: Mapping[str, Any], kind: str) -> bool:
    """Return whether some layer really attends within `sliding_window` only (attention.sliding_window)."""
    kinds = config.get("layer_types")
    if kinds is not None and "sliding_attention" not in kinds:
        return False
    return bool(config.get("use_sliding_window", not kind.startswith("qwen2")))
