"""The further options of run: limits, devices, groups, system calls, names and addresses."""

import os
import struct
import subprocess
from pathlib import Path

import pytest

from overlayfs_py.runtime import seccomp
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.spec import (
    Device,
    Ulimit,
    Volume,
    parse_cpuset,
    parse_device,
    parse_host,
    parse_mount,
    parse_ulimit,
)
from tests.runtime.conftest import Ovl

RUN = ("run", "--rm", "--network", "none", "-u", "root")


def test_limits_of_processes_are_set(ovl: Ovl) -> None:
    script = "ulimit -n; ulimit -Hn; ulimit -c"
    options = ("--ulimit", "nofile=100:200", "--ulimit", "core=0")
    assert ovl.out(*RUN, *options, "busy", "sh", "-c", script).split() == ["100", "200", "0"]
    ovl.run("run", "-d", "--name", "host", "--network", "none", *options, "busy", "sleep", "60")
    assert ovl.out("exec", "host", "sh", "-c", script).split() == ["100", "200", "0"]


def test_a_limit_that_one_may_not_raise_is_one_line(rootless: Ovl) -> None:
    line = rootless.error(*RUN, "--ulimit", "nofile=999999999", "busy", "true", status=125)
    assert line.startswith("--ulimit nofile: this user may have ")
    assert rootless.rows() == []


def test_name_servers_and_hosts_are_those_given(ovl: Ovl) -> None:
    options = ("--dns", "192.0.2.1", "--dns-search", "example.org", "--dns-option", "ndots:2")
    words = ovl.out(*RUN, *options, "--add-host", "db:192.0.2.7", "busy", "cat", "/etc/resolv.conf", "/etc/hosts")
    assert words.startswith("nameserver 192.0.2.1\nsearch example.org\noptions ndots:2\n")
    assert words.endswith("192.0.2.7\tdb\n")


def test_a_device_of_the_host_can_be_used_as_far_as_it_is_allowed(ovl: Ovl) -> None:
    script = "head -c 2 /dev/given | wc -c; echo > /dev/given"
    words = ("--device", "/dev/zero:/dev/given:r", "busy", "sh", "-c", script)
    done = ovl.run(*RUN, "--device", "/dev/fuse", "busy", "sh", "-c", "test -c /dev/fuse && echo there")
    assert done.stdout == b"there\n"
    assert ovl.run(*RUN, *words).stdout == b"2\n"
    assert ovl.error(*RUN, "--device", "/dev/nosuch", "busy", "true", status=125).startswith("--device /dev/nosuch: ")
    assert ovl.error(*RUN, "--device", "/etc", "busy", "true", status=125) == "--device /etc: it is no device"


def test_a_user_gives_a_device_that_the_user_may_use(rootless: Ovl) -> None:
    words = ("--device", "/dev/full:/dev/given", "busy", "sh", "-c", "echo > /dev/given")
    assert b"No space left" in rootless.run(*RUN, *words, status=1).stderr


def test_a_privileged_container_is_not_confined(ovl: Ovl) -> None:
    script = "mount -t tmpfs x /tmp && echo mounted; grep Seccomp: /proc/self/status; test -c /dev/fuse && echo device"
    words = ovl.out(*RUN, "--privileged", "busy", "sh", "-c", script).split()
    assert words == ["mounted", "Seccomp:", "0", "device"]


def test_a_user_runs_a_privileged_container_with_what_the_user_may(rootless: Ovl) -> None:
    assert (
        rootless.out(*RUN, "--privileged", "busy", "sh", "-c", "mount -t tmpfs x /tmp && echo mounted") == "mounted\n"
    )


def test_system_calls_that_take_a_capability_are_refused_without_it(ovl: Ovl) -> None:
    script = "mount -t tmpfs x /tmp; unshare -m true; echo $?"
    done = ovl.run(*RUN, "busy", "sh", "-c", script)
    assert done.stdout == b"1\n" and done.stderr.count(b"not permitted") + done.stderr.count(b"denied") == 2
    done = ovl.run(*RUN, "--cap-add", "SYS_ADMIN", "busy", "sh", "-c", script)
    assert (done.stdout, done.stderr) == (b"0\n", b"")
    words = ovl.out(*RUN, "--security-opt", "no-new-privileges", "busy", "grep", "NoNewPrivs", "/proc/self/status")
    assert words.split() == ["NoNewPrivs:", "1"]


def test_a_seccomp_profile_of_ones_own_counts(ovl: Ovl) -> None:
    profile = ovl.base / "profile.json"
    profile.write_text(
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}'
    )
    option = f"seccomp={profile}"
    done = ovl.run(*RUN, "--security-opt", option, "busy", "mkdir", "/made", status=1)
    assert b"not permitted" in done.stderr
    ovl.run(*RUN, "--security-opt", "seccomp=unconfined", "busy", "mkdir", "/made")
    for text in ("[]", "{", "{}"):
        profile.write_text(text)
        assert str(profile) in ovl.error(*RUN, "--security-opt", option, "busy", "uname", status=125)


