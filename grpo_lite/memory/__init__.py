"""Where a GPU's memory and a run's time go: the phases, the plan for a card, what fits it and a budget. Torch-free."""
