"""The start of replicas by what Ray Serve says about them, one state after the other."""

import logging
from collections.abc import Sequence

import pytest

from pipeline.serving.replicas.application import Application, State
from pipeline.serving.replicas.replica import REFUSAL
from vico.errors import UserError

WAITS = "Deployment 'replica' has 1 replicas that have taken more than 30s to be scheduled."


class Scripted(Application):
    def __init__(self, states: Sequence[State | None]):
        super().__init__("scripted", None, 2)
        self.states = list(states)

    def state(self) -> State | None:
        return self.states.pop(0)


def refused(host: str) -> str:
    """What Ray Serve says while one replica fails and others run: it never gives up then."""
    return (
        f"A replica failed to start with exception. Retrying. Error:\nTraceback\n{REFUSAL} host {host}: why"
    )


@pytest.mark.parametrize(
    "states, words",
    [
        ([State(0), State(1, message=refused("b"))], "--replicas=2: they do not start: host b: why"),
        ([State(0, is_failed=True, message="Error:\nOSError: full")], "they do not start: OSError: full"),
        ([State(1), None], "--replicas=2: they were deleted while they started"),
    ],
)
def test_a_start_that_cannot_succeed_ends(states, words):
    with pytest.raises(UserError, match=words):
        Scripted(states).await_replicas()


def test_what_delays_a_start_is_said_once(caplog):
    waiting = State(1, message=WAITS)
    died = State(1, message="A replica failed to start with exception. Error:\nThe actor died.")
    with caplog.at_level(logging.WARNING):
        Scripted([State(0), waiting, waiting, died, State(2, is_whole=True)]).await_replicas()
    assert [record.getMessage() for record in caplog.records] == [
        f"1 of 2 replicas run: {WAITS}",
        "1 of 2 replicas run: The actor died.",
    ]
