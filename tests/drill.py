"""The drill: trainings on a 3-node Ray cluster while workers, a raylet and the driver are killed.

    python -m tests.drill --rounds 20 --report docs/measurements/drill.md        (or: make drill)

Each round trains a small policy in a storage of its own and kills one thing with SIGKILL at a random step (a
preemption is a SIGTERM to a rank); what ended is started again by the same command. It must end with the
weights of the undisturbed training, bit for bit, or within 1e-5 relative where it went on with fewer ranks;
every step must be in MLflow exactly once.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import yaml

KINDS = ("worker", "raylet", "driver", "driver, then one rank", "preemption")
NUM_STEPS = 24
CHECKPOINT_EVERY = 4
TOLERANCE = 1e-5
_HEALTH = {"period_ms": 1000, "timeout_ms": 1000, "failure_threshold": 3, "initial_delay_ms": 1000}
_PATIENCE_S = 600


@dataclass
class Round:
    """What happened in one round, and what came out."""

    number: int
    kind: str
    kill_after_step: int
    killed_at_step: int = 0
    commands: int = 1
    restarts: float = 0
    weights: str = ""
    largest_difference: float = 0.0
    steps_once: bool = False
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def write_files(folder: Path, address: str) -> Path:
    """Pipeline and two site files (two ranks, one rank) on the cluster; the path of the pipeline file."""
    from tests.integration.demo_pipeline import write_pipeline

    pipeline = write_pipeline(folder)
    config = yaml.safe_load(pipeline.read_text())
    config["consistency"].update(
        packs_per_step=6, epochs=100, max_steps=NUM_STEPS, validate_every_steps=NUM_STEPS
    )
    pipeline.write_text(yaml.safe_dump(config))
    site = yaml.safe_load((folder / "site.yaml").read_text())
    site["ray"] = {"address": address}
    site["train"] = {"checkpoint_every_steps": CHECKPOINT_EVERY, "max_failures": 5}
    for workers in (2, 1):
        site["resources"] = {"workers": workers}
        (folder / f"site-{workers}.yaml").write_text(yaml.safe_dump(site))
    return pipeline


class Drill:
    """The cluster, the undisturbed training, and rounds against it."""

    def __init__(self, folder: Path, seed: int, kinds: Sequence[str]):
        from ray.cluster_utils import Cluster

        self.folder, self.random, self.kinds = folder, random.Random(seed), kinds
        (folder / "ray").mkdir()
        os.environ["RAY_TMPDIR"] = str(folder / "ray")
        head = {"num_cpus": 1, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            self.cluster.add_node(num_cpus=1)
        self.pipeline = write_files(folder, self.cluster.address)
        self.undisturbed = folder / "undisturbed"

    def command(self, storage: Path, workers: int = 2):
        from tests.integration.demo_pipeline import vico

        site = self.folder / f"site-{workers}.yaml"
        options = ("--storage", storage, "--site", site, "--until", "consistency")
        log = (storage.parent / f"{storage.name}.log").open("a")
        return vico("run", self.pipeline, *options, start_new_session=True, stdout=log, stderr=log)

    def train_undisturbed(self) -> None:
        code = self.command(self.undisturbed).wait(timeout=_PATIENCE_S)
        if code:
            raise SystemExit((self.folder / "undisturbed.log").read_text()[-3000:])

    def run(self, number: int) -> Round:
        """One round: start, kill, start again where need be, compare."""
        one = Round(number, self.kinds[number % len(self.kinds)], self.random.randint(1, NUM_STEPS - 3))
        storage = self.folder / f"round-{number:02d}"
        storage.mkdir()
        shutil.copytree(self.undisturbed / "shard", storage / "shard")  # sharding is not what is drilled
        began = time.monotonic()
        driver = self.command(storage)
        try:
            self.wait_for_step(storage, one.kill_after_step, driver)
            time.sleep(self.random.uniform(0, 0.5))
            one.killed_at_step = last_step(storage)
            self.kill(one.kind, driver)
            self.go_on(one, driver, storage)
            self.compare(one, storage)
        except (TimeoutError, RuntimeError, psutil.Error) as error:
            one.problems.append(f"{type(error).__name__}: {error}")
            driver.kill()
        one.seconds = round(time.monotonic() - began, 1)
        self.mend_cluster()
        if not one.problems:
            shutil.rmtree(storage)
        return one

    def wait_for_step(self, storage: Path, step: int, driver) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while last_step(storage) < step:
            if driver.poll() is not None:
                raise RuntimeError(f"the driver ended with {driver.returncode} before step {step}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {step} did not come within {_PATIENCE_S} s")
            time.sleep(0.05)

    def kill(self, kind: str, driver) -> None:
        if kind == "worker":
            self.random.choice(self.ranks()).kill()
        elif kind == "preemption":
            self.random.choice(self.ranks()).terminate()
        elif kind == "raylet":
            node = self.random.choice(sorted(self.cluster.worker_nodes, key=lambda node: node.unique_id))
            node.kill_raylet()
        else:
            driver.kill()
            driver.wait()

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks: children of this cluster's raylets alone."""
        found = []
        for node in [self.cluster.head_node, *self.cluster.worker_nodes]:
            raylet = psutil.Process(living_raylet(node).pid)
            for child in raylet.children(recursive=True):
                if "RayTrainWorker" in " ".join(child.cmdline()):
                    found.append(child)
        if not found:
            raise RuntimeError("no process of a rank was found")
        return found

    def go_on(self, one: Round, driver, storage: Path) -> None:
        """Waits for the end, giving the same command again as a user would when it ended early."""
        workers = 1 if one.kind == KINDS[3] else 2
        while True:
            code = driver.wait(timeout=_PATIENCE_S)
            if code == 0:
                return
            if one.commands == 4:
                raise RuntimeError(f"the command ended with {code} three times after the kill")
            driver = self.command(storage, workers)
            one.commands += 1

    def compare(self, one: Round, storage: Path) -> None:
        from safetensors.torch import load_file

        expected, found = (policy(place) for place in (self.undisturbed, storage))
        if expected.read_bytes() == found.read_bytes():
            one.weights = "the same bytes"
        else:
            wanted, got = load_file(expected), load_file(found)
            one.largest_difference = max(
                float((got[name] - tensor).abs().max() / max(float(tensor.abs().max()), 1.0))
                for name, tensor in wanted.items()
            )
            one.weights = f"{one.largest_difference:.1e} relative"
            if one.kind != KINDS[3] or one.largest_difference > TOLERANCE:
                one.problems.append(f"weights differ by {one.largest_difference:.1e} relative")
        steps, one.restarts = tracked_steps(storage)
        one.steps_once = steps == list(range(1, NUM_STEPS + 1))
        if not one.steps_once:
            one.problems.append(f"MLflow has the steps {steps}")

    def mend_cluster(self) -> None:
        """Three living nodes again."""
        for node in list(self.cluster.worker_nodes):
            if not living_raylet(node):
                self.cluster.remove_node(node, allow_graceful=False)
        while len(self.cluster.worker_nodes) < 2:
            self.cluster.add_node(num_cpus=1)

    def close(self) -> None:
        self.cluster.shutdown()


