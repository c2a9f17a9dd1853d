"""Mount options: every form that callers send, every rule that makes them an error."""

import math
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayfs_py import config
from overlayfs_py.config import IdRange, MountConfig, check_paths, parse_options, split_options
from overlayfs_py.errors import ConfigError
from tests.conftest import Layers
from tests.support.mounts import escape, layer_options
from tests.support.syscalls import MS_BIND, mount, umount

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME = 1, 2, 4, 8, 1024


def parse(*options: str | bytes, euid: int = 0, source: bytes | None = None) -> MountConfig:
    texts = [os.fsencode(option) for option in options]
    return parse_options(texts, mountpoint=b"mnt", source=source, cwd=b"/cwd", euid=euid)


def layers(*options: str | bytes) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    parsed = parse(*options)
    return parsed.lowerdirs, parsed.datadirs


def refusal(*options: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_paths_start_at_the_current_directory() -> None:
    parsed = parse("lowerdir=a:/b,upperdir=c/d,workdir=./e")
    assert parsed.lowerdirs == (b"/cwd/a", b"/b")
    assert (parsed.upperdir, parsed.workdir, parsed.mountpoint) == (b"/cwd/c/d", b"/cwd/./e", b"/cwd/mnt")


@pytest.mark.parametrize(
    ("value", "lowers", "datas"),
    [
        (r"/a\:b:/c", [b"/a:b", b"/c"], []),
        (r"/a\,b:/c", [b"/a,b", b"/c"], []),
        (r"/a\\:/c", [b"/a\\", b"/c"], []),
        (r"/a\\\:b", [b"/a\\:b"], []),
        (r"/\a", [b"/a"], []),
        (r"/a::/d", [b"/a"], [b"/d"]),
        (r"/a:/b::/d::/e", [b"/a", b"/b"], [b"/d", b"/e"]),
        (r"/a\:\:b", [b"/a::b"], []),
    ],
)
def test_lowerdir_is_split_as_the_kernel_splits_it(value: str, lowers: list[bytes], datas: list[bytes]) -> None:
    assert layers(f"lowerdir={value}") == (tuple(lowers), tuple(datas))


@pytest.mark.parametrize("value", [":/a", "/a:", "/a::", "/a:::/b", "::/a", "/a::/d:/b", ":"])
def test_misplaced_colons_are_refused(value: str) -> None:
    assert "lowerdir" in refusal(f"lowerdir={value}")


@pytest.mark.parametrize(
    ("options", "lowers", "datas"),
    [
        (["lowerdir+=/a,lowerdir+=/b:c,datadir+=/d"], [b"/a", b"/b:c"], [b"/d"]),
        (["lowerdir=/a,lowerdir+=/b"], [b"/a", b"/b"], []),
        (["lowerdir=/a::/d,datadir+=/e"], [b"/a"], [b"/d", b"/e"]),
        (["lowerdir=/a:/b::/d,lowerdir=/c"], [b"/c"], []),
        (["lowerdir+=/a", "lowerdir=,lowerdir+=/c"], [b"/c"], []),
        (["lowerdir=/a", "lowerdir+=/b", "datadir+=/c"], [b"/a", b"/b"], [b"/c"]),
    ],
)
def test_layers_are_appended_one_by_one(options: list[str], lowers: list[bytes], datas: list[bytes]) -> None:
    assert layers(*options) == (tuple(lowers), tuple(datas))


def test_a_lower_after_a_data_only_layer_is_refused() -> None:
    assert "data-only" in refusal("lowerdir=/a::/d,lowerdir+=/b")


@given(st.lists(st.binary(min_size=1, max_size=8).filter(lambda name: b"\0" not in name), min_size=1, max_size=4))
def test_any_name_survives_escaping(names: list[bytes]) -> None:
    paths = [b"/" + name for name in names]
    parsed = parse(layer_options(paths, paths[0], paths[-1], "volatile"))
    assert parsed.lowerdirs == tuple(paths)
    assert (parsed.upperdir, parsed.workdir, parsed.volatile) == (paths[0], paths[-1], True)


def test_a_single_layer_option_takes_colons_as_they_are() -> None:
    parsed = parse("lowerdir=/a,upperdir=/u:v,workdir=/w")
    assert parsed.upperdir == b"/u:v"


def test_five_hundred_lowers_are_the_limit_and_data_only_layers_count() -> None:
    assert len(layers("lowerdir=" + ":".join(f"/{n}" for n in range(500)))[0]) == 500
    assert "limit is 500" in refusal("lowerdir=" + ":".join(f"/{n}" for n in range(501)))
    assert "limit is 500" in refusal("lowerdir=" + ":".join(f"/{n}" for n in range(500)) + "::/d")


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        (b"a,b", [b"a", b"b"]),
        (b",a,,b,", [b"a", b"b"]),
        (b"", []),
        (rb"a\,b,c", [rb"a\,b", b"c"]),
        (rb"a\\,b", [rb"a\\", b"b"]),
        (b'context="u:r:t:s0:c1,c2",b', [b'context="u:r:t:s0:c1,c2"', b"b"]),
        (b'rootcontext="x,y",b', [b'rootcontext="x,y"', b"b"]),
        (b'lowerdir="a,b"', [b'lowerdir="a', b'b"']),
        (b"a\\", [b"a\\"]),
    ],
)
def test_options_are_split_at_commas(text: bytes, segments: list[bytes]) -> None:
    assert split_options(text) == segments


