"""What the daemon has to say: through loggers, or to where it said itself."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs_py import journal
from overlayfs_py.journal import Journal


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(journal, "_write", None)
    monkeypatch.setattr(journal, "_least", journal.INFO)
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before


def test_without_a_daemon_loggers_have_the_words(caplog: pytest.LogCaptureFixture) -> None:
    Journal("overlayfs_py.some").warning("%d of %s", 1, "two")
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("overlayfs_py.some", "WARNING", "1 of two")
    ]


def test_a_daemon_hears_what_is_of_its_level() -> None:
    heard: list[tuple[int, str]] = []
    journal.say_to(lambda level, text: heard.append((level, text)), journal.INFO)
    log = Journal("some")
    log.debug("not heard")
    log.info("100%")
    log.error("%s failed", "it")
    assert heard == [(journal.INFO, "100%"), (journal.ERROR, "it failed")]


def test_an_exception_is_told_with_where_it_comes_from_and_no_look_at_sources(tmp_path: Path) -> None:
    heard: list[str] = []
    journal.say_to(lambda level, text: heard.append(text), journal.INFO)
    scope: dict[str, object] = {}
    exec(compile("def f():\n    raise ValueError('deep')\n", str(tmp_path / "gone.py"), "exec"), scope)
    try:
        try:
            scope["f"]()  # type: ignore[operator]
        except ValueError as error:
            raise KeyError("outer") from error
    except KeyError:
        Journal("some").exception("unexpected")
    lines = heard[0].splitlines()
    assert lines[0] == "unexpected"
    assert f'  File "{tmp_path}/gone.py", line 2, in f' in lines
    assert lines.index("ValueError: deep") < lines.index("KeyError: 'outer'")


def test_a_log_file_has_time_process_and_level_before_the_words(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        journal.say_to(journal.records_to(descriptor), journal.DEBUG)
        Journal("some").warning("a name: %s", "\udcff")
        Journal("some").debug("found")
    finally:
        os.close(descriptor)
    head = rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} overlayfs-py\[{os.getpid()}\]: "
    text = (tmp_path / "log").read_text()
    assert re.fullmatch(rf"{head}WARNING: a name: \\udcff\n{head}DEBUG: found\n", text), text


def test_a_log_that_is_full_ends_nothing() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        journal.say_to(journal.lines_to(descriptor), journal.INFO)
        Journal("some").error("words")
    finally:
        os.close(descriptor)


def test_what_libraries_warn_of_goes_where_the_rest_goes() -> None:
    heard: list[tuple[int, str]] = []
    journal.say_to(lambda level, text: heard.append((level, text)), journal.INFO)
    journal.take_logging_over()
    logging.getLogger("some.library").warning("%s", "careful")
    assert heard == [(logging.WARNING, "careful")]
