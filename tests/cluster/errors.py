"""What goes wrong while a test cluster is made."""

from __future__ import annotations


class ClusterError(RuntimeError):
    """Says what failed and what to look at; the command line prints it without a traceback."""
