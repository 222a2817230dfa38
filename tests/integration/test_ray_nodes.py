"""A real Ray cluster of three nodes with networks of their own and a token; a fourth host submits and checks.

The checks of a site are each made to fail once.
"""

import importlib.metadata
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.site_checks.report import CheckResult
from tests.hosts import Host, hosts, needs_hosts
from tests.integration.demo_pipeline import ROOT, finished, write_pipeline
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, needs_hosts]
NODES = ("head", "w1", "w2")
PRIVATE = Path("/mnt")
"""A folder that every host has for itself."""


@dataclass
class RayNodes:
    machines: dict[str, Host]
    environment: dict[str, str]

    @property
    def jobs_address(self) -> str:
        return f"http://{self.machines['head'].address}:8265"

    @property
    def address(self) -> str:
        return f"{self.machines['head'].address}:6379"

    def start_node(self, name: str, *options: str) -> None:
        host = self.machines[name]
        command = [
            "ray",
            "start",
            f"--node-ip-address={host.address}",
            "--num-cpus=2",
            "--disable-usage-stats",
        ]
        started = host.run(*command, *options, env=self.environment)
        assert started.returncode == 0, started.stdout + started.stderr

    def vico(self, host: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
        """Start the command line on a host."""
        environment = {**self.environment, "PYTHONPATH": str(ROOT), **variables}
        command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return self.machines[host].start(*command, env=environment, **pipes)

    def checks(self, host: str, site: Path, *options: str, **variables: str) -> dict[str, CheckResult]:
        """Return the results of `vico site check` by name; its exit code must fit them."""
        code, out, err = finished(self.vico(host, "site", "check", site, "--json", *options, **variables))
        assert out, err
        results = [CheckResult(**result) for result in json.loads(out.splitlines()[-1])]
        assert code == any(result.state == "failed" for result in results), (results, err)
        assert all(result.remedy for result in results if result.state == "failed")
        return {result.check: result for result in results}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Iterator[RayNodes]:
    names = (*NODES, "client")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("RAY_", "VICO"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_TMPDIR": str(PRIVATE),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_raylet_start_wait_time_s": "180",  # busy machines
        "RAY_worker_niceness": "0",  # 15 by default
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "10",
    }
    private = {name: [PRIVATE] for name in names}
    with hosts(names, tmp_path_factory.mktemp("hosts"), private=private) as machines:
        ray_nodes = RayNodes(machines, environment)
        ray_nodes.start_node("head", "--head", "--port=6379", "--dashboard-host=0.0.0.0")
        for name in NODES[1:]:
            ray_nodes.start_node(name, f"--address={ray_nodes.address}", '--resources={"vico_w": 1}')
        yield ray_nodes


@pytest.fixture
def site(tmp_path, nodes) -> Any:
    """Return a function that writes a site of this cluster with further settings, and returns its file."""
    write_pipeline(tmp_path)

    def write(**settings: Any) -> Path:
        content = yaml.safe_load((tmp_path / "site.yaml").read_text())
        content |= {
            "name": "cluster",
            "kind": "ray",
            "nodes": [{"name": "w", "count": 2, "cpus": 2}],
            "jobs": {"address": nodes.jobs_address, "python": sys.executable},
        }
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump({**content, **settings}))
        return path

    return write


def test_a_sound_site_passes_all_checks_in_a_job(nodes, site):
    results = nodes.checks("client", site())
    assert {result.state for result in results.values()} == {"ok"}, results
    assert set(results) == {
        "storage here",
        "scheduler",
        "cluster",
        "nodes",
        "versions",
        "code",
        "resources",
        "storage",
        "clocks",
        "free disk",
        "mlflow",
        "all-reduce",
    }
    assert results["nodes"].detail.startswith("3 nodes answer: 10.77.0.2, 10.77.0.3, 10.77.0.4")
    assert "2 ranks, gloo, 16 MiB: " in results["all-reduce"].detail
    jobs = nodes.machines["client"].run(
        "ray", "job", "list", f"--address={nodes.jobs_address}", env=nodes.environment
    )
    assert "RUNNING" not in jobs.stdout, "the check's job is left"


