"""A model's sizes, layer by layer, as its config.json states them: what the plan of memory counts with. Torch-free.

A model is a stack of blocks of a few kinds. Each kind has attention, a recurrent mixer (a gated delta net, a short
convolution or Mamba-2) or both, and an MLP or experts. `tests/models/test_shape.py` compares the counts with the real
classes' own; a family that it does not compare is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_lite.errors import ModelError
from grpo_lite.models.positions import read_positions

Mixer = Literal["attention", "delta", "conv", "mamba", "parallel", "none"]  # parallel: attention beside Mamba-2
Recurrent = Literal["delta", "conv", "mamba"]
Linear = tuple[str, int, int]  # name, inputs, outputs

# Families whose layers all attend, with blocks as counted here.
_ATTENDING = """
llama qwen2 qwen3 gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text mistral ministral ministral3 olmo2 olmo3
smollm3 cohere cohere2 granite phi3 qwen3_moe mixtral gpt_oss
"""
# Families with layers that do not attend, and what these are.
_RECURRENT: dict[str, Recurrent] = {
    "qwen3_5_text": "delta",
    "qwen3_5_moe_text": "delta",
    "qwen3_next": "delta",
    "olmo_hybrid": "delta",
    "lfm2": "conv",
    "lfm2_moe": "conv",
    "lfm3": "conv",
    "granitemoehybrid": "mamba",
    "bamba": "mamba",
    "falcon_h1": "mamba",
    "nemotron_h": "mamba",
}
# config.json's words for a layer. Mamba layers are called linear_attention by transformers 5.
_ATTENTION_WORDS = ("full_attention", "sliding_attention", "attention")
_RECURRENT_WORDS = {"delta": ("linear_attention",), "conv": ("conv",), "mamba": ("mamba", "linear_attention")}
_GATED = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")  # each head's output is scaled by a gate of its own
_EXPERTS = """
qwen3_moe qwen3_5_moe_text qwen3_next lfm2_moe gemma4 gemma4_text granitemoehybrid mixtral gpt_oss nemotron_h
"""
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # config.json's words for their number
# peft would adapt these families' routed experts by their names, so layers of the same names are not adapted either.
_EXPERTS_BY_NAME = ("qwen3_moe", "qwen3_next", "mixtral")
_SHARED = "shared_expert_intermediate_size"
_PATTERN: dict[str, Mixer] = {"M": "mamba", "*": "attention", "-": "none", "E": "none"}  # nemotron_h's letters


@dataclass(frozen=True)
class Attention:
    """What a token's attention in one kind of layer computes with."""

    heads: int
    queries: int  # numbers: heads × their size
    keys: int  # numbers: key/value heads × their size
    keeps_keys: bool = True  # False: keys and values are an earlier layer's
    has_norms: bool = False  # of queries and keys
    is_gated: bool = False


