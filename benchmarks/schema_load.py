"""Schemathesis against `vico serve`: thousands of requests by its own document, with delay and memory.

    python -m benchmarks.schema_load --requests 10000

It starts a server of the demo model with a key and runs schemathesis with one seed after another, until the
server has given that many responses. Meanwhile a probe of another address asks for `/health` and for short
answers. The last line is JSON: responses by status as the server counts them, the longest waits of the probe,
and the peak of the server's memory beside what it announced. It ends with code 1 if a status is 5xx, an
answer is not as the document says, the log has a line, or the peak is above.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, defaultdict

from benchmarks.hostile_load import SMALL, Load, memory
from tests.served import Served, schemathesis_command

KEY = "benchmark"
_RESPONSES = re.compile(r'^vico_responses_total\{status="(\d+)"\} (\S+)$', re.MULTILINE)


def responses(server: Served) -> Counter[int]:
    """Return the server's own count of its responses by status."""
    request = urllib.request.Request(f"{server.url[:-3]}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read().decode()
    return Counter({int(status): int(float(number)) for status, number in _RESPONSES.findall(text)})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=300, help="per path and seed")
    arguments = parser.parse_args()
    options = ("--api-key", KEY, "--max-body-mb", "16", "--picture-cache-mb", "16")
    server = Served(SMALL, *options).started()
    assert server.process.stdout is not None
    announced = int(server.process.stdout.readline().split("at most ")[1].split()[0]) * 2**20
    before = memory(server, "VmRSS")
    load = Load(server, 0, {"Authorization": f"Bearer {KEY}"})
    waits: defaultdict[str, list[float]] = defaultdict(list)
    is_over = threading.Event()
    prober = threading.Thread(target=load.probe, args=(waits, is_over))
    prober.start()
    started = time.perf_counter()
    failures: list[str] = []
    statuses: Counter[int] = Counter()
    seed = num_sent = 0
    with tempfile.TemporaryDirectory() as folder:
        while num_sent < arguments.requests and not failures:
            seed += 1
            command = schemathesis_command(server, KEY, arguments.examples, seed)
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
            failures += [done.stdout[-4000:]] if done.returncode else []
            statuses = responses(server)
            num_own = seed - 1 + sum(len(values) for values in list(waits.values()))
            if statuses.total() - num_own <= num_sent:
                failures.append(f"schemathesis sent nothing: {done.stderr[-500:]}")
            num_sent = statuses.total() - num_own
            print(f"seed {seed}: {num_sent} requests", file=sys.stderr)
    seconds = time.perf_counter() - started
    is_over.set()
    prober.join()
    peak = memory(server, "VmHWM") - before
    code, errors = server.end()
    report = {
        "requests": num_sent,
        "seeds": seed,
        "seconds": round(seconds, 1),
        "statuses": dict(sorted(statuses.items())),
        "longest_wait_s": {name: round(max(values), 2) for name, values in waits.items() if values},
        "probes": {name: len(values) for name, values in waits.items()},
        "peak_mib": peak // 2**20,
        "announced_mib": announced // 2**20,
        "exit_code": code,
        "log_lines": errors.count("\n"),
        "failures": failures,
    }
    print(json.dumps(report))
    sys.exit(bool(failures or errors) or peak > announced or any(status >= 500 for status in statuses))


if __name__ == "__main__":
    main()
