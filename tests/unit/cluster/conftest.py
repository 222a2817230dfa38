from collections.abc import Callable

import pytest

from cluster.site import Site
from cluster.site_files import load_site


@pytest.fixture
def site_file(tmp_path, monkeypatch) -> Callable[..., Site]:
    """Return a function that writes a site file and loads it."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, **options: str) -> Site:
        path = tmp_path / "here.yaml"
        path.write_text(text)
        return load_site(path, **options)

    return load
