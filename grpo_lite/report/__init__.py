"""What a run's files say, without torch: diagnoses, the live board, curves, the page and the summary."""
