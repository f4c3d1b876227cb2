"""The kernel's means of isolation, called through ctypes: namespaces, Landlock, a system-call
filter, dropped capabilities. Linux on x86-64 or AArch64.

Every function raises OSError where the kernel, a container or a policy refuses.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_NEWNS, _NEWUTS, _NEWIPC = 0x0002_0000, 0x0400_0000, 0x0800_0000
_NEWUSER, _NEWPID, _NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000
_ANY_NAMESPACE = _NEWNS | _NEWUTS | _NEWIPC | _NEWUSER | _NEWPID | _NEWNET | 0x0200_0000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_PDEATHSIG, _DUMPABLE, _SECCOMP, _CAPBSET_DROP, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 22, 24, 36, 38
_DEVICES = ("null", "zero", "full", "random", "urandom")

#: System calls that nobody inside needs: (number on x86-64, number on AArch64), None: not there.
#: The network, also sockets in the file system; other processes, signals to them too; new
#: namespaces and mounts, which would give capabilities back; memory that no limit of a process
#: counts; interfaces of the kernel that go round this filter.
_FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "userfaultfd": (323, 282), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "open_by_handle_at": (304, 265), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
}  # fmt: skip
#: Without a view of files of its own also what Landlock does not cover: mode, owner, times and
#: attributes.
_FORBIDDEN_OUTSIDE: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
_CLONE, _CLONE3, _PRLIMIT, _FCNTL, _IOCTL = (56, 220), (435, 435), (302, 261), (72, 25), (16, 29)
#: F_SETOWN, F_SETSIG, F_SETOWN_EX: signals by way of a descriptor. FS_IOC_SETFLAGS and
#: FS_IOC_FSSETXATTR: attributes of a file that is open for reading.
_FCNTL_REFUSED, _IOCTL_REFUSED = (8, 10, 15), (0x4008_6602, 0x401C_5820)
_ARCH = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}


def _check(result: int, what: str) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _syscall(what: str, number: int, *arguments: Any) -> int:
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *words), what)


def _prctl(option: int, value: int) -> None:
    words = [ctypes.c_ulong(word) for word in (value, 0, 0, 0)]
    _check(_libc.prctl(ctypes.c_int(option), *words), f"prctl {option}")


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process as soon as the one that made it is gone."""
    _prctl(_PDEATHSIG, 9)
    if os.getppid() not in (parent, 0):
        os._exit(1)


def adopt_orphans() -> None:
    """Descendants that lose their parent become children of this process."""
    _prctl(_SUBREAPER, 1)


def set_dumpable(yes: bool) -> None:
    """Whether other processes of the same user may look into this one."""
    _prctl(_DUMPABLE, int(yes))


def new_namespaces() -> None:
    """User, network, IPC and host-name namespaces for this process; a process namespace whose
    first process is its next child.
    """
    uid, gid = os.geteuid(), os.getegid()
    flags = _NEWUSER | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                       ("gid_map", f"{gid} {gid} 1")):  # fmt: skip
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    words = [None if text is None else text.encode() for text in (source, target, kind)]
    result = _libc.mount(*words, ctypes.c_ulong(flags), options.encode())
    _check(result, f"mount {target}")


def _mount_flags(path: str, add: int, remove: int, flags: int = 0) -> None:
    wanted = struct.pack("QQQQ", add, remove, 0, 0)
    where = path.encode()
    _syscall("mount_setattr", 442, _AT_FDCWD, ctypes.c_char_p(where), flags, wanted, len(wanted))


def read_only_files(folder: str, size: int) -> None:
    """A mount namespace in which nothing can be written but `folder`, a new memory file system of
    at most `size` bytes. Of the devices the harmless ones are left; /proc shows this namespace.
    """
    _check(_libc.unshare(ctypes.c_int(_NEWNS)), "unshare")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    here = _MS_NOSUID | _MS_NODEV
    nodes = {name: os.open(f"/dev/{name}", os.O_PATH) for name in _DEVICES}
    _mount("tmpfs", "/dev", "tmpfs", _MS_NOSUID, "size=64k,mode=755")
    for name, node in nodes.items():
        os.close(os.open(f"/dev/{name}", os.O_CREAT | os.O_WRONLY))
        _mount(f"/proc/self/fd/{node}", f"/dev/{name}", None, _MS_BIND)
        os.close(node)
    _mount("tmpfs", folder, "tmpfs", here, f"size={size},nr_inodes=1024,mode=700")
    try:
        _mount("proc", "/proc", "proc", here | _MS_NOEXEC)
    except OSError:
        # Containers mask parts of /proc, and then no new one may be mounted: none at all then.
        _mount("tmpfs", "/proc", "tmpfs", here, "size=64k,mode=755")
    _mount_flags("/", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, _AT_RECURSIVE)
    for name in _DEVICES:
        _mount_flags(f"/dev/{name}", 0, _ATTR_NODEV)
    _mount_flags(folder, 0, _ATTR_RDONLY)


