"""Which attention kernel is used, and that an installed package is never replaced silently."""

import sys

import pytest
import torch

from vico.errors import UserError
from vico.model.attention_kernels import (
    ROW_KERNELS,
    Bounds,
    loaded,
    row_kernel,
    use_attention,
    vision_attention,
)

HOPPER, AMPERE, BLACKWELL = 9, 8, 10
MODULES = ("flash_attn", "flash_attn.cute", "flash_attn_interface")
# what a planted function returns tells whose it is
FUNCTION = "def flash_attn_varlen_func(*args, **kwargs):\n    return {name!r}\n"


def forget():
    loaded.cache_clear()
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Return a function that plants the packages of some kernels on the import path."""
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    files = {
        "flash-attn-2": "flash_attn/__init__.py",
        "flash-attn-3": "flash_attn_interface.py",
        "flash-attn-4": "flash_attn/cute/__init__.py",
    }

    def plant(*names):
        for name in names:
            file = tmp_path / files[name]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(FUNCTION.format(name=name))

    yield plant
    use_attention("auto", "auto")
    forget()


@pytest.mark.parametrize(
    ("installed", "capability", "width", "dropout", "expected"),
    [
        ((), HOPPER, 128, 0.0, "torch"),
        (("flash-attn-2",), HOPPER, 128, 0.0, "flash-attn-2"),
        (("flash-attn-2", "flash-attn-3"), HOPPER, 128, 0.0, "flash-attn-3"),
        (("flash-attn-2", "flash-attn-3"), AMPERE, 128, 0.0, "flash-attn-2"),
        (("flash-attn-3",), BLACKWELL, 128, 0.0, "torch"),
        (("flash-attn-2", "flash-attn-3", "flash-attn-4"), HOPPER, 128, 0.0, "flash-attn-4"),
        (("flash-attn-2", "flash-attn-3", "flash-attn-4"), HOPPER, 256, 0.0, "flash-attn-3"),
        (("flash-attn-2", "flash-attn-3", "flash-attn-4"), HOPPER, 128, 0.1, "flash-attn-2"),
        (("flash-attn-4",), AMPERE, 128, 0.0, "torch"),  # and its namespace is not taken for flash-attn 2
    ],
)
def test_the_first_kernel_that_is_there_and_supports_the_model(
    packages, installed, capability, width, dropout, expected
):
    packages(*installed)
    name, kernel = row_kernel(capability, width, dropout)
    assert name == expected
    if name != "torch":
        bounds = Bounds(torch.tensor([0, 1]), torch.tensor([0, 1]), 1, 1)
        assert kernel(None, None, None, bounds, dropout, None) == expected


def test_a_forced_kernel_is_used_or_refused(packages):
    packages("flash-attn-2", "flash-attn-4")
    use_attention("flash-attn-2", "auto")
    assert row_kernel(HOPPER, 128, 0.0)[0] == "flash-attn-2"
    use_attention("flash-attn-3", "auto")
    with pytest.raises(
        UserError, match=r"rows=flash-attn-3: .*not installed.*set train.attention.rows: auto"
    ):
        row_kernel(HOPPER, 128, 0.0)
    use_attention("flash-attn-4", "auto")
    with pytest.raises(UserError, match=r"flash-attn-4: the device has compute capability 8\.x"):
        row_kernel(AMPERE, 128, 0.0)


def test_dropout_without_a_kernel_for_it_is_refused(packages):
    with pytest.raises(UserError, match=r"torch: it has no dropout\); install flash-attn"):
        row_kernel(HOPPER, 128, 0.1)


@pytest.mark.parametrize("content", ["raise ImportError('undefined symbol: _ZN3c1')", "x = 1"])
def test_a_package_that_cannot_be_used_is_refused(packages, tmp_path, content):
    """Like a binary that was built for another torch."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(content)
    with pytest.raises(UserError, match=r"flash-attn is installed and cannot be imported .*uninstall it"):
        row_kernel(HOPPER, 128, 0.0)


def test_torch_has_the_varlen_kernel_that_comes_last():
    assert ROW_KERNELS[-1].name == "torch"
    assert loaded(ROW_KERNELS[-1]) is not None


def test_on_a_cpu_torch_chooses_the_vision_kernel():
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    with vision_attention(torch.zeros(1, dtype=torch.bfloat16)):
        assert (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before
