"""One script of operations on our filesystem and on the kernel's overlayfs over equal layers: everything must agree.

script.py      the operations, and how each runs and what it returns
side.py        one implementation over its own copy of the layers, mounted and unmounted
pair.py        two sides in step: results, visible trees, upper directories, each upper mounted by the other
stacks.py      layers to run over, written by hand and random
random_ops.py  operations chosen at random, guided by what exists
reduce.py      the shortest script that still shows a difference
known.py       the differences that are accepted, each with its reason
"""
