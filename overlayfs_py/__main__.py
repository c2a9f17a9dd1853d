"""`python -m overlayfs_py` is the program `overlayfs-py`."""

import sys

from overlayfs_py.cli.mount_program import main

sys.exit(main())
