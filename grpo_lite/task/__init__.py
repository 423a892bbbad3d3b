"""What is learned and what pays: prompts and their tokens, generators, rewards loaded, guarded and checked."""
