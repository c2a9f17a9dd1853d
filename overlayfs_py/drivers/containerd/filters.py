"""containerd's filter language: `kind==active,labels."containerd.io/gc.root"~=/^a/`.

A filter is selectors split by commas, all of which must match; an empty one matches everything. A selector is a field
path and, unless presence alone is asked for, an operator (`==`, `!=`, `~=`) and a value. A part of a path, and a
value, may be quoted as in Go; a regular expression also by `/` or `|`. Source: the documentation of containerd's
package filters. Regular expressions are Python's, which differ from Go's in rare corners.
"""

import re
from collections.abc import Callable, Sequence

from overlayfs_py.drivers.containerd.failures import InvalidArgumentError

Fields = Callable[[Sequence[str]], str | None]
"""The value of a field path, None where there is no such field."""

Filter = Callable[[Fields], bool]

_QUOTED = r'"(?:[^"\\\n]|\\.)*"'
_PART = re.compile(rf"[A-Za-z0-9_]+|{_QUOTED}")
_OPERATOR = re.compile(r"==|!=|~=")
_VALUE = re.compile(rf'{_QUOTED}|[^\s,"]+')
_PATTERN = re.compile(rf'{_QUOTED}|/(?:[^/\\\n]|\\.)*/|\|(?:[^|\\\n]|\\.)*\||[^\s,"]+')
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|.)")
_ESCAPED = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"'}


def parse_all(texts: Sequence[str]) -> Filter:
    """What matches any of the filters, or everything if there is none. Raises InvalidArgumentError."""
    filters = [parse(text) for text in texts]
    return lambda fields: not filters or any(accepts(fields) for accepts in filters)


def parse(text: str) -> Filter:
    """What matches one filter. Raises InvalidArgumentError."""
    selectors: list[Filter] = []
    at = 0
    while at < len(text):
        if selectors:
            at = _expect(text, at, ",")
        selector, at = _selector(text, at)
        selectors.append(selector)
    return lambda fields: all(accepts(fields) for accepts in selectors)


def _selector(text: str, at: int) -> tuple[Filter, int]:
    path, at = _field_path(text, at)
    found = _OPERATOR.match(text, at)
    if found is None:
        return (lambda fields: fields(path) is not None), at
    at = found.end()
    operator = found[0]
    token = (_PATTERN if operator == "~=" else _VALUE).match(text, at)
    if token is None:
        raise _malformed(text, at, "a value")
    value = _unquoted(text, token)
    return _comparison(text, path, operator, value), token.end()


def _comparison(text: str, path: Sequence[str], operator: str, value: str) -> Filter:
    if operator == "==":
        return lambda fields: fields(path) == value
    if operator == "!=":
        return lambda fields: fields(path) != value
    try:
        pattern = re.compile(value)
    except re.error as error:
        raise InvalidArgumentError(f"filter {text!r}: {error} in the regular expression {value!r}") from error
    return lambda fields: pattern.search(fields(path) or "") is not None


def _field_path(text: str, at: int) -> tuple[Sequence[str], int]:
    path: list[str] = []
    while True:
        token = _PART.match(text, at)
        if token is None:
            raise _malformed(text, at, "a field")
        path.append(_unquoted(text, token))
        at = token.end()
        if not text.startswith(".", at):
            return path, at
        at += 1


def _unquoted(text: str, token: re.Match[str]) -> str:
    word = token[0]
    if word[0] in "/|" and len(word) > 1 and word[-1] == word[0]:
        # Here a backslash belongs to the expression, but for one before the quote itself.
        return word[1:-1].replace(f"\\{word[0]}", word[0])
    if word[0] != '"':
        return word

    def plain(escape: re.Match[str]) -> str:
        code = escape[1]
        if code in _ESCAPED:
            return _ESCAPED[code]
        if len(code) == 1:
            raise _malformed(text, token.start() + 1 + escape.start(), "a known escape")
        number = int(code, 8) if code.isdigit() else int(code[1:], 16)
        if number > 0x10FFFF:
            raise _malformed(text, token.start() + 1 + escape.start(), "a character of Unicode")
        return chr(number)

    return _ESCAPE.sub(plain, word[1:-1])


def _expect(text: str, at: int, mark: str) -> int:
    if not text.startswith(mark, at):
        raise _malformed(text, at, f"{mark!r}")
    return at + len(mark)


def _malformed(text: str, at: int, wanted: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"filter {text!r}: {wanted} is missing at character {at + 1}")
