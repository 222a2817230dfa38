"""The places (a placement group) that a start of Ray Train takes, given back where Ray forgets them.

Ray 2.60 loses sight of the group of a start in which a rank dies, or the process group fails, before all
ranks are at work. It, and the ranks that live, keep their places until the driver ends, and the next start
waits for them without end.
"""

from collections.abc import Callable
from pathlib import Path

import ray
from ray import PlacementGroupID
from ray.util import get_current_placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup


def note_places(in_a_rank: Callable[[Callable[[], str]], ray.ObjectRef], file: Path) -> None:
    """Writes the id of the placement group of a start to `file`; `in_a_rank` runs a function in a rank's
    actor."""
    file.write_text(ray.get(in_a_rank(_placement_group_id)))


def free_places(file: Path) -> None:
    """Ends the placement group that is noted in `file`, if one is, and what still runs in it."""
    if file.exists():
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(file.read_text())))
        file.unlink()


def _placement_group_id() -> str:
    return get_current_placement_group().id.hex()