def test_an_open_quote_is_refused() -> None:
    assert "closing quote" in refusal('lowerdir=/a,context="u:r:t')


def test_what_podman_sends_is_understood() -> None:
    parsed = parse(
        "lowerdir=l/AAA:l/BBB,upperdir=1/diff,workdir=1/work,,volatile,uidmapping=:0:100000:1,gidmapping=0:100000:65536,"
        'xattr_permissions=2,squash_to_uid=1000,xino,fsync=0,private,context="system_u:object_r:c_t:s0:c1,c2"'
    )
    assert parsed.lowerdirs == (b"/cwd/l/AAA", b"/cwd/l/BBB")
    assert (parsed.upperdir, parsed.workdir) == (b"/cwd/1/diff", b"/cwd/1/work")
    assert parsed.uidmapping == (IdRange(disk=0, shown=100000, count=1),)
    assert parsed.gidmapping == (IdRange(disk=0, shown=100000, count=65536),)
    assert (parsed.xattr_permissions, parsed.squash_uid, parsed.squash_gid) == (2, 1000, None)
    assert (parsed.volatile, parsed.fsync, parsed.xino) == (True, False, "on")
    assert parsed.context == "system_u:object_r:c_t:s0:c1,c2"
    assert parsed.unknown == ()


def test_what_rootless_podman_maps_is_understood() -> None:
    parsed = parse("lowerdir=/a,uidmapping=:0:1:4242:4242:0:1:4243:4243:61294")
    assert parsed.uidmapping == (IdRange(0, 1, 4242), IdRange(4242, 0, 1), IdRange(4243, 4243, 61294))


def test_what_mount_fuse_sends_is_understood() -> None:
    parsed = parse("rw,lowerdir=/a,upperdir=/u,workdir=/w,dev,suid", source=b"overlay")
    assert (parsed.fsname, parsed.unknown, parsed.read_only) == ("overlay", (), False)
    assert not parsed.mount_flags & (MS_NODEV | MS_NOSUID | MS_RDONLY)


def test_a_hundred_and_twenty_eight_long_lowers_are_understood() -> None:
    names = [b"/var/lib/docker/fuse-overlayfs/l/" + b"%026d" % n for n in range(128)]
    assert layers(b"lowerdir=" + b":".join(names))[0] == tuple(names)


def test_root_lets_others_in_and_keeps_devices_and_suid() -> None:
    parsed = parse("lowerdir=/a,upperdir=/u,workdir=/w")
    assert (parsed.allow_other, parsed.default_permissions) == (True, True)
    assert parsed.mount_flags == MS_NOATIME


def test_others_get_neither_allow_other_nor_devices_nor_suid() -> None:
    parsed = parse("lowerdir=/a,upperdir=/u,workdir=/w", euid=1000)
    assert (parsed.allow_other, parsed.default_permissions) == (False, True)
    assert parsed.mount_flags == MS_NOATIME | MS_NODEV | MS_NOSUID


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ("ro", MS_RDONLY | MS_NOATIME),
        ("ro,rw", MS_NOATIME),
        ("nodev,nosuid,noexec", MS_NODEV | MS_NOSUID | MS_NOEXEC | MS_NOATIME),
        ("nodev,dev,nosuid,suid,noexec,exec", MS_NOATIME),
        ("atime", 0),
        ("atime,noatime", MS_NOATIME),
        ("nodiratime", MS_NOATIME | 2048),
        ("nodiratime,diratime", MS_NOATIME),
        ("relatime", 1 << 21),
        ("strictatime", 1 << 24),
        ("lazytime", MS_NOATIME | 1 << 25),
        ("lazytime,nolazytime", MS_NOATIME),
        ("sync,dirsync", MS_NOATIME | 16 | 128),
        ("sync,async", MS_NOATIME),
        ("nosymfollow", MS_NOATIME | 256),
        ("nosymfollow,symfollow", MS_NOATIME),
    ],
)
def test_generic_options_become_mount_flags(options: str, flags: int) -> None:
    assert parse(f"lowerdir=/a,upperdir=/u,workdir=/w,{options}").mount_flags == flags


