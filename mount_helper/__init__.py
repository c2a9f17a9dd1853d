"""All that needs privilege to mount, as a fixed set of operations; standard library only.

kernel       /dev/fuse, mount(2), umount2(2), the table of mounts
fusermount   the same through the set-user-ID program fusermount3, for users who may not mount
lean         the compiled halves of signal and socket
handover     mount for a daemon: hand it the descriptor, wait until the root answers, or leave nothing behind

A daemon and its helper talk over a socketpair, one word a packet: the daemon says READY, with the name under which its
root shows what is to be mounted, if that isn't the root itself; the helper answers MOUNTED with the descriptor of the
FUSE connection, and at the end ANSWERED, with that name if it could be used, or at any time FAILED with the reason. The
daemon, too, may say FAILED until then, with one word for the kind of error before the reason.
"""

from mount_helper.handover import ANSWERED, FAILED, MAX_WORD, MOUNTED, READY, STOP_SIGNALS, hand_over, hear
from mount_helper.request import HelperError, Request
from mount_helper.unmounting import unmount, unmount_if_dead

__all__ = [
    "ANSWERED",
    "FAILED",
    "MAX_WORD",
    "MOUNTED",
    "READY",
    "STOP_SIGNALS",
    "HelperError",
    "Request",
    "hand_over",
    "hear",
    "unmount",
    "unmount_if_dead",
]
