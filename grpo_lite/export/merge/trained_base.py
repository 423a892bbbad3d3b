"""TrainedBase: the weights of a base as 4-bit training reads them, given in 16 bits.

NF4 rounds each weight to one of 16 values, so a base in 4 bits is another model than its 16-bit original, and the
adapter is trained to fit it. Merged onto these weights, it is the model that was trained. Merged onto the original, the
rounding that the adapter grew up with is missing, which can help or harm
(docs/measurements/merge.md).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from grpo_lite.engine.out_of_memory import free_memory
from grpo_lite.engine.quantised import dequantize
from grpo_lite.errors import ExportError
from grpo_lite.models.base import Base
from grpo_lite.models.load import load_model


class TrainedBase:
    """The 4-bit layers of a base, loaded as for training, where training loads them.

    Attributes:
        shapes: `(out, in)` of each layer's weight, by the layer's name in the model.
    """

    def __init__(self, base: Base) -> None:
        """Load the base in 4 bits.

        Raises:
            ModelError: it cannot be loaded.
            ExportError: none of its layers is in 4 bits.
        """
        modules = load_model(base).named_modules()
        self._layers: dict[str, Any] = {name: module for name, module in modules if _quantised_shape(module)}
        if not self._layers:
            raise ExportError(f"model.load_in: no layer of {base.section.id} is in 4 bits. Merge with --onto original.")
        self.shapes = {name: _quantised_shape(layer) for name, layer in self._layers.items()}

    def weight(self, layer: str) -> Tensor:
        """Return a layer's weight `(out, in)` on the CPU, in the dtype that training computes in."""
        return dequantize(self._layers[layer]).cpu()

    def release(self) -> None:
        """Give the memory of the weights back; no layer can be read after that."""
        self._layers.clear()
        free_memory()

    def write_into(self, model: nn.Module) -> None:
        """Give the layers of the same model in 16 or 32 bits these weights, in place."""
        for name in self._layers:
            layer: Any = model.get_submodule(name)
            weight = self.weight(name)
            layer.weight.data.copy_(weight if isinstance(layer, nn.Linear) else weight.T)  # Conv1D: (in, out)


def _quantised_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a 4-bit weight; empty where the module has none."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return tuple(getattr(state, "shape", ()))
