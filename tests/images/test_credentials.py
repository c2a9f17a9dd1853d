"""Which credentials are sent to a registry."""

import base64
import json
from pathlib import Path

import pytest

from overlayfs_py.images import ImageError
from overlayfs_py.images.registry.credentials import Credentials, find_credentials


def entry(user: str, password: str = "secret") -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def write(path: Path, **content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("host", "repository", "user"),
    [
        ("host:5000", "folder/image", "image"),
        ("host:5000", "folder/other", "folder"),
        ("host:5000", "elsewhere/image", "host"),
        ("docker.io", "library/debian", "docker"),
        ("old.example", "a", "url"),
        ("unknown.example", "a", None),
    ],
)
def test_the_most_specific_entry_counts(tmp_path: Path, host: str, repository: str, user: str | None) -> None:
    path = write(
        tmp_path / "auth.json",
        auths={
            "host:5000": entry("host"),
            "host:5000/folder": entry("folder"),
            "host:5000/folder/image": entry("image"),
            "https://index.docker.io/v1/": entry("docker"),
            "https://old.example": entry("url"),
            "empty.example": {},
        },
    )
    found = find_credentials(host, repository, path)
    assert found == (Credentials(user, "secret") if user else None)


def test_the_usual_files_are_looked_at_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    places = [tmp_path / place for place in ("home/.docker/config.json", "home/.config/containers/auth.json")]
    for path in [*places, tmp_path / "run" / "containers" / "auth.json"]:
        write(path, auths={"host.example": entry(path.parent.name + path.name)})
        assert find_credentials("host.example", "a") == Credentials(path.parent.name + path.name, "secret")
    write(tmp_path / "named.json", auths={"host.example": {"identitytoken": "refresh"}})
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "named.json"))
    assert find_credentials("host.example", "a") == Credentials("", "", "refresh")


def test_a_helper_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text(
        '#!/bin/sh\nread host\n[ "$host" = host.example ] || { echo "credentials not found"; exit 1; }\n'
        'echo \'{"Username": "someone", "Secret": "from the helper"}\'\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    path = write(tmp_path / "config.json", credsStore="test", credHelpers={"bad.example": "not-there"})
    assert find_credentials("host.example", "a", path) == Credentials("someone", "from the helper")
    assert find_credentials("other.example", "a", path) is None
    with pytest.raises(ImageError, match="docker-credential-not-there is missing"):
        find_credentials("bad.example", "a", path)


@pytest.mark.parametrize("text", ["{", '{"auths": {"h": {"auth": "!"}}}', '{"auths": {"h": {"auth": "bm8="}}}'])
def test_a_file_that_makes_no_sense_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "auth.json").write_text(text)
    with pytest.raises(ImageError):
        find_credentials("h", "a", tmp_path / "auth.json")


def test_a_file_that_is_named_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is no"):
        find_credentials("h", "a", tmp_path / "missing.json")
