"""Names and expressions in the form that MLflow accepts."""

import pytest

from cluster.site import Site
from pipeline.tracking.client import chunks, metric_key, tag_filter


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("loss", "loss"),
        ("system/node-1/cpu", "system/node-1/cpu"),
        ("kl@0.5", "kl_0.5"),
        ("../up", "_up"),
        ("a//b", "a__b"),
        ("/root", "_root"),
        ("", "_"),
    ],
)
def test_metric_names_become_names_that_mlflow_accepts(name, key):
    assert metric_key(name) == key


def test_a_search_names_every_tag():
    expression = tag_filter({"vico.run": "a-run", "vico.stage": "draw"})
    assert expression == "tags.`vico.run` = 'a-run' and tags.`vico.stage` = 'draw'"


def test_chunks_are_in_order_and_complete():
    assert list(chunks([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]


def test_passwords_of_a_tracking_server_stay_out_of_files():
    site = Site.model_validate({"tracking": {"uri": "postgresql://me:secret@host:5432/mlflow"}})
    assert site.tracking_address == "postgresql://host:5432/mlflow"
