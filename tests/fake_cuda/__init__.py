"""The CUDA path, tested without a card: a simulated device and the scenarios that run on it."""
