"""Where a GPU's memory goes: the phases of a run, the plan for a card, the budgets that fit. Torch-free."""
