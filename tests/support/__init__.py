"""What tests share: mounting, layer trees, system calls that `os` lacks."""
