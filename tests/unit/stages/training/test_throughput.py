"""The line that predicts how long a training will take, and when nothing is measured."""

from cluster.train_settings import ProfilingSettings, TrainSettings
from stages.training.speed.throughput import run_throughput, throughput_line
from tests.stage_context import stage_context

METRICS = {
    "num_steps": 5.0,
    "tokens_per_second": 12345.6,
    "tiles_per_second": 7.25,
    "seconds_step": 2.5,
    "seconds_data_wait": 0.125,
    "peak_memory_bytes": 3.21e9,
    "seconds_predicted": 7500.0,
}


def test_the_line_names_speed_memory_and_time():
    line = throughput_line(METRICS, 3000)
    assert "12,346 tokens/s, 7.2 tiles/s, 2.50 s per update" in line
    assert "at most 3.21 GB per rank; all 3000 updates" in line and line.endswith("about 2 h 05 min")
    assert throughput_line(METRICS | {"seconds_predicted": 90.0}, 30).endswith("about 1.5 min")


def test_nothing_is_measured_unless_asked_for_or_after_the_training_has_begun(tmp_path):
    def refuse(settings):
        raise AssertionError("measured")

    context = stage_context("consistency", tmp_path, {})
    assert run_throughput(refuse, None, context, num_steps=3) == {}
    train = TrainSettings(profiling=ProfilingSettings(throughput_steps=2))
    context.site = context.site.model_copy(update={"train": train})
    (context.parts.output / "checkpoints/step-0000004").mkdir(parents=True)
    assert run_throughput(refuse, None, context, num_steps=3) == {}
