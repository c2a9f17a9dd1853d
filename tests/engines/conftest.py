"""Images, made once for the tests of an engine."""

from pathlib import Path
from typing import Final

import pytest

from tests.engines.image import make_debian, make_image

_LIMIT: Final = 300  # seconds: each test has engines work through whole images, on machines that may have other work


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(_LIMIT))


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