@dataclass(frozen=True)
class Block:
    """One kind of decoder layer."""

    linears: tuple[Linear, ...]  # what is quantized
    small: int  # weights of norms, biases and convolutions
    norms: int = 2  # over the hidden size
    attention: Attention | None = None
    recurrent: Recurrent | None = None
    mlp: int = 0  # width of the MLP that a token passes through, its experts' together
    keeps_product: bool = False  # of its MLP, for backward; that of others is computed again (recompute.py)
    routed: int = 0  # numbers that a token's experts are given, together
    experts: int = 0  # weights of experts and their router, which are neither quantized nor adapted
    unadapted: frozenset[str] = frozenset()  # names of linear layers that `all-linear` leaves out
    mixed: int = 0  # numbers of a token that a recurrent mixer computes with
    chunk: int = 1  # tokens that it takes together; a prompt and a completion are filled up to whole ones
    conv_state: int = 0  # numbers that a row keeps while it decodes, in the compute dtype
    recurrent_state: int = 0  # the same in float32

    @property
    def cached(self) -> int:
        """Keys and values that a token leaves behind, in numbers."""
        return 2 * self.attention.keys if self.attention and self.attention.keeps_keys else 0

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
    vocab: int
    tied: bool
    blocks: tuple[tuple[Block, int], ...]  # each kind, and how many layers are of it
    outside: tuple[Linear, ...] = ()  # linear layers beside the blocks, such as Gemma 4's for inputs per layer
    layer_inputs: int = 0  # numbers of a token that all layers are given besides: Gemma 4's embeddings per layer
    layer_embedding: int = 0  # weights of the table that these come from, and of their norm
    sliding_window: int | None = None
    softcap: bool = False  # scores are capped
    caps_logits: bool = False
    sinks: bool = False  # scores that take a share of the weight and add nothing
    rope_border: int | None = None  # beyond so many tokens the rotary frequencies are others
    positions: int | None = field(default=None, compare=False)  # of the longest sequence it was made for

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return sum(count for _, count in self.blocks)

    @property
    def cached(self) -> int:
        """Keys and values that a token leaves behind in all layers, in numbers."""
        return sum(count * block.cached for block, count in self.blocks)

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The kinds of attention."""
        return tuple(block.attention for block, _ in self.blocks if block.attention)

    @property
    def head_size(self) -> int:
        """The largest attention head; 0 where no layer attends."""
        return max((each.queries // each.heads for each in self.attentions), default=0)

    @property
    def scores_explicitly(self) -> bool:
        """Whether attention is computed score by score: SDPA knows neither caps nor sinks."""
        return self.softcap or self.sinks

    @property
    def overflows_in_float16(self) -> bool:
        """Whether activations are known to leave float16's range: Gemma 3, whose residual stream passes 65,504."""
        return self.kind.startswith("gemma3")

    @property
    def linear_layers(self) -> int:
        """How many linear layers there are, the output head apart."""
        return len(self.outside) + sum(count * len(block.linears) for block, count in self.blocks)

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear layers but the head, without biases."""
        return _weights(self.outside) + sum(count * block.linear_parameters for block, count in self.blocks)

    @property
    def linear_outputs(self) -> int:
        """Outputs of all linear layers but the head: each has a scale of its own in 8 bits."""
        in_blocks = sum(count * outputs for block, count in self.blocks for _, _, outputs in block.linears)
        return in_blocks + sum(outputs for _, _, outputs in self.outside)

    @property
    def largest_linear(self) -> int:
        """Weights of the largest linear layer, which is dequantized as a whole."""
        every = (*self.outside, *(linear for block, _ in self.blocks for linear in block.linears))
        return max(inputs * outputs for _, inputs, outputs in every)

    def adapter_parameters(self, rank: int, targets: tuple[str, ...] | None = None) -> int:
        """Return the weights of a LoRA on the linear layers of these names; None: on those of `all-linear`."""
        every = [(linear, count, block.unadapted) for block, count in self.blocks for linear in block.linears]
        every += [(linear, 1, frozenset()) for linear in self.outside]
        return rank * sum(
            count * (inputs + outputs)
            for (name, inputs, outputs), count, unadapted in every
            if (name not in unadapted if targets is None else name in targets)
        )

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding (the output head has as many when it is not tied)."""
        return self.vocab * self.hidden

    @property
    def unquantized_parameters(self) -> int:
        """Norms, biases, convolutions, experts and embeddings per layer."""
        return (
            self.hidden
            + self.layer_embedding
            + sum(count * (block.small + block.experts) for block, count in self.blocks)
        )

    @property
    def parameters(self) -> int:
        """All weights, as model cards count them; without a vision tower and heads for speculative decoding."""
        heads = 1 if self.tied else 2
        return self.linear_parameters + heads * self.embedding_parameters + self.unquantized_parameters

    def state_bytes(self, width: int) -> int:
        """Return what a row keeps in recurrent layers, whatever its length.

        Args:
            width: bytes of a number in the compute dtype.
        """
        return sum(count * (width * block.conv_state + 4 * block.recurrent_state) for block, count in self.blocks)


