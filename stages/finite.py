"""The check that what a model computed for a sample is finite, before it enters means, medians or choices."""

import numpy as np

from vico.errors import UserError
from vico.shown_text import printable


def check_finite(key: str, values: np.ndarray, what: str, dtype: str, setting: str) -> None:
    """Raise UserError if a value of the sample is not finite; `setting` chooses the dtype."""
    num_bad = int(np.sum(~np.isfinite(values)))
    if not num_bad:
        return
    remedy = "check the policy: its weights or activations overflow"
    if dtype != "float32":
        remedy = f"set {setting}: float32 instead of {dtype}; if that does not help, {remedy}"
    raise UserError(
        f"sample {printable(key)}: {num_bad} of its {len(values)} {what} are not finite; {remedy}"
    )
