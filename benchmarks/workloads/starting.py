"""Starting: the mount itself, and programs in it."""

from benchmarks.site import Site
from benchmarks.workload import workload

_IMPORTS = "asyncio, concurrent.futures, ctypes, email, http.server, sqlite3, unittest, xml.dom.minidom"


@workload("mount", "mount, to the first answer", group="start", lowers=["debian"], mounted=False)
def mount(site: Site) -> None:
    with site.clock:
        site.mount()


@workload("chroot", "50 × chroot /bin/true", group="start", lowers=["debian"])
def chroot(site: Site) -> None:
    times = " ".join(map(str, range(site.count(50))))
    with site.clock:
        site.run("sh", "-euc", f'for i in {times}; do chroot "$1" /bin/true; done', "sh", site.mnt)


@workload("python", "start Python with many imports, 5 ×", group="start", lowers=["debian"])
def python(site: Site) -> None:
    program = f"import {_IMPORTS}; import pip._internal.commands.install"
    with site.clock:
        for _ in range(5):
            site.run("chroot", site.mnt, "/usr/bin/python3", "-B", "-c", program)
