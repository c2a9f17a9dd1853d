"""`ovl driver` configures an engine, says whether it took, and gives back every byte."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from overlayfs_py.drivers.containerd.configuration import ROOT, unit
from tests.conftest import Checkout, Layers
from tests.support.mounts import REPOSITORY
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
    """Empty directories where engines have their settings and their data, in this mount namespace alone."""
    places = ["/etc/containers", "/etc/docker", "/etc/containerd", "/etc/systemd/system"]
    places += ["/usr/local/lib", "/usr/local/bin", "/var/lib", "/run"]
    with ExitStack() as stack:
        for place in map(os.fsencode, places):
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
    # On a machine that has buildah alone.
    programs = layers.add("programs")
    (programs / "buildah").symlink_to(shutil.which("buildah") or "")
    assert ovl("check", "podman", PATH=str(programs)) == "podman uses overlayfs-py\n"
    assert "buildah mounts with the kernel: " in ovl(
        "check", "podman", status=1, PATH=str(programs), **kernels(layers.base)
    )

    assert ovl("uninstall", "podman").startswith(f"restored {path}\n")
    assert path.read_text() == before
    assert os.listdir("/etc/containers") == ["storage.conf"]
    assert ovl("uninstall", "podman") == "nothing to take back\n"
    for name in ("store", "kernels"):
        if os.path.ismount(layers.base / name / "overlay"):
            umount(os.fsencode(layers.base / name / "overlay"))


def kernels(base: Path) -> dict[str, str]:
    """What makes engines mount with the kernel."""
    conf = base / "kernels.conf"
    conf.write_text(f'[storage]\ndriver = "overlay"\nrunroot = "{base}/run"\ngraphroot = "{base}/kernels"\n')
    return {"CONTAINERS_STORAGE_CONF": str(conf)}


@pytest.mark.parametrize("own", [[], ["before"], ["since"], ["before", "since"]])
def test_a_user_gets_a_file_of_their_own(layers: Layers, own: list[str]) -> None:
    """Directories made for it go with it, unless they hold something by then."""
    home = layers.base / "home" / "config"
    path = home / "containers" / "storage.conf"
    if "before" in own:
        path.parent.mkdir(parents=True)
    ovl("install", "podman", "--user", XDG_CONFIG_HOME=str(home))
    assert "mount_program" in path.read_text()
    ovl("install", "podman", "--user", XDG_CONFIG_HOME=str(home))
    if "since" in own:
        (home / "mine").touch()
    assert ovl("uninstall", "podman", "--user", XDG_CONFIG_HOME=str(home)).startswith(f"removed {path}\n")
    assert path.parent.exists() == ("before" in own)
    assert home.parent.exists() == bool(own)
    if "before" in own:
        assert os.listdir(path.parent) == []
    if "since" in own:
        assert (home / "mine").exists()


def test_a_file_that_was_changed_since_is_left_alone(layers: Layers) -> None:
    path = layers.base / "containers" / "storage.conf"
    ovl("install", "podman", "--user", XDG_CONFIG_HOME=str(layers.base))
    path.write_text(path.read_text() + "# mine\n")
    said = ovl("uninstall", "podman", "--user", status=1, XDG_CONFIG_HOME=str(layers.base))
    assert "was changed since" in said and said.count("\n") == 1
    assert path.read_text().endswith("# mine\n")


@pytest.mark.parametrize("text", ["[storage", "storage = 1\n", "storage.options = 'none'\n", "\udcff"])
def test_a_file_that_is_no_configuration_is_left_alone(layers: Layers, text: str) -> None:
    path = layers.base / "containers" / "storage.conf"
    path.parent.mkdir()
    path.write_bytes(os.fsencode(text))
    said = ovl("install", "podman", "--user", status=1, XDG_CONFIG_HOME=str(layers.base))
    assert said.startswith("ovl: ") and said.count("\n") == 1
    assert path.read_bytes() == os.fsencode(text)
    assert len(list(path.parent.iterdir())) == 1


def test_docker_takes_what_is_installed_and_all_is_given_back(settings: None) -> None:
    path = Path("/etc/docker/daemon.json")
    before = '{"debug": true, "iptables": false, "ip6tables": false, "bridge": "none"}'
    path.write_text(before)
    ovl("install", "docker")
    assert json.loads(path.read_text()) == json.loads(before) | {"storage-driver": "fuse-overlayfs"}
    unit = Path("/etc/systemd/system/docker.service.d/overlayfs-py.conf").read_text()
    programs = unit.partition("PATH=")[2].strip()
    first = Path(programs.partition(":")[0])
    done = subprocess.run([first / "fuse-overlayfs", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("overlayfs-py ")
    with daemon("dockerd", ready=("docker", "version"), PATH=programs):
        assert ovl("check", "docker") == "docker uses overlayfs-py\n"

    said = ovl("uninstall", "docker")
    assert f"restored {path}\n" in said
    assert path.read_text() == before
    # The key is the daemon's own.
    assert files("/etc/docker", "/usr/local/lib", "/etc/systemd/system") == [str(path), "/etc/docker/key.json"]
    path.write_text(before.replace("}", ', "storage-driver": "vfs"}'))
    with daemon("dockerd", ready=("docker", "version")):
        assert ovl("check", "docker", status=1) == "ovl: Docker uses the driver vfs\n"


def test_check_says_in_one_line_what_docker_lacks(layers: Layers) -> None:
    said = ovl("check", "docker", status=1, DOCKER_HOST=f"unix://{layers.base}/none")
    assert said.startswith("ovl: docker info ") and said.count("\n") == 1


def test_check_says_in_one_line_that_an_engine_is_not_there(layers: Layers) -> None:
    for engine, program in (("podman", "podman"), ("docker", "docker"), ("containerd", "ctr")):
        said = ovl("check", engine, status=1, PATH=str(layers.base))
        assert said == f"ovl: {program} is not installed\n"


def test_what_is_for_one_user_is_refused_to_engines_of_the_system() -> None:
    for engine in ("docker", "containerd"):
        for command in ("install", "uninstall"):
            said = ovl(command, engine, "--user", status=1)
            assert said == f"ovl: --user is for podman alone: {engine} is configured for the whole system\n"


def test_a_user_is_told_what_only_root_may_change(checkout: Checkout) -> None:
    command = ["setpriv", "--reuid=4242", "--regid=4242", "--clear-groups", checkout.python, *_OVL[1:]]
    for engine, hint in (("podman", "run it as root, or with --user\n"), ("docker", "run it as root\n")):
        done = subprocess.run(
            [*map(str, command), "install", engine], cwd=checkout.path, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert done.stderr.startswith("ovl: Permission denied: ") and done.stderr.endswith(hint)


def test_an_installation_that_fails_midway_takes_back_what_it_wrote(settings: None) -> None:
    Path("/etc/docker/daemon.json").write_text("{}")
    Path("/etc/systemd/system/docker.service.d").touch()
    assert ovl("install", "docker", status=1).count("\n") == 1
    assert Path("/etc/docker/daemon.json").read_text() == "{}"
    assert files("/etc/docker", "/usr/local/lib") == ["/etc/docker/daemon.json"]


_CONTAINERD = """# kept
version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri"]  # kept too
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
"""


@pytest.fixture
def systemctl(layers: Layers) -> str:
    """A PATH on which there is a systemctl."""
    programs = layers.add("bin")
    (programs / "systemctl").symlink_to("/bin/false")
    return f"{programs}:{os.environ['PATH']}"


def files(*places: str) -> list[str]:
    """The paths of all files below."""
    return sorted(f"{path}/{name}" for place in places for path, _, names in os.walk(place) for name in names)


def test_containerd_takes_what_is_installed_and_all_is_given_back(settings: None, systemctl: str) -> None:
    path = Path("/etc/containerd/config.toml")
    path.write_text(_CONTAINERD)
    service = Path("/etc/systemd/system/overlayfs-py-snapshotter.service")

    shown = ovl("install", "--dry-run", "containerd", PATH=systemctl)
    assert "+[proxy_plugins.overlayfs-py]\n" in shown and "+Type=notify\n" in shown
    assert (path.read_text(), service.exists()) == (_CONTAINERD, False)
    said = ovl("install", "containerd", PATH=systemctl)
    assert said.startswith(shown) and "systemctl enable --now overlayfs-py-snapshotter" in said
    assert path.read_text().startswith(_CONTAINERD)
    assert ovl("install", "containerd", PATH=systemctl) == "nothing to change\n"
    done = subprocess.run(["/usr/local/bin/overlayfs-py", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("overlayfs-py ")

    with daemon("containerd", ready=("ctr", "version")):
        assert "no snapshotter answers on /run/" in ovl("check", "containerd", status=1)
        (start,) = [line for line in service.read_text().splitlines() if line.startswith("ExecStart=")]
        with daemon(*start.partition("=")[2].split()):
            # Its connection waits up to three seconds before it tries again.
            deadline = time.monotonic() + 30
            while ctr("snapshots", "--snapshotter", "overlayfs-py", "prepare", "left"):
                assert time.monotonic() < deadline, "containerd does not reach the snapshotter"
                time.sleep(0.1)
            assert ovl("check", "containerd") == "containerd uses overlayfs-py\n"

    wants = service.parent / "containerd.service.wants" / service.name
    wants.parent.mkdir()
    wants.symlink_to(service)
    assert "systemctl disable --now" in ovl("uninstall", "containerd", status=1)
    wants.unlink()
    said = ovl("uninstall", "containerd", PATH=systemctl)
    assert f"restored {path}\n" in said and f"Snapshots are left in {ROOT}.\n" in said
    assert path.read_text() == _CONTAINERD
    assert files("/etc/containerd", "/etc/systemd/system", "/usr/local/bin") == [str(path)]
    with daemon("containerd", ready=("ctr", "version")):
        assert "containerd knows no snapshotter overlayfs-py" in ovl("check", "containerd", status=1)


def ctr(*arguments: str) -> int:
    return subprocess.run(["ctr", *arguments], capture_output=True, timeout=60, check=False).returncode


@contextmanager
def daemon(*command: str, ready: tuple[str, ...] = ("true",), **environment: str) -> Iterator[None]:
    """A daemon that is ended in the end; it is there when the command `ready` succeeds."""
    with tempfile.TemporaryDirectory() as scratch:
        process = subprocess.Popen(
            command,
            env=os.environ | {"TMPDIR": scratch} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 30
            while subprocess.run(ready, capture_output=True, timeout=60, check=False).returncode:
                assert process.poll() is None and time.monotonic() < deadline, f"{command[0]} does not answer"
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            assert process.wait(30) == 0


def test_without_systemd_containerd_gets_no_unit(settings: None, layers: Layers) -> None:
    said = ovl("install", "containerd", PATH=str(layers.base))
    assert "Now start overlayfs-py-snapshotter, as root, and then containerd." in said
    assert files("/etc/systemd/system") == []
    assert Path("/etc/containerd/config.toml").read_text().startswith("version = 2\n")
    ovl("uninstall", "containerd")
    assert files("/etc/containerd", "/usr/local/bin") == []


@pytest.mark.parametrize("text", ["[proxy_plugins", "proxy_plugins = 1\n", "[proxy_plugins]\noverlayfs-py = 1\n"])
def test_a_file_that_is_no_configuration_of_containerd_is_left_alone(settings: None, text: str) -> None:
    Path("/etc/containerd/config.toml").write_text(text)
    assert ovl("install", "containerd", status=1).startswith("ovl: /etc/containerd/config.toml is not what ")
    assert Path("/etc/containerd/config.toml").read_text() == text
    assert files("/etc/containerd", "/etc/systemd/system", "/usr/local/bin") == ["/etc/containerd/config.toml"]


def test_what_containerd_is_told_already_stays_beside_ours(settings: None) -> None:
    path = Path("/etc/containerd/config.toml")
    path.write_text('[proxy_plugins.overlayfs-py]\n  address = "/elsewhere"\n  capabilities = ["remap-ids"]\n')
    ovl("install", "containerd")
    assert tomllib.loads(path.read_text())["proxy_plugins"]["overlayfs-py"] == {
        "address": "/run/overlayfs-py-snapshotter/snapshotter.sock",
        "capabilities": ["remap-ids"],
        "type": "snapshot",
    }


def test_the_documents_show_what_is_installed() -> None:
    documents = REPOSITORY / "docs" / "containerd"
    shown = (documents / "overlayfs-py-snapshotter.service").read_text()
    assert shown == unit(Path("/usr/local/bin/overlayfs-py-snapshotter"))
    settings = tomllib.loads((documents / "config.toml").read_text())
    assert settings["proxy_plugins"]["overlayfs-py"]["address"] in shown
