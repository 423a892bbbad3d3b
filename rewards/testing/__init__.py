"""Test a reward before training: the gold answer must score, and no cheat may."""

from .battery import Finding, Line, Report, check_rewards, score_rows
from .cheats import Cheat, all_cheats

__all__ = ["Cheat", "Finding", "Line", "Report", "all_cheats", "check_rewards", "score_rows"]
