"""A killable process that compares answers by symbolic algebra; `client` asks, `server` answers."""

from .client import CRASH, NO, TIMEOUT, UNDECIDED, UNKNOWN, YES, JudgeError, ask, stop_judge

__all__ = ["CRASH", "NO", "TIMEOUT", "UNDECIDED", "UNKNOWN", "YES", "JudgeError", "ask", "stop_judge"]
