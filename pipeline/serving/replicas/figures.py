"""The figures of one replica, which Ray's Prometheus endpoint of its node shows with the replica's name."""

from ray.serve.metrics import Gauge, Histogram

from pipeline.serving.running import AnswerEngine

_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]


class ReplicaFigures:
    """Names are those of the server's own `/metrics`, with Ray's prefix `ray_`."""

    def __init__(self) -> None:
        self._step_s = Histogram(
            "vico_engine_step_seconds", description="Time of one step of the decoder.", boundaries=_SECONDS
        )
        self._waiting = Gauge("vico_waiting_requests", description="Requests without a row.")
        self._running = Gauge("vico_running_requests", description="Requests with a row.")
        self._reserved = Gauge("vico_cache_tokens", description="Tokens for which rows have room.")

    def step(self, seconds: float, num_tokens: int) -> None:
        """Count a step of the engine."""
        self._step_s.observe(seconds)

    def show(self, engine: AnswerEngine) -> None:
        """Show what the engine has now."""
        self._waiting.set(engine.num_waiting)
        self._running.set(engine.num_running)
        self._reserved.set(engine.num_reserved)
