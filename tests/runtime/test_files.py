"""What is in containers, from outside: cp, diff, commit, mount; and what is used."""

import io
import json
import os
import tarfile

from tests.runtime.conftest import Ovl

RUN = ("run", "--network", "none", "-u", "root")


def test_a_committed_container_is_an_image_that_runs_the_same(ovl: Ovl) -> None:
    ovl.run(*RUN, "--name", "work", "busy", "sh", "-c", "echo new > /file; rm -r /data; mkdir /more; echo a > /more/a")
    assert ovl.out("diff", "work").splitlines() == ["D /data", "C /file", "A /more", "A /more/a"]
    told = json.loads(ovl.out("diff", "--format", "json", "work"))
    assert told[0] == {"Kind": "D", "Path": "/data"}
    words = ("-c", 'CMD ["cat", "/file"]', "-c", "WORKDIR /more", "-c", "ENV A=b")
    made = ovl.out("commit", *words, "work", "changed").strip()
    assert made.startswith("sha256:")
    assert ovl.out("run", "--rm", "--network", "none", "changed") == "new\n"
    script = "pwd; ls /; echo $A $GREETING"
    seen = ovl.out("run", "--rm", "--network", "none", "changed", "sh", "-c", script).split()
    assert seen[0] == "/more" and "data" not in seen and seen[-2:] == ["b", "hello"]
    assert "it has to begin with one of CMD, " in ovl.error("commit", "-c", "RUN x", "work", "bad", status=1)


def test_a_running_container_is_committed_as_it_is_now(ovl: Ovl) -> None:
    script = "echo a > /one; echo ready; while :; do sleep 0.05; done"
    ovl.run(*RUN, "-d", "--name", "live", "busy", "sh", "-c", script)
    while "ready" not in ovl.out("logs", "live"):
        pass
    ovl.run("commit", "live", "snapshot")
    assert ovl.out("run", "--rm", "--network", "none", "snapshot", "cat", "/one") == "a\n"
    assert ovl.row("live")["State"] == "running"
    assert ovl.out("exec", "live", "cat", "/one") == "a\n"


def test_layers_in_use_are_looked_at_but_not_mended(ovl: Ovl) -> None:
    ovl.run("create", "--name", "user", "busy")
    assert ovl.out("check", "busy") == ""
    assert "are used by user: remove them first" in ovl.error("check", "--repair", "busy", status=1)
    ovl.run("rm", "user")
    assert ovl.out("check", "--repair", "busy") == ""


def test_an_image_in_use_is_not_removed(ovl: Ovl) -> None:
    ovl.run("create", "--name", "user", "busy")
    assert "user" in ovl.error("rmi", "busy", status=1)
    ovl.run("rm", "user")
    ovl.run("rmi", "busy")


def test_files_are_copied_both_ways(ovl: Ovl) -> None:
    ovl.run(*RUN, "-d", "--name", "box", "-v", "vol:/vol", "busy", "sleep", "60")
    tree = ovl.base / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "deep").write_text("deep\n")
    (tree / "link").symlink_to("/etc/hostname")
    os.chmod(tree / "sub" / "deep", 0o640)
    ovl.run("cp", tree, "box:/tmp")
    ovl.run("cp", f"{tree}/.", "box:/vol")
    ovl.run("cp", tree / "sub" / "deep", "box:/tmp/renamed")
    script = "cd /tmp; cat tree/sub/deep /vol/sub/deep renamed; stat -c %a:%u tree/sub/deep; readlink tree/link"
    assert ovl.out("exec", "box", "sh", "-c", script) == "deep\n" * 3 + "640:0\n/etc/hostname\n"
    ovl.run("cp", "box:/vol", "back")
    assert (ovl.base / "back/sub/deep").read_text() == "deep\n"
    ovl.run("cp", "box:/tmp/renamed", ".")
    assert (ovl.base / "renamed").read_text() == "deep\n"
    ovl.run("kill", "box")
    ovl.run("wait", "box")
    ovl.run("cp", tree / "sub" / "deep", "box:/file")
    assert (ovl.home("box") / "upper/file").read_text() == "deep\n"
    assert tarfile.open(fileobj=io.BytesIO(ovl.run("cp", "box:/data", "-").stdout)).getnames() == ["data", "data/seed"]
    ovl.run("cp", "-", "box:/root", stdin=ovl.run("cp", "box:/data", "-").stdout)
    assert (ovl.home("box") / "upper/root/data/seed").read_text() == "seed\n"


