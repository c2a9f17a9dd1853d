"""The commands of `ovl` on containers."""

from __future__ import annotations

import click

from overlayfs_py.cli import container_files, container_run, container_state, container_usage

commands: list[click.Command] = [
    container_run.create,
    container_run.run,
    container_run.start,
    container_run.attach,
    container_run.execute_,
    container_state.ps,
    container_state.inspect,
    container_state.logs_,
    container_state.stop,
    container_state.kill,
    container_state.restart,
    container_state.wait,
    container_state.rm,
    container_state.rename,
    container_state.port,
    container_files.cp,
    container_files.diff,
    container_files.commit,
    container_files.mount,
    container_files.umount,
    container_usage.top,
    container_usage.stats,
    container_usage.volume,
    container_usage.system,
]
