"""Under `-p tests.noskip` nothing goes untested unnoticed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

UNTESTED = {
    "a skip": "import pytest\ndef test(): pytest.skip('because')\n",
    "a skip in a fixture": "import pytest\n@pytest.fixture\ndef it(): pytest.skip('because')\ndef test(it): pass\n",
    "a skip by a mark": "import pytest\n@pytest.mark.skipif(True, reason='because')\ndef test(): pass\n",
    "a skip of a module": "import pytest\npytest.skip('because', allow_module_level=True)\ndef test(): pass\n",
    "an expected failure": "import pytest\n@pytest.mark.xfail(reason='because')\ndef test(): assert False\n",
}


def run(folder: Path, module: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(module)
    command = [sys.executable, "-m", "pytest", "-p", "tests.noskip", "-p", "no:cacheprovider", "-c", os.devnull]
    return subprocess.run(
        [*command, f"--rootdir={folder}", *options, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("module", UNTESTED.values(), ids=UNTESTED.keys())
def test_what_is_not_tested_fails_the_run(module: str, tmp_path: Path) -> None:
    done = run(tmp_path, module)
    assert done.returncode not in (0, 5), done.stdout
    assert "not tested" in done.stdout
    assert "because" in done.stdout


def test_a_test_that_is_left_out_fails_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, "def test_one(): pass\ndef test_other(): pass\n", "-k", "one")
    assert done.returncode not in (0, 5), done.stdout
    assert "not tested: test_it.py::test_other" in done.stderr


def test_a_run_in_which_all_is_tested_passes(tmp_path: Path) -> None:
    assert run(tmp_path, "def test(): pass\n").returncode == 0
