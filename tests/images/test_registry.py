"""Pull and push against Debian's docker-registry on loopback."""

import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from overlayfs_py.cli.ovl import main
from overlayfs_py.images import Image, ImageError, Store
from overlayfs_py.images.registry import client
from overlayfs_py.images.registry.transfer import Access, pull, push
from tests.images.registry import Behaviour, free_port, front, registry
from tests.images.rig import Item, archive, load_one, our_tree, write_layout
from tests.runtime.conftest import within
from tests.support.mounts import REPOSITORY
from tests.support.trees import compare_trees

NOISE = random.Random(7).randbytes(400_000)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    """No long pauses between attempts, and none of this machine's credentials."""
    monkeypatch.setattr(client, "_PAUSE", 0.01)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(base / "no-auth.json"))
    monkeypatch.setenv("HOME", str(base))
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)


@pytest.fixture
def image(store: Store, base: Path) -> Image:
    write_layout(base / "layout", [archive([Item("noise", NOISE)]), archive([Item("top", b"x")])], Cmd=["/noise"])
    return load_one(store, base / "layout")


@pytest.fixture
def other(base: Path) -> Store:
    """Another machine's store."""
    return Store.open(base / "other")


@pytest.fixture
def port(base: Path) -> Iterator[int]:
    with registry(base / "registry") as number:
        yield number


def test_an_image_comes_back_from_a_registry_as_it_went(
    store: Store, other: Store, base: Path, image: Image, port: int
) -> None:
    name = f"127.0.0.1:{port}/folder/image:1"
    digest = push(store, image, name)
    pulled, warnings = pull(other, name)
    assert (pulled.id, pulled.config, pulled.names, warnings) == (image.id, image.config, (name,), [])
    assert other.manifest_digest(pulled) == digest
    # Layers that were not compressed are now.
    assert pulled.size < image.size
    assert compare_trees(our_tree(pulled, base / "a"), our_tree(image, base / "b"), ignore=("atime",)) == []
    by_digest, _ = pull(other, f"127.0.0.1:{port}/folder/image@{digest}")
    assert by_digest.id == image.id


def test_skopeo_reads_what_was_pushed(store: Store, base: Path, image: Image, port: int) -> None:
    push(store, image, f"127.0.0.1:{port}/image:1")
    source = f"docker://127.0.0.1:{port}/image:1"
    command = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", source, f"oci:{base / 'copy'}:1"]
    subprocess.run(command, check=True, timeout=60)
    assert load_one(store, base / "copy").id == image.id


def test_only_what_is_missing_is_pulled_and_pushed(store: Store, other: Store, image: Image, port: int) -> None:
    behaviour = Behaviour()
    with front(port, behaviour) as number:
        push(store, image, f"127.0.0.1:{number}/image:1")
        pull(other, f"127.0.0.1:{number}/image:1")
        behaviour.asked.clear()
        push(store, image, f"127.0.0.1:{number}/image:2")
        pull(other, f"127.0.0.1:{number}/image:2")
    blobs = [(method, path) for method, path, _ in behaviour.asked if "/blobs/" in path and method != "HEAD"]
    assert blobs == [("GET", f"/v2/image/blobs/{image.id}")]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_is_cut_off_goes_on_where_it_was(
    store: Store, other: Store, image: Image, port: int, ranges: bool
) -> None:
    push(store, image, f"127.0.0.1:{port}/image:1")
    behaviour = Behaviour(cut=[100_000, 50_000], no_ranges=not ranges)
    with front(port, behaviour) as number:
        pulled, _ = pull(other, f"127.0.0.1:{number}/image:1")
    assert pulled.id == image.id
    asked = [asked for method, path, asked in behaviour.asked if method == "GET" and asked]
    assert asked == (["bytes=100000-", "bytes=150000-"] if ranges else ["bytes=100000-", "bytes=50000-"])


