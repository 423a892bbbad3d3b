"""After training: merge the adapter, prove the result, write GGUF, publish on the Hub. `stages` runs them for a run."""
