from collections.abc import Callable

MOST_HELPERS: int

class Pace:
    def help_by(self, begin: Callable[[], None]) -> None: ...
    def close(self) -> None: ...
