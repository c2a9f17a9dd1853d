"""A short run of the stress; `make test-stress` has longer ones."""

import os

import pytest

from tests.conftest import Layers
from tests.native.stress import lay_out, stress
from tests.native.walker import Walker

SECONDS = float(os.environ.get("OVERLAYFS_PY_TEST_SECONDS", "4"))


def test_the_walker_and_a_plain_directory_agree(layers: Layers) -> None:
    base = layers.add("plain")
    lay_out(base, 1)
    walker = Walker(base / "lower" / "c0", 1)
    for _ in range(2000):
        walker.step()
    walker.close()
    walker.check()


@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize(("uring", "io"), [("off", "cached"), ("on", "cached"), ("on", "passthrough")])
def test_many_clients_lose_no_byte_and_leave_nothing_behind(layers: Layers, uring: str, io: str) -> None:
    done = stress(layers.add("stress"), uring=uring, io=io, seconds=SECONDS, clients=4, seed=1)
    assert done.operations > 200
    assert done.mounts > 1
