"""overlayfs-py: a FUSE overlay filesystem for containers, and what it is made of.

config     every mount option, parsed and checked
errors     what may go wrong before there is a mount
core       the overlay's semantics, without FUSE
engines    what carries requests between the kernel and core
sys        raw system calls
cli        the program `overlayfs-py`
mounting   mount() and the Mount it returns
"""

__version__ = "0.1.0"
