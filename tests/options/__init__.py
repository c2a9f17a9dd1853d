"""What each mount option does, on real mounts of both engines; how options are parsed is in tests/test_config.py."""
