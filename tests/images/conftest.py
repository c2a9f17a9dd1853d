"""A store and a directory on a disk filesystem for each test of images."""

from pathlib import Path

import pytest

from overlayfs_py.images import Store, publish
from tests.conftest import Layers


@pytest.fixture
def base(layers: Layers) -> Path:
    """An empty directory on a disk filesystem."""
    return layers.add("images")


@pytest.fixture
def store(base: Path) -> Store:
    return Store.open(base / "store")


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests don't wait for the disk, which others use; those of the command do."""
    monkeypatch.setattr(publish, "_sync", lambda _directory: None)
