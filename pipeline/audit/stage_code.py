"""Code and packages that made a stage's result: a loss is a problem, a later change is a note."""

import hashlib
from pathlib import Path

from cluster.sources.reports import WORKERS_FILE, worker_digests
from pipeline.audit.findings import Findings
from pipeline.identity.provenance import PATCH_FILE, git_state, has_commit, locked_versions, package_versions
from pipeline.planning.reasons import made_by_attempts, mixed_code
from pipeline.results.records import ATTEMPT_FILE, CODE, CODES_OF_ATTEMPTS, PACKAGES_OF_ATTEMPTS, Record
from pipeline.results.stage_folder import StageFolder
from vico.errors import UserError, one_line

_MOST_SHOWN = 5


def audit_code(folder: StageFolder, record: Record, findings: Findings) -> None:
    """Check that the code of a record can still be had, and compare its packages with those of now."""
    _audit_commit(record, findings)
    if record.git.get("dirty"):
        _audit_patch(folder, record, findings)
    _audit_attempts(folder, record, findings)
    mixed = mixed_code(record)
    if mixed:
        findings.note(record.stage, mixed)
    locked = locked_versions()
    used = {name: version.partition("+")[0] for name, version in record.packages.items()}  # without +cpu
    unlocked = [
        f"{name} {used[name]}, not {version}"
        for name, version in locked.items()
        if used.get(name, version) != version
    ]
    if unlocked:
        findings.note(record.stage, f"packages differ from constraints.txt: {_shown(unlocked)}")
    installed = package_versions()
    changed = [
        f"{name} {version} -> {installed.get(name, 'gone')}"
        for name, version in record.packages.items()
        if version != installed.get(name)
    ]
    if changed:
        findings.note(record.stage, f"packages differ from those recorded: {_shown(changed)}")


def _audit_attempts(folder: StageFolder, record: Record, findings: Findings) -> None:
    """Compare what the record says of code and packages with what every attempt wrote when it began, and with
    what its workers reported."""
    if CODE not in record.facts:
        return  # of an older vico, whose attempts did not record all of it
    try:
        folder.refuse_edited(record)
        made = made_by_attempts(folder, record.sources, record.packages)
    except UserError:
        return  # an edited record and a damaged attempt.json are reported with the record
    for fact, word in ((CODES_OF_ATTEMPTS, "code"), (PACKAGES_OF_ATTEMPTS, "packages")):
        recorded, attempts = record.facts.get(fact, {}), made.get(fact, {})
        for number in sorted({*recorded, *attempts}, key=int):
            if recorded.get(number) != attempts.get(number):
                path = folder.path / "attempts" / number / ATTEMPT_FILE
                message = f"the {word} of attempt {number} are others than the record says"
                findings.problem(record.stage, "attempt", path, message)
    for path in sorted(folder.path.glob(f"attempts/*/{WORKERS_FILE}")):
        _audit_workers(path, record, findings)


def _audit_workers(path: Path, record: Record, findings: Findings) -> None:
    """Check that the workers of an attempt imported the code that the record names."""
    number = path.parent.name
    try:
        digests = worker_digests(path.parent)
    except (ValueError, KeyError, TypeError) as error:
        findings.problem(record.stage, "attempt", path, f"is damaged ({one_line(error)})")
        return
    if number == str(record.attempt) and digests != record.facts[CODE]["workers"]:
        message = f"the code of the workers of attempt {number} is other than the record says"
        findings.problem(record.stage, "attempt", path, message)
    others = set(digests) - {record.facts[CODE]["driver"]}
    if others:
        findings.note(record.stage, f"workers of attempt {number} imported other code than the last driver")


def _audit_commit(record: Record, findings: Findings) -> None:
    commit, error = record.git.get("commit"), record.git.get("error")
    if error:
        text = f"commit or patch of the code are not recorded; git said: {error}"
        findings.note(record.stage, text)
    elif commit is None:
        findings.note(record.stage, "made by code without a commit")
    is_here = has_commit(commit) if commit else None
    if is_here is False:
        message = f"commit {commit} is not in this checkout; fetch the branch that has it"
        findings.problem(record.stage, "git", str(commit), message)
    elif commit and is_here is None and "error" in git_state():
        text = f"commit {commit} was not looked for; git said: {git_state()['error']}"
        findings.note(record.stage, text)


def _shown(texts: list[str]) -> str:
    """Return the first texts, and how many more there are."""
    first, more = texts[:_MOST_SHOWN], texts[_MOST_SHOWN:]
    return ", ".join(first) + (f" and {len(more)} more" if more else "")


def _audit_patch(folder: StageFolder, record: Record, findings: Findings) -> None:
    """Check the stored patch: without it, code that was not committed is lost."""
    path = folder.path / "attempts" / str(record.attempt) / PATCH_FILE
    commit, recorded = record.git.get("commit"), record.git.get("patch")
    if recorded is None:
        text = f"tracked files differed from commit {commit}; the record has only their digests"
        findings.note(record.stage, text)
    elif not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != recorded:
        message = f"tracked files differed from commit {commit}, and the patch is missing or was edited"
        findings.problem(record.stage, "git", path, message)
    else:
        text = f"tracked files differed from commit {commit}; {PATCH_FILE} has the differences"
        findings.note(record.stage, text)