@pytest.mark.parametrize(
    "settings, check, detail",
    [
        (
            {"nodes": [{"name": "w", "count": 2, "cpus": 2, "gpus": 1}], "resources": {"gpus_per_worker": 1}},
            "resources",
            "group w promises 2 nodes of 2 CPUs and 1 GPUs, 0 have them",
        ),
        ({"nodes": [{"name": "w", "count": 4, "cpus": 2}]}, "resources", "group w promises 4 nodes"),
        (
            {"nodes": [], "resources": {"threads_per_worker": 3}},
            "resources",
            "resources.workers=2: 0 processes of 3 CPU fit on the nodes",
        ),
        (
            {"nodes": [], "resources": {"workers": 7}},
            "resources",
            "resources.workers=7: 6 processes of 1 CPU fit on the nodes",
        ),
        (
            {"storage": str(PRIVATE / "runs")},
            "storage",
            "cannot write to /mnt/runs: the folder does not exist",
        ),
        (
            {"tracking": {"uri": "http://10.77.0.2:9"}},
            "mlflow",
            "tracking.uri=http://10.77.0.2:9 does not answer",
        ),
    ],
)
def test_a_site_that_lacks_something_fails_its_check(nodes, site, settings, check, detail):
    joined = {"jobs": {}, "ray": {"address": nodes.address}}
    results = nodes.checks("head", site(**settings, **joined))
    assert results[check].state == "failed" and detail in results[check].detail, results
    ranks_fit = settings.get("resources") is None
    assert results["all-reduce"].state == ("ok" if ranks_fit else "skipped"), results


@contextmanager
def other_torch_on(host: Host, folder: Path) -> Iterator[None]:
    """Let torch have another version on one host: another file is mounted over its metadata."""
    (metadata,) = (
        file.locate() for file in importlib.metadata.files("torch") or () if file.name == "METADATA"
    )
    text = Path(metadata).read_text()
    other = folder / "METADATA"
    other.write_text(text.replace(f"Version: {importlib.metadata.version('torch')}", "Version: 1.0"))
    with mounted(host, other, Path(metadata)):
        yield


@contextmanager
def mounted(host: Host, other: Path, path: Path) -> Iterator[None]:
    host.run("mount", "--bind", other, path, check=True)
    try:
        yield
    finally:
        host.run("umount", path, check=True)


def test_other_versions_on_the_submitting_machine_are_named(nodes, site, tmp_path):
    with other_torch_on(nodes.machines["client"], tmp_path):
        results = nodes.checks("client", site())
    assert results["versions"].detail.startswith("the submitting machine has torch 1.0, the nodes have ")
    assert results["code"].state == "ok"


def test_a_node_with_other_versions_or_other_code_is_named(nodes, site, tmp_path):
    module, other_module = ROOT / "cluster" / "project.py", tmp_path / "project.py"
    other_module.write_text(module.read_text() + "# edited\n")
    host = nodes.machines["w1"]
    with other_torch_on(host, tmp_path), mounted(host, other_module, module):
        results = nodes.checks("head", site(jobs={}, ray={"address": nodes.address}))
    assert results["versions"].detail.startswith(f"{host.address} has torch 1.0, here it is")
    assert results["code"].detail.startswith(f"other code than here: {host.address} imports vico from {ROOT}")


def test_a_cluster_that_is_away_or_wants_another_token_is_named(nodes, site):
    results = nodes.checks("client", site(jobs={"address": "http://10.77.0.2:9"}))
    assert "no Ray Jobs server answers there" in results["scheduler"].detail
    results = nodes.checks("client", site(), RAY_AUTH_TOKEN="wrong" * 8)
    assert "the server refuses our token" in results["scheduler"].detail
    results = nodes.checks("head", site(jobs={}, ray={"address": "10.77.0.2:9"}))
    assert "no Ray cluster answers there" in results["cluster"].detail


def test_a_job_that_cannot_start_ends_the_check_with_its_reason(nodes, site):
    jobs = {"address": nodes.jobs_address, "python": "/no/such/python"}
    results = nodes.checks("client", site(jobs=jobs))
    assert "failed without a result" in results["job"].detail and "/no/such/python" in results["job"].detail


def test_a_run_outlives_its_client_and_a_node(nodes, site, tmp_path):
    """Submitted over HTTP from a host that is no node; the client goes, a node dies, the run ends well."""
    pipeline = yaml.safe_load((tmp_path / "pipeline.yaml").read_text())
    pipeline["consistency"] |= {"epochs": 30, "max_steps": 30}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    on_site = ["--site", site(nodes=[])]
    arguments = ["submit", tmp_path / "pipeline.yaml", *on_site, "--until", "consistency", "--json"]
    code, out, err = finished(nodes.vico("client", *arguments))
    assert code == 0, err
    run = json.loads(out.splitlines()[-1])["run"]
    following = nodes.vico("client", "logs", "-f", run, *on_site)
    attempts = tmp_path / "runs" / "consistency"

    def has_step(number: int) -> bool:
        files = attempts.glob("*/attempts/*/metrics.jsonl")
        return any(f'"step": {number},' in path.read_text() for path in files)

    wait_until(lambda: has_step(4))
    following.kill()
    following.wait()
    nodes.machines["w2"].kill()
    code, out, err = finished(nodes.vico("head", "logs", "-f", run, *on_site))
    assert code == 0 and f"run {run}: done until " in out.splitlines()[-1], out + err
    code, _, err = finished(nodes.vico("head", "audit", run, *on_site))
    assert code == 0, err
