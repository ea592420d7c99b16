import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from sputnik.cli import doctor
from sputnik.errors import MissingPackage
from sputnik.tasks.base import Verdict, judge, load_task
from sputnik.tasks.sandbox import Limits, Sandbox, SandboxError, bubble

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(Limits(seconds=30.0)) as sandbox:
        try:
            sandbox.check()
        except SandboxError as error:
            pytest.skip(str(error))
        yield sandbox


def inside(sandbox: Sandbox) -> list[psutil.Process]:
    """The server, and the program if one runs."""
    assert sandbox._server is not None
    return psutil.Process(sandbox._server._process.pid).children(recursive=True)


def test_a_program_reads_prints_and_ends(sandbox: Sandbox) -> None:
    outcome = sandbox.run("import sys\nprint(int(input()) + 1)\nprint('ü', file=sys.stderr)", stdin="41\n")
    assert (outcome.end, outcome.status, outcome.stdout, outcome.stderr) == ("exit", 0, "42\n", "ü\n")
    assert outcome.finished
    assert sandbox.run("raise SystemExit(3)").status == 1
    assert sandbox.run("raise SystemExit").finished
    assert sandbox.run("import os; os._exit(7)").status == 7
    assert sandbox.run("import os, signal; signal.raise_signal(signal.SIGTERM)").status == -signal.SIGTERM
    assert sandbox.run("1 / 0").stderr == "ZeroDivisionError: division by zero\n"
    assert sandbox.run("print(").not_python
    assert sandbox.run("print(len(input()))", "x" * 3_000_000).stdout == "3000000\n"
    assert sandbox.run("if __name__ == '__main__': print(__name__)").stdout == "__main__\n"
    assert sandbox.run("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n"
                       "    x: int\nprint(A(1))").stdout == "A(x=1)\n"  # fmt: skip


def test_a_program_sees_an_interpreter_and_nothing_of_this_machine(sandbox: Sandbox) -> None:
    seen = sandbox.run("""
import os, socket, sys
print(sorted(os.listdir('/')), os.listdir('/dev'), os.listdir('.'), sorted(os.listdir('/python')))
print(dict(os.environ), os.getresuid(), os.getresgid(), os.getppid(), os.uname().nodename, sys.argv)
print([path for path in sys.path if 'packages' in path], os.listdir(os.path.dirname(os.__file__) + '/site-packages')
    if os.path.isdir(os.path.dirname(os.__file__) + '/site-packages') else [])
""").stdout.splitlines()
    assert seen == [
        f"['dev', 'lib64', 'python', 'tmp'] ['null'] [] ['bin', '{sys.platlibdir}', 'shared']",
        "{} (65534, 65534, 65534) (65534, 65534, 65534) 1 sandbox ['program.py']",
        "[] []",
    ]


@pytest.mark.parametrize(
    "source",
    [
        "print(42); exit()",
        "print(42); quit(0)",
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print(42))).start()",
        "import concurrent.futures as c; c.ThreadPoolExecutor(2).submit(print, 42)",
        "import atexit; atexit.register(print, 42)",
        "import atexit, io, os, sys\nsys.stdout = io.StringIO()\n"
        "atexit.register(lambda: os.write(1, sys.stdout.getvalue().encode()))\nprint(42); exit()",
        "import sqlite3; print(*sqlite3.connect(':memory:').execute('select 42').fetchone())",
    ],
)
def test_a_program_ends_as_it_would_anywhere(sandbox: Sandbox, source: str) -> None:
    outcome = sandbox.run(source)
    assert (outcome.stdout, outcome.finished) == ("42\n", True), outcome


SLEEP = {"do": "run", "source": "import time; time.sleep(99)"}


