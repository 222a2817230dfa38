"""The files of a stage in the store, read in full, and links in their place. Called by the audit."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pipeline.audit.findings import Findings
from pipeline.identity.file_digests import file_sha256s
from pipeline.json_files import OutputFile
from pipeline.results.stage_folder import StageFolder
from pipeline.storage.output_files import is_partial

_KINDS = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFBLK: "device", stat.S_IFCHR: "device"}


def read_files(folder: StageFolder, findings: Findings) -> dict[str, OutputFile]:
    """Read every file of the stage's output and attempts into the findings' facts; return those of the
    output by name."""
    storage, stage = folder.storage, folder.stage
    sizes = storage.sizes(folder.path)
    digests = storage.sha256s(folder.path, sizes)
    outputs = {
        name: OutputFile(bytes=size, sha256=sha256)
        for (name, size), sha256 in zip(sizes.items(), digests, strict=True)
    }
    files = {f"{stage}/output/{name}": file for name, file in outputs.items()}
    logs = sorted(_attempt_files(folder))
    for path, sha256 in zip(logs, file_sha256s(logs), strict=True):
        name = f"{stage}/{path.relative_to(folder.path)}"
        files[name] = OutputFile(bytes=path.stat().st_size, sha256=sha256)
    findings.facts.files |= files
    return outputs


def audit_links(folder: StageFolder, findings: Findings) -> None:
    """Report links and special files in the place of the stage's folders and files.

    A link may lead to bytes that change without any change here. The storage itself may be a link.
    """
    output, attempts = folder.output, folder.path / "attempts"
    ways = (folder.path.parent, folder.path, output, attempts, folder.record_path)
    for path in (*ways, *_below(output), *_below(attempts)):
        if path.is_symlink():
            message = (
                f"is a link to {os.readlink(path)}, and what is there is not part of the store; move it "
                "here, or make the whole storage a link"
            )
            findings.problem(folder.stage, "link", path, message)
        elif path.exists() and (kind := _KINDS.get(stat.S_IFMT(path.lstat().st_mode))):
            findings.problem(folder.stage, "link", path, f"is a {kind} and not a file; remove it")


def _below(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder, at any depth and without going through links; not half-written parts."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_partial(name))
        yield from (Path(parent, name) for name in (*folders, *sorted(files)) if not is_partial(name))


def _attempt_files(folder: StageFolder) -> Iterator[Path]:
    """Yield the files of all attempts; of those in an object store, what is uploaded."""
    attempts = folder.path / "attempts"
    for path in _below(attempts):
        is_uploaded = path.parent.parent == attempts
        if (
            path.is_file()
            and not path.is_symlink()
            and (is_uploaded or not folder.storage.conditional_writes)
        ):
            yield path
