"""The plot of training curves: units on every axis, ratios apart from losses, means over values."""

import numpy as np
import pyarrow as pa

from stages.evaluate.training_curves import running_mean, training_curves


def curve_table(num_steps: int, **metrics: float) -> pa.Table:
    rows = [
        (step, name, value * (1 + 0.5 * (step % 2)))
        for name, value in metrics.items()
        for step in range(1, num_steps + 1)
    ]
    steps, names, values = zip(*rows, strict=True)
    return pa.table({"step": steps, "name": names, "value": values})


def test_every_plot_has_units_and_ratios_are_not_among_losses():
    metrics = {"loss": 0.4, "kl_per_token": 0.1, "validation_kl_over_best": 1.1, "grad_norm": 3.0}
    metrics |= {"learning_rate": 1e-4, "share_compressed": 0.5, "validation_kl_full": 0.2}
    figure = training_curves({"consistency": curve_table(100, **metrics)})
    axes = {each.get_title(): each for each in figure.axes}
    assert all(each.get_xlabel() == "step" and each.get_ylabel() for each in axes.values())
    labels = {title: {line.get_label() for line in each.lines} for title, each in axes.items()}
    assert {"loss", "kl per token", "validation kl full"} <= labels["consistency: loss"]
    assert "validation kl over best" not in labels["consistency: loss"]
    assert "validation kl over best" in labels["consistency: validation KL / its best"]
    assert not labels["consistency: gradient norm"] & {"learning rate"}


def test_the_auc_of_every_candidate_is_in_one_plot():
    metrics = {"loss": 0.4, "accuracy": 0.8, "validation_auc/0": 0.8, "validation_auc/1": 0.85}
    figure = training_curves({"router": curve_table(10, **metrics)})
    axes = {each.get_title(): each for each in figure.axes}
    labels = [line.get_label() for line in axes["router: AUC on calibration tiles"].lines]
    assert labels == ["validation auc/0", "validation auc/1"]


def test_a_long_curve_is_smoothed_over_its_values_and_a_short_one_is_not():
    for num_steps, num_lines in ((100, 2), (20, 1)):
        figure = training_curves({"router": curve_table(num_steps, loss=0.5)})
        (axes,) = figure.axes
        assert len(axes.lines) == num_lines
    assert np.allclose(running_mean(np.array([0.0, 3.0, 0.0, 3.0])), [1.5, 1.0, 2.0, 1.5])


def test_no_legend_covers_a_line():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = training_curves({"consistency": curve_table(100, loss=0.4, kl_per_token=0.1)})
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert not legend.overlaps(axes.get_window_extent())
