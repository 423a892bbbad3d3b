"""Pure tensor code: packed attention and recurrence, scoring, shared decoding, quantised weights, the LoRA fast path.

Imports torch and transformers only; `options` is torch-free, so that recipes and the planner can read it.
"""
