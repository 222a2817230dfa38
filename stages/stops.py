"""Why a stage must stop before it is done. Raised by the context, caught by the runner."""

from __future__ import annotations


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (SIGINT, SIGTERM, cancel); what is published stays.

    A KeyboardInterrupt, since that is what blocking calls in C give way to: Ray's swallow all others.
    """


class LeaseLost(Exception):
    """Another driver has taken this stage over; this one must stop and cannot publish any more."""
