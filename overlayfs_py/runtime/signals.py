"""The signals that go through to a container."""

import signal

FORWARDED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTERM,
    signal.SIGCONT,
    signal.SIGALRM,
)
"""A monitor, and a client in the foreground, pass these on to the container's process."""
