"""Advisory locks on directories."""

import fcntl


def try_lock_dir(fd: int) -> bool:
    """Take an exclusive lock on an open (not O_PATH) directory, held until all copies of fd are closed; False if
    someone else holds it. Source: flock(2)."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
