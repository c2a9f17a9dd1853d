"""A pytest plugin (`-p tests.noskip`) under which a skipped, expectedly failing or deselected test fails the run."""

from collections.abc import Sequence

import pytest

_untested: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        _untested.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _untested.append(report.nodeid)


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    _untested.extend(item.nodeid for item in items)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _untested and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _untested:
        terminalreporter.section("NOT TESTED: the run fails", sep="!", red=True, bold=True)
        for nodeid in _untested:
            terminalreporter.line(nodeid)