def _weights(linears: tuple[Linear, ...]) -> int:
    return sum(inputs * outputs for _, inputs, outputs in linears)


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
    mixers = layer_mixers(config)
    per_layer = _layer_input(config, kind) * len(mixers)
    outside: tuple[Linear, ...] = ()
    if per_layer:
        outside = (("per_layer_model_projection", config["hidden_size"], per_layer),)
    blocks = Counter(_block(config, kind, layer, mixer) for layer, mixer in enumerate(mixers))
    return ModelShape(
        kind=kind,
        hidden=config["hidden_size"],
        intermediate=_intermediate(config, kind),
        vocab=config["vocab_size"],
        tied=is_tied(config),
        blocks=tuple(blocks.items()),
        outside=outside,
        layer_inputs=per_layer,
        layer_embedding=_layer_embedding(config, kind, per_layer),
        sliding_window=config.get("sliding_window") if _slides(config, kind) else None,
        softcap=kind == "gemma2" and config.get("attn_logit_softcapping", 50.0) is not None,
        caps_logits=config.get("final_logit_softcapping", 30.0 if kind == "gemma2" else None) is not None,
        sinks=kind == "gpt_oss",
        rope_border=_rope_border(config),
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
    words = _layer_words(config, kind)
    if kind == "nemotron_h":  # whose layers are counted by their words
        return [_PATTERN.get(word) or _mixer(word, kind) for word in words or ()]
    layers = config["num_hidden_layers"]
    if kind == "falcon_h1":
        return ["parallel"] * layers
    if words:
        return [_mixer(word, kind) for word in words][:layers]
    recurrent: Mixer = _RECURRENT.get(kind, "attention")
    if kind in (*_GATED, "olmo_hybrid"):
        interval = config.get("full_attention_interval") or 4
        return ["attention" if (layer + 1) % interval == 0 else recurrent for layer in range(layers)]
    if kind == "lfm3":
        return ["attention" if layer % 4 == 2 or (layer and layer % 4 == 0) else recurrent for layer in range(layers)]
    attending = config.get("attn_layer_indices" if kind == "bamba" else "full_attn_idxs")
    if attending is not None:
        return ["attention" if layer in attending else recurrent for layer in range(layers)]
    return [recurrent] * layers


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether the output head is the embedding (LFM2: `tie_embedding`); Gemma, Cohere and LFM default to it."""
    default = str(config.get("model_type")).startswith(("gemma", "lfm", "cohere"))
    return bool(config.get("tie_embedding", config.get("tie_word_embeddings", default)))


def _layer_words(config: Mapping[str, Any], kind: str) -> list[str] | None:
    """Return what config.json calls each layer, where it says so."""
    pattern = config.get("hybrid_override_pattern")
    words = config.get("layer_types") or config.get("layers_block_type")
    return list(pattern) if kind == "nemotron_h" and pattern and not words else words


def _mixer(word: str, kind: str) -> Mixer:
    if word in _ATTENTION_WORDS:
        return "attention"
    return "none" if word in ("mlp", "moe") else _RECURRENT[kind]


def _unplanned(config: Mapping[str, Any], kind: str) -> str | None:
    if kind not in _ATTENDING.split() and kind not in _RECURRENT:
        return "its blocks are of a kind that is not counted"
    needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"]
    words = _layer_words(config, kind)
    if kind == "nemotron_h":
        if not words:
            return "it lacks hybrid_override_pattern"
        needed.remove("num_hidden_layers")
    missing = [name for name in needed if not isinstance(config.get(name), int) or config[name] < 1]
    if kind in _EXPERTS.split() and missing == ["intermediate_size"]:
        missing = []
    if missing:
        return f"it lacks {', '.join(missing)}"
    experts = next((name for name in _EXPERT_COUNTS if config.get(name)), None)
    if experts and kind not in _EXPERTS.split():
        return f"it is a mixture of experts ({experts})"
    known = [*_ATTENTION_WORDS, *_RECURRENT_WORDS.get(_RECURRENT.get(kind, ""), ())]
    if kind == "nemotron_h":
        known += ["mlp", "moe", *_PATTERN]
    strange = sorted({word for word in words or () if word not in known}) if kind != "falcon_h1" else []
    return f"it has {', '.join(strange)} layers" if strange else None


def _block(config: Mapping[str, Any], kind: str, layer: int, mixer: Mixer) -> Block:
    hidden, norms = config["hidden_size"], _norms(config, kind)
    parts: list[Block] = []
    if mixer in ("attention", "parallel"):
        parts.append(_attention(config, kind, layer))
    if mixer == "delta":
        parts.append(_delta(config, kind))
    if mixer == "conv":
        parts.append(_conv(config, kind))
    if mixer in ("mamba", "parallel"):
        parts.append(_mamba(config, kind))
    if kind != "nemotron_h" or mixer == "none":
        parts += _feed_forward(config, kind, layer)
    return Block(
        linears=tuple(linear for part in parts for linear in part.linears),
        small=norms * hidden + sum(part.small for part in parts),
        norms=norms,
        attention=next((part.attention for part in parts if part.attention), None),
        recurrent=next((part.recurrent for part in parts if part.recurrent), None),
        mlp=sum(part.mlp for part in parts),
        keeps_product=any(part.keeps_product for part in parts),
        routed=sum(part.routed for part in parts),
        experts=sum(part.experts for part in parts),
        unadapted=frozenset[str]().union(*(part.unadapted for part in parts)),
        mixed=sum(part.mixed for part in parts),
        chunk=max(part.chunk for part in parts),
        conv_state=sum(part.conv_state for part in parts),
        recurrent_state=sum(part.recurrent_state for part in parts),
    )


def _norms(config: Mapping[str, Any], kind: str) -> int:
    if kind in ("nemotron_h", "cohere", "cohere2"):
        return 1
    if kind.startswith("gemma4"):
        return 4 + bool(_layer_input(config, kind)) + 3 * bool(config.get("enable_moe_block"))
    if kind == "lfm3":
        return 4 if config.get("use_sandwich_norm", True) else 2
    return 4 if kind.startswith(("gemma2", "gemma3")) else 2


def _attention(config: Mapping[str, Any], kind: str, layer: int) -> Block:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size, key_heads = _head_sizes(config, kind, layer)
    query, key = heads * size, key_heads * size
    asked = 2 * query if kind in _GATED else query  # each head's gate beside its query
    keeps_keys = not _shares_keys(config, kind, layer)
    out = "out_proj" if kind in ("lfm2", "lfm2_moe") else "o_proj"
    linears: tuple[Linear, ...] = (("q_proj", hidden, asked),)
    if keeps_keys:
        linears += (("k_proj", hidden, key), ("v_proj", hidden, key))
    if kind.startswith("gemma4") and config.get("attention_k_eq_v") and not _is_sliding(config, layer):
        linears = tuple(linear for linear in linears if linear[0] != "v_proj")
    if kind == "phi3":
        linears = (("qkv_proj", hidden, query + 2 * key),)
    is_lfm3_gated = kind == "lfm3" and config.get("use_attention_gate", True)
    if is_lfm3_gated:
        linears += (("g_proj", hidden, heads),)
    small = 0
    if kind != "nemotron_h" and (kind == "qwen2" or config.get("attention_bias", kind == "gpt_oss")):
        small += asked + 2 * key + (0 if kind == "qwen2" else hidden)
    if kind == "gpt_oss":
        small += heads  # sinks
    has_norms = kind.startswith(("qwen3", "gemma3", "gemma4", "lfm", "olmo2", "olmo3", "olmo_hybrid"))
    if kind.startswith("olmo"):
        small += query + key
    elif has_norms:
        small += size * (1 + keeps_keys)
    elif kind.startswith("cohere") and config.get("use_qk_norm"):
        small += query + key
    attention = Attention(heads, query, key, keeps_keys, has_norms, kind in _GATED or bool(is_lfm3_gated))
    return Block((*linears, (out, query, hidden)), small, attention=attention)


def _head_sizes(config: Mapping[str, Any], kind: str, layer: int) -> tuple[int, int]:
    """Return the size of an attention head, and the number of key/value heads."""
    heads = config["num_attention_heads"]
    key_heads = config.get("num_key_value_heads") or heads
    default = {"gpt_oss": 64, "lfm3": 128, "nemotron_h": 128}.get(kind, config["hidden_size"] // heads)
    size = config.get("head_dim") or config.get("attention_head_dim") or default
    if kind.startswith("gemma4") and not _is_sliding(config, layer):
        own = config.get("per_layer_config")
        if own is None:  # as the file says it; transformers 5.24 writes it layer by layer
            size = config.get("global_head_dim") or 512
            key_heads = (config.get("attention_k_eq_v") and config.get("num_global_key_value_heads")) or key_heads
        else:
            sizes = next((given for name, given in own.items() if int(name) == layer), dict[str, Any]())  # "04" is 4
            size, key_heads = sizes.get("head_dim", size), sizes.get("num_key_value_heads", key_heads)
    return size, key_heads


def _is_sliding(config: Mapping[str, Any], layer: int) -> bool:
    """Return whether a layer of Gemma 4 has a window; the last one never has (Gemma4TextConfig)."""
    words, last = config.get("layer_types"), layer == config["num_hidden_layers"] - 1
    return not last and (words[layer] == "sliding_attention" if words else (layer + 1) % 6 != 0)


def _shares_keys(config: Mapping[str, Any], kind: str, layer: int) -> bool:
    shared = config.get("num_kv_shared_layers") or 0
    return kind.startswith("gemma4") and layer >= config["num_hidden_layers"] - shared


def _delta(config: Mapping[str, Any], kind: str) -> Block:
    hidden, keys, values, key_size, value_size = config["hidden_size"], *_delta_sizes(config, kind)
    key_dim, value_dim = keys * key_size, values * value_size
    channels, kernel = 2 * key_dim + value_dim, config.get("linear_conv_kernel_dim") or 4
    linears: tuple[Linear, ...] = (
        ("in_proj_qkv", hidden, channels),
        ("in_proj_z", hidden, value_dim),
        ("in_proj_b", hidden, values),
        ("in_proj_a", hidden, values),
        ("out_proj", value_dim, hidden),
    )
    if kind == "qwen3_next":
        joined: tuple[Linear, ...] = (
            ("in_proj_qkvz", hidden, channels + value_dim),
            ("in_proj_ba", hidden, 2 * values),
        )
        linears = (*joined, linears[-1])
    if kind == "olmo_hybrid":
        apart = (("q_proj", key_dim), ("k_proj", key_dim), ("v_proj", value_dim), ("g_proj", value_dim))
        linears = tuple((name, hidden, size) for name, size in (*apart, ("a_proj", values), ("b_proj", values)))
        linears += (("o_proj", value_dim, hidden),)
    return Block(
        linears,
        channels * kernel + 2 * values + value_size,  # convolution, decay and step, norm
        recurrent="delta",
        mixed=values * (2 * key_size + value_size),
        chunk=64,
        conv_state=channels * kernel,
        recurrent_state=values * key_size * value_size,
    )


def _delta_sizes(config: Mapping[str, Any], kind: str) -> tuple[int, int, int, int]:
    """Return heads of keys and of values, and their sizes; OLMo-hybrid's follow from its attention's."""
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    sizes = [config.get(name) for name in names]
    heads = config["num_attention_heads"]
    keys = int(sizes[0] or heads)
    size = int(sizes[2] or 0.75 * config["hidden_size"] / keys)
    return keys, int(sizes[1] or heads), size, int(sizes[3] or 2 * size)


def _conv(config: Mapping[str, Any], kind: str) -> Block:
    hidden, biased = config["hidden_size"], bool(config.get("conv_bias"))
    kernel = config.get("conv_L_cache") or (7 if kind == "lfm3" else 3)
    linears: tuple[Linear, ...] = (("in_proj", hidden, 3 * hidden), ("out_proj", hidden, hidden))
    small = hidden * kernel + biased * 5 * hidden
    return Block(linears, small, recurrent="conv", mixed=3 * hidden, conv_state=hidden * kernel)


def _mamba(config: Mapping[str, Any], kind: str) -> Block:
    hidden = config["hidden_size"]
    if kind == "nemotron_h":
        heads, states = config["mamba_num_heads"], config["ssm_state_size"]
        inner, groups = heads * config["mamba_head_dim"], config.get("n_groups") or config.get("mamba_n_groups") or 8
        kernel = config.get("conv_kernel") or config.get("mamba_d_conv") or 4
        conv_bias, in_bias = config.get("use_conv_bias", config.get("mamba_conv_bias", True)), config.get("use_bias")
        out_bias, has_norm = in_bias, True
    else:
        heads, states = config["mamba_n_heads"], config["mamba_d_state"]
        size, inner = config.get("mamba_d_head"), int(config.get("mamba_expand", 2) * hidden)
        inner = heads * size if isinstance(size, int) else (config.get("mamba_d_ssm") or inner)
        groups, kernel = config.get("mamba_n_groups", 1), config.get("mamba_d_conv", 4)
        conv_bias, in_bias = config.get("mamba_conv_bias", True), config.get("mamba_proj_bias")
        out_bias = config.get("projectors_bias") if kind == "falcon_h1" else in_bias
        has_norm = kind != "falcon_h1" or bool(config.get("mamba_rms_norm"))
    chunk = config.get("mamba_chunk_size") or config.get("chunk_size") or (128 if kind == "nemotron_h" else 256)
    channels = inner + 2 * groups * states
    width = inner + channels + heads
    small = channels * (kernel + bool(conv_bias)) + 3 * heads + inner * has_norm
    small += bool(in_bias) * width + bool(out_bias) * hidden
    return Block(
        (("in_proj", hidden, width), ("out_proj", inner, hidden)),
        small,
        recurrent="mamba",
        unadapted=frozenset(["out_proj"]),  # its kernels multiply by the weight directly (lora_targets)
        # Its projections, keys and queries for each head, the chunk's scores, and the states between chunks.
        mixed=width + heads * (states + chunk) + inner * states // chunk,
        chunk=chunk,
        conv_state=channels * kernel,
        recurrent_state=inner * states,
    )


def _feed_forward(config: Mapping[str, Any], kind: str, layer: int) -> list[Block]:
    """Return the MLP, the experts in its place or beside it, and what Gemma 4 adds to each layer."""
    hidden = config["hidden_size"]
    parts = [_mlp(config, kind, layer)]
    if _is_sparse(config, kind, layer):
        beside = kind == "granitemoehybrid" or kind.startswith("gemma4")  # a dense MLP stays
        parts = [*(parts if beside else ()), _experts(config, kind)]
    if inputs := _layer_input(config, kind):
        gate: tuple[Linear, ...] = (("per_layer_input_gate", hidden, inputs), ("per_layer_projection", inputs, hidden))
        parts.append(Block(gate, 0))
    return parts


def _mlp(config: Mapping[str, Any], kind: str, layer: int) -> Block:
    hidden, width = config["hidden_size"], _intermediate(config, kind)
    if kind.startswith("gemma4") and config.get("use_double_wide_mlp") and _shares_keys(config, kind, layer):
        width *= 2
    names = ("w1", "w3", "w2") if kind.startswith("lfm") else ("gate_proj", "up_proj", "down_proj")
    linears: tuple[Linear, ...] = (
        (names[0], hidden, width),
        (names[1], hidden, width),
        (names[2], width, hidden),
    )
    if kind == "granitemoehybrid":
        linears = (("input_linear", hidden, 2 * width), ("output_linear", width, hidden))
    if kind == "phi3":
        linears = (("gate_up_proj", hidden, 2 * width), ("down_proj", width, hidden))
    if kind == "nemotron_h":  # not gated
        linears = linears[1:]
    bias = bool(config.get("mlp_bias")) * sum(outputs for _, _, outputs in linears)
    own_formula = kind in ("falcon_h1", "nemotron_h")
    return Block(linears, bias, mlp=width, keeps_product=own_formula, unadapted=_of_expert_names(kind))


def _experts(config: Mapping[str, Any], kind: str) -> Block:
    """Return the routed experts, their router, and the expert that every token passes through."""
    hidden, count = config["hidden_size"], _expert_count(config)
    chosen = int(config.get("num_experts_per_tok") or config.get("top_k_experts") or 1)
    own_size = kind not in ("granitemoehybrid", "mixtral", "gpt_oss")
    each = int(config["moe_intermediate_size" if own_size else "intermediate_size"])
    router, small = count * hidden, 0
    linears: tuple[Linear, ...] = ()
    weights = 3 * each * hidden  # gate, up, down
    shared = config.get(_SHARED) or 0
    if kind == "gpt_oss":  # with biases
        weights, router = weights + 2 * each + hidden, router + count
    if kind.startswith("gemma4"):  # the router is a linear layer, with a scale
        router, small, linears = 0, hidden + count, (("proj", hidden, count),)
    if kind == "nemotron_h":  # not gated, perhaps behind a smaller space
        inner = config.get("moe_latent_size")
        weights, shared = 2 * each * (inner or hidden), config["moe_shared_expert_intermediate_size"]
        linears = (("up_proj", hidden, shared), ("down_proj", shared, hidden))
        linears += (("fc1_latent_proj", hidden, inner), ("fc2_latent_proj", inner, hidden)) if inner else ()
        small = bool(config.get("mlp_bias")) * sum(outputs for _, _, outputs in linears)
    elif shared:
        gate: Linear = ("shared_expert_gate", hidden, 1)
        linears = (("gate_proj", hidden, shared), ("up_proj", hidden, shared), ("down_proj", shared, hidden), gate)
    return Block(
        linears,
        small,
        # gpt-oss clamps both halves, and scales and shifts them: twice as many steps of the same width
        mlp=chosen * each * (2 if kind == "gpt_oss" else 1) + shared,
        keeps_product=True,
        routed=chosen * (config.get("moe_latent_size") or hidden),
        experts=count * weights + router,
        unadapted=_of_expert_names(kind),
    )


def _expert_count(config: Mapping[str, Any]) -> int:
    return next((int(config[name]) for name in _EXPERT_COUNTS if config.get(name)), 0)


def _of_expert_names(kind: str) -> frozenset[str]:
    return frozenset(("gate_proj", "up_proj", "down_proj") if kind in _EXPERTS_BY_NAME else ())


def _intermediate(config: Mapping[str, Any], kind: str) -> int:
    """Return the width of the MLP."""
    if kind == "granitemoehybrid":
        return int(config["shared_intermediate_size"])
    width = int(config.get("block_ff_dim") or config.get("intermediate_size") or config.get(_SHARED) or 0)
    # Source: transformers 5.23, Lfm2MLP.
    if kind == "lfm2" and config.get("block_auto_adjust_ff_dim", True):
        step, factor = config.get("block_multiple_of", 256), config.get("block_ffn_dim_multiplier", 1.0)
        width = int(2 * width / 3)
        width = width if factor is None else step * -(-int(factor * width) // step)
    return width


def _is_sparse(config: Mapping[str, Any], kind: str, layer: int) -> bool:
    """Return whether a layer has experts in place of an MLP, or beside it."""
    if kind not in _EXPERTS.split() or not _expert_count(config):
        return False
    if kind == "nemotron_h":
        return bool((_layer_words(config, kind) or ())[layer] in ("moe", "E"))
    if kind.startswith("gemma4"):
        return bool(config.get("enable_moe_block"))
    if kind == "lfm2_moe":
        return bool(layer >= config.get("num_dense_layers", 2))
    if layer in (config.get("mlp_only_layers") or ()):
        return False
    return (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0


def _layer_input(config: Mapping[str, Any], kind: str) -> int:
    """Return how many numbers of a token each layer of Gemma 4 is given besides."""
    return int(config.get("hidden_size_per_layer_input", 256) or 0) if kind.startswith("gemma4") else 0


def _layer_embedding(config: Mapping[str, Any], kind: str, per_layer: int) -> int:
    if not per_layer:
        return 0
    return int(config.get("vocab_size_per_layer_input", 262_144)) * per_layer + _layer_input(config, kind)


def _rope_border(config: Mapping[str, Any]) -> int | None:
    """Return the length beyond which a model with longrope rotates otherwise; see attention.rope_border."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or (rope.get("rope_type") or rope.get("type")) != "longrope":
        return None
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return int(original or config["max_position_embeddings"])


def _slides(config: Mapping[str, Any], kind: str) -> bool:
    """Return whether some layer really attends within `sliding_window` only (attention.sliding_window)."""
    kinds = config.get("layer_types")
    if kinds is not None and "sliding_attention" not in kinds:
        return False
    return bool(config.get("use_sliding_window", not kind.startswith("qwen2")))
