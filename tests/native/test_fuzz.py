"""The fuzzer's fixed inputs; longer runs are `python -m tests.native.fuzz --seconds 900`."""

import subprocess
import sys

import pytest

from tests.support.mounts import REPOSITORY


@pytest.mark.parametrize("transport", [(), ("--ring",)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_requests_near_to_valid_ones_are_answered_as_the_protocol_has_it(seed: int, transport: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tests.native.fuzz", "--inputs", "200", "--seed", str(seed), *transport]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
