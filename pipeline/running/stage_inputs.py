"""What a stage reads: the digests of its inputs, and their files, fetched and held against their records.

One for a run; its stages ask it, and tell it what they have made.
"""

from pathlib import Path

from cluster.site import Site
from data_prep.records.config import RecordsConfig
from data_prep.records.repairs import Repairs
from pipeline.identity.file_digests import DigestCache
from pipeline.identity.input_digests import repaired_fingerprint
from pipeline.planning.tasks import Pipeline, StageTask
from pipeline.results.runs import RunFile
from pipeline.results.stage_folder import Record, StageFolder
from stages.adopted import FOLDER as ADOPTED_FOLDER
from vico.errors import UserError

StageInput = Path | RecordsConfig | Repairs | None


class StageInputs:
    """The sources of a pipeline and what the stages of this run have made so far; threads may share it."""

    def __init__(self, pipeline: Pipeline, site: Site, run: RunFile, cache: DigestCache):
        self._pipeline, self._site, self._run, self._cache = pipeline, site, run, cache
        self._digests: dict[str, str] = dict(pipeline.sources)
        self._outputs: dict[str, Path] = {}
        self._whole = set[str]()

    def made(self, task: StageTask, folder: StageFolder, output_digest: str) -> None:
        """The stage is done: its output is there for those that read it."""
        self._digests[task.name] = output_digest
        self._outputs[task.name] = folder.output

    def digests(self, task: StageTask) -> dict[str, str]:
        return {name: self._digests[name] for name in task.inputs}

    def fetch(self, task: StageTask) -> None:
        """Have the outputs that the stage reads at hand. UserError when their bytes are not those recorded,
        sizes being right. Files that were read before and have not been touched since are not read again."""
        for name in task.inputs:
            if name not in self._outputs or name in self._whole:
                continue
            folder = StageFolder(self._site.storage, name, self._run.stages[name].fingerprint)
            record = folder.record()
            if record is not None:
                self._fetch(folder, record)
            self._whole.add(name)

    def given(self, task: StageTask) -> dict[str, StageInput]:
        """What the stage's code is given, by the names of its inputs; an adopted result stands beside
        them."""
        found = {name: self._one(name, task) for name in task.spec.inputs}
        return found if task.adopted_from is None else {**found, ADOPTED_FOLDER: task.adopted_from}

    def _one(self, name: str, task: StageTask) -> StageInput:
        inputs = self._pipeline.config.inputs
        if name == "records":
            return inputs.records
        if name == "heldout":
            return inputs.heldout
        if name == "repaired":
            return self._repairs(task) if inputs.repaired else None
        if name in ("model", "tokenizer"):
            return inputs.model_folder
        return self._outputs[name]

    def _repairs(self, task: StageTask) -> Repairs:
        """The last file of repaired rows and the shards that it mends: those of the files before it."""
        files = self._pipeline.config.inputs.repaired
        given = {**task.inputs, "repaired": repaired_fingerprint(files[:-1], self._cache)}
        known = {name: value for name, value in given.items() if value is not None}
        mended = StageTask(task.spec, task.config, known)
        folder = mended.folder(self._site.storage)
        record = folder.record()
        if record is None or folder.damage(record) or folder.fetch(record, self._cache.sha256s):
            raise UserError(
                f"inputs.repaired={files[-1]} mends shards ({mended.fingerprint[:12]}) that are not whole in "
                f"{self._site.storage_address}; give `vico data retry CONFIG`, which makes them first"
            )
        self._fetch(folder, record)
        return Repairs(files[-1], folder.output, mended.fingerprint)

    def _fetch(self, folder: StageFolder, record: Record) -> None:
        path = folder.fetch(record, self._cache.sha256s)
        if path is not None:
            raise UserError(
                f"{folder.storage.place(path)} is not what stage {folder.stage} wrote, though its size is; "
                f"--force {folder.stage} sets it aside and runs the stage again"
            )
