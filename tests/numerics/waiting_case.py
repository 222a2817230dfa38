"""One of two ranks: rank 0 waits for rank 1, which hangs, in the process group in which DeepSpeed reduces
gradients.

`python -m tests.numerics.waiting_case FILE TIMEOUT_S`: rank 0 writes to FILE how its wait ended.
"""

import os
import sys
import time
from pathlib import Path

import torch
from deepspeed.utils import groups

from stages.training.engine import init_distributed

if __name__ == "__main__":
    file, timeout_s = Path(sys.argv[1]), float(sys.argv[2])
    # the group waits only `timeout_s` for the other rank to join, and its imports may take longer
    file.with_name(f"ready-{os.environ['RANK']}").touch()
    while not file.with_name(f"ready-{1 - int(os.environ['RANK'])}").exists():
        time.sleep(0.05)
    init_distributed(timeout_s)
    torch.distributed.barrier()
    if torch.distributed.get_rank():
        while not file.exists():
            time.sleep(0.1)
    else:
        started = time.monotonic()
        try:
            torch.distributed.all_reduce(torch.ones(1), group=groups._get_data_parallel_group())
        except RuntimeError as error:
            partial = file.with_suffix(".partial")
            partial.write_text(f"{time.monotonic() - started:.1f} {error}")
            partial.rename(file)
