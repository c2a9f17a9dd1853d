"""Tests of the faces other engines call, without these engines."""
