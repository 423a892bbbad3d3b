"""The frozen adapter that KL is measured against with `reference: start`: a copy of the trained one as it starts.

TRL 1.14-1.16 score the reference with the adapter named "ref" where there is one, and with the adapter off otherwise.
PEFT saves it into a checkpoint's folder `ref/`, from which transformers restores it when a run resumes. Before 5.23 it
restores nothing else then, so the trained adapter is loaded here.
"""

from __future__ import annotations

import copy
from typing import Any

REFERENCE_NAME = "ref"  # TRL's name for it, and PEFT's for its folder in a checkpoint


def hold_reference(model: Any) -> None:
    """Add a frozen copy of the model's adapter, in its dtype, without touching the random state.

    Args:
        model: a PeftModel whose adapter `default` is trained.
    """
    import torch

    config = copy.deepcopy(model.peft_config["default"])
    config.init_lora_weights = False  # it gets the weights below; PiSSA and its like would rewrite the base again
    with torch.random.fork_rng():
        model.add_adapter(REFERENCE_NAME, config)
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            held = model.get_parameter(name.replace(".default.", f".{REFERENCE_NAME}."))
            held.data = parameter.detach().clone()
            held.requires_grad_(False)


def load_trained(model: Any, checkpoint: str) -> None:
    """Load a checkpoint's trained adapter where the model holds a reference, which transformers before 5.23 forgets.

    Args:
        model: a PeftModel, or another one, which is left alone.
        checkpoint: its folder.
    """
    if REFERENCE_NAME in getattr(model, "peft_config", ()):
        model.load_adapter(checkpoint, "default", is_trainable=True)
