"""One corpus of POSIX behaviour, for a plain directory, for the kernel's overlayfs, and for ours."""

import pytest

pytest.register_assert_rewrite("tests.posix.rig", "tests.posix.files", "tests.posix.acl")
