"""What can go wrong while a mount is set up.

The message of each is one line for the user: what is wrong and what to do. Once a mount serves, errors are plain
`OSError`.
"""


class OverlayError(Exception):
    """The common base: nothing was mounted, and the message says why."""


class ConfigError(OverlayError):
    """An option, or options together, or the paths they name, cannot be used."""


class LayerError(OverlayError):
    """A layer, or the work directory, cannot be opened or does not hold what an overlay needs."""


class MountError(OverlayError):
    """The kernel or fusermount3 refused the mount, or the daemon ended before the root answered."""
