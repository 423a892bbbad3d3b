"""A run on disk: its directory, its checkpoints, copies of them elsewhere, and what it was made with."""
