"""Our mount program as a file that container engines can be told to run."""

import compileall
import os
import sys
from pathlib import Path

from tests.support.mounts import REPOSITORY


def write_program(path: Path, checkout: Path = REPOSITORY, python: Path | None = None) -> Path:
    """A program that runs the mount program of a checkout, at a new path, which is returned.

    Its sources are compiled before, as those of an installation are, which takes longer than a mount does.
    """
    for package in ("overlayfs_py", "mount_helper"):
        assert compileall.compile_dir(REPOSITORY / package, quiet=1)
    lines = [
        f"#!{python or sys.executable}",
        "import sys",
        f"sys.path.insert(0, {os.fspath(checkout)!r})",
        "sys.dont_write_bytecode = True",
        "from overlayfs_py.cli.mount_program import main",
        "sys.exit(main())",
        "",
    ]
    path.write_text("\n".join(lines))
    os.chmod(path, 0o755)
    return path
