"""What there is to say while a mount is served, and where it goes.

As loggers of the standard library, and by way of those until a daemon says where its words go; the daemon alone never
loads them, since that takes as long as a good part of all that a mount does.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40

_write: Callable[[int, str], None] | None = None
_least = INFO


class Journal:
    """What one module has to say; `values` take the places that `text` leaves for them with %."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def debug(self, text: str, *values: object) -> None:
        """For who looks for a fault."""
        self._say(DEBUG, text, values)

    def info(self, text: str, *values: object) -> None:
        """All is well."""
        self._say(INFO, text, values)

    def warning(self, text: str, *values: object) -> None:
        """Something is not as it was asked for."""
        self._say(WARNING, text, values)

    def error(self, text: str, *values: object) -> None:
        """Something went wrong."""
        self._say(ERROR, text, values)

    def exception(self, text: str, *values: object) -> None:
        """As error, about the exception that is being handled."""
        self._say(ERROR, text, values, failure=sys.exception())

    def _say(self, level: int, text: str, values: tuple[object, ...], *, failure: BaseException | None = None) -> None:
        if _write is None:
            import logging

            logging.getLogger(self.name).log(level, text, *values, exc_info=failure, stacklevel=3)
        elif level >= _least:
            lines = [text % values if values else text, *(_history(failure) if failure else ())]
            _write(level, "\n".join(lines))


def say_to(write: Callable[[int, str], None], least: int) -> None:
    """From now on this process has `write(level, text)` called for all that is of the level `least` or above."""
    global _write, _least
    _write, _least = write, least


def take_logging_over() -> None:
    """Have the warnings of libraries go where the daemon's words go, once it has said where."""
    import logging

    class Relay(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert _write is not None
            failure = record.exc_info[1] if record.exc_info else None
            _write(record.levelno, "\n".join([record.getMessage(), *(_history(failure) if failure else ())]))

    logging.getLogger().handlers[:] = [Relay()]


def lines_to(descriptor: int) -> Callable[[int, str], None]:
    """What writes to a descriptor under the name of the program, for say_to."""

    def write(level: int, text: str) -> None:
        _put(descriptor, f"overlayfs-py: {text}\n")

    return write


def records_to(descriptor: int) -> Callable[[int, str], None]:
    """What writes to the descriptor of a log file, with the time, the process and the level, for say_to."""

    # The zone's file may lie where a mount is to be served.
    time.tzset()

    def write(level: int, text: str) -> None:
        now = time.time()
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        milliseconds = int(now % 1 * 1000)
        _put(descriptor, f"{clock},{milliseconds:03} overlayfs-py[{os.getpid()}]: {_name(level)}: {text}\n")

    return write


def _name(level: int) -> str:
    return "ERROR" if level >= ERROR else "WARNING" if level >= WARNING else "INFO" if level >= INFO else "DEBUG"


def _put(descriptor: int, text: str) -> None:
    try:
        os.write(descriptor, text.encode(errors="backslashreplace"))
    except OSError:
        # A log that is full, or that nobody reads any more, is no reason to end the service.
        return


def _history(failure: BaseException) -> list[str]:
    """Where an exception comes from, without a look at the sources, which may lie on the mount that is served."""
    lines = []
    cause = failure.__cause__ or (None if failure.__suppress_context__ else failure.__context__)
    if cause is not None:
        lines += [*_history(cause), "on which:"]
    lines.append("Traceback (most recent call last):")
    step = failure.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        lines.append(f'  File "{code.co_filename}", line {step.tb_lineno}, in {code.co_name}')
        step = step.tb_next
    return [*lines, f"{type(failure).__name__}: {failure}"]
