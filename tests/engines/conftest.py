"""Images, made once for the tests of an engine."""

from pathlib import Path

import pytest

from tests.engines.image import make_debian, make_image


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with the image."""
    path = tmp_path_factory.mktemp("image") / "layout"
    make_image(path)
    return path


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with a Debian root."""
    path = tmp_path_factory.mktemp("debian") / "layout"
    make_debian(path)
    return path
