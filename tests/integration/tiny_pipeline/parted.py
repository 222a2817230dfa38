"""Parts of the tiny stages, written one by one; a test can make the driver wait, die or fail in any of
them."""

import errno
import logging
import os
import signal
import sys
import time
from pathlib import Path

from stages.context import Context


def write_part(context: Context, number: int, text: str) -> None:
    """Publish part `number` unless it is done; TINY_PAUSE, TINY_KILL and TINY_FAIL=stage:number act in it."""
    name = f"part-{number}.txt"
    if context.parts.done(name):
        return
    context.check()
    context.parts.partial(name).write_text(text[: len(text) // 2])
    place = f"{context.stage}:{number}"
    if place in os.environ.get("TINY_PAUSE", "").split(","):
        Path(os.environ["TINY_PAUSED"]).touch()
        while not Path(os.environ["TINY_PAUSED"] + ".go").exists():
            time.sleep(0.02)
            if "TINY_FORK" in os.environ:
                context.check()  # in a thread, no signal interrupts the sleep
    if os.environ.get("TINY_KILL") == place:
        os.kill(os.getpid(), signal.SIGKILL)
    fails = os.environ.get("TINY_FAIL") == place and not _failed_before()
    if fails and "TINY_ERROR" in os.environ:
        raise OSError(getattr(errno, os.environ["TINY_ERROR"]), "planted")
    if fails and "TINY_MESSAGE" in os.environ:  # as a library that quotes what it was given
        logging.getLogger("library").warning(os.environ["TINY_MESSAGE"])
        sys.stderr.write(os.environ["TINY_MESSAGE"])
        raise RuntimeError(os.environ["TINY_MESSAGE"])
    if fails:
        raise RuntimeError(f"planted in {place}\nand its last line")
    context.parts.partial(name).write_text(text)
    context.parts.publish(name)
    context.log({"length": len(text)}, number)
    context.progress(number + 1, 4, "parts")


def _failed_before() -> bool:
    """With TINY_ONCE=FILE, return whether the failure has happened already."""
    if "TINY_ONCE" not in os.environ:
        return False
    mark = Path(os.environ["TINY_ONCE"])
    if mark.exists():
        return True
    mark.touch()
    return False
