"""overlayfs-py: a FUSE overlay filesystem for containers, and what it is made of.

config     every mount option, parsed and checked
errors     what may go wrong before there is a mount
journal    what a daemon has to say, and where it goes
records    named tuples and the like, without loading what has them
mounting   mount(), and the Mount it returns
core       the overlay's semantics, without FUSE: open a stack, call the operations of core.ops
engines    what carries requests between the kernel and core
images     OCI images: a store with one directory a layer, which it unpacks, compares, commits and checks
runtime    containers: their state, root, process, ports and volumes
sys        raw system calls
cli        the programs `overlayfs-py` and `ovl`

The names below are the library. Each is loaded when it is first used, as a program that only parses options needs few.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from overlayfs_py.config import MountConfig, parse_options
    from overlayfs_py.core.overlay import Overlay
    from overlayfs_py.core.requests import drive
    from overlayfs_py.errors import ConfigError, LayerError, MountError, OverlayError
    from overlayfs_py.mounting import Mount, mount

__all__ = [
    "ConfigError",
    "LayerError",
    "Mount",
    "MountConfig",
    "MountError",
    "Overlay",
    "OverlayError",
    "drive",
    "mount",
    "parse_options",
]

__version__ = "0.1.0"

_HOMES = {
    "ConfigError": "errors",
    "LayerError": "errors",
    "Mount": "mounting",
    "MountConfig": "config",
    "MountError": "errors",
    "Overlay": "core.overlay",
    "OverlayError": "errors",
    "drive": "core.requests",
    "mount": "mounting",
    "parse_options": "config",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
