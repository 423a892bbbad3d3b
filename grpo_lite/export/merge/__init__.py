"""Merge an adapter onto its 16-bit base, a block of rows at a time."""
