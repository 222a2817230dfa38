"""Numbers that users set in the environment."""

import math
import os

from vico.errors import UserError


def number_in_environment(variable: str, default: float) -> float:
    """Return the number that a variable has, or the default if it is empty or not set.

    Raises UserError unless it is finite and at least 0.
    """
    text = os.environ.get(variable) or str(default)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(
            f"{variable}={text} in the environment must be a number from 0 on; correct or unset it"
        )
    return number