def test_without_an_upper_the_mount_is_read_only_and_its_options_mean_nothing() -> None:
    parsed = parse("lowerdir=/a,workdir=/w,volatile,index=on,rw")
    assert parsed.read_only
    assert parsed.mount_flags & MS_RDONLY
    assert (parsed.workdir, parsed.volatile, parsed.index) == (None, False, None)


def test_ro_makes_a_mount_with_an_upper_read_only() -> None:
    assert parse("lowerdir=/a,upperdir=/u,workdir=/w,ro").read_only


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("redirect_dir=on", "redirect_dir", "on"),
        ("redirect_dir=follow", "redirect_dir", "follow"),
        ("redirect_dir=nofollow", "redirect_dir", "nofollow"),
        ("redirect_dir=off", "redirect_dir", "follow"),
        ("metacopy=on", "metacopy", True),
        ("metacopy=off", "metacopy", False),
        ("index=on", "index", True),
        ("index=off", "index", False),
        ("xino", "xino", "on"),
        ("xino=off", "xino", "off"),
        ("xino=auto", "xino", "auto"),
        ("userxattr", "userxattr", True),
        ("volatile", "volatile", True),
        ("fsync=0", "fsync", False),
        ("fsync=1", "fsync", True),
        ("squash_to_uid=7", "squash_uid", 7),
        ("squash_to_gid=8", "squash_gid", 8),
        ("xattr_permissions=0", "xattr_permissions", 0),
        ("xattr_permissions=1", "xattr_permissions", 1),
        ("static_nlink", "static_nlink", True),
        ("noacl", "noacl", True),
        ("noxattrs", "noxattrs", True),
        ("noxattrs=1", "noxattrs", True),
        ("noxattrs=0", "noxattrs", False),
        ("ino32_t", "ino32", True),
        ("timeout=0", "timeout", 0.0),
        ("timeout=1.5", "timeout", 1.5),
        ("timeout=1000000000.0", "timeout", 1e9),
        ("timeout=inf", "timeout", math.inf),
        ("writeback", "writeback", True),
        ("writeback=1", "writeback", True),
        ("writeback=0", "writeback", False),
        ("context=u:r:t", "context", "u:r:t"),
        (r"context=u:r:t:s0:c1\,c2", "context", "u:r:t:s0:c1,c2"),
        (r"fsname=a\,b", "fsname", "a,b"),
        ("max_write=131072", "max_write", 131072),
        ("request_timeout=60", "request_timeout", 60),
        ("", "engine", "auto"),
        ("engine=auto", "engine", "auto"),
        ("engine=portable", "engine", "portable"),
        ("engine=native", "engine", "native"),
        ("io=cached", "io", "cached"),
        ("io=passthrough", "io", "passthrough"),
        ("cpu_latency=auto", "cpu_latency", "auto"),
        ("cpu_latency=on", "cpu_latency", "on"),
        ("cpu_latency=off", "cpu_latency", "off"),
        ("readdirplus=auto", "readdirplus", "auto"),
        ("readdirplus=on", "readdirplus", "on"),
        ("uring=on", "uring", "on"),
        ("uring=off", "uring", "off"),
        ("allow_other", "allow_other", True),
        ("allow_root", "allow_root", True),
        ("default_permissions", "default_permissions", True),
    ],
)
def test_option_sets_its_field(option: str, field: str, value: object) -> None:
    assert getattr(parse("lowerdir=/a,upperdir=/u,workdir=/w", option), field) == value


@pytest.mark.parametrize(
    "option",
    [
        "redirect_dir=maybe", "metacopy=1", "index=", "xino=1", "fsync=2", "fsync", "xattr_permissions=3", "timeout=-1",
        "timeout=nan", "timeout=soon", "timeout", "squash_to_uid=-1", "squash_to_uid=root", "squash_to_gid=4294967295",
        "uidmapping=0:1", "uidmapping=a:b:c", "gidmapping=0:1:-1", "uidmapping=0:5:2:1:9:1", "uidmapping=0:5:2:7:6:1",
        "max_write=1", "max_write=lots", "writeback=2", "userxattr=on", "volatile=1", "upperdir=", "workdir",
        "lowerdir+=", "datadir+=", "engine=fast", "uring=maybe", "readdirplus=", "nfs_export=maybe", "verity=on",
        "verity=require", "remount", "ro=1", "cpu_latency=0",
    ],
)  # fmt: skip
def test_bad_value_is_refused_by_name(option: str) -> None:
    assert option.partition("=")[0] in refusal("lowerdir=/a,upperdir=/u,workdir=/w", option)


