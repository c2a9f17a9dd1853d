"""`ovl`: images made of layers, and containers with a writable layer each."""

from __future__ import annotations

import click


@click.group()
def main() -> None:
    """Images made of layers, and containers with a writable layer each."""
