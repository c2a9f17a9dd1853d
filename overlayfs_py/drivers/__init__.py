"""The faces that other container engines see, and the configuration that makes them use overlayfs-py."""
