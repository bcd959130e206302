"""What can go wrong, as a tree.

FedrayError
 ├─ ConfigError    the user's configuration or data is wrong: exit code 2, before anything starts
 └─ RunError       a run that had started cannot go on: exit code 1
     ├─ NumericError   a value that cannot be summed or sent (not finite, or beyond the exact range)
     ├─ WireError      a payload that cannot be decoded
     └─ ClientError    a client's work raised, or its actor died too often
"""

from __future__ import annotations


class FedrayError(Exception):
    """Base of every error that fedray raises on purpose; its text is one sentence for the user."""


class ConfigError(FedrayError, ValueError):
    """The configuration or the data is wrong; names the key, the value, the rule and the remedy."""


class RunError(FedrayError, RuntimeError):
    """A run that had started cannot go on."""


class NumericError(RunError):
    """A value is not finite, or lies beyond the range in which sums are exact."""


class WireError(RunError):
    """A payload is corrupt, truncated or does not fit what the receiver knows."""


class ClientError(RunError):
    """The work of one client failed; names round, client and hook."""
