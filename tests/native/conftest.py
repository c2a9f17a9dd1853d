"""What tests of the native engine share: its transports, and what it keeps of those served in this process."""

import contextlib
from collections.abc import Iterator

import pytest

from overlayfs_py.config import MountConfig
from overlayfs_py.core.overlay import Overlay
from tests.native import wire
from tests.support.uring import switch_kept


@pytest.fixture(params=["off", "on"])
def uring(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both transports; the machine's switch is as it was afterwards."""
    with switch_kept() if request.param == "on" else contextlib.nullcontext():
        yield str(request.param)


@pytest.fixture
def overlays(monkeypatch: pytest.MonkeyPatch) -> list[Overlay]:
    """The overlays that are served in this process, the latest last."""
    made: list[Overlay] = []

    def make(config: MountConfig) -> Overlay:
        made.append(Overlay(config))
        return made[-1]

    monkeypatch.setattr(wire, "Overlay", make)
    return made
