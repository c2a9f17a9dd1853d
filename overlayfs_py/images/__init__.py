"""Images made of layers: a store of OCI blobs, with one unpacked directory for each layer. No FUSE, no mounts.

model      what an image and a layer are; digests and chain IDs
reference  names of images, as Docker writes them
store      the store on disk: look up, tag, remove, commit

`Store.open` is where to start.
"""

from overlayfs_py.images.model import Image, ImageError, Layer
from overlayfs_py.images.store import Store

__all__ = ["Image", "ImageError", "Layer", "Store"]
