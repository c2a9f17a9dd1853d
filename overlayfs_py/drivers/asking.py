"""Commands of the engines that are asked whether they use us."""

from __future__ import annotations

import subprocess
from typing import Final

from overlayfs_py.drivers.changes import DriverError

_LIMIT: Final = 60.0  # seconds for an answer


def answer(*command: str) -> str:
    """What a command prints. Raises DriverError when it is not installed, fails, or doesn't end within a minute."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT, check=False
        )
    except FileNotFoundError as error:
        raise DriverError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise DriverError(f"{' '.join(command)}: no answer for {_LIMIT:.0f} seconds") from error
    if done.returncode:
        raise DriverError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout
