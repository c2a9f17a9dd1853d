"""The proxy snapshotter of containerd: image layers and containers as snapshots, mounted by `overlayfs-py`.

configuration     what makes containerd use it
snapshots.proto   the service, as containerd calls it; snapshots_pb2 is made of it
failures          what a request may be refused for
filters           containerd's filter language
usage             what a directory takes on disk
metadata          names, parents, kinds and labels of snapshots, in SQLite
snapshotter       the snapshots themselves: metadata, directories, mounts
service           the snapshotter behind gRPC on a Unix socket
"""
