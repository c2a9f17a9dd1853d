"""Containers: an image's layers and a writable one as a root, and a process in it. No FUSE, no daemon of its own.

spec        what a container is asked to be
state       containers on disk
names       names and ids
lifecycle   create, start, stop, wait, remove, and setting right what was killed
monitor     the process beside each running container
streams     what flows through it; client is the other end, frames what they say, logs what is kept
bundle      what the OCI runtime is told; oci runs it
root        the mount
users       who a process runs as, by the image
network     a network of its own; publishing and proxy for its ports
volumes     data that outlives containers
limits      control groups
process     processes that stay the same one
"""
