import sys
from types import ModuleType

import pytest

from pipeline.config.graph import Graph, StageSpec
from vico.errors import UserError


@pytest.fixture
def spec(monkeypatch):
    def made(name, *inputs):
        module = ModuleType(f"graph_test_{name}")
        module.INPUTS = inputs
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return StageSpec(name, module.__name__)

    return made


def test_inputs_must_come_from_outside_or_from_an_earlier_stage(spec):
    with pytest.raises(ValueError, match="'b' needs \\['a'\\]"):
        Graph([spec("b", "a"), spec("a", "records")])
    with pytest.raises(ValueError, match="two stages or sources are named 'a'"):
        Graph([spec("a", "records"), spec("a", "records")])
    with pytest.raises(ValueError, match="named 'model'"):
        Graph([spec("model", "records")])


def test_what_depends_on_a_stage_and_what_comes_up_to_it(spec):
    graph = Graph(
        [spec("a", "records"), spec("b", "model"), spec("c", "a"), spec("d", "b"), spec("e", "c", "d")]
    )
    assert graph.dependents(["a"]) == {"a", "c", "e"}
    assert graph.until("c").names == ["a", "b", "c"]
    assert graph.until("a").sources() == {"records"}
    with pytest.raises(UserError, match="--until='z' is no stage; the stages are a, b, c, d, e"):
        graph.until("z")
