"""What runs inside the sandbox: a server that forks one process per program, and what that process does.

`box.py` hands this file's text to the sandbox's interpreter; it imports nothing but the standard library. The server
never reads a program: the new process gets its job, input and output as open files of its own, so that nothing of one
program is left in the memory from which the next one is forked.

A program may rewrite everything it finds here. It gains nothing by it: all that leaves its process is data, and what
the data should be is known outside only, or in the process of the checker, which never runs a program.
"""

import atexit
import builtins
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import traceback
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

CONTROL, NOBODY = 3, 65534
JOB = 3  # of a program; 0, 1 and 2 are its stdin, stdout and stderr
FINISHED, RAISED, NOT_PYTHON = 0, 1, 65  # how a program's process ends
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
LOOK_MS = 50
ANSWER_BYTES = 16 << 20  # of one answer to a call of the tests; more is no answer
STOPS = (StopIteration, StopAsyncIteration)
"""What a loop takes for its end: `all(map(test, cases))` would be over, and true, at the first case."""
SMALL = 1 << 63  # integers beyond this travel as hexadecimal: decimal has a limit of 4,300 digits, and takes long
COMMON = "bisect collections copy functools heapq itertools math operator random re string typing"


class NotPlain(TypeError):
    """A value of a type that does not travel."""


