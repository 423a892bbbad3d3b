"""Which layers of a model `all-linear` adapts: those whose change can be merged into the checkpoint afterwards.

peft takes every linear layer but the output head, and two kinds too many:
- The routed experts of Mixtral and Qwen MoE, whose weights transformers 5 holds in one tensor for all experts. peft
  adapts that tensor as a parameter, and a merge cannot write its change into the checkpoint's tensors by expert. It
  goes by the last part of a name, so dense layers and shared experts of the same name (`gate_proj` …) are left out too.
- The output projection of a Mamba-2 layer. Its kernels multiply by the weight directly, so an adapter there would not
  be trained; peft refuses it for some families and not for others.
Read in peft 0.21.2: `utils/transformers_weight_conversion.py`, `tuners/tuners_utils.py`.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from grpo_lite.errors import ModelError

logger = logging.getLogger(__name__)


def choose_targets(config: Any, model: Any) -> None:
    """Narrow a LoraConfig's `all-linear` to what can be merged, in place; names that cannot are refused.

    Args:
        config: of peft.
        model: the base; its weights may be on the meta device.

    Raises:
        ModelError: `target_modules` names routed experts.
    """
    everything = config.target_modules == "all-linear"
    experts, rest = _routed_experts(config, model)
    if experts and not everything:
        raise ModelError(
            f"lora.target_modules: {_listed(config.target_modules)} includes the routed experts of this model "
            f"({', '.join(experts)}), which are one tensor for all experts; their adapter cannot be merged. Set "
            f"lora.target_modules={_listed(rest) if rest else 'all-linear'}, or all-linear, which leaves them out."
        )
    if experts:
        config.target_modules = rest
        logger.info("all-linear leaves out the routed experts and the router: adapted are %s", _listed(rest))
    if everything and (direct := _multiplied_directly(model)):
        config.exclude_modules = sorted({*(config.exclude_modules or []), *direct})


def _routed_experts(config: Any, model: Any) -> tuple[list[str], set[str]]:
    """Return the experts' parameters that peft would adapt, and the other modules that it would adapt by name."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # peft 0.18 leaves experts alone
        return [], set()
    trial = copy.deepcopy(config)
    convert_peft_config_for_transformers(trial, model, None)
    before = set(config.target_parameters or ())
    return sorted(set(trial.target_parameters or ()) - before), set(trial.target_modules or ())


def _multiplied_directly(model: Any) -> set[str]:
    """Return the ends of the names of Mamba-2's output projections (`mamba.out_proj`)."""
    mixers = (name for name, part in model.named_modules() if hasattr(part, "A_log") and hasattr(part, "D"))
    return {f"{name.rpartition('.')[2]}.out_proj" for name in mixers}


def _listed(names: Any) -> str:
    return names if isinstance(names, str) else f"[{','.join(sorted(names))}]"
