"""One training from start to end: build the trainer, train, stop cleanly, record, show progress."""
