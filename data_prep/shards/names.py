"""Names of the files of a shard folder and of the samples in them."""

INDEX_FILE = "index.parquet"
MANIFEST_FILE, QUARANTINE_FILE = "manifest.json", "quarantine.jsonl"
SIDECAR_FOLDER = "sidecars"
_LINE_DIGITS = 8


def shard_name(number: int) -> str:
    return f"{number:05d}.tar"


def sample_key(slug: str, line: int) -> str:
    return f"{slug}-{line:0{_LINE_DIGITS}d}"


def sidecar_name(number: int) -> str:
    return f"{SIDECAR_FOLDER}/{number:05d}.parquet"


def waiting_tar(number: int) -> str:
    """Return the name of a shard's tar while it waits for the check across shards."""
    return f"{SIDECAR_FOLDER}/{shard_name(number)}"


def kept_sidecar_name(number: int) -> str:
    """Return the name of the sidecar of a shard rewritten without the samples that straddle the split."""
    return f"{SIDECAR_FOLDER}/{number:05d}.kept.parquet"