def write_only_below(folder: str) -> None:
    """Landlock: files are written, made and removed below `folder` only. Needs version 3 of the
    interface (Linux 6.2), the first to cover truncation.
    """
    version = _syscall("Landlock", 444, None, 0, 1)
    if version < 3:
        raise OSError(errno.EOPNOTSUPP, f"Landlock: version 3 is needed, the kernel has {version}")
    write_file, truncate, device_ioctl = 1 << 1, 1 << 14, 1 << 15
    everything = write_file | sum(1 << bit for bit in range(4, 14)) | truncate
    everything |= device_ioctl if version >= 5 else 0
    # TCP from version 4; abstract sockets and signals to the outside from version 6.
    words = [everything, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]
    attributes = struct.pack(f"{len(words)}Q", *words)
    rules = _syscall("Landlock", 444, attributes, len(attributes), 0)
    special = 1 << 6 | 1 << 9 | 1 << 11  # character devices, sockets, block devices
    on_a_file = write_file | truncate
    for path, allowed in ((folder, everything & ~special), ("/dev/null", on_a_file)):
        node = os.open(path, os.O_PATH)
        _syscall("Landlock", 445, rules, 1, struct.pack("=Qi", allowed, node), 0)
        os.close(node)
    _prctl(_NO_NEW_PRIVS, 1)
    _syscall("Landlock", 446, rules, 0)
    os.close(rules)


def drop_capabilities() -> None:
    """None left, none to be had again."""
    for capability in range(64):
        if _libc.prctl(_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) == -1:
            break  # the first that this kernel does not know, or the right to drop is not there
    header, none = struct.pack("Ii", 0x2008_0522, 0), struct.pack("6I", *[0] * 6)
    _check(_libc.capset(header, none), "capset")
    _prctl(_NO_NEW_PRIVS, 1)


def forbid_system_calls(also_outside: bool) -> None:
    """Install the filter; `also_outside` adds what only a process without namespaces must not."""
    machine = platform.machine()
    if machine not in _ARCH:
        raise OSError(errno.EOPNOTSUPP, f"no system-call filter for {machine}")
    column = list(_ARCH).index(machine)
    forbidden = [*_FORBIDDEN.values(), *(_FORBIDDEN_OUTSIDE.values() if also_outside else ())]
    numbers = [pair[column] for pair in forbidden]
    code = _filter(column, _ARCH[machine], [n for n in numbers if n is not None], also_outside)
    program = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(program))
    _prctl(_NO_NEW_PRIVS, 1)
    buffer = ctypes.create_string_buffer(header, len(header))
    result = _libc.prctl(_SECCOMP, ctypes.c_ulong(2), buffer, 0, 0)
    _check(result, "seccomp")


def _filter(column: int, arch: int, numbers: Iterable[int], also_outside: bool) -> bytes:
    """Berkeley packet filter: instructions of (code, jump if true, jump if false, operand)."""
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown = 0x7FFF_0000, 0x0005_0000 | errno.EPERM, 0x0005_0000 | errno.ENOSYS
    steps: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4), (equal, 1, 0, arch), (answer, 0, 0, 0x8000_0000),
        (load, 0, 0, 0),
        # Numbers from 2^30 on are the 32-bit pointer calls of x86-64: other numbers for the same.
        (at_least, 0, 1, 0x4000_0000), (answer, 0, 0, refuse),
    ]  # fmt: skip
    for number in numbers:
        steps += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    # clone3 hides its flags in memory; C libraries fall back to clone, whose flags are seen here.
    steps += [(equal, 0, 1, _CLONE3[column]), (answer, 0, 0, unknown)]
    second = 24  # where the low half of the second argument is
    steps += [
        (equal, 0, 4, _CLONE[column]), (load, 0, 0, 16),
        (any_bit, 0, 1, _ANY_NAMESPACE), (answer, 0, 0, refuse), (answer, 0, 0, allow),
    ]  # fmt: skip
    # Limits of this process only.
    steps += [
        (equal, 0, 4, _PRLIMIT[column]), (load, 0, 0, 16), (equal, 1, 0, 0),
        (answer, 0, 0, refuse), (answer, 0, 0, allow),
    ]  # fmt: skip
    if also_outside:
        for call, values in ((_FCNTL, _FCNTL_REFUSED), (_IOCTL, _IOCTL_REFUSED)):
            steps += [(equal, 0, 2 * len(values) + 2, call[column]), (load, 0, 0, second)]
            for value in values:
                steps += [(equal, 0, 1, value), (answer, 0, 0, refuse)]
            steps.append((answer, 0, 0, allow))
    steps.append((answer, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *step) for step in steps)