def test_a_container_runs_programs_of_each_abi_that_the_host_runs(ovl: Ovl) -> None:
    program = ovl.base / "program"
    # mov eax, 1; mov ebx, 42; int 0x80: exit(42), as 32-bit programs call it.
    code = b"\xb8\x01\x00\x00\x00\xbb\x2a\x00\x00\x00\xcd\x80"
    start = 0x400000
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, start + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, start, start, 120 + len(code), 120 + len(code), 4096)
    program.write_bytes(header + segment + code)
    program.chmod(0o755)
    status = subprocess.run([program]).returncode
    ovl.run(*RUN, "-v", f"{program}:/program:ro", "busy", "/program", status=status if status >= 0 else 128 - status)


def test_further_groups_settings_and_shared_memory(ovl: Ovl) -> None:
    script = "id -G; cat /proc/sys/net/ipv4/ip_forward; df -k /dev/shm | tail -n 1; cat /proc/self/oom_score_adj"
    options = ("--group-add", "extra", "--group-add", "55", "--sysctl", "net.ipv4.ip_forward=1", "--shm-size", "1m")
    words = ovl.out(*RUN, *options, "--oom-score-adj", "500", "busy", "sh", "-c", script).split()
    assert words[:4] + words[5:6] + words[-1:] == ["0", "44", "55", "1", "1024", "500"]


def test_limits_of_control_groups_are_set(ovl: Ovl) -> None:
    options = ("--cpuset-cpus", "0", "--cpu-shares", "512", "--memory", "16m", "--memory-swap", "-1")
    script = "nproc; cat /sys/fs/cgroup/cpu/cpu.shares || cat /sys/fs/cgroup/cpu.weight"
    words = ovl.run(*RUN, *options, "busy", "sh", "-c", script).stdout.split()
    # Version 2 has a weight, which the OCI runtime makes of the shares.
    assert words[0] == b"1" and words[1] in (b"512", b"20")


