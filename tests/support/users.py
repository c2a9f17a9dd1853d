"""Code that runs as another user."""

import os
import traceback
from collections.abc import Callable


def run_as(uid: int, call: Callable[[], object]) -> None:
    """Call a function in a child that is another user, of the group of that number alone; fails if it raises."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            call()
            status = 0
        except BaseException:  # noqa: BLE001 - told, and answered by the status
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
