"""Start a sandbox: bubblewrap's command line, the seccomp filters, the users of the new namespace, and its end.

The file system holds the interpreter with its standard library and the shared objects they are linked to, /dev/null and
an empty /tmp; there is no /proc, no /etc, no home. What lies in many places outside lies under /python inside. Programs
of a sandbox that root starts belong to a user who owns nothing.
"""

import errno
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

from sputnik.errors import MissingPackage, SputnikError
from sputnik.tasks.sandbox.inside import NOBODY

STARTUP_S = 20.0
PYTHON = "/python/bin/python3"
PYTHON_FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8")
# Modules that need shared objects.
LINKED = ("_bz2", "_ctypes", "_decimal", "_hashlib", "_lzma", "_sqlite3", "_uuid", "zlib")
HOW_TO_INSTALL = "run `apt-get install bubblewrap`, or scripts/sandbox.sh in a clone of this project"
HOW_TO_ALLOW = (
    "user namespaces must be allowed: user.max_user_namespaces above 0, kernel.unprivileged_userns_clone=1, on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns=0 (all by sysctl); a container needs --security-opt "
    "seccomp=unconfined --security-opt apparmor=unconfined, or --privileged; root needs CAP_SETUID, _SETGID, _SETFCAP"
)
# What a program may ask of the kernel; anything else fails with EPERM. No sockets, no signals to others, no processes;
# no flock and no utimensat, for /dev/null and the interpreter's files are those of the machine.
CALLS = """
access alarm arch_prctl brk chdir chmod clock_getres clock_gettime clock_nanosleep close close_range creat dup dup2 dup3
epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_wait eventfd2 exit exit_group faccessat faccessat2 fchdir fchmod
fchmodat fcntl fdatasync fstat fstatfs fsync ftruncate futex getcpu getcwd getdents getdents64 getegid geteuid
getgid getgroups getitimer getpgid getpgrp getpid getppid getrandom getresgid getresuid getrlimit getrusage getsid
gettid gettimeofday getuid lseek lstat madvise membarrier mkdir mkdirat mmap mprotect mremap munmap nanosleep newfstatat
open openat pause pipe pipe2 poll ppoll pread64 preadv pselect6 pwrite64 pwritev read readlink readlinkat readv rename
renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend
rt_sigtimedwait sched_getaffinity sched_yield select set_robust_list set_tid_address setitimer sigaltstack stat statfs
statx symlink symlinkat tgkill time times truncate umask uname unlink unlinkat write writev
"""
SERVER_CALLS = """
execve getsockname getsockopt kill pidfd_open prctl recvmsg sendto setgroups setresgid setresuid setrlimit wait4 waitid
"""
CLONE_THREAD, CLONE_NAMESPACES = 0x0001_0000, 0x7E02_0000
TERMINAL_QUESTIONS = (0x5401, 0x5413, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX: what open() asks


class SandboxError(SputnikError):
    """There is no sandbox, or it does not hold: programs cannot be judged on this machine as it is."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. `seconds` are of the clock on the wall, and of processor time."""

    seconds: float = 4.0
    memory_bytes: int = 512 << 20
    """Address space of the process, its threads included."""
    disk_bytes: int = 16 << 20
    """Of /tmp, the only place that can be written to."""
    files: int = 1000
    """That may lie there."""
    output_bytes: int = 1 << 20
    threads: int = 16
    open_files: int = 64


class Server:
    """bubblewrap, with the server of inside.py as the first process in it. `control` is the line to that server."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, memory_file(b"") as errors, ExitStack() as undo:
            undo.callback(self.control.close)
            self._process, first = _launch(limits, theirs.fileno(), errors)
            undo.pop_all()
            self.close = weakref.finalize(self, _kill, self._process, first, self.control)
            theirs.close()
            self.control.settimeout(STARTUP_S)
            ready = b""
            with suppress(TimeoutError, ConnectionResetError):
                ready = self.control.recv(16)
            if ready != b"ready":
                self.close()
                said = os.pread(errors, 10_000, 0).decode(errors="replace").split("\n")
                reason = next((line for line in reversed(said) if line), f"no answer within {STARTUP_S:.0f} s")
                raise SandboxError(f"the sandbox does not start: {reason}; {HOW_TO_ALLOW}")
            self.control.settimeout(None)

    @property
    def alive(self) -> bool:
        return self.close.alive and self._process.poll() is None


def _launch(limits: Limits, control: int, errors: int) -> tuple["subprocess.Popen[bytes]", int | None]:
    """The bubblewrap process, and a handle of the first process inside; None if it never came to that."""
    settings = {"control": control, "filter": _filter(server=False).hex(), "limits": _rlimits(limits)}
    settings["files"] = limits.files
    with _pipe() as (info, their_info), _pipe() as (their_go, _), memory_file(_filter(server=True)) as lock:
        command = [_find_bubblewrap(), *_walls(limits), "--seccomp", str(lock), "--info-fd", str(their_info.fileno())]
        mapped = _may_map_users()
        if (
            mapped
        ):  # bubblewrap waits until both are in the map, and keeps what it takes to change from one to the other
            command += [
                "--userns-block-fd",
                str(their_go.fileno()),
                "--cap-add",
                "CAP_SETUID",
                "--cap-add",
                "CAP_SETGID",
            ]
        else:
            command += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
        command += ["--", PYTHON, *PYTHON_FLAGS, "-c", _inside(), json.dumps(settings)]
        kept, null = (control, lock, their_info.fileno(), their_go.fileno()), subprocess.DEVNULL
        process = subprocess.Popen(command, stdin=null, stdout=null, stderr=errors, pass_fds=kept, env={}, cwd="/")
        their_info.close()
        told = b"".join(iter(lambda: info.read(4096), b""))
        if not told:
            return process, None
        number, first = json.loads(told)["child-pid"], None
        try:
            first = os.pidfd_open(number)
            for kind in ("uid_map", "gid_map") if mapped else ():
                Path(f"/proc/{number}/{kind}").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
        except OSError as error:
            process.kill()
            os.write(errors, str(error).encode())
        return process, first  # bubblewrap goes on when our end of the pipe is closed


def _kill(process: "subprocess.Popen[bytes]", first: int | None, control: socket.socket) -> None:
    """With the first process of a pid namespace the kernel ends all others; bubblewrap outside then goes by itself."""
    control.close()
    if first is not None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(first, signal.SIGKILL)
        os.close(first)
    try:
        process.wait(timeout=STARTUP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _find_bubblewrap() -> str:
    if not sys.platform.startswith("linux"):
        raise SandboxError("programs are judged on Linux only: the sandbox is made of its namespaces")
    found = shutil.which("bwrap") or shutil.which("bwrap", path=str(Path(sys.prefix) / "bin"))
    if not found:
        raise SandboxError(f"bubblewrap is not installed: {HOW_TO_INSTALL}")
    return found


def _may_map_users() -> bool:
    """May this process give the sandbox a second user? Root may, unless it is root of a namespace with one user."""
    if os.geteuid() != 0:
        return False
    lines = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    ranges = [[int(word) for word in line.split()] for line in lines]
    return any(start <= NOBODY < start + count for start, _, count in ranges)


def _walls(limits: Limits) -> list[str]:
    walls = "--unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup --hostname sandbox"
    walls += " --cap-drop ALL --as-pid-1 --die-with-parent --new-session --clearenv"
    walls += " --setenv LD_LIBRARY_PATH /python/shared --setenv PYTHONHASHSEED 0 --setenv MALLOC_ARENA_MAX 2"
    for folder in ("/python", "/python/bin", "/python/shared", f"/python/{sys.platlibdir}", "/dev"):
        walls += f" --perms 0755 --dir {folder}"
    space = f"--perms 1777 --size {limits.disk_bytes} --tmpfs /tmp --chdir /tmp --remount-ro /"
    return [*walls.split(), *_interpreter(), "--dev-bind", "/dev/null", "/dev/null", *space.split()]


@cache
def _interpreter() -> tuple[str, ...]:
    """The binds for this interpreter, its standard library and the shared objects of both, and nothing else."""
    python = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    library = Path(sysconfig.get_path("stdlib"))
    inside = f"/python/{sys.platlibdir}/{library.name}"
    binds = ["--ro-bind", str(python), PYTHON, "--ro-bind", str(library), inside]
    for packages in ("site-packages", "dist-packages"):
        if (library / packages).is_dir():
            binds += ["--tmpfs", f"{inside}/{packages}", "--remount-ro", f"{inside}/{packages}"]
    modules = [path for name in LINKED for path in library.glob(f"lib-dynload/{name}.*.so")]
    listed = subprocess.run(["ldd", python, *modules], capture_output=True, text=True, check=False).stdout
    for path in sorted(set(re.findall(r"=> (/\S+) \(0x", listed))):
        binds += ["--ro-bind", path, f"/python/shared/{Path(path).name}"]
    for loader in sorted(set(re.findall(r"^\s*(/\S+) \(0x", listed, re.MULTILINE))):
        binds += ["--perms", "0755", "--dir", str(Path(loader).parent), "--ro-bind", loader, loader]
    return tuple(binds)


def _inside() -> str:
    return Path(__file__).with_name("inside.py").read_text(encoding="utf-8")


def _rlimits(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_CPU": math.ceil(limits.seconds) + 1,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.disk_bytes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_NPROC": limits.threads + 1,  # the server counts too
        "RLIMIT_CORE": 0,
    }


@cache
def _filter(server: bool) -> bytes:
    """The filter as the kernel takes it. The server may also start processes, and close the door behind itself."""
    try:
        import pyseccomp
    except ImportError:
        raise MissingPackage("pyseccomp", "code") from None
    except RuntimeError:
        raise SandboxError("libseccomp is not installed: run `apt-get install libseccomp2`") from None
    rules, allow = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM)), pyseccomp.ALLOW
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    for call in (CALLS + SERVER_CALLS if server else CALLS).split():
        if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call) != -1:  # newer than this libseccomp: stays shut
            rules.add_rule(allow, call)
    flags = CLONE_NAMESPACES if server else CLONE_NAMESPACES | CLONE_THREAD
    rules.add_rule(allow, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flags, 0 if server else CLONE_THREAD))
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")  # its flags cannot be seen; libraries then use clone
    rules.add_rule(allow, "prlimit64", pyseccomp.Arg(0, pyseccomp.EQ, 0))  # of itself
    for question in TERMINAL_QUESTIONS:
        rules.add_rule(allow, "ioctl", pyseccomp.Arg(1, pyseccomp.EQ, question))
    with memory_file(b"") as file, os.fdopen(file, "rb", closefd=False) as export:
        rules.export_bpf(export)
        return os.pread(file, 1 << 20, 0)


@contextmanager
def memory_file(content: bytes) -> Iterator[int]:
    """A file that lies in no directory, at its start."""
    file = os.memfd_create("sandbox")
    try:
        with os.fdopen(file, "wb", closefd=False) as writer:
            writer.write(content)
        os.lseek(file, 0, os.SEEK_SET)
        yield file
    finally:
        os.close(file)


@contextmanager
def _pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", 0) as reader, os.fdopen(writing, "wb", 0) as writer:
        yield reader, writer
