"""A server's sign of life in Ray's key-value store. Replicas whose server gives none any more end themselves.

Ray Serve's replicas outlive the process that asked for them. Without this, those of a server that was killed
would keep their GPUs for ever.
"""

import logging
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ray import serve
from ray.experimental import internal_kv

from vico.errors import UserError, one_line

logger = logging.getLogger(__name__)

_NAMESPACE = b"vico_serve"
_BEAT_S = 2.0
_LOOK_S = 4 * _BEAT_S
"""How long a new server looks for the sign of another one."""
_LOST_S = 60.0
"""How long replicas wait for a sign: longer than a restart of Ray's own server takes."""


@contextmanager
def lease(name: str) -> Iterator[None]:
    """Show that the server of the application `name` lives, until the end of the block.

    Raises UserError if another living server has an application of this name.
    """
    _refuse_other_server(name)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(name, ended), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_LOOK_S)
        with suppress(Exception):  # whatever Ray raises if its server is gone
            internal_kv._internal_kv_del(name, namespace=_NAMESPACE)


def end_without_server(name: str) -> None:
    """Start a thread that deletes the application `name` when its server has given no sign for a minute."""
    threading.Thread(target=_watch, args=(name,), name="lease", daemon=True).start()


def _refuse_other_server(name: str) -> None:
    first = _sign(name)
    until = time.monotonic() + _LOOK_S
    while first is not None and time.monotonic() < until:
        time.sleep(_BEAT_S / 4)
        sign = _sign(name)
        if sign not in (None, first):
            raise UserError(
                f"the replicas {name} belong to another `vico serve`, which lives; give another --port"
            )


def _beat(name: str, ended: threading.Event) -> None:
    server, number, is_lost = secrets.token_hex(8), 0, False
    while not ended.is_set():
        number += 1
        try:
            internal_kv._internal_kv_put(name, f"{server} {number}", namespace=_NAMESPACE)
            is_lost = False
        except Exception as error:  # Ray's server may be starting again
            if not is_lost:
                logger.error("Ray's store does not take the sign of life of %s: %s", name, one_line(error))
            is_lost = True
        ended.wait(_BEAT_S)


def _watch(name: str) -> None:
    last, since = None, time.monotonic()
    while True:
        time.sleep(_BEAT_S)
        try:
            sign = _sign(name)
            if sign is not None and sign != last:
                last, since = sign, time.monotonic()
            elif time.monotonic() - since > _LOST_S:
                logger.error("no sign of life of the server of %s for %.0f s; it ends", name, _LOST_S)
                serve.delete(name, _blocking=False)
        except Exception as error:  # then nobody can tell whether the server lives
            logger.error("the sign of life of %s cannot be read: %s", name, one_line(error))
            since = time.monotonic()


def _sign(name: str) -> bytes | None:
    return internal_kv._internal_kv_get(name, namespace=_NAMESPACE)
