"""`vico audit RUN --sample KEY` and `--step N`: where a sample was used, and which samples made a step.

The answers come from the packs that the trainings themselves follow.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.site import Site
from data_prep.packs.pack import Pack
from data_prep.records.sets import slug_of
from data_prep.shards.index import ShardIndex, load_index
from data_prep.shards.names import QUARANTINE_FILE, sample_key
from pipeline.config.graph import JOINT, block_of, block_path
from pipeline.config.inputs import Inputs
from pipeline.identity.file_digests import DigestCache
from pipeline.results.run_results import record_of
from pipeline.results.runs import RunFile, Runs
from pipeline.results.stage_folder import StageFolder
from stages.outputs import LABELS_FILE, POLICY_FOLDER, RATIOS_FILE, SCORES_FILE
from stages.parts import Parts
from vico.errors import UserError

_TRAININGS = ("consistency", "router")
_TABLES = {"ratio": RATIOS_FILE, "label": LABELS_FILE, "router": SCORES_FILE}
_PREFIXES = ("", f"{JOINT}_")
TRAININGS = tuple(prefix + stage for prefix in _PREFIXES for stage in _TRAININGS)
TABLES = {prefix + stage: file for prefix in _PREFIXES for stage, file in _TABLES.items()}
"""Stage -> the table of its output that has rows by key."""


class TrainingPacks(Protocol):
    """The packs of all steps of a training, as its ranks get them."""

    num_steps: int

    def packs(self, step: int) -> Sequence[Pack]:
        """Return the packs of a step, counted from 0 over all epochs."""


class RunSamples:
    """The samples of a run: in its finished stages, and in trainings that are running or have failed.

    The steps of a training that failed are asked for most.
    """

    def __init__(self, site: Site, name: str):
        self.site = site
        self.run: RunFile = Runs(site.storage).named(name)
        records = {stage: record_of(self.run, stage, site.storage) for stage in self.run.stages}
        self.records = {stage: record for stage, record in records.items() if record is not None}
        if "shard" not in self.records:
            raise UserError(f"run {self.run.run} has no finished shard stage, so no samples; finish the run")
        self.index: ShardIndex = load_index(self.output("shard"))

    def output(self, stage: str) -> Path:
        """Return the folder of a stage's output, after fetching it if it is in an object store."""
        run_record = self.records[stage]
        if not run_record.is_superseded:
            folder = StageFolder(self.site.storage, stage, run_record.record.fingerprint)
            folder.fetch(run_record.record, DigestCache(self.site.storage).sha256s)
        return run_record.folder / "output"

    def sample(self, key: str) -> dict[str, Any]:
        """Return the sample's place in the index, every use in training, and its rows in the stages' tables.

        Raises UserError for a key that no shard has.
        """
        table = self.index.table(["key"])
        rows = table.filter(pc.equal(table["key"], key))["row"].to_pylist()
        if not rows:
            raise UserError(f"--sample {key}: {self._why_missing(key)}")
        row = self.index.row(rows[0])
        columns = {name: row[name] for name in ("shard", "split", "group", "repeat", "tiles", "text_tokens")}
        uses = [
            use
            for stage in self._trainings()
            for use in self._uses(stage)
            if use.pop("row") == rows[0] and row["split"] == "train"
        ]
        return {"run": self.run.run, "key": key, **columns, "uses": uses, **self._table_rows(key)}

    def step(self, number: int) -> dict[str, Any]:
        """Return the samples of step `number` (from 1, as in the metrics) of each training."""
        stages: dict[str, Any] = {}
        longest = 0
        for stage in self._trainings():
            packs = self._packs(stage)
            longest = max(longest, packs.num_steps)
            if 1 <= number <= packs.num_steps:
                uses = [{"key": self._key(use.pop("row")), **use} for use in _uses_of_step(packs, number)]
                stages[stage] = [_without(use, "step") for use in uses]
        if not stages:
            raise UserError(
                f"--step {number}: the trainings of run {self.run.run} have at most {longest} steps; "
                "the first is 1"
            )
        return {"run": self.run.run, "step": number, "stages": stages}

    def _why_missing(self, key: str) -> str:
        """Return why the sample is in no shard. The quarantine has its row by source and line, which make its
        key."""
        ledger = self.output("shard") / QUARANTINE_FILE
        with ledger.open(encoding="utf-8") if ledger.is_file() else nullcontext(()) as lines:
            for row in map(json.loads, lines):
                if key in (sample_key(slug_of(row["source"]), row["line"]), f"{row['source']}-{row['line']}"):
                    return f"quarantined: {row['reason']} ({row['message']})"
        return f"no shard of run {self.run.run} has it; the keys are in {self.index.path}"

    def _key(self, row: int) -> str:
        return self.index.row(row)["key"]

    def _trainings(self) -> list[str]:
        """Return the trainings whose steps are known: those that have begun and were not adopted."""
        adopted = self.run.config["inputs"].get("adopt", {})
        begun = {stage for stage, entry in self.run.stages.items() if entry.attempt}
        for prefix in _PREFIXES:  # not while its inputs are being made again
            if not {f"{prefix}consistency", f"{prefix}label"} <= self.records.keys():
                begun.discard(f"{prefix}router")
        if not {"consistency", "joint_rates"} <= self.records.keys():
            begun.discard("joint_consistency")
        return [stage for stage in TRAININGS if stage in begun and stage not in adopted]

    def _uses(self, stage: str) -> Iterator[dict[str, Any]]:
        packs = self._packs(stage)
        for step in range(1, packs.num_steps + 1):
            yield from ({"stage": stage, **use} for use in _uses_of_step(packs, step))

    def _packs(self, stage: str) -> TrainingPacks:
        config_json, parts = self._config_and_parts(stage)
        shard = self.output("shard")
        # The modules of packs alone: those of the stages' workers import DeepSpeed.
        prefix = _prefix(stage)
        if stage.endswith("consistency"):
            return self._consistency_packs(stage, config_json, parts)
        from stages.router.config import RouterConfig
        from stages.router.packs import RouterPacks, RouterSettings

        router = RouterConfig.model_validate_json(config_json)
        policy, labels = self.output(f"{prefix}consistency") / POLICY_FOLDER, self.output(f"{prefix}label")
        return RouterPacks(RouterSettings(router, shard, policy, labels, parts, self.site.train))

    def _consistency_packs(self, stage: str, config_json: str, parts: Parts) -> TrainingPacks:
        from stages.consistency.config import ConsistencyConfig, JointConsistencyConfig
        from stages.consistency.packs import ConsistencyPacks, ConsistencySettings, JointInputs

        inputs = Inputs.model_validate_json(json.dumps(self.run.config["inputs"]))
        form, joint = ConsistencyConfig, None
        if stage != "consistency":
            policy = self.output("consistency") / POLICY_FOLDER
            form, joint = JointConsistencyConfig, JointInputs(policy, self.output("joint_rates"))
        settings = ConsistencySettings(
            form.model_validate_json(config_json),
            self.output("shard"),
            inputs.model_folder,
            parts,
            self.site.train,
            joint,
        )
        return ConsistencyPacks(settings)

    def _config_and_parts(self, stage: str) -> tuple[str, Parts]:
        """Return the config of a training as JSON, and its parts: of its record, else of its last attempt."""
        if stage in self.records:
            run_record = self.records[stage]
            config, attempt = run_record.record.identity["config"], run_record.record.attempt
            return json.dumps(config), Parts(run_record.folder, attempt)
        entry = self.run.stages[stage]
        folder = StageFolder(self.site.storage, stage, entry.fingerprint).path
        return json.dumps(block_of(self.run.config, stage)), Parts(folder, entry.attempt)

    def _table_rows(self, key: str) -> dict[str, list[dict[str, Any]]]:
        """Return the sample's rows in the table of every stage, by the name of the table."""
        tables: dict[str, list[dict[str, Any]]] = {}
        for stage, file in TABLES.items():
            if stage in self.records and (self.output(stage) / file).is_file():
                table = pq.read_table(self.output(stage) / file, filters=[("key", "=", key)])
                rows = [_without(row, "key", "split") for row in table.to_pylist()]
                tables[_prefix(stage) + file.removesuffix(".parquet")] = rows
        return tables


def _prefix(stage: str) -> str:
    """Return the beginning of a stage's name that a joint stage has; empty for others."""
    return stage.removesuffix(block_path(stage)[-1])


def _uses_of_step(packs: TrainingPacks, step: int) -> Iterator[dict[str, Any]]:
    for number, pack in enumerate(packs.packs(step - 1)):
        for row, copy, compressed in zip(pack.rows, pack.copies, pack.compressed, strict=True):
            rates = [bool(is_compressed) for is_compressed in compressed]
            yield {"step": step, "pack": number, "row": int(row), "copy": int(copy), "compressed": rates}


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}
