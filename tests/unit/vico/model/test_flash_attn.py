"""Which varlen kernel is used, and that an installed flash-attn is never replaced silently."""

import sys

import pytest

from vico.errors import UserError
from vico.model.segments import flash_attn_varlen


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return the folder of a package flash_attn on the import path, not created yet."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    flash_attn_varlen.cache_clear()
    yield tmp_path / "flash_attn"
    sys.modules.pop("flash_attn", None)
    flash_attn_varlen.cache_clear()


def test_a_package_that_cannot_be_imported_is_refused(package):
    """Like a binary that was built for another torch."""
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c1')"
    )
    with pytest.raises(
        UserError, match=r"flash_attn .*undefined symbol: _ZN3c1\); install one .* uninstall it"
    ):
        flash_attn_varlen()


def test_a_namespace_without_the_kernel_is_none(package):
    """flash-attn 4 alone installs only its own package within."""
    (package / "cute").mkdir(parents=True)
    assert flash_attn_varlen() is None


def test_a_package_that_can_be_imported_is_used(package):
    package.mkdir()
    (package / "__init__.py").write_text("def flash_attn_varlen_func():\n    return 'attended'\n")
    assert flash_attn_varlen()() == "attended"
