"""Load state files without running the code that a pickle can hold.

DeepSpeed passes `weights_only=False` to every `torch.load`, in the engine, in its universal format and in its
conversion program. torch has a switch that overrules this for a whole process.
"""

import os
import pickle
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stages.training.state_digests import UnsafeState

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_CONVERTER = "deepspeed.checkpoint.ds_to_universal"


@contextmanager
def weights_only() -> Iterator[None]:
    """Return a context in which each `torch.load` of this process, and of processes it forks, makes tensors
    and plain values only.

    The exceptions are the three classes of DeepSpeed 0.19 in its optimizer states, which run nothing when
    they are made. Raises UnsafeState for a file that needs more.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        raise UnsafeState(_refused(error)) from error
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _refused(error: pickle.UnpicklingError) -> str:
    """Return the line of torch's message that says what was refused."""
    lines = [line.strip() for line in str(error).splitlines()]
    reason = next((line for line in lines if "WeightsUnpickler error" in line), lines[0])
    what = reason.partition("WeightsUnpickler error: ")[2] or reason
    return f"a state file holds more than tensors and plain values ({what.split('. ')[0]})"


def main() -> None:
    """Run DeepSpeed's conversion program with the arguments of this one."""
    sys.argv[0] = _CONVERTER
    with weights_only():
        runpy.run_module(_CONVERTER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
