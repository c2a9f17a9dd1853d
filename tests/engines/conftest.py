"""One image, made once for the tests of an engine, and their monitors reaped."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.engines.image import make_image

_INTERVAL: Final = 0.02  # seconds


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with the image."""
    path = tmp_path_factory.mktemp("image") / "layout"
    make_image(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def reaped_monitors() -> Iterator[None]:
    """The run adopts the monitors of containers, and engines wait for those that have ended but are not reaped."""
    ended = threading.Event()
    reaper = threading.Thread(target=_reap_until, args=(ended,))
    reaper.start()
    try:
        yield
    finally:
        ended.set()
        reaper.join()


def _reap_until(ended: threading.Event) -> None:
    while not ended.wait(_INTERVAL):
        for table in Path("/proc/self/task").glob("*/children"):
            # A thread of the test's may end at any moment.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for child in table.read_text().split():
                    # Adopted ones alone, which have left the session: subprocess waits for those that it has started.
                    if os.getsid(int(child)) != os.getsid(0):
                        os.waitpid(int(child), os.WNOHANG)