def test_copying_never_follows_a_link_out_of_the_container(ovl: Ovl) -> None:
    ovl.run(*RUN, "--name", "trap", "busy", "sh", "-c", "ln -s /etc/shadow /leak; ln -s / /up; rm -rf /etc/passwd")
    before = sorted(os.listdir("/etc"))
    (ovl.base / "mine").write_text("x")
    ovl.run("cp", "mine", "trap:/out/ovl-was-here")
    assert sorted(os.listdir("/etc")) == before
    assert (ovl.home("trap") / "upper/etc/ovl-was-here").exists()
    assert "there is no /leak" in ovl.error("cp", "-L", "trap:/leak", ".", status=1)
    assert "there is no /up/up/etc/passwd" in ovl.error("cp", "trap:/up/up/etc/passwd", ".", status=1)
    assert "there is no directory /nosuch" in ovl.error("cp", "mine", "trap:/nosuch/x", status=1)
    assert "one of source and target" in ovl.error("cp", "mine", "other", status=1)


def test_images_and_containers_can_be_mounted(ovl: Ovl) -> None:
    target = ovl.base / "mnt"
    target.mkdir()
    # Relative to where we are, as any path.
    ovl.run("mount", "busy", "mnt")
    assert (target / "file").read_text() == "of the image\n"
    assert f"the mount on {target}" in ovl.error("rmi", "busy", status=1)
    assert "no image and no container is mounted on /proc" in ovl.error("umount", "/proc", status=1)
    ovl.run("umount", target)
    assert os.listdir(target) == []
    ovl.run("create", "--name", "shelf", "--network", "none", "-u", "root", "busy", "cat", "/file")
    ovl.run("mount", "shelf", target)
    (target / "file").write_text("from outside\n")
    assert f"is mounted on {target}" in ovl.error("start", "shelf", status=1)
    assert f"is mounted on {target}" in ovl.error("rm", "-f", "shelf", status=1)
    ovl.run("umount", target)
    assert ovl.out("start", "-a", "shelf") == "from outside\n"
    assert "no image and no container is mounted" in ovl.error("umount", target, status=1)


def test_processes_and_what_they_use_are_shown(ovl: Ovl) -> None:
    ovl.run(*RUN, "-d", "--name", "busyone", "--memory", "32m", "busy", "sh", "-c", "sleep 61 & while :; do :; done")
    top = ovl.out("top", "busyone").splitlines()
    assert top[0].split()[:3] == ["UID", "PID", "PPID"] and len(top) == 3 and "sleep 61" in top[2]
    (row,) = json.loads(ovl.out("stats", "--no-stream", "--format", "json"))
    assert row["CPUPercent"] > 1 and row["MemoryLimit"] == 32 << 20 and row["Pids"] == 2
    assert "busyone" in ovl.out("stats", "--no-stream", "busyone")


def test_space_is_told_and_freed(ovl: Ovl) -> None:
    ovl.run(*RUN, "--name", "fat", "-v", "vol:/v", "busy", "dd", "if=/dev/zero", "of=/fat", "bs=1M", "count=3")
    rows = {row["Type"]: row for row in json.loads(ovl.out("system", "df", "--format", "json"))}
    assert rows["Containers"]["Reclaimable"] >= 3 << 20
    assert rows["Images"]["Total"] == 1 and rows["Images"]["Reclaimable"] == 0
    assert rows["Volumes"]["Total"] == 1
    told = ovl.out("system", "prune", "-f", "-a", "--volumes").splitlines()
    assert told == ["container fat", "image busy:latest", "volume vol"]
    assert ovl.rows() == [] and ovl.out("images", "-q") == "" and ovl.out("volume", "ls", "-q") == ""
    assert list((ovl.root / "containers.tmp").iterdir()) == [ovl.root / "containers.tmp" / "lock"]
