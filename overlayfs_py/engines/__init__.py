"""What carries requests between the kernel and the core."""
