"""How a pod's main process ends, so that the operator knows what to do."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the supervisor; anything else is a crash."""

    DRAINED = 0
    CONFIGURATION = 64
    """No retry helps: a person has to change something."""
    RESTART_GANG = 75
    INTERRUPTED = 130
    """A second Ctrl-C: ended at once, running streams were cut."""
