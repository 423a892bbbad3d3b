"""A run on disk: its directory, its checkpoints, copies of them elsewhere, and its provenance."""
