"""The settings of an image that a container starts with, changed by lines like those of a Dockerfile.

Source: the OCI image specification, config.md; the Dockerfile reference.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from overlayfs_py.images.model import ImageError

_KNOWN: Final = ("CMD", "ENTRYPOINT", "ENV", "EXPOSE", "LABEL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR")


def apply_lines(settings: Mapping[str, Any], lines: Sequence[str]) -> dict[str, Any]:
    """The settings (the configuration's "config") after some lines, each an instruction of a Dockerfile."""
    result = dict(settings)
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word.upper() not in _KNOWN or not rest:
            raise ImageError(f"{line!r} changes no setting: it has to begin with one of {', '.join(_KNOWN)}")
        _apply(result, word.upper(), rest)
    return result


def _apply(settings: dict[str, Any], word: str, rest: str) -> None:
    if word in ("CMD", "ENTRYPOINT"):
        settings["Cmd" if word == "CMD" else "Entrypoint"] = _command(rest)
    elif word == "ENV":
        environment = dict(variable.partition("=")[::2] for variable in settings.get("Env") or ())
        environment |= _pairs(rest, word)
        settings["Env"] = [f"{name}={value}" for name, value in environment.items()]
    elif word == "LABEL":
        settings["Labels"] = dict(settings.get("Labels") or {}) | _pairs(rest, word)
    elif word == "EXPOSE":
        ports: dict[str, Any] = {port if "/" in port else f"{port}/tcp": {} for port in rest.split()}
        settings["ExposedPorts"] = dict(settings.get("ExposedPorts") or {}) | ports
    elif word == "VOLUME":
        paths = _command(rest) if rest.startswith("[") else rest.split()
        settings["Volumes"] = dict(settings.get("Volumes") or {}) | {path: {} for path in paths}
    elif word == "WORKDIR":
        settings["WorkingDir"] = os.path.normpath(os.path.join(settings.get("WorkingDir") or "/", rest))
    else:
        settings["User" if word == "USER" else "StopSignal"] = rest


def _command(text: str) -> list[str]:
    """A command in JSON, or one for the shell."""
    if text.startswith("["):
        try:
            words = json.loads(text)
        except ValueError:
            words = None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ImageError(f"{text!r} is no list of words in JSON")
        return words
    return ["/bin/sh", "-c", text]


def _pairs(text: str, word: str) -> dict[str, str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ImageError(f"{word} {text!r} has a quote that is not closed") from error
    if "=" not in words[0]:
        # The old form, of one name and all the rest.
        name, _, value = text.partition(" ")
        return {name: value.strip()}
    if not all("=" in pair for pair in words):
        raise ImageError(f"{word} {text!r} has to be of the form NAME=VALUE")
    return dict(pair.partition("=")[::2] for pair in words)


def now() -> str:
    """The time of making something, by RFC 3339; SOURCE_DATE_EPOCH (reproducible-builds.org) where it is set."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    seconds = int(fixed) if fixed.isdecimal() else int(time.time())
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
