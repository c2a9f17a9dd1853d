"""The commands of `ovl` on containers."""

from __future__ import annotations

import click

from overlayfs_py.cli import container_run, container_state

commands: list[click.Command] = [
    container_run.create,
    container_run.run,
    container_run.start,
    container_run.attach,
    container_run.execute_,
    container_state.ps,
    container_state.logs_,
    container_state.stop,
    container_state.kill,
    container_state.restart,
    container_state.wait,
    container_state.rm,
    container_state.rename,
    container_state.port,
]