@pytest.mark.parametrize("option", ["nfs_export=off", "verity=off"])
def test_harmless_values_of_missing_features_pass(option: str) -> None:
    assert parse("lowerdir=/a", option).unknown == ()


@pytest.mark.parametrize("option", ["threaded=1", "nonsense", "nonsense=1", "uuid=null"])
def test_options_without_effect_are_kept_for_a_warning(option: str) -> None:
    assert parse("lowerdir=/a", option).unknown == (option,)


def test_options_for_others_are_ignored_silently() -> None:
    fstab = "_netdev,nofail,x-systemd.automount,x-y,X-mount.mkdir=0755,user,user=me,noauto,auto,defaults,comment=z"
    assert parse("lowerdir=/a", fstab, "private,rslave,shared,unbindable,silent,nomand").unknown == ()


def test_root_squashes_both_owners_and_single_ones_go_before_it() -> None:
    parsed = parse("lowerdir=/a,squash_to_uid=5,squash_to_root")
    assert (parsed.squash_uid, parsed.squash_gid) == (5, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("", "no lower layer"),
        ("upperdir=/u,workdir=/w", "no lower layer"),
        ("lowerdir=,datadir+=/d", "no lower layer"),
        ("lowerdir=/a,upperdir=/u", "needs a workdir"),
        ("lowerdir=/a,engine=portable,uring=on", "uring=on takes the native engine"),
        ("lowerdir=/a,metacopy=on,userxattr", "metacopy=on and userxattr"),
        ("lowerdir=/a,io=passthrough,writeback", "io=passthrough and writeback"),
        ("lowerdir=/a,io=passthrough,engine=portable", "io=passthrough takes the native engine"),
        ("lowerdir=/a,upperdir=/u,workdir=/w,metacopy=on,redirect_dir=off", "redirect_dir"),
        ("lowerdir=/a,upperdir=/u,workdir=/w,metacopy=on,redirect_dir=nofollow", "redirect_dir"),
        ("lowerdir=/a,metacopy=on,redirect_dir=nofollow", "redirect_dir"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: str, says: str) -> None:
    assert says in refusal(options)


def test_users_choose_one_of_allow_other_and_allow_root() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        parse("lowerdir=/a,allow_other,allow_root", euid=1000)


def test_allow_root_takes_the_place_of_roots_default() -> None:
    parsed = parse("lowerdir=/a,allow_root")
    assert (parsed.allow_root, parsed.allow_other) == (True, False)


def test_metacopy_turns_redirects_on() -> None:
    assert parse("lowerdir=/a,upperdir=/u,workdir=/w,metacopy=on").redirect_dir == "on"
    assert parse("lowerdir=/a,metacopy=on,redirect_dir=follow").redirect_dir == "follow"


def test_redirects_are_allowed_with_userxattr() -> None:
    parsed = parse("lowerdir=/a,upperdir=/u,workdir=/w,userxattr,redirect_dir=on")
    assert (parsed.userxattr, parsed.redirect_dir) == (True, "on")


def test_data_only_layers_need_no_metacopy() -> None:
    assert parse("lowerdir=/a::/d").metacopy is None


def test_every_field_has_the_documented_default() -> None:
    parsed = parse("lowerdir=/a,upperdir=/u,workdir=/w")
    expected = MountConfig(
        lowerdirs=(b"/a",),
        upperdir=b"/u",
        workdir=b"/w",
        mountpoint=b"/cwd/mnt",
        mount_flags=MS_NOATIME,
        allow_other=True,
        default_permissions=True,
    )
    assert parsed == expected
    assert parsed.timeout == math.inf


def checked(base: Layers, **changes: object) -> MountConfig:
    values: dict[str, object] = {
        "lowerdirs": (os.fsencode(base.lower),),
        "upperdir": os.fsencode(base.upper),
        "workdir": os.fsencode(base.work),
        "mountpoint": os.fsencode(base.mnt),
        **changes,
    }
    return check_paths(MountConfig(**values))  # type: ignore[arg-type]


def path_refusal(base: Layers, **changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(base, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def under(path: Path, *names: str) -> bytes:
    path.joinpath(*names).mkdir(parents=True, exist_ok=True)
    return os.fsencode(path.joinpath(*names))


def test_good_paths_are_resolved(layers: Layers) -> None:
    (layers.base / "link").symlink_to("lower")
    (layers.base / "m").symlink_to(layers.mnt)
    found = checked(layers, lowerdirs=(under(layers.base) + b"/link",), mountpoint=under(layers.base) + b"/m")
    assert found.lowerdirs == (os.path.realpath(os.fsencode(layers.lower)),)
    assert found.mountpoint == os.path.realpath(os.fsencode(layers.mnt))


def test_missing_paths_and_files_are_refused_by_name(layers: Layers) -> None:
    (layers.base / "file").write_text("")
    (layers.base / "loop").symlink_to("loop")
    for name, says in (("gone", "No such file"), ("file", "not a directory"), ("loop", "symbolic links")):
        path = os.fsencode(layers.base / name)
        assert says in path_refusal(layers, lowerdirs=(path,))
        assert "lowerdir" in path_refusal(layers, lowerdirs=(path,))
        assert "datadir" in path_refusal(layers, datadirs=(path,))
        assert "upperdir" in path_refusal(layers, upperdir=path)
        assert "workdir" in path_refusal(layers, workdir=path)
        assert "mountpoint" in path_refusal(layers, mountpoint=path)


def test_a_message_about_an_odd_name_stays_one_line(layers: Layers) -> None:
    assert r"a\x0ab" in path_refusal(layers, lowerdirs=(os.fsencode(layers.base) + b"/a\nb",))


def test_overlapping_layers_are_refused(layers: Layers) -> None:
    lower, upper = os.fsencode(layers.lower), os.fsencode(layers.upper)
    assert "one directory" in path_refusal(layers, lowerdirs=(lower, lower))
    assert "one directory" in path_refusal(layers, upperdir=lower)
    assert "one directory" in path_refusal(layers, workdir=upper)
    assert "one directory" in path_refusal(layers, datadirs=(lower,))
    assert "inside" in path_refusal(layers, lowerdirs=(lower, under(layers.lower, "a", "b")))
    assert "inside" in path_refusal(layers, upperdir=under(layers.lower, "u"))
    assert "inside" in path_refusal(layers, workdir=under(layers.upper, "w"))
    assert "inside" in path_refusal(layers, upperdir=under(layers.work, "u"))
    assert "inside" in path_refusal(layers, lowerdirs=(under(layers.work, "l"),))


def test_layers_that_are_one_directory_by_a_bind_mount_are_refused(layers: Layers) -> None:
    other = under(layers.base, "other")
    mount(os.fsencode(layers.lower), other, None, MS_BIND)
    try:
        assert "one directory" in path_refusal(layers, lowerdirs=(os.fsencode(layers.lower), other))
    finally:
        umount(other)


def test_upper_and_work_on_different_filesystems_are_refused(layers: Layers) -> None:
    other = under(layers.base, "other")
    mount(b"tmpfs", other, b"tmpfs")
    try:
        assert "different filesystems" in path_refusal(layers, workdir=other)
    finally:
        umount(other)


def test_mountpoint_inside_a_layer_is_refused(layers: Layers) -> None:
    for layer in (layers.lower, layers.upper, layers.work):
        assert "mountpoint" in path_refusal(layers, mountpoint=under(layer, "a", "b"))


def test_mountpoint_may_be_a_layer_or_hold_layers(layers: Layers) -> None:
    assert checked(layers, mountpoint=os.fsencode(layers.lower))
    assert checked(layers, mountpoint=os.fsencode(layers.base))


def test_nothing_is_changed_by_the_checks(layers: Layers) -> None:
    before = {path: path.stat().st_mtime_ns for path in layers.base.iterdir()}
    checked(layers)
    assert {path: path.stat().st_mtime_ns for path in layers.base.iterdir()} == before
    assert all(stat.S_ISDIR(path.stat().st_mode) for path in before)


def test_the_config_is_frozen() -> None:
    parsed = parse("lowerdir=/a")
    with pytest.raises(AttributeError):
        parsed.volatile = True  # type: ignore[misc]


def test_every_option_has_a_line_of_help_without_a_full_stop() -> None:
    for name, option in config.OPTIONS.items():
        assert option.help and "\n" not in option.help and not option.help.endswith("."), name


def test_escape_of_the_tests_is_the_one_documented() -> None:
    assert escape(rb"a\b:c,d") == rb"a\\b\:c\,d"
