"""The table of operations is what engines serve: each row handled, or declared unsupported."""

import inspect

import pyfuse3
import pytest

from overlayfs_py.core.ops import OPERATIONS
from overlayfs_py.engines import portable


def test_the_portable_engine_handles_each_row_or_says_that_it_does_not() -> None:
    rows = frozenset(OPERATIONS)
    own = {name for name, value in vars(portable.Portable).items() if inspect.iscoroutinefunction(value)}
    assert rows - own == portable.UNSUPPORTED
    assert portable.UNSUPPORTED <= rows


@pytest.mark.parametrize("row", sorted(set(OPERATIONS) - portable.UNSUPPORTED))
def test_a_row_that_is_handled_goes_through_the_table(row: str) -> None:
    source = inspect.getsource(getattr(portable.Portable, row))
    assert f'OPERATIONS["{row}"]' in source


@pytest.mark.parametrize("row", sorted(portable.UNSUPPORTED))
def test_what_is_unsupported_is_what_pyfuse3_cannot_ask(row: str) -> None:
    assert not hasattr(pyfuse3.Operations, row)
