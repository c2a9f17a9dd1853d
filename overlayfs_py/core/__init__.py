"""The overlay's semantics: synchronous, without FUSE, threads or locks.

An engine holds one Overlay and calls the operations of `ops`. Where to look:

- overlay   a mount as an object: its layers, nodes, descriptors
- layers    one layer; inode numbers; the cache of directory descriptors
- marks     everything the overlay writes into layers beside data: whiteouts, opaque, redirect, origin, ...
- nodes     what is known of each object
- merged    which lower layers to ask for a name
- lookup    which object a name leads to
- readdir   which names a directory shows
- copyup    giving a lower object its copy in the upper layer
- create, remove, rename, attrs, files
            what changes things
- work      the work directory, where things are built before they are seen
- index     hard links that stay hard links
- owners, ids, acl
            who owns what, as stored and as shown
"""
