"""The table of a process's descriptors: made large enough before threads share it."""

import re
import subprocess
import sys

import pytest

_SCRIPT = """
import os, resource, sys
from overlayfs_py.sys.descriptors import make_room
limit, taken = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
if taken:
    os.dup2(0, taken)
before = os.listdir("/proc/self/fd")
make_room(0, limit)
assert os.listdir("/proc/self/fd") == before
print(open("/proc/self/status").read())
"""


@pytest.mark.parametrize(
    ("limit", "taken", "least"), [(20000, 0, 1024), (1024, 1023, 1024), (100, 0, 65), (100, 99, 65)]
)
def test_the_table_has_room_for_all_descriptors_there_may_be(limit: int, taken: int, least: int) -> None:
    command = [sys.executable, "-c", _SCRIPT, str(limit), str(taken)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    found = re.search(r"^FDSize:\s*(\d+)$", done.stdout, re.MULTILINE)
    assert found is not None
    assert int(found[1]) >= least
