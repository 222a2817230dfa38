"""How the cost of a call grows with its input: finds quadratic code on machines of any speed."""

import time
from collections.abc import Callable


def cpu_growth(call: Callable[[int], object], size: int, factor: int = 8, repeats: int = 3) -> float:
    """Return the CPU time of `call(size * factor)` divided by that of `call(size)`, the best of each.

    Linear code gives about `factor`, quadratic code about `factor` squared.
    """
    return _cpu_s(call, size * factor, repeats) / _cpu_s(call, size, repeats)


def _cpu_s(call: Callable[[int], object], size: int, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        call(size)
        times.append(time.process_time() - begun)
    return min(times)
