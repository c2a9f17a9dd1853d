"""What a request may be refused for; each has its code in gRPC (service.py)."""


class SnapshotError(Exception):
    """The common base: nothing was changed, and the message says why."""


class NotFoundError(SnapshotError):
    """No snapshot has this name."""


class AlreadyExistsError(SnapshotError):
    """A snapshot has this name already, or the content that was to be prepared is there."""


class FailedPreconditionError(SnapshotError):
    """The snapshot is of the wrong kind, or others are built on it."""


class InvalidArgumentError(SnapshotError):
    """The request says something that can't be meant."""
