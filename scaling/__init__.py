"""Scaling-law studies of CLUE, the Contrastive Learning User Encoder (Shin et al., AAAI 2023)."""

__version__ = "0.1.0"


class ClueError(Exception):
    """Base of every error whose message is meant for the person at the terminal.

    The command line prints it as one paragraph, without a traceback, and exits with status 2.
    """