def test_an_init_program_is_the_first_process(ovl: Ovl, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--init" in ovl.out("run", "--help")
    tools = ovl.base / "tools"
    tools.mkdir()
    program = tools / "docker-init"
    program.write_text('#!/bin/sh\necho init is $$ "$1"; shift; exec "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert ovl.out(*RUN, "--init", "busy", "echo", "a b") == "init is 1 --\na b\n"


def test_mounts_can_be_told_in_words(ovl: Ovl) -> None:
    (ovl.base / "given").mkdir()
    options = ["--mount", f"type=bind,src={ovl.base}/given,dst=/given,ro"]
    options += ["--mount", "type=volume,source=vol,target=/vol", "--mount", "type=tmpfs,dst=/scratch,tmpfs-size=1m"]
    script = "touch /given/x; touch /vol/x; df -k /scratch | tail -n 1"
    done = ovl.run(*RUN, *options, "busy", "sh", "-c", script)
    assert b"Read-only" in done.stderr and b" 1024 " in done.stdout
    assert ovl.out(*RUN, "-v", "vol:/v", "busy", "ls", "/v") == "x\n"
    ovl.run("volume", "rm", "vol")


def test_volumes_and_network_of_another_container_can_be_shared(ovl: Ovl) -> None:
    ovl.run("run", "-d", "--name", "base", "-v", "/shared", "-u", "root", "busy", "sleep", "60")
    ovl.run("exec", "base", "touch", "/shared/a")
    joined = ("run", "--rm", "-u", "root", "--network", "container:base", "--volumes-from", "base:ro")
    done = ovl.run(*joined, "busy", "sh", "-c", "ls /shared; touch /shared/b; ip -o -4 address show eth0", status=0)
    address = ovl.status("base")["address"]
    assert done.stdout.startswith(b"a\n") and address.encode() in done.stdout and b"Read-only" in done.stderr
    ovl.run("stop", "-t", "0", "base")
    assert ovl.error(*joined, "busy", "true", status=125).endswith("whose network this one has, is not running")
    ovl.run("rm", "-v", "base")
    assert ovl.out("volume", "ls", "-q") == ""


def test_the_id_is_written_for_a_container_that_is_made(ovl: Ovl) -> None:
    file = ovl.base / "cid"
    ovl.run("create", "--cidfile", file, "--name", "made", "busy")
    assert file.read_text() == ovl.row("made")["Id"]
    assert ovl.error("create", "--cidfile", file, "busy", status=125) == f"--cidfile {file}: File exists"
    ovl.error("create", "--cidfile", ovl.base / "other", "--pull", "never", "nosuch", status=125)
    assert not (ovl.base / "other").exists()


def test_the_time_to_stop_is_the_containers_own(ovl: Ovl) -> None:
    words = ("--network", "none", "--stop-timeout", "0", "--stop-signal", "SIGTERM", "busy", "sleep", "600")
    ovl.run("run", "-d", "--name", "deaf", *words)
    ovl.run("stop", "deaf")
    assert ovl.row("deaf")["ExitCode"] == 137


def test_the_ports_that_an_image_exposes_are_published(ovl: Ovl) -> None:
    ovl.run("create", "--name", "made", "busy")
    ovl.run("commit", "-c", "EXPOSE 80 53/udp", "made", "exposing")
    ovl.run("run", "-d", "--name", "server", "-P", "-p", "127.0.0.1:0:80", "exposing", "sleep", "60")
    lines = ovl.out("port", "server").splitlines()
    assert [line.rpartition(":")[0] for line in lines] == [
        "80/tcp -> 127.0.0.1",
        "53/udp -> 0.0.0.0",
        "53/udp -> [::]",
    ]


NONSENSE = (
    ("--ulimit", "nosuch=1"),
    ("--ulimit", "nofile=2:1"),
    ("--device", "relative"),
    ("--security-opt", "nosuch"),
    ("--sysctl", "novalue"),
    ("--sysctl", "kernel.panic=1"),
    ("--mount", "type=bind,dst=/a"),
    ("--mount", "type=tmpfs,src=/a,dst=/a"),
    ("--mount", "nosuch=1,dst=/a"),
    ("--add-host", "name"),
    ("--dns", "name"),
    ("--cpuset-cpus", "9999"),
    ("--memory-swap", "1g"),
    ("--memory", "16m", "--memory-swap", "8m"),
    ("--pids-limit", "0"),
    ("--shm-size", "much"),
    ("--network", "nosuch"),
    ("--network", "container:nosuch"),
    ("--volumes-from", "nosuch"),
    ("--group-add", "nosuch"),
)


def test_an_option_that_makes_no_sense_is_one_line_and_leaves_nothing(ovl: Ovl) -> None:
    for words in NONSENSE:
        ovl.error("run", "--network", "none", *words, "busy", "true", status=125)
    assert ovl.rows() == []


def test_options_are_read_as_in_docker() -> None:
    assert parse_ulimit("nofile=1") == Ulimit("nofile", 1, 1)
    assert parse_ulimit("memlock=1:unlimited") == Ulimit("memlock", 1, -1)
    assert parse_device("/dev/a") == Device("/dev/a", "/dev/a")
    assert parse_device("/dev/a:r") == Device("/dev/a", "/dev/a", "r")
    assert parse_device("/dev/a:/dev/b:rw") == Device("/dev/a", "/dev/b", "rw")
    assert parse_host("name:::1") == ("name", "::1") == parse_host("name:[::1]")
    assert parse_mount("type=volume,src=vol,dst=/a,readonly") == Volume("/a", name="vol", read_only=True)
    assert parse_mount("type=tmpfs,dst=/a,tmpfs-mode=700") == ("/a", "noexec,nosuid,nodev,mode=700")
    assert parse_cpuset("0") == "0"
    with pytest.raises(ContainerError, match="the soft limit is above the hard one"):
        parse_ulimit("nofile=unlimited:5")


def test_a_profile_is_read_for_the_capabilities_and_the_machine(tmp_path: Path) -> None:
    text = """{
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "comment": "left out",
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        "syscalls": [
            {"names": ["a"], "action": "SCMP_ACT_ALLOW", "args": null, "comment": ""},
            {"names": ["b"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_CHOWN"]}},
            {"names": ["c"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["d"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_CHOWN"]}},
            {"names": ["e"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
            {"names": ["f"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.0"}},
            {"names": ["g"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["none"]}}
        ]
    }"""
    file = tmp_path / "profile"
    file.write_text(text)
    profile = seccomp.chosen(seccomp.read(str(file)), {"CHOWN"})
    assert [rule["names"] for rule in profile["syscalls"]] == [["a"], ["b"], ["e"]]
    assert profile["syscalls"][0] == {"names": ["a"], "action": "SCMP_ACT_ALLOW"}
    assert profile["defaultErrnoRet"] == 38 and "comment" not in profile


def test_the_default_profile_names_no_call_twice_for_different_ends() -> None:
    for had in ([], ["SYS_ADMIN"], ["SYS_PTRACE", "SYS_TIME"]):
        *allowed, refused = seccomp.default(had)["syscalls"]
        whole = {name for rule in allowed if "args" not in rule for name in rule["names"]}
        assert whole.isdisjoint(refused["names"])
        assert ("mount" in whole) == ("SYS_ADMIN" in had) != ("mount" in refused["names"])
