"""For people who look and ask: the page over `runs/` in a browser, and the chat with a trained run."""
