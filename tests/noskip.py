"""A pytest plugin (`-p tests.noskip`) under which a test that is skipped, or expected to fail, has failed.

None may be deselected either.
"""

from collections.abc import Generator, Sequence

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"not tested: {report.longrepr}"
        # Set for a test that is expected to fail, which pytest counts by this alone.
        vars(report).pop("wasxfail", None)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"not tested: {report.longrepr}"
    return report


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    raise pytest.UsageError(f"not tested: {', '.join(item.nodeid for item in items)}")
