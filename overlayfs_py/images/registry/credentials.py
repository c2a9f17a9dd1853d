"""Who one is to a registry, from the files that podman, skopeo and Docker keep. Source: containers-auth.json(5)."""

from __future__ import annotations

import base64
import binascii
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from overlayfs_py.images.model import ImageError

_DOCKER_KEYS: Final = ("docker.io", "https://index.docker.io/v1/", "index.docker.io", "registry-1.docker.io")
_HELPER_TIMEOUT: Final = 30.0  # seconds
_TOKEN_USER: Final = "<token>"


class Credentials(NamedTuple):
    """A user and password; `identity` is a refresh token instead."""

    user: str
    password: str
    identity: str = ""


def find_credentials(host: str, repository: str, authfile: Path | None = None) -> Credentials | None:
    """What the first file has that knows the repository, its folders or its host; None for an anonymous user.

    Raises ImageError where a file or helper can't be used.
    """
    for path in [authfile] if authfile else _files():
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            if authfile:
                raise ImageError(f"there is no {authfile}") from error
            continue
        except OSError as error:
            raise ImageError(f"cannot read {path}: {error.strerror}") from error
        try:
            values = json.loads(data)
        except ValueError as error:
            raise ImageError(f"{path} is no JSON: {error}") from error
        if isinstance(values, Mapping):
            found = _in_file(values, host, repository, path)
            if found is not None:
                return found
    return None


def _files() -> Iterator[Path]:
    named = os.environ.get("REGISTRY_AUTH_FILE")
    if named:
        yield Path(named)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        yield Path(runtime) / "containers" / "auth.json"
    config = os.environ.get("XDG_CONFIG_HOME")
    home = Path.home()
    yield (Path(config) if config else home / ".config") / "containers" / "auth.json"
    docker = os.environ.get("DOCKER_CONFIG")
    yield (Path(docker) if docker else home / ".docker") / "config.json"


def _in_file(values: Mapping[str, Any], host: str, repository: str, path: Path) -> Credentials | None:
    auths, helpers = values.get("auths"), values.get("credHelpers")
    auths = auths if isinstance(auths, Mapping) else {}
    helpers = helpers if isinstance(helpers, Mapping) else {}
    for key in _keys(host, repository):
        if key in helpers:
            return _ask_helper(str(helpers[key]), key)
        for form in (key, f"https://{key}", f"http://{key}"):
            entry = auths.get(form)
            if isinstance(entry, Mapping) and (entry.get("auth") or entry.get("identitytoken")):
                return _decoded(entry, path)
    if values.get("credsStore"):
        key = _DOCKER_KEYS[1] if host == _DOCKER_KEYS[0] else host
        return _ask_helper(str(values["credsStore"]), key)
    return None


def _keys(host: str, repository: str) -> Iterator[str]:
    """The most specific first."""
    hosts = _DOCKER_KEYS if host == _DOCKER_KEYS[0] else (host,)
    parts = repository.split("/")
    for end in range(len(parts), 0, -1):
        yield f"{hosts[0]}/{'/'.join(parts[:end])}"
    yield from hosts


def _decoded(entry: Mapping[str, Any], path: Path) -> Credentials:
    try:
        user, colon, password = base64.b64decode(str(entry.get("auth") or ""), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ImageError(f"{path} has credentials that can't be decoded") from error
    identity = str(entry.get("identitytoken") or "")
    if not identity and not colon:
        raise ImageError(f"{path} has credentials without a password")
    return Credentials(user, password.strip("\0"), identity)


def _ask_helper(name: str, key: str) -> Credentials | None:
    program = f"docker-credential-{name}"
    if "/" in name:
        raise ImageError(f"{program} is no name of a credential helper")
    try:
        done = subprocess.run([program, "get"], input=key.encode(), capture_output=True, timeout=_HELPER_TIMEOUT)
    except FileNotFoundError as error:
        raise ImageError(f"the credential helper {program} is missing") from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"the credential helper {program} does not answer") from error
    if done.returncode != 0:
        if b"not found" in done.stdout + done.stderr:
            return None
        raise ImageError(f"the credential helper {program} failed: {done.stderr.decode(errors='replace').strip()}")
    try:
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError) as error:
        raise ImageError(f"the credential helper {program} gave no credentials") from error
    return Credentials("", "", secret) if user == _TOKEN_USER else Credentials(user, secret)
