"""What this process may do."""

CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_MKNOD = 27
CAP_SYS_ADMIN = 21


def has_capability(cap: int) -> bool:
    """Whether `cap` (linux/capability.h) is effective, in the user namespace of this process. Source: proc(5)."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"CapEff:"):
                return bool(int(line[7:], 16) >> cap & 1)
    return False


def in_initial_user_namespace() -> bool:
    """Whether user ids are those of the machine: the map covers all of them one to one. Source: user_namespaces(7)."""
    with open("/proc/self/uid_map", "rb") as id_map:
        return id_map.read().split() == [b"0", b"0", b"4294967295"]
