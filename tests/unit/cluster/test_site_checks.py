"""Checks of a site that need no cluster: MLflow, clocks, and results in the log of a job."""

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster.site import Site
from cluster.site_checks import in_node
from cluster.site_checks.nodes import Node, _clocks, _code, _promised, _versions, num_fitting, versions_here
from cluster.site_checks.report import failed, log_line, passed, results_in_log
from cluster.site_checks.run import check_mlflow
from tests.ports import free_port


@pytest.fixture
def server() -> Iterator[Callable[[int], str]]:
    """Return a function that starts a web server which always answers with this status."""
    servers = []

    def start(status: int) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status if self.path == "/health" else 404)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for each in servers:
        each.shutdown()
        each.server_close()


@pytest.mark.parametrize("status, state", [(200, "ok"), (401, "ok"), (500, "failed"), (404, "failed")])
def test_mlflow_must_answer(server, status, state):
    result = check_mlflow(Site(tracking={"uri": server(status)}))
    assert result.state == state
    assert ("wants a login" in result.detail) == (status == 401)


def test_mlflow_that_is_away_is_named_without_its_password():
    port = free_port()
    result = check_mlflow(Site(tracking={"uri": f"http://me:secret@127.0.0.1:{port}"}))
    assert result.state == "failed" and f"http://127.0.0.1:{port} does not answer" in result.detail
    assert "secret" not in result.detail and result.remedy


def test_a_database_or_no_tracking_needs_no_answer():
    assert check_mlflow(Site()).state == "ok"
    assert check_mlflow(Site(tracking={"enabled": False})).state == "skipped"


@pytest.mark.parametrize(
    "needs, number",
    [
        ({"CPU": 1.0}, 9),
        ({"CPU": 3.0}, 2),  # 9 CPUs, but the rest of each node is too small
        ({"CPU": 2.0, "GPU": 1.0}, 2),
        ({"CPU": 0.0, "GPU": 1.0}, 3),
        ({"CPU": 1.0, "vico_gpu": 0.001}, 4),
        ({"CPU": 1.0, "GPU": 0.4}, 4),
        ({"GPU": 0.4}, 6),  # two on each GPU, although 3 GPUs have 7.5 times as much
        ({"TPU": 1.0}, 0),
    ],
)
def test_processes_must_fit_into_single_nodes(needs, number):
    nodes = [
        Node("1", "10.0.0.1", {"CPU": 5.0}),
        Node("2", "10.0.0.2", {"CPU": 4.0, "GPU": 3.0, "vico_gpu": 1.0}),
    ]
    assert num_fitting(nodes, needs) == number


@pytest.mark.parametrize(
    "present, detail",
    [
        ([("cpu", 0), ("cpu", 0), ("gpu", 2)], None),
        (
            [("cpu", 0), ("gpu", 2), ("gpu", 2)],
            "1 of the 2 nodes of group cpu have the Ray resource vico_cpu",
        ),
        ([("cpu", 0), ("gpu", 2)], "1 of the 2 nodes of group cpu have the Ray resource vico_cpu"),
        ([("cpu", 0), ("other", 0), ("gpu", 2)], "1 of the 2 nodes of group cpu"),
        (
            [("cpu", 0), ("cpu", 0), ("gpu", 1)],
            "group gpu promises 1 nodes of 4 CPUs and 2 GPUs, 0 have them",
        ),
    ],
)
def test_groups_must_have_the_nodes_that_they_promise(present, detail):
    groups = [{"name": "cpu", "count": 2, "cpus": 4}, {"name": "gpu", "count": 1, "cpus": 4, "gpus": 2}]
    stages = {"shard": {"nodes": "cpu", "gpus_per_worker": 0}}
    resources = {"workers": 2, "gpus_per_worker": 1, "nodes": "gpu", "stages": stages}
    site = Site.model_validate(
        {"kind": "ray", "ray": {"address": "a:1"}, "nodes": groups, "resources": resources}
    )
    nodes = [
        Node(str(n), f"10.0.0.{n}", {"CPU": 4.0, "GPU": float(gpus), f"vico_{name}": 1.0})
        for n, (name, gpus) in enumerate(present)
    ]
    result = _promised(site, nodes, {node.id: {"gpus": 2} for node in nodes})
    assert result.state == ("ok" if detail is None else "failed")
    assert detail is None or detail in result.detail


class ShiftedNode:
    """A node whose clock is off. A real one is not possible here: all hosts of a test share the clock."""

    def __init__(self, address: str, offset_s: float):
        self.address, self.offset_s = address, offset_s

    def call(self, function: Callable[..., Any], *arguments: Any) -> float:
        assert function is in_node.now
        return time.time() + self.offset_s


@pytest.mark.parametrize("offset, state", [(0.0, "ok"), (0.5, "ok"), (30.0, "failed"), (-30.0, "failed")])
def test_a_clock_that_is_off_is_named(offset, state):
    result = _clocks([ShiftedNode("10.0.0.1", 0.0), ShiftedNode("10.0.0.2", offset)])
    assert result.state == state
    if state == "failed":
        assert result.detail == f"the clock of 10.0.0.2 is off by {offset:+.1f} s"


@pytest.mark.parametrize(
    "differences, detail",
    [
        ({}, None),
        ({"torch": "{torch}+cu128"}, None),
        ({"ray": "2.1.0"}, "the submitting machine has ray 2.1.0, the nodes have {ray}"),
        ({"torch": "1.0.0"}, "the submitting machine has torch 1.0.0, the nodes have {torch}"),
        ({"python": "3.9.1"}, "the submitting machine has python 3.9.1, the nodes have {python}"),
    ],
)
def test_versions_of_the_submitting_machine_are_compared_with_those_of_the_nodes(differences, detail):
    here = versions_here()
    plain = {**here, "torch": here["torch"].partition("+")[0]}
    submitter = {**here, **{name: text.format(**plain) for name, text in differences.items()}}
    node = Node("id", "10.0.0.1", {})
    result = _versions([node], {"id": in_node.facts("/")}, submitter)
    assert result.state == ("ok" if detail is None else "failed")
    assert detail is None or (result.detail == detail.format(**here) and result.remedy)


def test_other_sources_on_the_submitting_machine_are_named():
    class Here:
        address = "10.0.0.1"

        def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
            return function(*arguments)

    assert _code([Here()], versions_here()).state == "ok"
    result = _code([Here()], {"vico": "0" * 64})
    assert (
        result.state == "failed"
        and "the submitting machine has vico 000000000000, the nodes" in result.detail
    )


def test_results_go_through_the_log_of_a_job():
    results = [passed("cluster", "answers"), failed("storage", "läuft über", "fix it")]
    log = f"job 1 starts\n{log_line(results)}\nRay stops\n"
    assert results_in_log(log) == results
    assert results_in_log("job 1 starts\n") is None
