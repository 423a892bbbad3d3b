"""grpo_lite: GRPO with LoRA/QLoRA on one small GPU, from a recipe to a verified merged model.

Importing this package loads no torch; see grpo_lite.cli for the commands and grpo_lite.train for the straight line.
"""

from grpo_lite import alias

__version__ = "0.1.0"
PROJECT_URL = ""  # of the repository, for badges, notebooks and cards; empty: it has no public address yet

alias.install()  # `rewards` and `grpo_lite.rewards` are the same modules
