"""`ovl driver` configures an engine, says whether it took, and gives back every byte."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.support.syscalls import mount, umount

_OVL = (sys.executable, "-m", "overlayfs_py.cli.ovl", "driver")
_BEFORE = """# kept
[storage]
driver = "vfs"  # kept too
runroot = "{base}/run"
graphroot = "{base}/store"
[storage.options]
pull_options = {{enable_partial_images = "false"}}
"""


def ovl(*arguments: str, status: int = 0, **environment: str) -> str:
    """What `ovl driver` prints, with an exit status."""
    done = subprocess.run(
        [*_OVL, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stderr if status else done.stdout


@pytest.fixture
def settings() -> Iterator[None]:
    """Empty directories where engines have their settings, in this mount namespace alone."""
    with ExitStack() as stack:
        for place in (b"/etc/containers", b"/etc/docker", b"/etc/systemd/system", b"/usr/local/lib"):
            os.makedirs(place, exist_ok=True)
            mount(b"none", place, b"tmpfs")
            stack.callback(umount, place)
        yield


def test_podman_takes_what_is_installed_and_all_is_given_back(settings: None, layers: Layers) -> None:
    path = Path("/etc/containers/storage.conf")
    before = _BEFORE.format(base=layers.base)
    path.write_text(before)
    path.chmod(0o600)
    (layers.base / "containers.conf").write_text(f'[engine]\ntmp_dir="{layers.base}/tmp"\nlock_type="file"\n')

    shown = ovl("install", "--dry-run", "podman")
    assert path.read_text() == before
    assert '-driver = "vfs"  # kept too\n+driver = "overlay" # kept too\n' in shown.replace('overlay"  #', 'overlay" #')
    assert ovl("install", "podman").startswith(shown)
    assert path.read_text().startswith("# kept\n")
    assert path.stat().st_mode & 0o777 == 0o600
    assert ovl("check", "podman", CONTAINERS_CONF=f"{layers.base}/containers.conf") == "podman uses overlayfs-py\n"
    assert ovl("install", "podman") == "nothing to change\n"

    assert ovl("uninstall", "podman") == f"restored {path}\n"
    assert path.read_text() == before
    assert os.listdir("/etc/containers") == ["storage.conf"]
    assert ovl("uninstall", "podman") == "nothing to take back\n"
    if os.path.ismount(layers.base / "store" / "overlay"):
        umount(os.fsencode(layers.base / "store" / "overlay"))


def test_a_user_gets_a_file_of_their_own(layers: Layers) -> None:
    path = layers.base / "containers" / "storage.conf"
    ovl("install", "podman", "--user", XDG_CONFIG_HOME=str(layers.base))
    assert "mount_program" in path.read_text()
    assert ovl("uninstall", "podman", "--user", XDG_CONFIG_HOME=str(layers.base)) == f"removed {path}\n"
    assert list(path.parent.iterdir()) == []


def test_a_file_that_was_changed_since_is_left_alone(layers: Layers) -> None:
    path = layers.base / "containers" / "storage.conf"
    ovl("install", "podman", "--user", XDG_CONFIG_HOME=str(layers.base))
    path.write_text(path.read_text() + "# mine\n")
    said = ovl("uninstall", "podman", "--user", status=1, XDG_CONFIG_HOME=str(layers.base))
    assert "was changed since" in said and said.count("\n") == 1
    assert path.read_text().endswith("# mine\n")


@pytest.mark.parametrize("text", ["[storage", "storage = 1\n"])
def test_a_file_that_is_no_configuration_is_left_alone(layers: Layers, text: str) -> None:
    path = layers.base / "containers" / "storage.conf"
    path.parent.mkdir()
    path.write_text(text)
    said = ovl("install", "podman", "--user", status=1, XDG_CONFIG_HOME=str(layers.base))
    assert said.startswith("ovl: ") and said.count("\n") == 1
    assert path.read_text() == text
    assert len(list(path.parent.iterdir())) == 1


def test_docker_gets_a_program_of_the_name_it_looks_for(settings: None) -> None:
    daemon = Path("/etc/docker/daemon.json")
    before = '{"debug": true}'
    daemon.write_text(before)
    ovl("install", "docker")
    assert json.loads(daemon.read_text()) == {"debug": True, "storage-driver": "fuse-overlayfs"}
    unit = Path("/etc/systemd/system/docker.service.d/overlayfs-py.conf").read_text()
    first = Path(unit.partition("PATH=")[2].partition(":")[0])
    done = subprocess.run([first / "fuse-overlayfs", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("overlayfs-py ")

    ovl("uninstall", "docker")
    assert daemon.read_text() == before
    left = [files for place in ("/etc/docker", "/usr/local/lib", "/etc/systemd/system") for *_, files in os.walk(place)]
    assert [files for files in left if files] == [["daemon.json"]]


def test_check_says_in_one_line_what_docker_lacks(layers: Layers) -> None:
    said = ovl("check", "docker", status=1, DOCKER_HOST=f"unix://{layers.base}/none")
    assert said.startswith("ovl: docker info: ") and said.count("\n") == 1
