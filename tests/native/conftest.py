"""What tests of the native engine share: its transports."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.support.uring import switch_kept


@pytest.fixture(params=["off", "on"])
def uring(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both transports; the machine's switch is as it was afterwards."""
    with switch_kept() if request.param == "on" else contextlib.nullcontext():
        yield str(request.param)
