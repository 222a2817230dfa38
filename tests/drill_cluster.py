"""The drill's Ray cluster: three nodes on one host, and what can befall them."""

import os
import random
import time
from pathlib import Path

import psutil

_HEALTH = {"period_ms": 1000, "timeout_ms": 1000, "failure_threshold": 3, "initial_delay_ms": 1000}
_NOTICE_S = 600  # what Ray says is left; long enough that the training reacts to the word and not to the end


class DrillCluster:
    """A head and two more nodes, a CPU each, with sockets and logs in `folder`."""

    def __init__(self, folder: Path):
        os.environ.update({f"RAY_health_check_{name}": str(value) for name, value in _HEALTH.items()})
        os.environ["RAY_TMPDIR"] = str(folder)
        os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.2"  # the drill's trainings last seconds
        from ray.cluster_utils import Cluster

        self._drained: set[str] = set()
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        self.mend()

    @property
    def address(self) -> str:
        return self._cluster.address

    def ranks(self) -> list[tuple[object, psutil.Process]]:
        """(node, process) of every rank: children of this cluster's raylets alone."""
        found = []
        for node in [self._cluster.head_node, *self._cluster.worker_nodes]:
            raylet = living_raylet(node)
            if raylet:
                children = psutil.Process(raylet.pid).children(recursive=True)
                found += [
                    (node, child) for child in children if "RayTrainWorker" in " ".join(child.cmdline())
                ]
        if not found:
            raise RuntimeError("no process of a rank was found")
        return found

    def kill_rank(self, chance: random.Random) -> None:
        chance.choice(self.ranks())[1].kill()

    def terminate_rank(self, chance: random.Random) -> None:
        chance.choice(self.ranks())[1].terminate()

    def kill_raylet(self, chance: random.Random) -> None:
        self._node_of_a_rank(chance).kill_raylet()

    def give_notice(self, chance: random.Random) -> None:
        """Tells Ray, as an autoscaler would, that a node with a rank on it will be taken away."""
        from ray._raylet import GcsClient

        node = self._node_of_a_rank(chance)
        deadline_ms = int((time.time() + _NOTICE_S) * 1000)
        client = GcsClient(address=self.address)
        accepted, why = client.drain_node(node.node_id, 2, "the drill takes it", deadline_ms)  # 2: preemption
        if not accepted:
            raise RuntimeError(f"the node was not drained: {why}")
        self._drained.add(node.node_id)

    def _node_of_a_rank(self, chance: random.Random):
        """A node other than the head (which holds the cluster's state) on which a rank runs."""
        nodes = {node.node_id: node for node, _ in self.ranks() if node is not self._cluster.head_node}
        return nodes[chance.choice(sorted(nodes))]

    def mend(self) -> None:
        """Three living nodes again."""
        for node in list(self._cluster.worker_nodes):
            if not living_raylet(node) or node.node_id in self._drained:
                self._cluster.remove_node(node, allow_graceful=False)
        while len(self._cluster.worker_nodes) < 2:
            self._cluster.add_node(num_cpus=1)

    def close(self) -> None:
        self._cluster.shutdown()


def living_raylet(node):
    """The process of a node's raylet; None where it is dead (Ray forgets the ones it killed itself)."""
    living = [one.process for one in node.all_processes.get("raylet", ()) if one.process.poll() is None]
    return living[0] if living else None
