"""What goes wrong with containers."""

FAILED = 125
"""Exit status of `run` when the container was never started; docker-run(1)."""
CANNOT_INVOKE = 126
"""Exit status when the command is there but can't be run."""
NOT_FOUND = 127
"""Exit status when the command isn't there."""


class ContainerError(Exception):
    """A container can't be made, found, started or changed: one line that says what is wrong.

    `status` is the exit status of `run` and `exec` for it.
    """

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


class NoContainerError(ContainerError):
    """There is no container of the name or id `word`."""

    def __init__(self, word: str) -> None:
        super().__init__(f"no such container: {word}", 1)
        self.word = word