def living_raylet(node):
    """The process of a node's raylet; None where it is dead (Ray forgets the ones it killed itself)."""
    living = [one.process for one in node.all_processes.get("raylet", ()) if one.process.poll() is None]
    return living[0] if living else None


def policy(storage: Path) -> Path:
    [found] = storage.glob("consistency/*/output/policy/model.safetensors")
    return found


def last_step(storage: Path) -> int:
    """The last step that rank 0 reported, over all attempts."""
    steps = [0]
    for path in storage.glob("consistency/*/attempts/*/metrics.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                steps.append(json.loads(line)["step"])
    return max(steps)


def tracked_steps(storage: Path) -> tuple[list[int], float]:
    """(steps of the loss in MLflow in order, restarts of all ranks within the command)."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    [run] = client.search_runs(experiments, "tags.`vico.stage` = 'consistency'")
    losses = client.get_metric_history(run.info.run_id, "loss")
    return sorted(metric.step for metric in losses), (
        run.data.metrics.get("num_worker_failures", 0.0) + run.data.metrics.get("num_preemptions", 0.0)
    )


def report(rounds: list[Round], folder: Path, seconds: float) -> str:
    good = [one for one in rounds if not one.problems]
    lines = [
        f"# Drill: {len(good)} of {len(rounds)} rounds ended as the undisturbed training\n",
        f"{NUM_STEPS} steps, a checkpoint every {CHECKPOINT_EVERY}, 2 ranks on a 3-node Ray cluster on one "
        f"host, ZeRO-2, float32; {seconds / 60:.0f} minutes in all.\n",
        "| round | killed | at step | commands | restarts within | weights | every step once in MLflow | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in rounds:
        lines.append(
            f"| {one.number} | {one.kind} | {one.killed_at_step} | {one.commands} | {one.restarts:.0f} | "
            f"{one.weights} | {'yes' if one.steps_once else 'no'} | {one.seconds:.0f} |"
        )
    lines += [f"\nround {one.number}: {problem}" for one in rounds for problem in one.problems]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--report", type=Path)
    options.add_argument("--json", action="store_true")
    arguments = options.parse_args()
    os.environ.update({f"RAY_health_check_{name}": str(value) for name, value in _HEALTH.items()})
    folder = Path(tempfile.mkdtemp(prefix="vico-drill-", dir="/tmp"))
    began = time.monotonic()
    drill = Drill(folder, arguments.seed, arguments.kinds)
    rounds: list[Round] = []
    try:
        drill.train_undisturbed()
        for number in range(arguments.rounds):
            rounds.append(drill.run(number))
            sys.stderr.write(f"{json.dumps(asdict(rounds[-1]))}\n")
            text = report(rounds, folder, time.monotonic() - began)
            if arguments.report:
                arguments.report.write_text(text)
    finally:
        drill.close()
    failed = [one for one in rounds if one.problems]
    if arguments.json:
        sys.stdout.write(
            json.dumps({"name": "drill", "rows": [asdict(one) for one in rounds], "ratios": {}}) + "\n"
        )
    else:
        sys.stdout.write(text)
    if not failed:
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
