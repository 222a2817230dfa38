import sys

import pytest

from pipeline.identity.source_files import _imports, _sha256, _source_file, _spec, source_digests

FILES = {
    "srcstage/__init__.py": "",
    "srcstage/one.py": """
import json
def run():
    from srcstage import deep
    from srcstage.parts import part
""",
    "srcstage/deep.py": "from . import deeper\n",
    "srcstage/deeper.py": "import srcstage.last as last\n",
    "srcstage/last.py": "x = 1\n",
    "srcstage/parts.py": "def part(): ...\n",
    "srcstage/unused.py": "raise RuntimeError\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "srcstage").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "srcstage", raising=False)
    for cached in (_imports, _sha256, _source_file, _spec):
        cached.cache_clear()
    return tmp_path


def test_everything_that_a_stage_imports_belongs_to_its_sources(package):
    digests = source_digests("srcstage.one")
    expected = {"__init__", "one", "deep", "deeper", "last", "parts"}
    assert set(digests) == {f"srcstage/{name}.py" for name in expected}


def test_an_import_in_any_kind_of_statement_is_found(tmp_path):
    lines = """
try:
    import a1
except* OSError:
    import a2
else:
    import a3
finally:
    import a4
async def f():
    async with x:
        import a5
    async for y in x:
        import a6
    else:
        import a7
    while y: import a8
match x:
    case 1:
        if y: import a9
        elif z: import a10
        else: from a11 import b
class C:
    def f(self):
        try: pass
        except OSError: from . import a12
x = 1; import a13, a14 as c
"""
    (tmp_path / "one.py").write_text(lines)
    found = {name for name in _imports("pack.one", tmp_path / "one.py") if "a1" in name or name[0] == "a"}
    expected = {f"a{number}" for number in range(1, 15)} - {"a12"} | {"a11.b", "pack.a12"}
    assert found == expected


def test_an_edit_of_an_indirect_import_is_seen(package):
    before = source_digests("srcstage.one")
    (package / "srcstage/last.py").write_text("x = 2\n")
    _sha256.cache_clear()
    after = source_digests("srcstage.one")
    assert {name for name in after if before[name] != after[name]} == {"srcstage/last.py"}


def test_the_sources_of_a_real_stage_leave_out_where_and_when_it_runs():
    digests = source_digests("stages.consistency.stage")
    assert {
        "stages/consistency/stage.py",
        "stages/consistency/worker.py",
        "vico/losses.py",
        "data_prep/packs/plan.py",
    } <= set(digests)
    assert not [name for name in digests if name.startswith(("pipeline/", "cluster/", "tests/"))]
