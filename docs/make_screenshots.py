"""Pictures of a finished run in MLflow and TensorBoard, taken with Chromium.

    python docs/make_screenshots.py --storage runs --out docs/images

writes

    mlflow_runs.png       the experiment: the latest run with its stages
    mlflow_run.png        the page of the run
    mlflow_stage.png      the page of its consistency stage
    mlflow_metrics.png    the metrics of that stage
    mlflow_version.png    the version of its model in the registry
    tensorboard.png       the curves, if the run has event files (`tracking.tensorboard: true` in the
                          site) and TensorBoard is installed

Playwright drives an installed Chromium (Debian and Ubuntu have it as a package), or its own.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.tracking import MlflowClient
from playwright.sync_api import Page, sync_playwright

WIDTH = 1500
HOST = "mlflow.example"
"""The name by which the browser calls this machine: on localhost MLflow opens its assistant over the page."""
TRAINING = "workflowType=machine_learning"
"""MLflow's view for model training; its switch is a setting of the browser, and new ones show GenAI."""
START_S = 120
"""Seconds that a server has for its first answer."""
PAGE_MS = 120_000
"""Milliseconds that a page has to load; MLflow's pages ask the server for news and are never idle."""
SETTLED_MS = 3_000
"""Milliseconds from the text that a picture must show to the picture, for charts to be drawn."""
INSTALLED = ("chromium", "chromium-browser", "google-chrome")


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


@contextmanager
def browser_page() -> Iterator[Page]:
    """Yield an empty page of Chromium, WIDTH pixels wide."""
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, INSTALLED)), None)
        options = [f"--host-resolver-rules=MAP {HOST} 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser.new_page()
        browser.close()


def take(page: Page, url: str, file: Path, height: int, shows: str, click: str = "") -> None:
    """Write a picture of an address, `height` pixels high, as soon as it shows a text.

    `click` is the selector of what is clicked once it is there, to make the page show the text.
    """
    page.set_viewport_size({"width": WIDTH, "height": height})
    page.goto("about:blank")  # else a change behind the address's # loads nothing
    page.goto(url, timeout=PAGE_MS)
    if click:
        page.locator(click).first.click(timeout=PAGE_MS)
    page.get_by_text(shows, exact=True).first.wait_for(timeout=PAGE_MS)
    page.wait_for_timeout(SETTLED_MS)
    page.screenshot(path=file)
    print(f"wrote {file}", flush=True)


def mlflow_pictures(page: Page, database: Path, out: Path) -> None:
    """Write the pictures of MLflow. Raises SystemExit if its database has no finished run."""
    uri = f"sqlite:///{database.resolve()}"
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, order_by=["attributes.start_time DESC"], max_results=1000)
    parent = next((run.info for run in runs if run.data.tags.get("vico.stage") == "pipeline"), None)
    if parent is None or parent.status != "FINISHED":
        raise SystemExit(f"{database} has no finished run as its latest; give the storage of one")
    stages = {
        run.data.tags["vico.stage"]: run.info.run_id
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.run_id
    }
    versions = client.search_model_versions(f"run_id = '{stages['export']}'")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
    hosts = ["--allowed-hosts", f"{HOST}:*,127.0.0.1:*", "--cors-allowed-origins", f"http://{HOST}:{port}"]
    with served([*command, "--workers", "1", *hosts], port) as address:
        experiment = f"{address}/#/experiments/{parent.experiment_id}"
        stage = f"{experiment}/runs/{stages['consistency']}"
        listed = f"{experiment}/runs?{TRAINING}"
        take(page, listed, out / "mlflow_runs.png", 600, "consistency", "[role=gridcell] button[type=button]")
        run = f"{experiment}/runs/{parent.run_id}?{TRAINING}"
        take(page, run, out / "mlflow_run.png", 1250, "Registered models")
        take(page, f"{stage}?{TRAINING}", out / "mlflow_stage.png", 1250, "Registered models")
        take(page, f"{stage}/model-metrics?{TRAINING}", out / "mlflow_metrics.png", 1500, "learning_rate")
        for version in versions:
            place = f"{address}/#/models/{version.name}/versions/{version.version}"
            take(page, f"{place}?{TRAINING}", out / "mlflow_version.png", 800, "vico.base_model")


def tensorboard_picture(page: Page, events: Path, out: Path) -> None:
    """Write the picture of TensorBoard. Raises SystemExit if TensorBoard is not installed."""
    if shutil.which("tensorboard") is None:
        raise SystemExit("tensorboard is not on the PATH; install it: pip install tensorboard")
    port = free_port()
    with served(["tensorboard", "--logdir", str(events), "--port", str(port)], port) as address:
        url = f"{address}/?darkMode=false#timeseries"
        take(page, url, out / "tensorboard.png", 1100, "consistency_speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="storage of a finished run")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with browser_page() as page:
        mlflow_pictures(page, options.storage / "mlflow.db", options.out)
        if any(options.storage.glob("runs/*/tensorboard")):
            tensorboard_picture(page, options.storage / "runs", options.out)


if __name__ == "__main__":
    main()
