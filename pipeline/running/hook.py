"""The site's hook: a program or URL that is called when a command on a run has ended. Used by the driver."""

import json
import logging
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping

from cluster.passwords import without_passwords
from cluster.settings.blocks import Hook
from vico.errors import last_line

logger = logging.getLogger(__name__)


def call_hook(hook: Hook, ending: Mapping[str, str | int]) -> None:
    """Send `ending` to the hook's command and URL, and warn of what fails.

    The command gets JSON on its standard input, and each value as a variable: VICO_RUN, VICO_STATE and so on.
    The URL gets the same JSON as the body of a POST. A failure does not fail the run.
    """
    command_fault = _run(hook, ending) if hook.command else None
    url_fault = _post(hook, hook.url, ending) if hook.url else None
    faults = [fault for fault in (command_fault, url_fault) if fault]
    for fault in faults:
        logger.warning("%s", fault)


def _run(hook: Hook, ending: Mapping[str, str | int]) -> str | None:
    values = {f"VICO_{name.upper()}": str(value) for name, value in ending.items()}
    try:
        ended = subprocess.run(
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
    if ended.returncode:
        return f"hook.command ended with {ended.returncode}: {last_line(ended.stderr) or 'no message'}"
    return None


def _post(hook: Hook, url: str, ending: Mapping[str, str | int]) -> str | None:
    """Errors name only the host, because the path of such a URL is often its key."""
    body = json.dumps(ending).encode()
    headers = {"Content-Type": "application/json"}
    host = without_passwords(url).split("/")[2]
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=hook.timeout_s):
            return None
    except urllib.error.HTTPError as error:
        return f"hook.url at {host} answered {error.code}"
    except (OSError, ValueError) as error:
        return f"hook.url at {host}: {getattr(error, 'reason', type(error).__name__)}"
