"""The graph of stages: its order, and which stages depend on which."""

import sys
from types import ModuleType

import pytest

from pipeline.config.graph import Graph, StageSpec
from vico.errors import UserError


@pytest.fixture
def spec(monkeypatch):
    def stage_spec(name, *inputs):
        """Return a stage whose module has only INPUTS."""
        module = ModuleType(f"graph_test_{name}")
        module.INPUTS = inputs
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return StageSpec(name, module.__name__)

    return stage_spec


def test_inputs_must_come_from_outside_or_from_an_earlier_stage(spec):
    with pytest.raises(ValueError, match="'b' needs \\['a'\\]"):
        Graph([spec("b", "a"), spec("a", "records")])
    with pytest.raises(ValueError, match="two stages or sources are named 'a'"):
        Graph([spec("a", "records"), spec("a", "records")])
    with pytest.raises(ValueError, match="named 'model'"):
        Graph([spec("model", "records")])


def test_dependents_of_a_stage_and_the_graph_up_to_it(spec):
    graph = Graph(
        [spec("a", "records"), spec("b", "model"), spec("c", "a"), spec("d", "b"), spec("e", "c", "d")]
    )
    assert graph.dependents(["a"]) == {"a", "c", "e"}
    assert graph.until("c").names == ["a", "b", "c"]
    assert graph.until("a").sources() == {"records"}
    with pytest.raises(UserError, match="--until='z' is not a stage; the stages are a, b, c, d, e"):
        graph.until("z")
