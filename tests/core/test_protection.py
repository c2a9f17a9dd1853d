"""Asking whether something is protected takes no rights that changing it wouldn't take."""

import os

from overlayfs_py.core.overlay import Overlay
from tests.conftest import Layers
from tests.core.rig import Rig, configure
from tests.support.users import run_as


def test_who_may_not_read_a_file_may_change_and_remove_it(layers: Layers) -> None:
    for path in (layers.base, layers.upper, layers.work, layers.lower):
        os.chown(path, 1000, 1000)
    for name in ("f", "g"):
        (layers.upper / name).write_bytes(b"data")
        os.chown(layers.upper / name, 1000, 1000)
        (layers.upper / name).chmod(0)

    def change() -> None:
        rig = Rig(Overlay.open(configure([layers.lower], layers.upper, layers.work, userxattr=True)))
        rig.change(b"f", mode=0o200)
        rig.unlink(b"g")
        rig.fs.close()

    run_as(1000, change)
    assert (layers.upper / "f").stat().st_mode & 0o777 == 0o200
    assert not (layers.upper / "g").exists()
