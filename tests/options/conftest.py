"""Both engines, and the kernel's switch for io_uring put back as it was."""

from collections.abc import Iterator
from typing import Final

import pytest

from tests.support.uring import switch_kept

PORTABLE: Final = "engine=portable"
NATIVE: Final = "engine=native,uring=off"
URING: Final = "engine=native,uring=on"

_NAMES: Final = {PORTABLE: "portable", NATIVE: "native", URING: "uring"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames:
        engines = [PORTABLE, NATIVE]
        if "over_uring" in metafunc.fixturenames:
            engines.append(URING)
        metafunc.parametrize("engine", engines, ids=_NAMES.__getitem__)


@pytest.fixture
def over_uring() -> Iterator[None]:
    """For tests that also run over io_uring: `uring=on` turns it on for the machine, so it is set back."""
    with switch_kept():
        yield
