"""Release the placement group of a failed start of Ray Train, which Ray 2.60 forgets.

Ray loses the placement group of a start when a rank dies, or the process group fails, before all ranks are
ready. The group, and the ranks that are still alive, then keep their CPUs and GPUs until the driver ends, and
the next start waits for them forever.
"""

from collections.abc import Callable
from pathlib import Path

import ray
from ray import PlacementGroupID
from ray.util import get_current_placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup


def record_placement_group(run_in_rank: Callable[[Callable[[], str]], ray.ObjectRef], file: Path) -> None:
    """Write the id of a start's placement group to `file`.

    `run_in_rank` runs a function in the actor of a rank.
    """
    file.write_text(ray.get(run_in_rank(_placement_group_id)))


def release_placement_group(file: Path) -> None:
    """Remove the placement group that `file` names, with all that still runs in it, and delete the file.

    Without the file nothing is done.
    """
    if file.exists():
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(file.read_text())))
        file.unlink()


def _placement_group_id() -> str:
    group = get_current_placement_group()
    assert group is not None, "the ranks of Ray Train run in a placement group"
    return group.id.hex()
