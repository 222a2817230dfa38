"""The machines and packages that made a run, and what each stage used of them."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from cluster.metric_lines import metric_lines, system_metrics_file
from pipeline.report.run_files import RunFiles
from pipeline.report.tables import Row, Table, number, percent, size

_MAIN_PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "ray",
    "flash-attn",
    "webdataset",
    "pyarrow",
    "mlflow",
    "numpy",
    "pillow",
    "tokenizers",
    "vico",
)
_SYSTEM = "system/"
_MEGABYTE = 1_000_000
_CPU = "cpu_utilization_percentage"
"""It is the load since the sample before, so the first one says nothing."""
Usage = Mapping[str, float]
"""Metric of a node -> value."""


def machines_table(files: RunFiles) -> Table:
    """Return the machine of each finished stage, with its ranks."""
    rows = []
    for stage, stage_record in files.records.items():
        facts = stage_record.record.facts
        resources = facts.get("resources") or {}
        cells = (
            stage,
            str(facts.get("host", "-")),
            str(facts.get("platform", "-")),
            str(facts.get("python", "-")),
            str(facts.get("cpus", "-")),
            str(resources.get("workers", "-")),
            _plain(resources.get("gpus_per_worker")),
        )
        rows.append(Row(cells))
    columns = ("stage", "host of the driver", "platform", "Python", "CPUs", "workers", "GPUs per worker")
    return Table("Machines of the finished stages", columns, rows, num_numbers=3)


def usage_table(files: RunFiles) -> Table:
    """Return what each stage used of each node, by the samples that its attempts recorded."""
    rows = []
    for stage in files.run.stages:
        attempts = files.attempts(stage)
        for node, samples in sorted(_samples(attempts).items()) if attempts is not None else ():
            rows.append(Row((stage, node, *_usage_cells(samples))))
    notes = () if rows else ("The metrics of the nodes were not recorded.",)
    columns = ("stage", "node", "samples", "CPU, mean", "memory, most", "GPU, mean", "GPU memory, most")
    return Table("What the stages used of the nodes", columns, rows, num_numbers=5, notes=notes)


def _samples(attempts: Path) -> dict[str, list[Usage]]:
    """Return node -> what was measured of it, over all attempts."""
    samples: dict[str, list[Usage]] = defaultdict(list)
    for path in sorted(attempts.glob(f"*/{system_metrics_file('*')}")):
        for line in metric_lines(path):
            of_node: dict[str, dict[str, float]] = defaultdict(dict)
            for name, value in line.metrics.items():
                node, _, metric = name.removeprefix(_SYSTEM).rpartition("/")
                if line.step or metric != _CPU:
                    of_node[node][metric] = value
            for node, usage in of_node.items():
                samples[node].append(usage)
    return samples


def _usage_cells(samples: list[Usage]) -> tuple[str, ...]:
    """Return number of samples, mean CPU, peak memory of the driver's processes, mean load and peak memory
    of the GPUs."""

    def values(*parts: str) -> list[float]:
        return [
            value for usage in samples for name, value in usage.items() if all(part in name for part in parts)
        ]

    cpu, memory = values(_CPU), values("process_tree_memory")
    gpu, gpu_memory = values("gpu_", "utilization"), values("gpu_", "memory_usage_megabytes")
    return (
        f"{len(samples):,}",
        percent(_mean(cpu)),
        size(max(memory) * _MEGABYTE) if memory else "-",
        percent(_mean(gpu)),
        size(max(gpu_memory) * _MEGABYTE) if gpu_memory else "-",
    )


def _mean(percentages: list[float]) -> float | None:
    """Return the mean as a share; None without values."""
    return sum(percentages) / len(percentages) / 100 if percentages else None


def _plain(value: float | None) -> str:
    return number(value, "g")


def main_packages(files: RunFiles) -> Table:
    """Return the versions of the packages that matter most."""
    versions = package_versions(files)
    rows = [Row((name, ", ".join(versions[name]))) for name in _MAIN_PACKAGES if name in versions]
    return Table("Main packages", ("package", "version"), rows)


def all_packages(files: RunFiles) -> list[str]:
    """Return all packages of all finished stages as `name==version`."""
    return [f"{name}=={' or '.join(versions)}" for name, versions in sorted(package_versions(files).items())]


def package_versions(files: RunFiles) -> dict[str, list[str]]:
    """Return package -> its versions over all finished stages, usually one."""
    versions: dict[str, list[str]] = {}
    for stage_record in files.records.values():
        for name, version in stage_record.record.packages.items():
            if version not in versions.setdefault(name, []):
                versions[name].append(version)
    return versions
