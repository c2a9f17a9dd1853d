"""Something outside the layers that is not to be touched."""

from collections.abc import Iterator

import pytest

from tests.conftest import Layers
from tests.core.conftest import make
from tests.hostile.canary import Canary

__all__ = ["canary", "make"]


@pytest.fixture
def canary(layers: Layers) -> Iterator[Canary]:
    """Files beside the layers. The test fails if anybody touches them."""
    watched = Canary(layers.base / "outside")
    try:
        yield watched
        assert watched.touches() == []
    finally:
        watched.close()
