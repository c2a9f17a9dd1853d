"""The programs; thin."""
