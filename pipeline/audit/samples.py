"""`vico audit RUN --sample KEY` and `--step N`: in which packs and steps a sample was used and what was
measured of it, and which samples made a step. Asked of the plan that the training itself follows.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.site import Site
from data_prep.shards.index import ShardIndex, load_index
from pipeline.config.graph import StageSpec
from pipeline.config.pipeline_file import Inputs
from pipeline.identity.file_digests import DigestCache
from pipeline.results.run_results import record_of
from pipeline.results.runs import RunFile, Runs
from pipeline.results.stage_folder import StageFolder
from stages.parts import Parts
from vico.errors import UserError

TRAININGS = ("consistency", "router")
TABLES = {"ratio": "ratios.parquet", "label": "labels.parquet", "router": "scores.parquet"}
"""Stage -> the table of its output that has rows by key."""


class RunSamples:
    """The stages of one run as far as samples go: finished ones, and of the trainings also one that is under
    way or has failed, whose steps are asked for most."""

    def __init__(self, site: Site, name: str):
        self.site = site
        self.run: RunFile = Runs(site.storage).named(name)
        found = {stage: record_of(self.run, stage, site.storage) for stage in self.run.stages}
        self.records = {stage: one for stage, one in found.items() if one is not None}
        if "shard" not in self.records:
            raise UserError(f"run {self.run.run} has no finished shard stage, so no samples; finish the run")
        self.index: ShardIndex = load_index(self.output("shard"))

    def output(self, stage: str) -> Path:
        """The stage's output at hand."""
        made = self.records[stage]
        if not made.is_superseded:
            folder = StageFolder(self.site.storage, stage, made.record.fingerprint)
            folder.fetch(made.record, DigestCache(self.site.storage).sha256s)
        return made.folder / "output"

    def sample(self, key: str) -> dict[str, Any]:
        """Where the sample lies, every use of it in training, and its rows in the tables of the stages.

        Raises UserError for a key that no shard holds.
        """
        table = self.index.table(["key"])
        found = table.filter(pc.equal(table["key"], key))["row"].to_pylist()
        if not found:
            raise UserError(f"--sample {key}: {self._why_not(key)}")
        row = self.index.row(found[0])
        place = {name: row[name] for name in ("shard", "split", "group", "repeat", "tiles", "text_tokens")}
        uses = [
            use
            for stage in self._trainings()
            for use in self._uses(stage)
            if use.pop("row") == found[0] and row["split"] == "train"
        ]
        return {"run": self.run.run, "key": key, **place, "uses": uses, **self._measured(key)}

    def step(self, number: int) -> dict[str, Any]:
        """The samples of update `number` (from 1, as in the metrics) of each training."""
        stages: dict[str, Any] = {}
        for stage in self._trainings():
            packs = self._packs(stage)
            if 1 <= number <= packs.num_steps:
                uses = [{"key": self._key(use.pop("row")), **use} for use in _uses_of_step(packs, number)]
                stages[stage] = [_without(use, "stage", "step") for use in uses]
        if not stages:
            longest = max((self._packs(stage).num_steps for stage in self._trainings()), default=0)
            raise UserError(
                f"--step {number}: the trainings of run {self.run.run} have at most {longest} steps, from 1"
            )
        return {"run": self.run.run, "step": number, "stages": stages}

    def _why_not(self, key: str) -> str:
        """Whether the ledger says why the sample is in no shard."""
        ledger = self.output("shard") / "quarantine.jsonl"
        for line in ledger.read_text(encoding="utf-8").splitlines() if ledger.is_file() else ():
            entry = json.loads(line)
            if key in (entry.get("key"), f"{entry.get('source')}-{entry.get('line')}"):
                return f"quarantined: {entry['reason']} ({entry['message']})"
        return f"no shard of run {self.run.run} holds it; keys are in {self.index.path}"

    def _key(self, row: int) -> str:
        return self.index.row(row)["key"]

    def _trainings(self) -> list[str]:
        """Those whose steps are known: one whose result was adopted has none here, nor has one that has not
        begun."""
        adopted = self.run.config["inputs"].get("adopt", {})
        begun = {stage for stage, entry in self.run.stages.items() if entry.attempt}
        if not {"consistency", "label"} <= self.records.keys():
            begun.discard("router")  # what it read is made again
        return [stage for stage in TRAININGS if stage in begun and stage not in adopted]

    def _uses(self, stage: str) -> Iterator[dict[str, Any]]:
        packs = self._packs(stage)
        for step in range(1, packs.num_steps + 1):
            yield from ({"stage": stage, **use} for use in _uses_of_step(packs, step))

    def _packs(self, stage: str) -> Any:
        """The packs of all steps, as the ranks of the stage get them."""
        if stage in self.records:
            record = self.records[stage].record
            given, parts = record.identity["config"], Parts(self.records[stage].folder, record.attempt)
        else:
            entry = self.run.stages[stage]
            folder = StageFolder(self.site.storage, stage, entry.fingerprint).path
            given, parts = self.run.config[stage], Parts(folder, entry.attempt)
        spec = StageSpec(stage, f"stages.{stage}")
        config = spec.config_class.model_validate_json(json.dumps(given))
        shard = self.output("shard")
        if stage == "consistency":
            from stages.consistency.packs import ConsistencyPacks, ConsistencySettings

            inputs = Inputs.model_validate_json(json.dumps(self.run.config["inputs"]))
            settings = ConsistencySettings(config, shard, inputs.model_folder, parts, self.site.train)
            return ConsistencyPacks(settings)
        from stages.router.packs import RouterPacks, RouterSettings

        policy, labels = self.output("consistency") / "policy", self.output("label")
        return RouterPacks(RouterSettings(config, shard, policy, labels, parts, self.site.train))

    def _measured(self, key: str) -> dict[str, list[dict[str, Any]]]:
        """The sample's rows of every stage's table, under the name of the table."""
        found: dict[str, list[dict[str, Any]]] = {}
        for stage, name in TABLES.items():
            if stage in self.records and (self.output(stage) / name).is_file():
                table = pq.read_table(self.output(stage) / name, filters=[("key", "=", key)])
                rows = [_without(row, "key", "split") for row in table.to_pylist()]
                found[name.removesuffix(".parquet")] = rows
        return found


def _uses_of_step(packs: Any, step: int) -> Iterator[dict[str, Any]]:
    for number, pack in enumerate(packs.packs(step - 1)):
        for row, copy, compressed in zip(pack.rows, pack.copies, pack.compressed, strict=True):
            rates = [bool(one) for one in compressed]
            yield {"step": step, "pack": number, "row": int(row), "copy": int(copy), "compressed": rates}


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}
