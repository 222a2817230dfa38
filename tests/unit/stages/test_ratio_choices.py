"""What the ratio stage compresses and which samples it looks at."""

import numpy as np
import pytest
from pydantic import ValidationError

from stages.evaluate import EvaluateConfig
from stages.ratio import RatioConfig
from stages.ratio_worker import rate_vectors
from stages.sample_choice import chosen_rows


def as_text(vectors) -> list[str]:
    return ["".join(str(int(flag)) for flag in vector) for vector in vectors]


def test_one_tile_at_a_time_after_the_full_rate():
    assert as_text(rate_vectors((2, 1), "tile")) == ["000", "100", "010", "001"]
    assert as_text(rate_vectors((1,), "tile")) == ["0", "1"]


def test_all_tiles_of_an_image_at_a_time():
    assert as_text(rate_vectors((2, 1), "image")) == ["000", "110", "001"]
    assert as_text(rate_vectors((3,), "image")) == ["000", "111"]


def test_a_smaller_choice_lies_within_a_larger_one():
    rows = np.arange(5, 500, 3)
    small, large = chosen_rows(rows, 20, 1), chosen_rows(rows, 60, 1)
    assert len(small) == 20 and set(small) <= set(large) <= set(rows) and (np.diff(large) > 0).all()
    assert chosen_rows(rows, 0, 1).tolist() == chosen_rows(rows, 999, 1).tolist() == rows.tolist()
    assert set(chosen_rows(rows, 20, 2)) != set(small)
    assert small.max() > 250  # drawn, not the first


def test_rows_that_cannot_be_used_leave_the_others_chosen():
    rows = np.arange(300)
    usable = rows % 4 != 0
    assert set(chosen_rows(rows, 100, 1)[usable[chosen_rows(rows, 100, 1)]]) <= set(
        chosen_rows(rows[usable], 100, 1)
    )


@pytest.mark.parametrize(
    "config, values, message",
    [
        (RatioConfig, {"splits": ("calib", "test")}, "needs train"),
        (RatioConfig, {"splits": ("train", "train")}, "no split twice"),
        (EvaluateConfig, {"shares": (0.5, 1.0)}, "between 0 and 1"),
        (EvaluateConfig, {"controls": ("rendom",)}, "random"),
    ],
)
def test_configs_refuse_what_cannot_be_meant(config, values, message):
    with pytest.raises(ValidationError, match=message):
        config(**values)
