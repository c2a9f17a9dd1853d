"""A store and a directory on a disk filesystem for each test of images."""

from pathlib import Path

import pytest

from overlayfs_py.images import Store
from tests.conftest import Layers


@pytest.fixture
def base(layers: Layers) -> Path:
    """An empty directory on a disk filesystem."""
    return layers.add("images")


@pytest.fixture
def store(base: Path) -> Store:
    return Store.open(base / "store")
