"""A snapshotter for each test."""

from collections.abc import Iterator

import pytest

from tests.conftest import Layers
from tests.drivers.rig import Client, Process, snapshotter


@pytest.fixture
def process(layers: Layers) -> Iterator[Process]:
    with snapshotter(layers.base) as running:
        yield running


@pytest.fixture
def client(process: Process) -> Client:
    return process.client
