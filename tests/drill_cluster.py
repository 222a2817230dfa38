"""The drill's Ray cluster: three nodes on one host, and what can happen to them."""

import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

_HEALTH = {"period_ms": 1000, "timeout_ms": 1000, "failure_threshold": 3, "initial_delay_ms": 1000}
_NOTICE_S = 600  # the time that Ray announces; training must react to the notice, not to the end


class DrillCluster:
    """A head and two more nodes with one CPU each; sockets and logs are in `folder`."""

    def __init__(self, folder: Path):
        os.environ.update({f"RAY_health_check_{name}": str(value) for name, value in _HEALTH.items()})
        os.environ["RAY_TMPDIR"] = str(folder)
        os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.2"  # the drill's trainings take only seconds
        from ray.cluster_utils import Cluster

        self._drained: set[str] = set()
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        self.restore()

    @property
    def address(self) -> str:
        return self._cluster.address

    def ranks(self) -> list[tuple[Any, psutil.Process]]:
        """Return (node, process) of every rank. They are children of this cluster's raylets."""
        ranks = []
        for node in [self._cluster.head_node, *self._cluster.worker_nodes]:
            raylet = living_raylet(node)
            if raylet:
                children = psutil.Process(raylet.pid).children(recursive=True)
                ranks += [
                    (node, child) for child in children if "RayTrainWorker" in " ".join(child.cmdline())
                ]
        if not ranks:
            raise RuntimeError("no process of a rank was found")
        return ranks

    def kill_rank(self, chance: random.Random) -> None:
        chance.choice(self.ranks())[1].kill()

    def terminate_rank(self, chance: random.Random) -> None:
        chance.choice(self.ranks())[1].terminate()

    def kill_raylet(self, chance: random.Random) -> None:
        self._node_of_a_rank(chance).kill_raylet()

    def give_notice(self, chance: random.Random) -> None:
        """Tell Ray, like an autoscaler, that a node with a rank on it will be taken away."""
        from ray._raylet import GcsClient

        node = self._node_of_a_rank(chance)
        deadline_ms = int((time.time() + _NOTICE_S) * 1000)
        client = GcsClient(address=self.address)
        accepted, why = client.drain_node(node.node_id, 2, "the drill takes it", deadline_ms)  # 2: preemption
        if not accepted:
            raise RuntimeError(f"the node was not drained: {why}")
        self._drained.add(node.node_id)

    def _node_of_a_rank(self, chance: random.Random) -> Any:
        """Return a node with a rank that is not the head, which holds the cluster's state."""
        nodes = {node.node_id: node for node, _ in self.ranks() if node is not self._cluster.head_node}
        return nodes[chance.choice(sorted(nodes))]

    def restore(self) -> None:
        """Start new nodes until three are alive again."""
        for node in list(self._cluster.worker_nodes):
            if not living_raylet(node) or node.node_id in self._drained:
                self._cluster.remove_node(node, allow_graceful=False)
        while len(self._cluster.worker_nodes) < 2:
            self._cluster.add_node(num_cpus=1)

    def close(self) -> None:
        self._cluster.shutdown()


def living_raylet(node: Any) -> subprocess.Popen[bytes] | None:
    """Return the process of a node's raylet; None if it is dead. Ray forgets those that it killed itself."""
    raylets = [info.process for info in node.all_processes.get("raylet", ())]
    return next((raylet for raylet in raylets if raylet.poll() is None), None)