@pytest.mark.parametrize("forgetful", [False, True])
def test_an_upload_that_is_cut_off_goes_on_where_it_was(
    store: Store, other: Store, image: Image, port: int, forgetful: bool
) -> None:
    behaviour = Behaviour(cut_uploads=[100_000, 50_000], forgetful=forgetful)
    with front(port, behaviour) as number:
        push(store, image, f"127.0.0.1:{number}/image:1")
    assert pull(other, f"127.0.0.1:{port}/image:1")[0].id == image.id
    starts = [asked.partition("-")[0] for method, _, asked in behaviour.asked if method == "PATCH" and asked]
    assert starts == ([] if forgetful else ["100000", "150000"])
    assert behaviour.cut_uploads == []


def test_an_upload_that_never_gets_through_is_one_line(store: Store, image: Image, port: int) -> None:
    with (
        front(port, Behaviour(cut_uploads=[0] * 20)) as number,
        pytest.raises(ImageError, match=rf"^the connection to 127\.0\.0\.1:{number} failed: "),
    ):
        push(store, image, f"127.0.0.1:{number}/image:1")


def test_a_pull_after_one_that_failed_goes_on_where_that_was(
    store: Store, other: Store, image: Image, port: int
) -> None:
    push(store, image, f"127.0.0.1:{port}/image:1")
    behaviour = Behaviour(cut=[100_000, *[0] * 10])
    with front(port, behaviour) as number:
        with pytest.raises(ImageError, match="cut off"):
            pull(other, f"127.0.0.1:{number}/image:1")
        assert other.images() == []
        assert [path.stat().st_size for path in other.layout.partial.iterdir()] == [100_000]
        behaviour.cut.clear()
        behaviour.asked.clear()
        assert pull(other, f"127.0.0.1:{number}/image:1")[0].id == image.id
    assert ["bytes=100000-"] == [asked for _, _, asked in behaviour.asked if asked]
    assert list(other.layout.partial.iterdir()) == []


@contextmanager
def stalling(image: Image, store: Store, port: int) -> Iterator[int]:
    """A registry that stops in the middle of every blob, and says nothing any more."""
    push(store, image, f"127.0.0.1:{port}/image:1")
    with front(port, Behaviour(cut=[50_000, *[0] * 20], stall=True)) as number:
        yield number


@pytest.mark.parametrize("words", [["pull"], ["run", "--rm", "--network", "none"]])
def test_a_pull_that_is_interrupted_ends_at_once_and_is_gone_on_with(
    store: Store, other: Store, image: Image, port: int, words: list[str]
) -> None:
    with stalling(image, store, port) as number:
        command = [sys.executable, "-m", "overlayfs_py.cli.ovl", "--root", str(other.root)]
        command += [*words, f"127.0.0.1:{number}/image:1"]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert within(20, lambda: sum(path.stat().st_size for path in other.layout.partial.iterdir()) >= 50_000)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=10) == ("", "ovl: interrupted\n")
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130
    assert other.images() == [] and list(other.layout.tmp.iterdir()) == []
    behaviour = Behaviour()
    with front(port, behaviour) as number:
        assert pull(other, f"127.0.0.1:{number}/image:1")[0].id == image.id
    assert "bytes=50000-" in [asked for _, _, asked in behaviour.asked]


def test_a_registry_that_stops_in_the_middle_is_one_line(
    store: Store, other: Store, image: Image, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_TIMEOUT", (1.0, 0.2))
    with stalling(image, store, port) as number:
        words = ["--root", str(other.root), "pull", f"127.0.0.1:{number}/image:1"]
        done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 1
    assert re.fullmatch(rf"ovl: 127.0.0.1:{number} does not answer in time\n", done.stderr), done.stderr
    assert other.images() == [] and list(other.layout.tmp.iterdir()) == []


def test_a_full_disk_ends_a_pull_in_one_line_and_leaves_nothing(
    store: Store, base: Path, image: Image, port: int
) -> None:
    push(store, image, f"127.0.0.1:{port}/image:1")
    small = base / "small"
    small.mkdir()
    with mounted_tmpfs(small, "300k"):
        words = ["--root", str(small / "store"), "pull", f"127.0.0.1:{port}/image:1"]
        done = CliRunner().invoke(main, words, catch_exceptions=False)
        assert (done.exit_code, done.stderr) == (1, "ovl: cannot write to the store: No space left on device\n")
        full = Store.open(small / "store")
        assert full.images() == []
        assert [*full.layout.tmp.iterdir(), *full.layout.partial.iterdir(), *full.layout.blobs.iterdir()] == []


@contextmanager
def mounted_tmpfs(where: Path, size: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", where], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", where], check=True)


