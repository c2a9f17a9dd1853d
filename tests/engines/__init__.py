"""Container engines that run on our mounts."""
