"""Programs that people run in containers: git, a package manager, a compiler, pip."""

from pathlib import Path

from benchmarks.inputs import WHEEL
from benchmarks.site import Site
from benchmarks.workload import workload


def _git(site: Site, *arguments: str | Path) -> str:
    return site.run("git", "-c", "safe.directory=*", "-c", "gc.auto=0", *arguments)


@workload(
    "git-clone", "git clone of 2,000 files", group="programs", lowers=["repository"], writes=True, filesystem="journal"
)
def git_clone(site: Site) -> None:
    with site.clock:
        _git(site, "clone", "--quiet", site.mnt / "source.git", site.mnt / "clone")
    site.check("changes", _git(site, "-C", site.mnt / "clone", "status", "--porcelain"), "")


@workload(
    "git-status",
    "git status in a lower clone",
    group="programs",
    lowers=["checkout"],
    writes=True,
    filesystem="journal",
)
def git_status(site: Site) -> None:
    with site.clock:
        changes = _git(site, "-C", site.mnt / "clone", "status", "--porcelain")
    site.check("changes", changes, "")


@workload(
    "git-checkout",
    "git checkout of an old commit, and back",
    group="programs",
    lowers=["checkout"],
    writes=True,
    filesystem="journal",
)
def git_checkout(site: Site) -> None:
    commits = _git(site, "-C", site.mnt / "clone", "rev-list", "--count", "HEAD").strip()
    with site.clock:
        _git(site, "-C", site.mnt / "clone", "checkout", "--quiet", f"HEAD~{int(commits) // 2}")
        _git(site, "-C", site.mnt / "clone", "checkout", "--quiet", "main")
    site.check("changes", _git(site, "-C", site.mnt / "clone", "status", "--porcelain"), "")


@workload(
    "git-log", "git log --stat of 100 commits", group="programs", lowers=["checkout"], writes=True, filesystem="journal"
)
def git_log(site: Site) -> None:
    with site.clock:
        _git(site, "-C", site.mnt / "clone", "log", "--stat")


@workload(
    "apt", "apt install of vim, offline", group="programs", lowers=["debs", "debian"], writes=True, filesystem="journal"
)
def apt(site: Site) -> None:
    debs = sorted(f"/srv/debs/{path.name}" for path in (site.input("debs") / "srv/debs").iterdir())
    with site.clock:
        site.inside("apt-get", "-qq", "-o", "Dpkg::Use-Pty=0", "install", *debs)
    site.check("files amiss", site.inside("dpkg", "--verify", "vim", "vim-runtime"), "")


@workload(
    "make", "make -j2 of 25 C files", group="programs", lowers=["project", "debian"], writes=True, filesystem="journal"
)
def make(site: Site) -> None:
    with site.clock:
        site.inside("make", "-C", "/srv/project", "--silent", "-j2")
    site.inside("/srv/project/program")


@workload(
    "pip",
    f"pip install of {WHEEL}, offline",
    group="programs",
    lowers=["wheels", "debian"],
    writes=True,
    filesystem="journal",
)
def pip(site: Site) -> None:
    options = ["--quiet", "--no-index", "--find-links=/srv/wheels"]
    as_root = ["--break-system-packages", "--root-user-action=ignore"]
    with site.clock:
        site.inside("pip", "install", *options, *as_root, WHEEL)
    site.inside("python3", "-c", f"import {WHEEL}")
