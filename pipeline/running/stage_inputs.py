"""What a stage reads: the digests of its inputs, and their files, fetched and compared with their records.

There is one StageInputs per run. Stages ask it for their inputs and report their outputs to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.site import Site
from data_prep.records.config import RecordsConfig
from data_prep.records.repairs import Repairs
from pipeline.config.graph import MODEL_SOURCES, SOURCES
from pipeline.identity.file_digests import DigestCache, LocalDigests, RemoteInput
from pipeline.identity.input_digests import repaired_fingerprint, source_fingerprint
from pipeline.planning.tasks import Pipeline, StageTask
from pipeline.results.records import Record
from pipeline.results.runs import RunFile
from pipeline.results.stage_folder import StageFolder
from stages.adopted import ADOPTED_FOLDER
from vico.errors import Unreachable, UserError


@dataclass(frozen=True)
class InputFiles:
    """What the code of one stage may read: folders by the names of its inputs, and configs of records."""

    folders: Mapping[str, Path]
    records: RecordsConfig
    heldout: RecordsConfig | None
    repaired: Repairs | None


class StageInputs:
    """The sources of a pipeline and the outputs of the stages of this run so far. Threads may share it."""

    def __init__(self, pipeline: Pipeline, site: Site, run: RunFile, cache: DigestCache):
        self._pipeline, self._site, self._run, self._cache = pipeline, site, run, cache
        self._digests: dict[str, str] = dict(pipeline.sources)
        self._outputs: dict[str, Path] = {}
        self._fetched = set[str]()

    def add_output(self, task: StageTask, folder: StageFolder, output_digest: str) -> None:
        """Make the output of a stage that is done available to the stages that read it."""
        self._digests[task.name] = output_digest
        self._outputs[task.name] = folder.output

    def output(self, stage: str) -> Path | None:
        """Return the output folder of a stage that is done, else None. Its files may have to be fetched."""
        return self._outputs.get(stage)

    def digests(self, task: StageTask) -> dict[str, str]:
        """Return input -> digest of its bytes."""
        return {name: self._digests[name] for name in task.inputs}

    def fetch(self, task: StageTask) -> None:
        """Make the outputs that the stage reads available as files here.

        Raises UserError if their bytes differ from the records although the sizes are right. Files that were
        read before and have not changed since are not read again.
        """
        self.check_unchanged(task)
        for name in task.inputs:
            if name not in self._outputs or name in self._fetched:
                continue
            folder = self._folder(name)
            record = folder.record()
            if record is not None:
                self._fetch(folder, record)
            self._fetched.add(name)

    def check_unchanged(self, task: StageTask) -> None:
        """Raise UserError if an input is not what this run's digests say: a source that was edited, or a
        result that another run replaced, while this run used it.

        Remote sources are not asked for again.
        """
        for name in task.inputs:
            if name in self._outputs:
                folder = self._folder(name)
                folder.storage.refresh_file(folder.record_path)
                record = folder.record()
                if record is None or record.output_digest != self._digests[name]:
                    raise UserError(
                        f"{folder.storage.address(folder.path)}: another command replaced the result of "
                        f"stage {name} while this run used it; run the same command again"
                    )
            elif name in SOURCES and self._local_fingerprint(name) not in (None, self._digests[name]):
                field = "inputs.model" if name in MODEL_SOURCES else f"inputs.{name}"
                raise UserError(
                    f"{field}: its files changed after this run had read their digests, so stage {task.name} "
                    "cannot say what it was made from; run the same command again"
                )

    def _folder(self, stage: str) -> StageFolder:
        return StageFolder(self._site.storage, stage, self._run.stages[stage].fingerprint)

    def _local_fingerprint(self, source: str) -> str | None:
        """Return the digest of a source as it is now; None if a part of it is remote."""
        try:
            return source_fingerprint(source, self._pipeline.config.inputs, LocalDigests(self._cache))
        except (RemoteInput, Unreachable):
            return None

    def files(self, task: StageTask) -> InputFiles:
        """Return what the stage's code may read; call `fetch` first."""
        inputs = self._pipeline.config.inputs
        folders = {
            name: self._outputs[giver] for name, giver in task.spec.givers.items() if giver not in SOURCES
        }
        folders |= {name: inputs.model_folder for name in MODEL_SOURCES if name in task.spec.inputs}
        if task.adopted_from is not None:
            folders[ADOPTED_FOLDER] = task.adopted_from
        repaired = self._repairs(task) if inputs.repaired and "repaired" in task.spec.inputs else None
        return InputFiles(folders, inputs.records, inputs.heldout, repaired)

    def _repairs(self, task: StageTask) -> Repairs:
        """Return the last file of repaired rows and the shards that it repairs: those made with the files
        before it."""
        files = self._pipeline.config.inputs.repaired
        fingerprints = {**task.inputs, "repaired": repaired_fingerprint(files[:-1], self._cache)}
        inputs = {name: fingerprint for name, fingerprint in fingerprints.items() if fingerprint is not None}
        before = StageTask(task.spec, task.config, inputs)
        folder = before.folder(self._site.storage)
        record = folder.record()
        if record is None or folder.damage(record) or folder.fetch(record, self._cache.sha256s):
            raise UserError(
                f"inputs.repaired={files[-1]} repairs shards ({before.fingerprint[:12]}) that are missing or "
                f"damaged in {self._site.storage_address}; run `vico data retry CONFIG` to make them first"
            )
        self._fetch(folder, record)
        return Repairs(files[-1], folder.output, before.fingerprint)

    def _fetch(self, folder: StageFolder, record: Record) -> None:
        path = folder.fetch(record, self._cache.sha256s)
        if path is not None:
            raise UserError(
                f"{folder.storage.address(path)} is not what stage {folder.stage} wrote, though its size is; "
                f"--force {folder.stage} archives it and runs the stage again"
            )
