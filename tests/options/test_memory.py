"""What a mount keeps in memory for the files that the kernel knows, and max_nodes, which bounds it.

Not beside the other tests of the native engine, as those run with a sanitizer, too, whose memory this would count.
"""

import os
from pathlib import Path

import pytest

from benchmarks.requests import collect, switch, tracing
from tests.conftest import Layers
from tests.options.conftest import NATIVE, PORTABLE, URING
from tests.options.rig import mounted
from tests.support.caches import drop_names
from tests.support.mounts import Mount

FILES = int(os.environ.get("OVERLAYFS_PY_TEST_FILES", "20000"))


@pytest.fixture
def many(layers: Layers) -> Layers:
    """FILES files in directories of a hundred, and one in the upper layer."""
    for number in range(FILES // 100):
        directory = layers.lower / "many" / f"d{number}"
        directory.mkdir(parents=True)
        for file in range(100):
            (directory / f"f{file}").touch()
    (layers.upper / "u").write_bytes(b"of the upper layer")
    return layers


def private(live: Mount) -> int:
    """KiB of memory that the daemon has for itself."""
    for line in Path(f"/proc/{live.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError("no RssAnon")


def walked(layers: Layers) -> int:
    return sum(len(files) for _, _, files in os.walk(layers.mnt / "many"))


def test_a_file_that_the_kernel_knows_takes_some_four_hundred_bytes(many: Layers) -> None:
    """At a million, 380; with as few as here the dict of nodes has more room to spare."""
    with mounted(many, NATIVE) as live:
        before = private(live)
        assert walked(many) == FILES
        assert (private(live) - before) * 1024 / (FILES + FILES // 100) < 440


@pytest.mark.timeout(120 + FILES // 1000)
@pytest.mark.parametrize("native", [NATIVE, URING])
def test_files_that_are_walked_and_forgotten_again_and_again_take_no_more_each_time(
    many: Layers, over_uring: None, native: str
) -> None:
    taken, asked = [], []
    with mounted(many, native) as live, tracing():
        before = private(live)
        for _ in range(20):
            switch(on=True)
            assert walked(many) == FILES
            switch(on=False)
            asked.append(sum(count.requests for count in collect([live.connection])))
            taken.append(private(live) - before)
            drop_names()
    assert min(asked) > 0.9 * max(asked), "the kernel had not forgotten all"
    # The allocator takes some more, a piece at a time, as what is free lies between what is not. If a twentieth of
    # the nodes stayed each time, it would be twice as much.
    assert max(taken) < taken[0] * 1.6, taken


@pytest.mark.parametrize("native", [NATIVE, URING])
def test_an_idle_mount_takes_little_memory(layers: Layers, over_uring: None, native: str) -> None:
    with mounted(layers, native) as live:
        os.listdir(layers.mnt)
        lines = Path(f"/proc/{live.pid}/smaps_rollup").read_text().splitlines()
        assert sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) < 25 << 10  # KiB


@pytest.mark.parametrize("native", [NATIVE, URING])
def test_memory_stays_bounded_while_many_files_are_walked(many: Layers, over_uring: None, native: str) -> None:
    with mounted(many, native, "max_nodes=2000") as live:
        before = private(live)
        for _ in range(2):
            assert walked(many) == FILES
        # 400 bytes for each of 20,000 would be 7,800 KiB; what is open or in use is never forgotten.
        assert private(live) - before < 4_000
        with (many.mnt / "u").open("rb") as held:
            os.chdir(many.mnt / "many" / "d7")
            try:
                assert walked(many) == FILES
                assert held.read() == b"of the upper layer"
                assert len(os.listdir(".")) == 100
                Path("f3").write_bytes(b"written")
            finally:
                os.chdir("/")
        assert (many.upper / "many" / "d7" / "f3").read_bytes() == b"written"


@pytest.mark.parametrize("option", ["max_nodes=2000", "security_label", "readdirplus=auto"])
def test_the_portable_engine_says_what_it_can_not_do(layers: Layers, option: str) -> None:
    log = layers.base / "log"
    with mounted(layers, PORTABLE, option, log=log):
        assert os.listdir(layers.mnt) == []
    assert f"option {option.partition('=')[0]} has no effect in the portable engine; ignored" in log.read_text()