def test_a_blob_that_is_not_what_its_digest_says_is_refused(
    store: Store, other: Store, image: Image, port: int
) -> None:
    push(store, image, f"127.0.0.1:{port}/image:1")
    with front(port, Behaviour(lie=True)) as number, pytest.raises(ImageError, match="not what its digest says"):
        pull(other, f"127.0.0.1:{number}/image:1")
    assert other.images() == [] and list(other.layout.partial.iterdir()) == []


def write_auth(path: Path, host: str, user: str, password: str) -> Path:
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return path


def test_a_password_comes_from_the_file_of_credentials(store: Store, base: Path, image: Image) -> None:
    with registry(base / "registry", {"someone": "pass:word"}) as port:
        name = f"127.0.0.1:{port}/image:1"
        with pytest.raises(ImageError, match="wants a user and password"):
            push(store, image, name)
        good = Access(write_auth(base / "good.json", f"127.0.0.1:{port}", "someone", "pass:word"))
        push(store, image, name, access=good)
        assert pull(store, name, access=good)[0].id == image.id
        bad = Access(write_auth(base / "bad.json", f"127.0.0.1:{port}", "someone", "wrong"))
        with pytest.raises(ImageError, match="does not let you read"):
            pull(store, name, access=bad)
        # skopeo's own file serves, too.
        login = ["skopeo", "login", "--tls-verify=false", "-u", "someone", "-p", "pass:word", f"127.0.0.1:{port}"]
        env = dict(os.environ, REGISTRY_AUTH_FILE=str(base / "no-auth.json"))
        subprocess.run(login, check=True, capture_output=True, timeout=60, env=env)
        assert pull(store, name)[0].id == image.id


@pytest.mark.parametrize("known", [True, False])
def test_a_token_is_fetched_from_where_the_registry_says(
    store: Store, base: Path, image: Image, port: int, known: bool
) -> None:
    behaviour = Behaviour(token="secret-token")
    with front(port, behaviour) as number:
        access = Access()
        if known:
            access = Access(write_auth(base / "auth.json", f"127.0.0.1:{number}/image", "someone", "password"))
        push(store, image, f"127.0.0.1:{number}/image:1", access=access)
        assert pull(store, f"127.0.0.1:{number}/image:1", access=access)[0].id == image.id
    expected = "Basic " + base64.b64encode(b"someone:password").decode() if known else ""
    assert set(behaviour.authorised) == {expected}


def test_what_is_not_there_is_one_line(store: Store, port: int) -> None:
    with pytest.raises(ImageError, match=re.escape(f"127.0.0.1:{port} has no missing:1")):
        pull(store, f"127.0.0.1:{port}/missing:1")
    with pytest.raises(ImageError, match="Connection refused"):
        pull(store, f"127.0.0.1:{free_port()}/missing:1")
    assert store.images() == []


def test_a_certificate_has_to_be_trusted_unless_the_user_says_so(
    store: Store, base: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    with registry(base / "registry", tls=True) as port:
        name = f"127.0.0.1:{port}/image:1"
        with pytest.raises(ImageError, match="has a certificate that is not trusted"):
            push(store, image, name)
        push(store, image, name, access=Access(tls_verify=False))
        certificate = base / "registry" / "certificate"
        with monkeypatch.context() as patched:
            patched.setenv("REQUESTS_CA_BUNDLE", str(certificate))
            assert pull(store, name)[0].id == image.id
        own = base / "certs.d" / f"127.0.0.1:{port}" / "ca.crt"
        own.parent.mkdir(parents=True)
        own.write_bytes(certificate.read_bytes())
        monkeypatch.setattr(client, "_CERTIFICATES", (base / "certs.d",))
        assert pull(store, name)[0].id == image.id
