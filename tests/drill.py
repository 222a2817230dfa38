"""The drill: trainings on a 3-node Ray cluster while workers, a raylet and the driver are killed.

    python -m tests.drill --rounds 20 --report docs/measurements/drill.md        (or: make drill)

Each round trains a small policy in a storage of its own and kills one thing with SIGKILL at a random step (a
preemption is a SIGTERM to a rank, a notice is Ray's own word that a node will be taken away, a stop a SIGTERM
to the driver, which must leave a checkpoint of its last step); what ended is started again by the same
command. It must end with the weights of the undisturbed training, bit for bit, or within 1e-5 relative where
it went on with fewer ranks; every step must be in MLflow exactly once. Called again with the same `--folder`,
the drill goes on with the round after the last.
"""

import argparse
import json
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

from tests.drill_cluster import DrillCluster

FEWER, STOP = "driver, then one rank", "stop"
KINDS = ("worker", "raylet", "driver", "preemption", "notice", STOP, FEWER)
NUM_STEPS = 36
LAST_KILL = 24  # a fast machine takes ten steps while a process is looked for and killed
CHECKPOINT_EVERY = 4
TOLERANCE = 1e-5
_PATIENCE_S = 600
_ROUNDS_FILE = "rounds.jsonl"


@dataclass
class Round:
    """What happened in one round, and what came out."""

    number: int
    kind: str
    kill_after_step: int
    killed_at_step: int = 0
    commands: int = 1
    restarts: float = 0
    preemptions: float = 0
    weights: str = ""
    largest_difference: float = 0.0
    steps_once: bool = False
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def write_files(folder: Path) -> Path:
    """Pipeline and model of the drill; the path of the pipeline file."""
    from tests.integration.demo_pipeline import write_pipeline

    pipeline = write_pipeline(folder)
    config = yaml.safe_load(pipeline.read_text())
    config["consistency"].update(
        packs_per_step=6, epochs=100, max_steps=NUM_STEPS, validate_every_steps=NUM_STEPS
    )
    pipeline.write_text(yaml.safe_dump(config))
    return pipeline


def write_sites(folder: Path, address: str) -> None:
    """Two site files on the cluster: with two ranks and with one."""
    site = yaml.safe_load((folder / "site.yaml").read_text())
    site["ray"] = {"address": address}
    site["train"] = {"checkpoint_every_steps": CHECKPOINT_EVERY, "max_failures": 5}
    for workers in (2, 1):
        site["resources"] = {"workers": workers}
        (folder / f"site-{workers}.yaml").write_text(yaml.safe_dump(site))


