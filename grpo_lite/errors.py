"""Every error a user can meet, as a tree.

GRPOLiteError                 the CLI prints it and exits 1; never a traceback
├── RecipeError               the recipe or an override is wrong (all faults in one message)
├── DataError                 a dataset cannot be loaded or lacks what the recipe names
├── RewardError               a reward cannot be imported, or breaks its contract
├── ModelError                a model cannot be found, loaded or quantised here
├── MemoryBudgetError         the plan does not fit the device
├── RunDirError               the run directory is locked, finished, changed or not writable
├── TrainingError             training cannot continue: disk full, NaN after NaN, rewards that keep failing
├── EvaluationError           base and trained cannot be compared
└── ExportError               the merge or an export is wrong or unproven
    └── NothingToMerge        the adapter changes nothing that the merged weights could hold

A message has four parts: where, what was given, what is allowed, what to do.
"""


class GRPOLiteError(Exception):
    """Base of all errors that grpo_lite raises on purpose."""


class RecipeError(GRPOLiteError):
    """The recipe, or an override of it, is wrong."""


class DataError(GRPOLiteError):
    """A dataset cannot be loaded, or lacks what the recipe names."""


class RewardError(GRPOLiteError):
    """A reward cannot be imported, or broke its contract."""


class ModelError(GRPOLiteError):
    """A model cannot be found, loaded or quantised on this machine."""


class MemoryBudgetError(GRPOLiteError):
    """The plan does not fit the device."""


class RunDirError(GRPOLiteError):
    """The run directory is locked, finished, changed or not writable."""


class TrainingError(GRPOLiteError):
    """Training cannot continue; what was saved before is whole."""


class EvaluationError(GRPOLiteError):
    """Base and trained model cannot be compared."""


class ExportError(GRPOLiteError):
    """The merge or an export is wrong, or not proven right."""


class NothingToMerge(ExportError):
    """The adapter changes nothing that the merged weights could hold."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for a message of ours; its class's name where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
