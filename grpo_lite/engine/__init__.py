"""Pure tensor code: packed attention, scoring, shared-prefix decoding, quantised weights, the LoRA fast path.

Imports torch and transformers only; `options` is torch-free, so that recipes and the planner can read it.
"""