def pack(value: Any) -> Any:
    """Plain data as JSON that keeps apart what JSON does not: lists and tuples, sets, keys that are no texts."""
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        return value if -SMALL < value < SMALL else {"int": hex(value)}
    if isinstance(value, list):
        return [pack(item) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [pack(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise NotPlain(f"{type(value).__name__} is not plain data")


def unpack(data: Any) -> Any:
    """The value that `pack` wrote. The text may come from a program: whatever it holds, only builtin types come out.
    ValueError or TypeError if it is no such text."""
    if isinstance(data, list):
        return [unpack(item) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    makers: dict[str, Callable[[Any], Any]] = {
        "int": lambda text: int(text, 16),
        "tuple": lambda items: tuple(map(unpack, items)),
        "set": lambda items: set(map(unpack, items)),
        "frozenset": lambda items: frozenset(map(unpack, items)),
        "dict": lambda pairs: {unpack(key): unpack(item) for key, item in pairs},
        "bytes": bytes.fromhex,
        "complex": lambda parts: complex(*parts),
    }
    if kind not in makers:
        raise ValueError("an unknown kind of data")
    return makers[kind](content)


def say(file: BinaryIO, message: Any) -> None:
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()


# --- the server ---


def serve(settings: dict[str, Any]) -> None:
    """Fork a process per message on the control socket, until nobody is at its other end."""
    os.dup2(settings["control"], CONTROL)
    os.closerange(CONTROL + 1, 1 << 20)  # all: where many files are open outside, those handed in have high numbers
    if os.getuid() == 0:  # root outside: become a user that owns nothing, so that the limit on processes holds
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    libc = ctypes.CDLL(None)
    libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong]
    for name in COMMON.split():
        __import__(name)
    sys.argv = ["program.py"]
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # which come from `site`, and that is left out
    os.environ.clear()
    gc.collect()
    gc.freeze()
    control, untouched = socket.socket(fileno=CONTROL), traces()
    control.send(b"ready")
    while True:
        message, files, _, _ = socket.recv_fds(control, 1, 8)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            control.detach()
            for place, file in enumerate(files):  # their numbers are above the places: up to 3 all were taken
                os.dup2(file, place)
            os.closerange(len(files), 64)
            work(settings["limits"], libc, bytes.fromhex(settings["filter"]))
        for file in files:
            os.close(file)
        status = reap(pid, control, settings["files"])
        control.send(json.dumps([status, no_children() and traces() == untouched]).encode())


def reap(pid: int, control: socket.socket, most_files: int) -> int:
    """Wait for the program's end; if the outside goes first, so does this process, and everything in here with it.

    /tmp has a limit on bytes but none on empty files, which take the kernel's memory: that is looked after here."""
    waiting = select.poll()
    handle = os.pidfd_open(pid)
    waiting.register(handle, select.POLLIN)
    waiting.register(control, 0)  # its other end closed
    while not (events := waiting.poll(LOOK_MS)):
        space = os.statvfs("/tmp")
        if space.f_files - space.f_ffree > most_files:
            os.kill(pid, signal.SIGKILL)
    if any(file == control.fileno() for file, _ in events):
        os._exit(1)
    os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def no_children() -> bool:
    """Nothing that the program started is left: orphans become children of this process, which is number 1."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def traces() -> tuple[int, ...]:
    """Changes whenever anything is made, renamed or removed in the only place where a program can write."""
    place, space = Path("/tmp").stat(), os.statvfs("/tmp")
    return place.st_ctime_ns, place.st_mtime_ns, place.st_mode, space.f_bfree, space.f_ffree


# --- the process of one program ---


def work(limits: dict[str, int], libc: ctypes.CDLL, lock: bytes) -> NoReturn:
    """Read the job, give up what it does not need, do it."""
    with os.fdopen(JOB, "rb") as file:
        job = json.load(file)
    for name, most in limits.items():
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    code = ctypes.create_string_buffer(lock, len(lock))
    program = struct.pack("@HP", len(lock) // 8, ctypes.addressof(code))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) != 0:
        os._exit(RAISED)
    status = RAISED
    try:
        jobs: dict[str, Callable[..., int]] = {"run": run, "call": call, "answer": answer, "check": check}
        status = jobs[job.pop("do")](**job)
        sys.stdout.flush()
    finally:
        os._exit(status)


def load(source: str, name: str) -> dict[str, Any] | str:
    """The names that a program defines, or why it is no Python; what it raises goes on."""
    try:
        code = compile(source, f"{name}.py", "exec")
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(code, module.__dict__)
    return module.__dict__


def tell_why() -> None:
    """What was raised, to stderr, for people."""
    kind, error, _ = sys.exc_info()
    print(*traceback.format_exception_only(kind, error), sep="", end="", file=sys.stderr, flush=True)


def run(source: str) -> int:
    """A whole program with stdin and stdout. As any Python, it ends after its threads and what it left for its exit."""
    status = ran(source)
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    return status


def ran(source: str) -> int:
    try:
        loaded = load(source, "__main__")
    except SystemExit as error:
        return FINISHED if error.code in (None, 0) else RAISED
    except BaseException:  # noqa: BLE001 - it is the program's, and ends nothing but the program
        tell_why()
        return RAISED
    if isinstance(loaded, str):
        print(loaded, file=sys.stderr, flush=True)
        return NOT_PYTHON
    return FINISHED


def call(source: str, function: str, calls: list[Any]) -> int:
    """Say what the program's function gives for each list of arguments, a line each. What it prints is lost."""
    _, lines = own_files()
    return answered(source, function, lines, ([xs, {}] for xs in calls))


def answer(source: str, function: str) -> int:
    """Answer the calls of the tests, a line each, until the tests are over."""
    questions, answers = own_files(line=True)
    return answered(source, function, answers, (unpack(json.loads(line)) for line in questions))


def answered(source: str, function: str, answers: BinaryIO, calls: Iterable[Any]) -> int:
    try:
        loaded = load(source, "program")
    except BaseException:  # noqa: BLE001 - the program's
        tell_why()
        return RAISED
    if isinstance(loaded, str):
        print(loaded, file=sys.stderr, flush=True)
        return NOT_PYTHON
    for positional, named in calls:
        say(answers, called(loaded.get(function), positional, named))
    return FINISHED


def called(function: Any, positional: list[Any], named: dict[str, Any]) -> dict[str, Any]:
    """What the call gives, as a message."""
    try:
        return {"value": pack(function(*positional, **named))}
    except Exception as error:  # noqa: BLE001 - the program's
        return {"raised": type(error).__name__, "text": str(error)[:200]}


def own_files(line: bool = False) -> tuple[BinaryIO, BinaryIO]:
    """Take stdin and stdout away, and leave nothing in their place; `line`: what is said goes where is listened. Then
    stderr goes too: both ends are busy with the line, and a full pipe that nobody reads would stop the program."""
    files = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(0 if line else 1), "wb")
    silence = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1, 2) if line else (0, 1):
        os.dup2(silence, file)
    os.close(silence)
    return files


class Questioner:
    """Stands for the program's function in the tests: each call is answered by the program, in another sandbox."""

    def __init__(self, answers: BinaryIO, questions: BinaryIO) -> None:
        self.calls = 0
        self.broken = ""
        self._answers, self._questions = answers, questions

    def __call__(self, *positional: Any, **named: Any) -> Any:
        self.calls += 1
        try:
            question = pack((positional, named))
        except NotPlain as error:
            self.broken = f"the tests hand over what does not travel: {error}"
            raise
        say(self._questions, question)
        reply = json.loads(self._answers.readline(ANSWER_BYTES))
        if "value" in reply:
            return unpack(reply["value"])
        kind = getattr(builtins, str(reply.get("raised")), None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, STOPS):
            raise kind(reply.get("text", ""))
        raise RuntimeError(f"the program raised {reply.get('raised')}")


def check(prelude: str, tests: str, function: str) -> int:
    """Run tests written as Python against a program that is elsewhere, and say what came of it."""
    verdict = os.fdopen(os.dup(1), "wb")
    ask = Questioner(*own_files(line=True))
    failed = tested(prelude, tests, function, ask)
    if ask.broken or not ask.calls:
        say(verdict, {"broken": ask.broken or failed or f"they never call {function}"})
    else:
        say(verdict, {"failed": failed} if failed else {"passed": True})
    return FINISHED


def tested(prelude: str, tests: str, function: str, ask: Questioner) -> str:
    """Why the tests fail; empty if they pass."""
    try:
        names = load(prelude, "tests")
        if isinstance(names, str):
            return names
        names |= {function: ask, "candidate": ask}
        exec(compile(tests, "tests.py", "exec"), names)
        if callable(names.get("check")):
            names["check"](ask)
    except Exception as error:  # noqa: BLE001 - a failed assertion, or what an answer made the tests do
        return f"{type(error).__name__}: {error}"[:200] or "failed"
    return ""


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
