"""Raw system calls, addressed by directory descriptor and one name; knows nothing of overlays.

paths        open below a root without following links; /proc/self/fd paths
files        temporary files, nodes, owners, modes, times, listings
rename       renameat2
xattrs       extended attributes by descriptor and name
copying      file data: reflink, copy_file_range keeping holes, read/write
handles      file handles and filesystem UUIDs
locking      advisory locks
credentials  what this process may do
descriptors  what this process has open
namespaces   namespaces, and who adopts orphans

Every function raises OSError with the errno of the call that failed.
"""