class Drill:
    """The cluster, the undisturbed training, and rounds against it."""

    def __init__(self, folder: Path, ray_folder: Path, seed: int, kinds: Sequence[str]):
        self.folder, self.seed, self.kinds = folder, seed, kinds
        self.pipeline = folder / "pipeline.yaml"
        if not self.pipeline.exists():
            self.pipeline = write_files(folder)
        self.cluster = DrillCluster(ray_folder)
        write_sites(folder, self.cluster.address)
        self.undisturbed = folder / "undisturbed"

    def command(self, storage: Path, workers: int = 2):
        from tests.integration.demo_pipeline import vico

        site = self.folder / f"site-{workers}.yaml"
        options = ("--storage", storage, "--site", site, "--until", "consistency")
        log = (storage.parent / f"{storage.name}.log").open("a")
        return vico("run", self.pipeline, *options, start_new_session=True, stdout=log, stderr=log)

    def train_undisturbed(self) -> None:
        """Once; a further call finds it done."""
        if list(self.undisturbed.glob("consistency/*/record.json")):
            return
        if self.command(self.undisturbed).wait(timeout=_PATIENCE_S):
            raise SystemExit((self.folder / "undisturbed.log").read_text()[-3000:])

    def run(self, number: int) -> Round:
        """One round: start, kill, start again where need be, compare."""
        chance = random.Random(f"{self.seed}/{number}")
        kind = self.kinds[number % len(self.kinds)]
        one = Round(number, kind, chance.randint(1, LAST_KILL // 2 if kind == "notice" else LAST_KILL))
        storage = self.folder / f"round-{number:02d}"
        shutil.rmtree(storage, ignore_errors=True)  # of a drill that was stopped in it
        storage.mkdir()
        shutil.copytree(self.undisturbed / "shard", storage / "shard")  # sharding is not what is drilled
        began = time.monotonic()
        driver = self.command(storage)
        try:
            self.wait_for_step(storage, one.kill_after_step, driver)
            time.sleep(chance.uniform(0, 0.5))
            one.killed_at_step = last_step(storage)
            if one.kind == STOP:
                stop(one, driver, storage)
            else:
                self.kill(one.kind, driver, chance)
            self.go_on(one, driver, storage)
            self.compare(one, storage)
        except (TimeoutError, RuntimeError, psutil.Error) as error:
            one.problems.append(f"{type(error).__name__}: {error}")
            driver.kill()
        one.seconds = round(time.monotonic() - began, 1)
        self.cluster.mend()
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

    def kill(self, kind: str, driver, chance: random.Random) -> None:
        if kind.startswith("driver"):
            driver.kill()
            driver.wait()
            return
        befall = {
            "worker": self.cluster.kill_rank,
            "raylet": self.cluster.kill_raylet,
            "preemption": self.cluster.terminate_rank,
            "notice": self.cluster.give_notice,
        }
        befall[kind](chance)

    def go_on(self, one: Round, driver, storage: Path) -> None:
        """Waits for the end, giving the same command again as a user would when it ended early."""
        workers = 1 if one.kind == FEWER else 2
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
            if one.kind != FEWER or one.largest_difference > TOLERANCE:
                one.problems.append(f"weights differ by {one.largest_difference:.1e} relative")
        steps, one.restarts, one.preemptions = tracked_steps(storage)
        one.steps_once = steps == list(range(1, NUM_STEPS + 1))
        if not one.steps_once:
            one.problems.append(f"MLflow has the steps {steps}")
        if one.commands > 1 and one.kind not in ("driver", FEWER, STOP):
            one.problems.append("the driver was not killed, but the command had to be given again")
        if one.commands == 1 and not one.restarts + one.preemptions:
            one.problems.append("the training went on as if nothing had been killed")
        if one.kind in ("preemption", "notice") and not one.preemptions:
            one.problems.append("no preemption was counted")

    def close(self) -> None:
        self.cluster.close()


def stop(one: Round, driver, storage: Path) -> None:
    """SIGTERM to the driver, as job servers send it; nothing of what was done may be lost."""
    driver.terminate()
    code = driver.wait(timeout=_PATIENCE_S)
    checkpoints = storage.glob("consistency/*/output/checkpoints/step-*")
    kept = max((int(path.name.removeprefix("step-")) for path in checkpoints), default=0)
    if code != 143 or kept != last_step(storage):
        one.problems.append(f"exit code {code}; stopped at step {last_step(storage)}, kept was step {kept}")


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


def tracked_steps(storage: Path) -> tuple[list[int], float, float]:
    """(steps of the loss in MLflow in order, failures and preemptions of ranks over all commands)."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    [run] = client.search_runs(experiments, "tags.`vico.stage` = 'consistency'")
    losses, metrics = client.get_metric_history(run.info.run_id, "loss"), run.data.metrics
    counted = (metrics.get(f"num_{what}", 0.0) for what in ("worker_failures", "preemptions"))
    return sorted(metric.step for metric in losses), *counted


def report(rounds: list[Round]) -> str:
    good = [one for one in rounds if not one.problems]
    lines = [
        f"# Drill: {len(good)} of {len(rounds)} rounds ended as the undisturbed training\n",
        f"{NUM_STEPS} steps, a checkpoint every {CHECKPOINT_EVERY}, 2 ranks on a 3-node Ray cluster on one "
        f"host, ZeRO-2, float32; {sum(one.seconds for one in rounds) / 60:.0f} minutes of rounds.\n",
        "| round | what | at step | commands | failures | preemptions | weights | steps once in MLflow | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rounds:
        lines.append(
            f"| {one.number} | {one.kind} | {one.killed_at_step} | {one.commands} | {one.restarts:.0f} | "
            f"{one.preemptions:.0f} | {one.weights} | {'yes' if one.steps_once else 'no'} | "
            f"{one.seconds:.0f} |"
        )
    lines += [f"\nround {one.number}: {problem}" for one in rounds for problem in one.problems]
    return "\n".join(lines) + "\n"


def earlier_rounds(folder: Path) -> list[Round]:
    path = folder / _ROUNDS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [Round(**json.loads(line)) for line in lines]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=20, help="rounds of this call")
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--folder", type=Path, help="kept, and gone on with; else a new one")
    options.add_argument("--report", type=Path)
    options.add_argument("--json", action="store_true")
    arguments = options.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="vico-drill-", dir="/tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    rounds = earlier_rounds(folder)
    ray_folder = Path(tempfile.mkdtemp(prefix="vico-drill-ray-", dir="/tmp"))
    drill = Drill(folder, ray_folder, arguments.seed, arguments.kinds)
    try:
        drill.train_undisturbed()
        for _ in range(arguments.rounds):
            rounds.append(drill.run(len(rounds)))
            line = json.dumps(asdict(rounds[-1])) + "\n"
            sys.stderr.write(line)
            with (folder / _ROUNDS_FILE).open("a") as file:
                file.write(line)
            if arguments.report:
                arguments.report.write_text(report(rounds))
    finally:
        drill.close()
        shutil.rmtree(ray_folder, ignore_errors=True)
    failed = [one for one in rounds if one.problems]
    if arguments.json:
        sys.stdout.write(
            json.dumps({"name": "drill", "rows": [asdict(one) for one in rounds], "ratios": {}}) + "\n"
        )
    else:
        sys.stdout.write(report(rounds))
    if not failed and not arguments.folder:
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
