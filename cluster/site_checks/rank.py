"""One process of the all-reduce. Nodes get it by value; torch is imported there."""

from __future__ import annotations

import socket
import time


class Rank:
    """Rank `number` of `world`."""

    def __init__(self, number: int, world: int) -> None:
        self.number, self.world = number, world

    def address(self) -> str:
        """Return HOST:PORT of this process, for the ranks to meet."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return f"{ray.util.get_node_ip_address()}:{port}"

    def seconds(self, address: str, backend: str, num_bytes: int) -> float:
        """Return the seconds of an all-reduce of `num_bytes`; the fastest of five."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}",
            rank=self.number,
            world_size=self.world,
            timeout=timedelta(seconds=120),
        )
        device = "cuda" if backend == "nccl" else "cpu"
        tensor = torch.empty(num_bytes // 4, device=device)
        taken = []
        for _ in range(6):
            tensor.fill_(1)
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
            if tensor[0].item() != self.world:  # whole numbers, exact in float32
                raise RuntimeError(f"the sum is {tensor[0].item()}, not {self.world}")
        dist.destroy_process_group()
        return min(taken[1:])
