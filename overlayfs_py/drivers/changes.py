"""Changes of configuration files that can be shown before they are made, and taken back afterwards."""

from __future__ import annotations

import difflib
import errno
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_BACKUP: Final = ".before-overlayfs-py"


class DriverError(Exception):
    """An engine cannot be configured, or its configuration not be taken back; the message is one line."""


@dataclass(frozen=True, slots=True)
class Change:
    """The text that a file shall have, and the mode of a file that is new."""

    path: Path
    text: str
    mode: int = 0o644


def difference(change: Change) -> str:
    """What a change does to its file, as a unified diff; empty when nothing."""
    old = read(change.path)
    lines = difflib.unified_diff(
        (old or "").splitlines(keepends=True),
        change.text.splitlines(keepends=True),
        str(change.path) if old is not None else os.devnull,
        str(change.path),
    )
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def make(changes: Sequence[Change]) -> None:
    """Make all changes, each with a backup beside its file, or none of them. Raises OSError."""
    made: list[Path] = []
    try:
        for change in changes:
            old = read(change.path)
            if old == change.text:
                continue
            backup = _backup(change.path)
            # The first backup is what the user had, whatever we have written since.
            kept: dict[str, Any] = json.loads(backup.read_text()) if backup.exists() else {"before": old}
            new = [str(parent) for parent in change.path.parents if not parent.exists()]
            kept.update(after=change.text, directories=[*new, *kept.get("directories", ())])
            change.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write(backup, json.dumps(kept), 0o600)
            except OSError:
                _remove_empty(new)
                raise
            made.append(change.path)
            _write(change.path, change.text, change.mode)
    except OSError:
        undo(made)
        raise


def undo(paths: Sequence[Path]) -> list[Path]:
    """Give files back what they had before `make`, newest first; returns those that had been changed.

    Directories that were made for them go, if nothing else is in them by now.

    Raises DriverError, and changes nothing, where another has written to one since.
    """
    found: list[tuple[Path, str | None, list[str]]] = []
    for path in reversed(paths):
        backup = _backup(path)
        if not backup.exists():
            continue
        kept = json.loads(backup.read_text())
        if read(path) not in (kept["before"], kept["after"]):
            raise DriverError(f"{path} was changed since: take it back by hand, what it had is in {backup}")
        found.append((path, kept["before"], kept.get("directories", [])))
    for path, before, directories in found:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            _write(path, before, 0o644)
        _backup(path).unlink()
        _remove_empty(directories)
    return [path for path, _, _ in found]


def _remove_empty(directories: Sequence[str]) -> None:
    """Remove directories, the innermost first, up to one that holds something."""
    for directory in directories:
        try:
            os.rmdir(directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise
            # somebody's own is in it, or it is gone
            return


def is_made(path: Path) -> bool:
    """Whether `make` has changed a file, and `undo` would give it back."""
    return _backup(path).exists()


def read(path: Path) -> str | None:
    """The text of a configuration file, None where there is none. Raises DriverError when it is not UTF-8."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DriverError(f"{path} is not UTF-8") from error


def _backup(path: Path) -> Path:
    return path.with_name(path.name + _BACKUP)


def _write(path: Path, text: str, mode: int) -> None:
    """Replace a file in one step; the mode and owner of one that exists stay."""
    # A link stays one, and what it names is changed.
    path = path.resolve()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w") as file:
            file.write(text)
            try:
                st = path.stat()
            except FileNotFoundError:
                os.fchmod(descriptor, mode)
            else:
                os.fchown(descriptor, st.st_uid, st.st_gid)
                os.fchmod(descriptor, st.st_mode & 0o7777)
            file.flush()
            os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
