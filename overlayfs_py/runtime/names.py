"""Names and ids of containers and volumes, by Docker's rules."""

import re
import secrets

from overlayfs_py.runtime.errors import ContainerError

_LONGEST_HOSTNAME = 63
_HOSTNAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")

_MANNERS = """
    amber brisk calm clever cosy crisp dapper eager early fair fleet fond frank gentle glad golden hardy hazel jolly
    keen kind lively lucid mellow merry mild misty neat nimble noble patient plain plucky proud quick quiet ready rosy
    rustic serene sharp silver sleek snug solid spry steady sturdy sunny swift tidy trusty velvet vivid warm wise witty
""".split()
_BIRDS = """
    auk avocet bittern bunting buzzard chough condor coot crane curlew dipper dove dunlin egret eider falcon finch
    gannet godwit goose grebe grouse harrier heron hobby hoopoe ibis jackdaw jay kestrel kite knot lapwing lark linnet
    magpie martin merlin moorhen osprey ouzel owl petrel pipit plover puffin quail rail raven redstart robin rook ruff
    shrike siskin skua snipe sparrow starling stork swallow swan swift teal tern thrush treecreeper twite wagtail
    warbler waxwing wheatear whimbrel wigeon wren wryneck
""".split()


def check(name: str, what: str = "container") -> str:
    """The name, if it is one. Raises ContainerError."""
    if not _NAME.fullmatch(name):
        raise ContainerError(
            f"{name!r} is no name for a {what}: use letters, digits, '_', '.' and '-', two or more, beginning with a "
            "letter or digit"
        )
    return name


def check_hostname(name: str) -> str:
    """The name, if a machine can have it. Raises ContainerError. Source: hostname(7)."""
    if len(name) > _LONGEST_HOSTNAME or not _HOSTNAME.fullmatch(name):
        raise ContainerError(
            f"{name!r} is no host name: use letters, digits, '-' and '.', {_LONGEST_HOSTNAME} at most, "
            "beginning with a letter or digit"
        )
    return name


def new_id() -> str:
    """A fresh id: 64 hexadecimal digits."""
    while (new := secrets.token_hex(32))[:12].isdigit():
        # A short id of digits alone reads as a number, for a hostname for one.
        pass
    return new


def invent() -> str:
    """A name that is easy to say; it may be taken."""
    return f"{secrets.choice(_MANNERS)}_{secrets.choice(_BIRDS)}"
