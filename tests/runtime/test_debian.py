"""An image of layers that apt and dpkg made: a Debian root; without Python; with nginx; with Python again.

Packages come from where this machine gets its own: its network, apt settings and certificates are used.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs_py.images import Store
from tests.images.rig import mounted
from tests.runtime.conftest import Ovl, left_of
from tests.runtime.test_network import fetch, port_of
from tests.support.mounts import REPOSITORY

SETTINGS = """
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
DPkg::Options { "--force-unsafe-io"; };
APT::Install-Recommends "false";
"""
PROXIES = ("http_proxy", "https_proxy", "no_proxy")
LEFT_OUT = ("usr/lib/gcc", "usr/lib/git-core", "usr/include", "usr/share/locale", "*.a", "*lto-dump*", "*san.so*")
"""Of the Debian root, half its size."""
PAGE = "/var/www/html/index.html"
LAYERS = (
    ("bare", "apt-get update && apt-get purge --yes --auto-remove python3-pip python3-minimal && rm -r /usr/share/doc"),
    ("web", f"apt-get install --yes nginx-light && echo from the image >{PAGE}"),
    ("python", "apt-get install --yes python3"),
)
"""Names of images, each made of the one before by this command."""


def import_root(ovl: Ovl) -> None:
    tree = subprocess.run([REPOSITORY / "tools/debian-tree"], capture_output=True, text=True, check=True).stdout.strip()
    command = ["tar", "--delete", "--wildcards", "--file", "-", *(f"./{pattern}" for pattern in LEFT_OUT)]
    small = ovl.base / "small.tar"
    with open(tree, "rb") as whole, small.open("wb") as written:
        subprocess.run(command, stdin=whole, stdout=written, check=True)
    ovl.run("import", small, "debian:base")


def add_layers(ovl: Ovl) -> None:
    apt = ovl.base / "apt"
    for name in ("lists", "archives"):
        (apt / name).mkdir(parents=True)
    found = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True).stdout
    (apt / "apt.conf").write_text(found + SETTINGS)
    options = ["--network", "host", "--tmpfs", "/run", "-e", "DEBIAN_FRONTEND=noninteractive"]
    options += ["-e", "APT_CONFIG=/run/apt.conf", "-v", f"{apt}/apt.conf:/run/apt.conf:ro"]
    options += ["-v", f"{apt}/lists:/var/lib/apt/lists", "-v", f"{apt}/archives:/var/cache/apt/archives"]
    options += ["-v", "/etc/ssl/certs/ca-certificates.crt:/etc/ssl/certs/ca-certificates.crt:ro"]
    for name in PROXIES:
        options += ["-e", name]
    below = "debian:base"
    for tag, command in LAYERS:
        ovl.run("run", "--name", f"making-{tag}", *options, below, "sh", "-euc", command)
        below = f"debian:{tag}"
        ovl.run("commit", "-c", 'CMD ["nginx", "-g", "daemon off;"]', f"making-{tag}", below)
        ovl.run("rm", f"making-{tag}")
    ovl.run("tag", below, "debian")


@pytest.fixture(scope="module")
def ovl(scratch: Path) -> Iterator[Ovl]:
    """With the image `debian`, and those that it was made of."""
    base = scratch / "debian-images"
    base.mkdir()
    made = Ovl(base / "store", base, base)
    try:
        import_root(made)
        add_layers(made)
        yield made
    finally:
        if names := [row["Id"] for row in made.rows()]:
            made.run("rm", "-f", "-v", *names)
        assert left_of(made.root) == []
        subprocess.run(["rm", "-rf", "--one-file-system", base], check=True)


def test_its_packages_are_whole_in_a_container_and_on_the_kernel(ovl: Ovl) -> None:
    script = "dpkg --audit; dpkg --verify nginx nginx-common nginx-light iproute2 python3 python3-minimal python3.11"
    script += " python3.11-minimal libpython3.11-stdlib libpython3.11-minimal; python3 -c 'print(6 * 7)'"
    assert ovl.out("run", "--rm", "--network", "none", "debian", "sh", "-c", script) == "42\n"
    with mounted(Store.open(ovl.root).image("debian"), ovl.base / "mnt") as root:
        done = subprocess.run(["chroot", root, "sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


def test_a_layer_hides_what_it_deletes_of_those_below(ovl: Ovl) -> None:
    python, web, bare, base = json.loads(ovl.out("layers", "--format", "json", "debian"))
    assert bare["Deleted"] > 100 and python["Deleted"] == web["Deleted"] == base["Deleted"] == 0
    names = ["/usr/bin/python3", "/usr/lib/python3", "/usr/share/doc"]
    found = {}
    for tag in ("base", "bare", "web", "python"):
        done = ovl.run("run", "--rm", "--network", "none", f"debian:{tag}", "ls", "-d", *names, status=None)
        found[tag] = done.stdout.decode().splitlines()
    assert found == {"base": names, "bare": [], "web": names[2:], "python": names}


def test_each_container_serves_its_own_page_on_a_published_port(ovl: Ovl) -> None:
    names = ("one", "two")
    for name in names:
        ovl.run("run", "-d", "--name", name, "-p", "127.0.0.1::80", "debian")
    ports = [port_of(ovl, name, "80/tcp") for name in names]
    assert [fetch(port) for port in ports] == ["from the image\n"] * 2
    for name in names:
        ovl.run("exec", name, "sh", "-c", f"echo from {name} >{PAGE}")
    assert [fetch(port) for port in ports] == ["from one\n", "from two\n"]
    for name in names:
        assert f"C {PAGE}" in ovl.out("diff", name).splitlines()
    assert ovl.out("run", "--rm", "--network", "none", "debian", "cat", PAGE) == "from the image\n"
