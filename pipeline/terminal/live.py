"""A view that changes: on a terminal it is drawn over itself, elsewhere written again after a change."""

import io
from contextlib import AbstractContextManager
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live

from pipeline.terminal.output import Terminal, View, unfiltered


class LiveView(AbstractContextManager["LiveView"]):
    """Lines and tables on a stream. The last ones stay there."""

    def __init__(self, stream: TextIO):
        self._terminal = Terminal(stream)
        self._live: Live | None = None
        self._last = ""
        if self._terminal.is_terminal:
            # Without the redirection, which would show the escapes of other writers as colours.
            self._live = Live(
                console=Console(file=unfiltered(stream), highlight=False),
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, view: View) -> None:
        """Put these lines and tables in the place of the last ones; elsewhere write them if they differ."""
        if self._live is not None:
            width = self._live.console.width
            self._live.update(Group(*(self._terminal.drawn(part, width) for part in view)), refresh=True)
            return
        whole = io.StringIO()
        Terminal(whole).view(view)
        if whole.getvalue() != self._last:
            self._last = whole.getvalue()
            self._terminal.view(view)
