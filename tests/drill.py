"""The drill: trainings on a 3-node Ray cluster while workers, a raylet and the driver are killed.

python -m tests.drill --rounds 20 --report docs/measurements/drill.md        (or: make drill)

Each round trains a small policy in a storage of its own and kills one process with SIGKILL at a random step.
Other kinds of rounds: a preemption is a SIGTERM to a rank, a notice is Ray's own message that a node will be
taken away, and a stop is a SIGTERM to the driver, which must leave a checkpoint of its last step. The same
command then resumes whatever ended. The weights must equal those of the undisturbed training, bit for bit, or
within 1e-5 relative if training resumed with fewer ranks; every step must be in MLflow exactly once. Called
again with the same `--folder`, the drill continues with the next round.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import yaml

from tests.drill_cluster import DrillCluster
from tests.drill_report import (
    CHECKPOINT_EVERY,
    NUM_STEPS,
    Round,
    earlier_rounds,
    json_report,
    keep_round,
    report,
)

FEWER, STOP = "driver, then one rank", "stop"
KINDS = ("worker", "raylet", "driver", "preemption", "notice", STOP, FEWER)
LAST_KILL = 24  # a fast machine makes ten steps while a process is searched for and killed
TOLERANCE = 1e-5
_PATIENCE_S = 600


def write_files(folder: Path) -> Path:
    """Write pipeline and model of the drill; return the path of the pipeline file."""
    from tests.integration.demo_pipeline import write_pipeline

    pipeline = write_pipeline(folder)
    config = yaml.safe_load(pipeline.read_text())
    config["consistency"].update(
        packs_per_step=6, epochs=100, max_steps=NUM_STEPS, validate_every_steps=NUM_STEPS
    )
    pipeline.write_text(yaml.safe_dump(config))
    return pipeline


def write_sites(folder: Path, address: str) -> None:
    """Write two site files on the cluster: with two ranks and with one."""
    site = yaml.safe_load((folder / "site.yaml").read_text())
    site["ray"] = {"address": address}
    site["train"] = {"checkpoints": {"every_steps": CHECKPOINT_EVERY}, "restarts": {"max_failures": 5}}
    for workers in (2, 1):
        site["resources"] = {"workers": workers}
        (folder / f"site-{workers}.yaml").write_text(yaml.safe_dump(site))


class Drill:
    """The cluster, the undisturbed training, and rounds that are compared with it."""

    def __init__(self, folder: Path, ray_folder: Path, seed: int, kinds: Sequence[str]):
        self.folder, self.seed, self.kinds = folder, seed, kinds
        self.pipeline = folder / "pipeline.yaml"
        if not self.pipeline.exists():
            self.pipeline = write_files(folder)
        self.cluster = DrillCluster(ray_folder)
        write_sites(folder, self.cluster.address)
        self.undisturbed = folder / "undisturbed"

    def command(self, storage: Path, workers: int = 2) -> subprocess.Popen[str]:
        from tests.integration.demo_pipeline import vico

        site = self.folder / f"site-{workers}.yaml"
        options = ("--storage", storage, "--site", site, "--until", "consistency")
        log = (storage.parent / f"{storage.name}.log").open("a")
        return vico("run", self.pipeline, *options, start_new_session=True, stdout=log, stderr=log)

    def train_undisturbed(self) -> None:
        """Train once; a later call finds it done."""
        if list(self.undisturbed.glob("consistency/*/record.json")):
            return
        if self.command(self.undisturbed).wait(timeout=_PATIENCE_S):
            raise SystemExit((self.folder / "undisturbed.log").read_text()[-3000:])

    def run(self, number: int) -> Round:
        """Run one round: start, kill, resume if needed, compare."""
        chance = random.Random(f"{self.seed}/{number}")
        kind = self.kinds[number % len(self.kinds)]
        result = Round(number, kind, chance.randint(1, LAST_KILL // 2 if kind == "notice" else LAST_KILL))
        storage = self.folder / f"round-{number:02d}"
        shutil.rmtree(storage, ignore_errors=True)  # of a drill that was stopped in this round
        storage.mkdir()
        shutil.copytree(self.undisturbed / "shard", storage / "shard")  # the drill does not test sharding
        began = time.monotonic()
        driver = self.command(storage)
        try:
            self.wait_for_step(storage, result.kill_after_step, driver)
            time.sleep(chance.uniform(0, 0.5))
            result.killed_at_step = last_step(storage)
            if kind == STOP:
                stop(result, driver, storage)
            else:
                self.kill(kind, driver, chance)
            self.finish(result, driver, storage)
            self.compare(result, storage)
        except (TimeoutError, RuntimeError, psutil.Error) as error:
            result.problems.append(f"{type(error).__name__}: {error}")
            driver.kill()
        result.seconds = round(time.monotonic() - began, 1)
        self.cluster.restore()
        if not result.problems:
            shutil.rmtree(storage)
        return result

    def wait_for_step(self, storage: Path, step: int, driver: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while last_step(storage) < step:
            if driver.poll() is not None:
                raise RuntimeError(f"the driver ended with {driver.returncode} before step {step}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {step} did not come within {_PATIENCE_S} s")
            time.sleep(0.05)

    def kill(self, kind: str, driver: subprocess.Popen[str], chance: random.Random) -> None:
        if kind.startswith("driver"):
            driver.kill()
            driver.wait()
            return
        actions = {
            "worker": self.cluster.kill_rank,
            "raylet": self.cluster.kill_raylet,
            "preemption": self.cluster.terminate_rank,
            "notice": self.cluster.give_notice,
        }
        actions[kind](chance)

    def finish(self, result: Round, driver: subprocess.Popen[str], storage: Path) -> None:
        """Wait for the end; when the command ends early, run it again as a user would."""
        workers = 1 if result.kind == FEWER else 2
        while True:
            code = driver.wait(timeout=_PATIENCE_S)
            if code == 0:
                return
            if result.commands == 4:
                raise RuntimeError(f"the command ended with {code} three times after the kill")
            driver = self.command(storage, workers)
            result.commands += 1

    def compare(self, result: Round, storage: Path) -> None:
        """Compare weights and steps with the undisturbed training."""
        self.compare_weights(result, storage)
        steps, result.restarts, result.preemptions = tracked_steps(storage)
        result.steps_once = steps == list(range(1, NUM_STEPS + 1))
        if not result.steps_once:
            result.problems.append(f"MLflow has the steps {steps}")
        if result.commands > 1 and result.kind not in ("driver", FEWER, STOP):
            result.problems.append("the driver was not killed, but the command had to be run again")
        if result.commands == 1 and not result.restarts + result.preemptions:
            result.problems.append("the training continued as if nothing had been killed")
        if result.kind in ("preemption", "notice") and not result.preemptions:
            result.problems.append("no preemption was counted")

    def compare_weights(self, result: Round, storage: Path) -> None:
        from safetensors.torch import load_file

        undisturbed, disturbed = policy(self.undisturbed), policy(storage)
        if undisturbed.read_bytes() == disturbed.read_bytes():
            result.weights = "the same bytes"
            return
        expected, weights = load_file(undisturbed), load_file(disturbed)
        result.largest_difference = max(
            float((weights[name] - tensor).abs().max() / max(float(tensor.abs().max()), 1.0))
            for name, tensor in expected.items()
        )
        result.weights = f"{result.largest_difference:.1e} relative"
        if result.kind != FEWER or result.largest_difference > TOLERANCE:
            result.problems.append(f"weights differ by {result.largest_difference:.1e} relative")

    def close(self) -> None:
        self.cluster.close()


def stop(result: Round, driver: subprocess.Popen[str], storage: Path) -> None:
    """Send SIGTERM to the driver, as job servers do; no step may be lost."""
    driver.terminate()
    code = driver.wait(timeout=_PATIENCE_S)
    checkpoints = storage.glob("consistency/*/output/checkpoints/step-*")
    kept = max((int(path.name.removeprefix("step-")) for path in checkpoints), default=0)
    if code != 143 or kept != last_step(storage):
        result.problems.append(
            f"exit code {code}; stopped at step {last_step(storage)}, but the checkpoint is of step {kept}"
        )


def policy(storage: Path) -> Path:
    [weights] = storage.glob("consistency/*/output/policy/model.safetensors")
    return weights


def last_step(storage: Path) -> int:
    """Return the last step that rank 0 reported, over all attempts."""
    steps = [0]
    for path in storage.glob("consistency/*/attempts/*/metrics.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                steps.append(json.loads(line)["step"])
    return max(steps)


def tracked_steps(storage: Path) -> tuple[list[int], float, float]:
    """Return the steps of the loss in MLflow in order, and the failures and preemptions of ranks over all
    commands."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    [run] = client.search_runs(experiments, "tags.`vico.stage` = 'consistency'")
    losses, metrics = client.get_metric_history(run.info.run_id, "loss"), run.data.metrics
    failures, preemptions = (metrics.get(f"num_{name}", 0.0) for name in ("worker_failures", "preemptions"))
    return sorted(metric.step for metric in losses), failures, preemptions


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="rounds of this call")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep this folder and continue in it; default: a new one")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="vico-drill-", dir="/tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    rounds = earlier_rounds(folder)
    ray_folder = Path(tempfile.mkdtemp(prefix="vico-drill-ray-", dir="/tmp"))
    drill = Drill(folder, ray_folder, options.seed, options.kinds)
    try:
        drill.train_undisturbed()
        for _ in range(options.rounds):
            rounds.append(drill.run(len(rounds)))
            sys.stderr.write(keep_round(folder, rounds[-1]))
            if options.report:
                options.report.write_text(report(rounds))
    finally:
        drill.close()
        shutil.rmtree(ray_folder, ignore_errors=True)
    sys.stdout.write(json_report(rounds) if options.json else report(rounds))
    failed = any(result.problems for result in rounds)
    if not failed and not options.folder:
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
