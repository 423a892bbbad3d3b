"""Scores: base against trained on held-out prompts, the probe before training, and how long a step takes."""
