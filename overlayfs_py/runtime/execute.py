"""Further processes in a running container; the OCI runtime does the work, and passes on streams and signals."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time

from overlayfs_py.runtime import bundle, oci, users
from overlayfs_py.runtime.signals import FORWARDED
from overlayfs_py.runtime.spec import Spec
from overlayfs_py.runtime.state import Container

_PIECE = 64 << 10
_PAUSE = 10  # milliseconds


def execute(container: Container, spec: Spec, *, detach: bool) -> int:
    """Run the spec's command in the container; returns its exit code, or 0 at once with `detach`.

    Of the spec the command, environment, user, directory, capabilities and terminal count; without `interactive` its
    standard input is empty. Raises ContainerError where the command can't be run.
    """
    root_fd = os.open(container.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        user = users.resolve(root_fd, spec.user, spec.groups)
    finally:
        os.close(root_fd)
    with tempfile.TemporaryDirectory(prefix=".exec-", dir=container.directory) as place:
        wanted = os.path.join(place, "process.json")
        with open(wanted, "w", encoding="utf-8") as file:
            json.dump(bundle.process(spec, user, args=spec.args), file)
        log = os.path.join(place, "log")
        pid_file = os.path.join(place, "pid")
        words = ["exec", "--process", wanted, "--pid-file", pid_file, container.id]
        command = oci.command(container, *words, log=log)
        code = _leave(command, pid_file) if detach else _run(command, stdin=spec.interactive, pid_file=pid_file)
        if code != 0 and not os.path.exists(pid_file):
            raise oci.explain(log, spec.args[0])
        return code


def _leave(command: list[str], pid_file: str) -> int:
    """Leave the OCI runtime in the background, as the parent that the process needs: were that a process of the host
    that collects no children, the container could not end."""
    null = subprocess.DEVNULL
    child = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, cwd="/", start_new_session=True)
    while not os.path.exists(pid_file):
        if child.poll() is not None:
            return child.returncode
        time.sleep(_PAUSE / 1000)
    return 0


def _run(command: list[str], *, stdin: bool, pid_file: str) -> int:
    """Run the OCI runtime as a child that gets our signals; what it says itself when it fails is not passed on."""
    child = subprocess.Popen(command, stdin=None if stdin else subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/")
    # What is typed at a terminal comes to the child by itself.
    typed = (signal.SIGINT, signal.SIGQUIT) if os.isatty(0) else ()
    for number in typed:
        signal.signal(number, signal.SIG_IGN)
    for number in set(FORWARDED) - set(typed):
        signal.signal(number, lambda number, _frame: child.send_signal(number))
    assert child.stderr is not None
    _pass_on(child.stderr.fileno(), pid_file)
    code = child.wait()
    child.stderr.close()
    return code if code >= 0 else 128 - code


def _pass_on(errors: int, pid_file: str) -> None:
    """Pass on to standard error what the process writes there, once its pid file says that it runs."""
    held = b""
    poll = select.poll()
    poll.register(errors, select.POLLIN)
    runs = False
    while True:
        runs = runs or os.path.exists(pid_file)
        if held and runs:
            os.write(2, held)
            held = b""
        if not poll.poll(_PAUSE if held else None):
            continue
        data = os.read(errors, _PIECE)
        if not data:
            break
        held += data
    if held and os.path.exists(pid_file):
        os.write(2, held)
