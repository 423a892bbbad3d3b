"""The CUDA path, tested without a card: a make-believe device and the scenarios that run on it."""
