"""Why a stage must stop before it is done. The context raises these, the runner catches them."""

from __future__ import annotations


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (SIGINT, SIGTERM, cancel); published parts stay.

    It is a KeyboardInterrupt because blocking calls in C, such as Ray's, swallow all other exceptions.
    """


class LeaseLost(Exception):
    """Another driver has taken over this stage; this one must stop and can no longer publish."""
