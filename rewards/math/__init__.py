"""Mathematical answers: parsed, and compared for equivalence, in bounded time."""