def test_a_program_has_namespaces_and_a_filter_of_its_own_and_no_powers(sandbox: Sandbox) -> None:
    with bubble.memory_file(b"") as nothing, sandbox.start(SLEEP, nothing):
        status: dict[str, str] = {}
        while status.get("Seccomp_filters") != "2":  # its own comes on top of that of the server
            program = inside(sandbox)[-1].pid
            status = dict(re.findall(r"^(\w+):\t(.*)$", Path(f"/proc/{program}/status").read_text(), re.MULTILINE))
        for kind in ("user", "pid", "net", "ipc", "uts", "cgroup", "mnt"):
            assert Path(f"/proc/{program}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink(), kind
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert {status[kind] for kind in ("CapEff", "CapPrm", "CapAmb")} == {"0" * 16}
        assert "0" not in status["Uid"].split()
        assert os.getsid(program) not in (os.getsid(0), 0)
        assert len([*Path(f"/proc/{program}/fd").iterdir()]) == 3
        network = Path(f"/proc/{program}/net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in network] == ["lo"]
    assert not sandbox._server.alive  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("source", "end", "said"),
    [
        ("x = bytearray(600 << 20)", "exit", "MemoryError"),
        ("print('x' * (2 << 20))", "output", ""),
        ("import time; time.sleep(60)", "timeout", ""),
        ("open('x', 'wb').write(bytes(17 << 20))", "exit", ""),
        ("x = [open('/dev/null') for _ in range(100)]", "exit", "Too many open files"),
        ("import threading, time\nfor _ in range(20): threading.Thread(target=time.sleep, args=(0.5,)).start()",
         "exit", "can't start new thread"),
        ("import time\nfor n in range(1100): open(str(n), 'w')\ntime.sleep(60)", "exit", ""),
        ("import os; os.fork()", "exit", "Operation not permitted"),
        ("open('/x', 'w')", "exit", "Read-only file system"),
        ("import os; open(os.__file__, 'a')", "exit", "Error"),
        ("import os; os.utime('/dev/null')", "exit", "Operation not permitted"),
        ("import fcntl, os; fcntl.flock(open(os.__file__), fcntl.LOCK_EX)", "exit", "Operation not permitted"),
    ],
)  # fmt: skip
def test_limits_hold(sandbox: Sandbox, source: str, end: str, said: str) -> None:
    outcome = sandbox.run(source, seconds=0.5 if end == "timeout" else None)
    assert outcome.end == end
    assert not outcome.finished
    assert said in outcome.stderr


def test_threads_and_files_are_there_for_honest_use(sandbox: Sandbox) -> None:
    program = """
import sys, tempfile, threading
def work():
    sys.setrecursionlimit(100_000)
    def depth(n): return n and 1 + depth(n - 1)
    with open('notes', 'w') as file: file.write(str(depth(50_000)))
threading.stack_size(64 << 20)
thread = threading.Thread(target=work); thread.start(); thread.join()
print(open('notes').read())
"""
    assert sandbox.run(program).stdout == "50000\n"


def test_a_sandbox_stays_warm_until_a_program_leaves_something(sandbox: Sandbox) -> None:
    sandbox.run("pass")
    server = sandbox._server
    assert sandbox.run("1 / 0").status == 1
    assert sandbox.run("import os; os._exit(0)").finished
    assert sandbox._server is server
    for trace in ("open('x', 'w')", "import os; os.mkdir('d')", "open('x', 'w'); import os; os.remove('x')"):
        server = sandbox._server
        assert sandbox.run(trace).finished
        assert sandbox.run("import os; print(os.listdir('.'))").stdout == "[]\n"
        assert sandbox._server is not server


def test_a_program_changes_nothing_for_the_next_one(sandbox: Sandbox) -> None:
    sandbox.run("pass")
    server = sandbox._server
    outcome = sandbox.run("""
import builtins, fcntl, os, random, signal, sys
for file in (0, 1, 2):
    fcntl.fcntl(file, fcntl.F_SETFL, os.O_NONBLOCK)
fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 4096)
builtins.print = sys.modules['json'] = None
signal.signal(signal.SIGTERM, signal.SIG_IGN); os.umask(0o777); random.seed(0)
os.write(1, b'left over'); os.read(0, 1)
os._exit(0)
""", stdin="unread input")  # fmt: skip
    assert outcome.stdout == "left over"
    following = sandbox.run("import sys, json; print(sys.stdin.read() + 'x' * 300_000)", stdin="in")
    assert following.stdout == "in" + "x" * 300_000 + "\n"
    assert sandbox._server is server
    assert len({sandbox.run("import random; print(random.random())").stdout for _ in range(3)}) == 3


def test_nothing_of_a_program_is_left_in_the_memory_the_next_is_forked_from(sandbox: Sandbox) -> None:
    mark = "mark" + "ed" * 20
    assert sandbox.run(f"x = '{mark}'; print(x)", stdin=mark).stdout == mark + "\n"
    (server,) = inside(sandbox)
    try:
        with Path(f"/proc/{server.pid}/mem").open("rb", 0) as memory:
            for line in Path(f"/proc/{server.pid}/maps").read_text().splitlines():
                start, end, mode = re.match(r"(\w+)-(\w+) (\S+)", line).groups()  # type: ignore[union-attr]
                if mode.startswith("rw"):
                    memory.seek(int(start, 16))
                    assert mark.encode() not in memory.read(int(end, 16) - int(start, 16)), line
    except PermissionError:
        pytest.skip("may not look into another process")


def test_open_files_do_not_add_up(sandbox: Sandbox) -> None:
    def count() -> int:
        return len([*Path("/proc/self/fd").iterdir()])

    sandbox.run("pass")
    before = count()
    for _ in range(3):
        sandbox.run("pass")
        sandbox.run("import time; time.sleep(9)", seconds=0.05)
        with bubble.memory_file(b"") as nothing, sandbox.start(SLEEP, nothing):
            pass
    sandbox.run("pass")
    assert count() == before


def test_a_program_cannot_reach_the_server_however_many_files_are_open_outside() -> None:
    code = """
import os, resource
from sputnik.tasks.sandbox import Limits, Sandbox
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
with Sandbox(Limits(seconds=30.0)) as sandbox:
    print(sandbox.run('''
import os
for file in range(3, 2000):
    try: os.write(file, b'[0, true]')
    except OSError: pass
os._exit(3)''').status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100)
    if "Too many open files" in done.stderr or "SandboxError" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.stdout == "3\n", done.stderr


def test_close_leaves_no_process_and_a_closed_sandbox_starts_again() -> None:
    before = set(psutil.Process().children(recursive=True))
    with Sandbox() as sandbox:
        sandbox.run("pass")
        assert len(set(psutil.Process().children(recursive=True)) - before) == 2
    assert set(psutil.Process().children(recursive=True)) == before
    assert sandbox.run("print(1)").stdout == "1\n"
    del sandbox
    assert set(psutil.Process().children(recursive=True)) == before


def test_a_killed_parent_takes_the_sandbox_with_it(sandbox: Sandbox) -> None:
    code = "from sputnik.tasks.sandbox import *; Sandbox(Limits(seconds=99)).run('import time; time.sleep(99)')"
    processes: list[psutil.Process] = []
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        names: list[str] = []
        while names != ["bwrap", "python3", "python3"]:
            with suppress(psutil.NoSuchProcess):  # while it starts, some come and go
                processes = psutil.Process(parent.pid).children(recursive=True)
                names = [process.name() for process in processes]
        parent.kill()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


# --- it fails closed ---


def refusal() -> str:
    with pytest.raises(SandboxError) as caught:
        load_task("code")
    return str(caught.value)


def test_without_bubblewrap_code_tasks_refuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert refusal().startswith("bubblewrap is not installed: run `apt-get install bubblewrap`")


def test_the_doctor_tries_the_sandbox(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found() -> doctor.Finding:
        config = doctor.DoctorConfig(quick=True)
        return next(finding for finding in doctor.examine(config) if finding.what == "sandbox")

    assert found().state == "ok"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert (found().state, found().found) == ("note", "none")
    assert "apt-get install bubblewrap" in found().fix


def test_a_sandbox_lost_on_the_way_is_an_error_and_not_a_wrong_answer(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = load_task("code")
    problem = task.problems("train", 1)[0]
    assert judge(task, problem, problem.gold).verdict == Verdict.CORRECT
    task.program_sandbox.close()  # type: ignore[attr-defined]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    judgement = judge(task, problem, problem.gold)
    assert judgement.verdict == Verdict.ERROR
    assert "bubblewrap is not installed" in judgement.detail


def test_without_the_filter_library_code_tasks_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    bubble._filter.cache_clear()
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    with pytest.raises(MissingPackage, match=r"pip install 'sputnik\[code\]'"):
        load_task("code")


def test_a_filter_that_lets_everything_through_is_noticed(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_all = bytes.fromhex("06000000 0000ff7f")
    monkeypatch.setattr(bubble, "_filter", lambda server: allow_all)
    said = refusal()
    assert said.startswith("the sandbox does not hold on this machine")
    assert "reach the network, start processes, run files, send signals" in said


@pytest.mark.parametrize(("server", "program"), [(b"\x00" * 8, None), (None, b"\x00" * 8)])
def test_a_filter_that_cannot_be_loaded_is_noticed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, server: bytes | None, program: bytes | None
) -> None:
    right = {True: bubble._filter(True), False: bubble._filter(False)}
    given = {True: server, False: program}
    monkeypatch.setattr(bubble, "_filter", lambda server: given[server] or right[server])
    assert "the sandbox does not" in refusal()


PROGRAM = "from sputnik.tasks.sandbox import Sandbox; s = Sandbox(); s.check(); print(s.run('print(42)').stdout)"


def as_someone(*unshare: str, shell: str = "") -> subprocess.CompletedProcess[str]:
    """Python in a new user namespace, as another user than ours."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    command = ["unshare", "--user", *unshare, "sh", "-c", f'{shell} exec "$0" -c "$1"', sys.executable, PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    if "unshare failed" in done.stderr:
        pytest.skip(done.stderr)
    return done


@pytest.mark.parametrize("user", (["--map-user=1000", "--map-group=1000"], ["--map-root-user"]))
def test_a_user_without_any_powers_has_the_sandbox_too(sandbox: Sandbox, user: list[str]) -> None:
    done = as_someone(*user)
    assert done.stdout == "42\n\n", done.stderr


def test_where_user_namespaces_are_forbidden_it_refuses_and_says_what_to_allow(sandbox: Sandbox) -> None:
    done = as_someone("--map-root-user", shell="echo 0 > /proc/sys/user/max_user_namespaces &&")
    last = done.stderr.splitlines()[-1]
    assert done.stdout == ""
    assert "SandboxError: the sandbox does not start: bwrap: " in last
    assert "user.max_user_namespaces above 0" in last


IN_A_CONTAINER = f"""
import errno, pyseccomp as p
rules, user = p.SyscallFilter(p.ALLOW), 0x10000000
rules.add_rule(p.ERRNO(errno.EPERM), "unshare")
rules.add_rule(p.ERRNO(errno.EPERM), "clone", p.Arg(0, p.MASKED_EQ, user, user))
rules.add_rule(p.ERRNO(errno.ENOSYS), "clone3")
rules.load()
{PROGRAM}"""


def test_where_the_filter_of_a_container_forbids_namespaces_it_refuses_too(sandbox: Sandbox) -> None:
    command = [sys.executable, "-c", IN_A_CONTAINER]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.stdout == ""
    assert "SandboxError: the sandbox does not start: bwrap: No permissions to create new namespace" in done.stderr
    assert "a container needs --security-opt seccomp=unconfined" in done.stderr
