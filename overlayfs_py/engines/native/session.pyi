from overlayfs_py.core.overlay import Overlay
from overlayfs_py.engines.beginning import Beginning
from overlayfs_py.engines.native.pace import Pace
from overlayfs_py.engines.native.passthrough import Passthrough
from overlayfs_py.engines.native.pipes import Pipes
from overlayfs_py.engines.native.prune import Pruning

UNSUPPORTED: frozenset[str]
MAX_WRITE: int
DATA_DESCRIPTORS: int

class Session:
    uring: bool
    pace: Pace
    pipes: Pipes
    through: Passthrough
    pruning: Pruning
    minor: int | None
    def __init__(
        self, fs: Overlay, fuse_fd: int, *, want_uring: bool = False, beginning: Beginning | None = None
    ) -> None: ...
    def close(self) -> None: ...
