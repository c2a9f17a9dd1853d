from overlayfs_py.core.overlay import Overlay

UNSUPPORTED: frozenset[str]
MAX_WRITE: int

class Session:
    uring: bool
    minor: int | None
    def __init__(self, fs: Overlay, *, want_uring: bool = False) -> None: ...
    def close(self) -> None: ...
