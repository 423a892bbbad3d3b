"""Publish a run on the Hub with a model card made from what was measured."""
