"""Recurrent layers in packed rows: a prompt is run once, and each completion starts from the prompt's final state.

A short convolution (LFM2), a gated delta net (Qwen3.5) or a Mamba-2 mixer (Granite 4) runs along a sequence. `install`
wraps each such layer: a call that carries a `packed_layout` is cut into sequences, and the layer's own forward runs
over the prompts, then over the completions. `States` stands where it expects transformers' Cache, starts empty for a
prompt and with the prompt's states for a completion, and writes nothing in place, so that the gradients of all
completions reach the prompt. No arithmetic of a layer is repeated here. Other calls pass through unchanged.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# The layers served, classes of transformers. They read and write their states by a Cache's methods alone, and the
# layers around them hand on keyword arguments: tests/engine/test_hybrid.py holds both against the installed version.
SERVED = frozenset(
    {
        "Lfm2ShortConv",
        "Lfm2MoeShortConv",
        "Lfm3ShortConv",
        "Qwen3_5GatedDeltaNet",
        "Qwen3_5MoeGatedDeltaNet",
        "Qwen3NextGatedDeltaNet",
        "OlmoHybridGatedDeltaNet",
        "GraniteMoeHybridMambaLayer",
        "BambaMixer",
        "FalconH1Mixer",
        "NemotronHMamba2Mixer",
    }
)
# What transformers calls its Cache in a layer's call: 5.24 on, before that, and in layers named after attention.
CACHE_ARGUMENTS = ("cache", "cache_params", "past_key_values")
# What a configuration calls layers that hold one of them, and layers that mix no tokens.
RECURRENT_KINDS = frozenset({"conv", "linear_attention", "mamba", "hybrid"})
TOKENWISE_KINDS = frozenset({"mlp", "moe"})
# Sequences run together are padded to the longest: none is shorter than this share of it, or all are short.
PADDED_SHARE = 0.75
SHORT = 64  # tokens; the delta rule pads to a multiple of as many anyway

# Runs a layer over (rows, L, H) with the rows' states and, where it is padded on the left, a mask (rows, L).
Run = Callable[[Tensor, "States", Tensor | None], Tensor]


class States:
    """One layer's states of some rows, where transformers' Cache stands in the layer's call.

    transformers 5.23 calls the `get_…` and `is_recording_past`, 5.17 `has_previous_state` and `layers[i].conv_states`.
    A step of one token updates the tensors in place, by the layer itself: that is for decoding, without gradients.
    """

    record_past = False

    def __init__(self, conv: Tensor | None = None, recurrent: Tensor | None = None) -> None:
        self.conv_states = {0: conv}  # (rows, channels, kernel size)
        self.recurrent_states = {0: recurrent}  # (rows, heads, …); a short convolution has none

    @property
    def layers(self) -> "States":
        """The same for every layer: it serves the call of one."""
        return self

    def __getitem__(self, layer_idx: int) -> "States":
        return self

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        """Return whether the rows have been run over something."""
        return self.conv_states[state_idx] is not None

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return whether earlier states can be restored."""
        return self.record_past

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the last inputs of the convolution."""
        return self.conv_states[state_idx]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the state of the recurrence."""
        return self.recurrent_states[state_idx]

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int
    ) -> Tensor:
        """Keep the last inputs of the convolution, and return all that it has to run over: `(rows, channels, L)`."""
        before = self.conv_states[state_idx]
        seen = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        if seen.size(-1) < conv_kernel_size:
            seen = nn.functional.pad(seen, (conv_kernel_size - seen.size(-1), 0))
        self.conv_states[state_idx] = seen[..., -conv_kernel_size:]
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        """Keep the state of the recurrence, and return it."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    def select(self, rows: Tensor) -> "States":
        """Return copies of the states of these rows, a row as often as it is named."""
        conv, recurrent = self.conv_states[0], self.recurrent_states[0]
        return States(
            None if conv is None else conv.index_select(0, rows),
            None if recurrent is None else recurrent.index_select(0, rows),
        )

    def zeros(self, rows: int) -> "States":
        """Return buffers for the states of so many rows."""
        conv, recurrent = self.conv_states[0], self.recurrent_states[0]
        return States(
            None if conv is None else conv.new_zeros(rows, *conv.shape[1:]),
            None if recurrent is None else recurrent.new_zeros(rows, *recurrent.shape[1:]),
        )

    def first(self, rows: int) -> "States":
        """Return views of the states of the first rows."""
        conv, recurrent = self.conv_states[0], self.recurrent_states[0]
        return States(None if conv is None else conv[:rows], None if recurrent is None else recurrent[:rows])

    def put(self, rows: Tensor | None, states: "States") -> None:
        """Copy the states of other rows over those of these rows, None for all, without moving the tensors."""
        for kind in ("conv_states", "recurrent_states"):
            buffer, new = getattr(self, kind)[0], getattr(states, kind)[0]
            if buffer is None or new is buffer:
                continue
            if rows is None:
                buffer.copy_(new)
            else:
                buffer.index_copy_(0, rows, new)

    def freeze(self, rows: Tensor, before: Sequence[Tensor]) -> None:
        """Put back what stood in the tensors of these rows (truth values `(rows,)`), without moving them."""
        for tensor, old in zip(self.tensors, before, strict=True):
            tensor.copy_(torch.where(rows.view(-1, *[1] * (old.dim() - 1)), old, tensor))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors there are."""
        return [x for x in (self.conv_states[0], self.recurrent_states[0]) if x is not None]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return next((x.size(0) for x in (self.conv_states[0], self.recurrent_states[0]) if x is not None), 0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows' states."""
        return sum(x.nbytes for x in self.tensors)


@dataclass(frozen=True)
class _Batch:
    """Sequences of a flat row that are run together."""

    members: list[int]  # which sequences
    gather: Tensor  # (rows, L) places in the flat row; padding repeats a token of the same sequence
    mask: Tensor | None  # (rows, L), false on padding; None where the padding is on the right, or there is none

    def take(self, hidden: Tensor) -> Tensor:
        """Return the sequences `(rows, L, H)` of a flat row `(1, T, H)`."""
        return hidden[0].index_select(0, self.gather.flatten()).view(*self.gather.shape, hidden.size(-1))


class Branches:
    """Where the sequences of a flat row lie: those that start from nothing, and those that start from a prompt's end.

    A prompt with a single completion is one sequence with it.
    """

    def __init__(self, segments: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> None:
        roots: list[range] = []
        branches: list[range] = []
        owners: list[int] = []
        offset = 0
        for prompt, completions in segments:
            alone = completions[0] if len(completions) == 1 else 0
            roots.append(range(offset, offset + prompt + alone))
            offset += prompt + alone
            for length in () if alone else completions:
                branches.append(range(offset, offset + length))
                owners.append(len(roots) - 1)
                offset += length
        scatter = torch.empty(offset, dtype=torch.long)
        # On the left a prompt's padding leaves no trace in its final state, as the layer masks it; on the right a
        # completion's padding is read by nobody. One token would take the layer's step for decoding, so it gets a pad.
        self._roots, base = _batches(roots, scatter, 0, on_left=True, device=device)
        self._branches, _ = _batches(branches, scatter, base, on_left=False, device=device)
        self._owners = [torch.tensor([owners[i] for i in batch.members]).to(device) for batch in self._branches]
        order = [i for batch in self._roots for i in batch.members]
        self._root_order = torch.tensor(order).argsort().to(device)
        self._scatter = scatter.to(device)

    def mix(self, hidden: Tensor, run: Run) -> tuple[Tensor, States]:
        """Run a layer over a flat row `(1, T, H)`; return its output `(1, T, H)` and the roots' final states."""
        outputs: list[Tensor] = []
        ends: list[States] = []
        for batch in self._roots:
            ends.append(States())
            outputs.append(run(batch.take(hidden), ends[-1], batch.mask).flatten(0, 1))
        final = join(ends).select(self._root_order)
        for batch, owners in zip(self._branches, self._owners, strict=True):
            outputs.append(run(batch.take(hidden), final.select(owners), None).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self._scatter).unsqueeze(0), final


def _batches(
    sequences: list[range], scatter: Tensor, base: int, on_left: bool, device: torch.device
) -> tuple[list[_Batch], int]:
    """Divide sequences into batches of similar length.

    Args:
        sequences: places in the flat row.
        scatter: `(T,)`; gets the place of each token in the padded outputs of all batches, one behind the other.
        base: where the first batch's output begins.
        on_left: the side of the padding.
        device: of the result.

    Returns:
        The batches, and where the next output would begin.
    """
    members: list[list[int]] = []
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        longest = len(sequences[members[-1][0]]) if members else 0
        if not members or (longest > SHORT and len(sequences[i]) < PADDED_SHARE * longest):
            members.append([])
        members[-1].append(i)
    batches = []
    for rows in members:
        width = len(sequences[rows[0]])
        if not on_left:
            width = max(2, width)
        starts = torch.tensor([sequences[i].start for i in rows]).unsqueeze(1)
        lengths = torch.tensor([len(sequences[i]) for i in rows]).unsqueeze(1)
        columns = torch.arange(width)
        columns = columns - (width - lengths) if on_left else columns.expand(len(rows), width)
        real = (columns >= 0) & (columns < lengths)
        gather = starts + columns.clamp(min=0).minimum(lengths - 1)
        scatter[gather[real]] = base + real.flatten().nonzero().squeeze(1)
        base += real.numel()
        mask = None if not on_left or bool(real.all()) else real.to(device)
        batches.append(_Batch(rows, gather.to(device), mask))
    return batches, base


def join(parts: list[States]) -> States:
    """Return the rows of several states as those of one."""

    def cat(states: list[Tensor | None]) -> Tensor | None:
        tensors = [x for x in states if x is not None]
        return torch.cat(tensors) if tensors else None

    return States(cat([x.conv_states[0] for x in parts]), cat([x.recurrent_states[0] for x in parts]))


@dataclass(frozen=True)
class _Layers:
    """What a model's modules say, read once: a scan of them takes milliseconds, and a decoding step asks."""

    mixers: int  # recurrent layers that are served
    calls: int  # layers that mix tokens in one pass
    takes_seq_idx: bool  # a layer around a mixer hands on `seq_idx` alone


_LAYERS: WeakKeyDictionary[PreTrainedModel, _Layers] = WeakKeyDictionary()


def _layers(model: PreTrainedModel) -> _Layers:
    if model not in _LAYERS:
        served = mixers(model)
        attentions = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")]
        calls = len(served) + len(attentions) if served else int(model.config.num_hidden_layers)
        parameters = _parameters(type(served[0])) if served else ()
        _LAYERS[model] = _Layers(len(served), calls, "seq_idx" in parameters and "kwargs" not in parameters)
    return _LAYERS[model]


_PARAMETERS: dict[type[nn.Module], tuple[str, ...]] = {}


def _parameters(layer: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of a layer's arguments."""
    if layer not in _PARAMETERS:
        _PARAMETERS[layer] = tuple(inspect.signature(layer.forward).parameters)
    return _PARAMETERS[layer]


def mixers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the recurrent layers of a model that are served."""
    return [m for m in model.modules() if type(m).__name__ in SERVED and type(m).__module__.startswith("transformers.")]


def has_mixers(model: PreTrainedModel) -> bool:
    """Return whether a model has recurrent layers that are served."""
    return _layers(model).mixers > 0


def calls_per_pass(model: PreTrainedModel) -> int:
    """Return how many layers mix tokens in one pass: attentions and recurrent layers."""
    return _layers(model).calls


def obstacle(model: PreTrainedModel) -> str | None:
    """Return which layers of a model are recurrent and not served, or None."""
    served = mixers(model)
    known_ids = set(map(id, served))
    unknown = {type(m).__name__ for m in model.modules() if id(m) not in known_ids and _is_recurrent(m)}
    if unknown:
        return f"its recurrent layers ({', '.join(sorted(unknown))}) are not known to packed compute"
    listed = [str(kind) for kind in getattr(model.config, "layer_types", None) or []]
    known = {"full_attention", "sliding_attention"} | (RECURRENT_KINDS | TOKENWISE_KINDS if served else set())
    others = set(listed) - known
    if not others and sum(kind in RECURRENT_KINDS for kind in listed) not in (0, len(served)):
        others = set(listed) & RECURRENT_KINDS
    return f"it has {', '.join(sorted(others))} layers" if others else None


def _is_recurrent(module: nn.Module) -> bool:
    """Return whether a module is a layer of a sequence model with a convolution in it."""
    return hasattr(module, "layer_idx") and any(isinstance(child, nn.Conv1d) for child in module.children())


def install(model: PreTrainedModel) -> None:
    """Let the model's recurrent layers accept a `packed_layout`."""
    for module in mixers(model):
        before = module.__dict__.get("forward")
        if not (isinstance(before, partial) and before.func is _forward):
            # Not a bound method: those cannot be pickled. `before` is another tool's, or None for the class's own.
            module.__dict__["forward"] = partial(_forward, module, before)


def arguments(model: PreTrainedModel, layout: Any) -> dict[str, Any]:
    """Return the keyword arguments that carry a layout to all layers of a model.

    LFM2's block of transformers 5.17 hands its convolution nothing but `seq_idx`.
    """
    return {"packed_layout": layout} | ({"seq_idx": layout} if _layers(model).takes_seq_idx else {})


def _forward(
    module: nn.Module, before: Callable[..., Tensor] | None, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Stand where a recurrent layer's forward stood."""
    plain = partial(type(module).forward, module) if before is None else before
    layout: Any = kwargs.get("packed_layout", kwargs.get("seq_idx"))
    argument = next(name for name in CACHE_ARGUMENTS if name in _parameters(type(module)))
    if not hasattr(layout, "mix"):  # none, or another tool's `seq_idx`
        is_mamba = hasattr(module, "A_log") and hasattr(module, "D")
        if is_mamba and module.training and not args and kwargs.get(argument) is None:
            # Without a cache mamba_ssm's fused kernel multiplies by `out_proj.weight` itself: it would pass over an
            # adapter, and cannot read 4-bit weights (transformers 5.17 to 5.23).
            kwargs[argument] = States()
        return plain(hidden_states, *args, **kwargs)

    def run(hidden: Tensor, states: States, mask: Tensor | None) -> Tensor:
        return plain(hidden, **{argument: states}, attention_mask=mask)

    mixed: Tensor = layout.mix(module.layer_idx, hidden_states, run)
    return mixed
