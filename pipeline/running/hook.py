"""A command or URL that a site wants to be told when a command on a run has ended. Called by the driver."""

import json
import logging
import os
import subprocess
import urllib.request
from typing import Any

from cluster.passwords import without_passwords
from cluster.site import Hook

logger = logging.getLogger(__name__)


def call_hook(hook: Hook, ending: dict[str, Any]) -> str | None:
    """Tell command and URL how the run ended; the line that says what went wrong, None if nothing did.

    The command gets `ending` as JSON on its standard input and, by name, as VICO_RUN, VICO_STATE and so on;
    the URL gets it as the body of a POST. Neither can fail the run.
    """
    faults = []
    if hook.command:
        faults.append(_run(hook, ending))
    if hook.url:
        faults.append(_post(hook, ending))
    told = [fault for fault in faults if fault]
    for fault in told:
        logger.warning("%s", fault)
    return "; ".join(told) or None


def _run(hook: Hook, ending: dict[str, Any]) -> str | None:
    values = {f"VICO_{name.upper()}": str(value) for name, value in ending.items()}
    try:
        done = subprocess.run(
            hook.command,
            input=json.dumps(ending),
            env={**os.environ, **values},
            capture_output=True,
            text=True,
            timeout=hook.timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"hook.command did not end within {hook.timeout_s:g} s"
    except OSError as error:
        return f"hook.command={hook.command[0]}: {error.strerror}"
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return f"hook.command ended with {done.returncode}: {last[0][:200]}"
    return None


def _post(hook: Hook, ending: dict[str, Any]) -> str | None:
    """Errors name the host alone: the path of such a URL is often its key."""
    body = json.dumps(ending).encode()
    headers = {"Content-Type": "application/json"}
    host = without_passwords(hook.url).split("/")[2]
    try:
        with urllib.request.urlopen(urllib.request.Request(hook.url, body, headers), timeout=hook.timeout_s):
            return None
    except urllib.error.HTTPError as error:
        return f"hook.url at {host} answered {error.code}"
    except (OSError, ValueError) as error:
        return f"hook.url at {host}: {getattr(error, 'reason', type(error).__name__)}"
