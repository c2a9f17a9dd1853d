"""What a mount takes of typing and collections, without loading them.

A mount must answer soon, and half of the time until then went into loading modules of the standard library: typing
brings in re, enum, functools and contextlib. Whoever runs on the way to a mount takes from here what he needs of those.
"""

from __future__ import annotations

__all__ = ["TYPE_CHECKING", "NamedTuple", "OrderedDict", "deque"]

TYPE_CHECKING = False
"""As in typing; type checkers take it for true."""

if TYPE_CHECKING:
    from collections import OrderedDict as OrderedDict
    from collections import deque as deque
    from typing import NamedTuple as NamedTuple
else:
    try:
        # What collections itself is made of.
        from _collections import OrderedDict, _tuplegetter, deque
    except ImportError:

        def _tuplegetter(position, doc):
            return property(lambda record: record[position], doc=doc)

    class _Fields(type):
        def __new__(cls, name, bases, namespace):
            fields = tuple(namespace.get("__annotations__", ()))
            # Looked up by position, as a function that names its arguments is called faster than any that gathers them.
            words = ", ".join(fields)
            make = eval(f"lambda cls, {words}: new(cls, ({words}{',' * bool(fields)}))", {"new": tuple.__new__})
            make.__defaults__ = tuple(namespace[field] for field in fields if field in namespace)
            for position, field in enumerate(fields):
                namespace[field] = _tuplegetter(position, f"Field {position}.")
            namespace |= {"__slots__": (), "__new__": make, "__match_args__": fields, "_fields": fields}
            return type.__new__(cls, name, bases, namespace)

    class NamedTuple(tuple, metaclass=_Fields):
        """As in typing, less what nobody here uses; fields without a default come first."""

        def _replace(self, **changed):
            return type(self)(**(dict(zip(self._fields, self, strict=True)) | changed))

        def __repr__(self):
            values = (f"{field}={value!r}" for field, value in zip(self._fields, self, strict=True))
            return f"{type(self).__name__}({', '.join(values)})"

        def __getnewargs__(self):
            return tuple(self)
