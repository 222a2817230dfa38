"""Pictures of a finished run in MLflow and TensorBoard, taken with Chromium.

    python docs/make_screenshots.py --storage runs --out docs/images

writes mlflow_runs.png (the experiment's list), mlflow_run.png (the page of the latest run) and
mlflow_metrics.png (the metrics of its consistency stage), and tensorboard.png if the run has event files
(`tracking.tensorboard: true` in the site) and TensorBoard is installed. The programs are `chromium` (Debian and
Ubuntu have it as a package) and `tensorboard`, found by their names.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.tracking import MlflowClient

WIDTH = 1500
HOST = "mlflow.example"
"""The name by which the browser calls this machine: on localhost MLflow opens its assistant over the page."""
TRAINING = "workflowType=machine_learning"
"""MLflow's view for model training; its switch is a setting of the browser, and new ones show GenAI."""
START_S = 120
"""Seconds that a server has for its first answer."""
PAGE_MS = 30_000
"""Milliseconds of the page's own clock after which it is drawn, once nothing loads any more."""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def served(command: list[str], port: int) -> Iterator[str]:
    """Yield the address of a server that is started with the command, and end it afterwards.

    Raises SystemExit if it does not answer.
    """
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_S
        while server.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise SystemExit(f"{' '.join(command)} did not answer")
        yield f"http://{HOST}:{port}"
    finally:
        server.terminate()
        server.wait()


def take(url: str, file: Path, height: int) -> None:
    """Write a picture of a page as Chromium shows it, WIDTH pixels wide. Raises SystemExit without Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("chromium is not on the PATH; install it: apt install chromium")
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless=new",
            "--hide-scrollbars",
            f"--host-resolver-rules=MAP {HOST} 127.0.0.1",
            f"--user-data-dir={profile}",
            f"--window-size={WIDTH},{height}",
            f"--virtual-time-budget={PAGE_MS}",
            f"--screenshot={file.resolve()}",
        ]
        if os.geteuid() == 0:  # Chromium's sandbox refuses to run as root
            options.append("--no-sandbox")
        done = subprocess.run([browser, *options, url], capture_output=True, text=True, timeout=300)
    if not file.is_file():
        raise SystemExit(f"{browser} took no picture of {url}:\n{done.stderr[-2000:]}")
    print(f"wrote {file}")


def mlflow_pictures(database: Path, out: Path) -> None:
    """Write the pictures of MLflow. Raises SystemExit if its database has no run of a pipeline."""
    uri = f"sqlite:///{database.resolve()}"
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, order_by=["attributes.start_time DESC"], max_results=1000)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    if not parents:
        raise SystemExit(f"{database} has no run; give the storage of a finished run")
    latest = parents[0].info
    [training] = [
        run.info
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == latest.run_id and "consistency" in run.info.run_name
    ]
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
    hosts = ["--allowed-hosts", f"{HOST}:*,127.0.0.1:*", "--cors-allowed-origins", f"http://{HOST}:{port}"]
    with served([*command, "--workers", "1", *hosts], port) as address:
        experiment = f"{address}/#/experiments/{latest.experiment_id}"
        take(f"{experiment}/runs?{TRAINING}", out / "mlflow_runs.png", 700)
        take(f"{experiment}/runs/{latest.run_id}?{TRAINING}", out / "mlflow_run.png", 1500)
        take(f"{experiment}/runs/{training.run_id}/model-metrics?{TRAINING}", out / "mlflow_metrics.png", 1100)


def tensorboard_picture(events: Path, out: Path) -> None:
    """Write the picture of TensorBoard. Raises SystemExit if TensorBoard is not installed."""
    if shutil.which("tensorboard") is None:
        raise SystemExit("tensorboard is not on the PATH; install it: pip install tensorboard")
    port = free_port()
    with served(["tensorboard", "--logdir", str(events), "--port", str(port)], port) as address:
        take(f"{address}/?darkMode=false#timeseries", out / "tensorboard.png", 1100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="storage of a finished run")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    mlflow_pictures(options.storage / "mlflow.db", options.out)
    if any(options.storage.glob("runs/*/tensorboard")):
        tensorboard_picture(options.storage / "runs", options.out)


if __name__ == "__main__":
    main()
