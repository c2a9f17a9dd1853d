"""Images made of layers: a store of OCI blobs, with one unpacked directory for each layer. No FUSE, no mounts.

model      what an image and a layer are; digests and chain IDs
reference  names of images, as Docker reads and writes them
manifest   the documents that make blobs an image
store      the store: look up, tag, remove, commit; on layout (what lies where), index and publish (the way in)
streams    archives as streams of bytes; compress, the other way
archive    the entries of an archive
unpack     an archive to a directory; settle, the part of it that needs the layers below;
           owners, whether they can be had
stack      a stack of layers read in place; walk, an upper layer beside what is below it
changes    what an upper layer changes; pack, the same as an archive
load       docker-archive and OCI layout; save, the other way; make, new images
registry   pull and push
check      marks that make no sense; convert, from one style of marks to the other

`Store.open` is where to start.
"""

from overlayfs_py.images.model import Image, ImageError, Layer
from overlayfs_py.images.store import Store

__all__ = ["Image", "ImageError", "Layer", "Store"]
