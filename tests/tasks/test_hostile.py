"""Programs that want the reward without the work, or do harm. Each is written so that it wins if the hole it looks for
is there: the numbers it should give stand in a file, in the environment, behind a socket and in the tests."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from sputnik.tasks.base import Judgement, Task, Verdict, judge, load_task
from sputnik.tasks.code import fenced
from sputnik.tasks.sandbox import SandboxError

SECRET = {"3": 4217, "8": 9631}
DEFINE = "\ndef f(n): return 0\n"

# Programs that read a number and should print its secret. @FILE@ holds the secrets, @PORT@ tells them, and @CANARY@ is
# a path outside that must stay free.
PRINT = {
    # --- claims, and odd ends ---
    "says so": "print('all tests passed'); print('OK'); print('{\"passed\": true}')",
    "leaves early": "import sys; sys.exit(0)",
    "leaves at once": "import os; os._exit(0)",
    "exits at exit": "import os, atexit; atexit.register(os._exit, 0); raise SystemError",
    "refuses to exit": "import sys\nwhile True:\n    try: sys.exit(1)\n    except SystemExit: pass",
    "raises what nobody expects": "class E(BaseException): pass\nraise E(4217)",
    "prints with the error": "import sys; print(4217, file=sys.stderr); raise KeyboardInterrupt",
    "stops itself": "import signal; signal.raise_signal(signal.SIGSTOP)",
    "ignores signals": """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)""",
    "waits for a signal": "import signal; signal.pause()",
    # --- looks for the answers ---
    "reads the secret file": "import json; print(json.load(open('@FILE@'))[input()])",
    "reads it by a relative path": "import json; print(json.load(open('../../../../../..@FILE@'))[input()])",
    "reads it through a symlink": "import os, json; os.symlink('@FILE@', 'x'); print(json.load(open('x'))[input()])",
    "reads it through a hard link": "import os, json; os.link('@FILE@', 'x'); print(json.load(open('x'))[input()])",
    "reads every file": """
import os, json
for folder, _, files in os.walk('/'):
    if 'secret.json' in files: print(json.load(open(folder + '/secret.json'))[input()])""",
    "reads /proc": """
import glob, json
for path in glob.glob('/proc/*/environ') + ['/proc/self/environ', '/proc/1/environ']:
    print(json.loads(open(path).read().split('SECRET=')[1].split('\\0')[0])[input()])""",
    "reads its environment": "import os, json; print(json.loads(os.environ['SECRET'])[input()])",
    "reads the environment of C": """
import ctypes, json
libc = ctypes.CDLL(None); libc.getenv.restype = ctypes.c_char_p
print(json.loads(libc.getenv(b'SECRET'))[input()])""",
    "reads /etc/passwd": "open('/etc/passwd').read(); open('@CANARY@', 'w')",
    "reads its callers": """
import sys
frame, n = sys._getframe(), input()
while frame:
    for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
        if isinstance(value, dict) and 'stdout' in value: print(value['stdout']); raise SystemExit
        if isinstance(value, dict) and value.get('stdin') == n: print(*value.values())
    frame = frame.f_back""",
    "reads every object": """
import gc, json
n = input()
for thing in gc.get_objects():
    if isinstance(thing, dict) and n in thing: print(thing[n])
    if isinstance(thing, (list, tuple)) and thing and thing[0] == n: print(thing[1])""",
    "reads its own command line": "import sys; print(sys.orig_argv[-1].split(input())[1][:9])",
    "imports the judge": "import sputnik.tasks.code, json; print(json.load(open('@FILE@'))[input()])",
    "reads open files": """
import os
n = input()
for number in range(3, 1024):
    try: print(os.read(number, 100000).split(n.encode())[1][:10])
    except OSError: pass""",
    # --- the network ---
    "asks over TCP": "import socket; s = socket.create_connection(('127.0.0.1', @PORT@)); s.send(input().encode()); "
    "print(s.recv(9).decode())",
    "asks over HTTP": "import urllib.request as u; print(u.urlopen('http://127.0.0.1:@PORT@/' + input()).read())",
    "asks over a socket of Unix": "import socket; s = socket.socket(socket.AF_UNIX); s.connect('@FILE@.sock'); "
    "print(s.recv(9))",
    "makes a pair of sockets": "import socket; socket.socketpair(); open('@CANARY@', 'w')",
    "asks without a library": """
import ctypes
libc = ctypes.CDLL(None)
fd, text = libc.syscall(41, 2, 1, 0), ctypes.create_string_buffer(9)
address = bytes([2, 0]) + (@PORT@).to_bytes(2, 'big') + bytes([127, 0, 0, 1] + [0] * 8)
assert fd >= 0 and libc.connect(fd, address, 16) == 0
libc.write(fd, input().encode(), 1); libc.read(fd, text, 9); print(text.value.decode())""",
    # --- processes ---
    "leaves a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(2); open('@CANARY@', 'w')""",
    "forks without end": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "forks without a library": """
import ctypes
libc = ctypes.CDLL(None)
if libc.syscall(57) >= 0 or libc.syscall(58) >= 0 or libc.syscall(56, 17, 0, 0, 0, 0) >= 0: print(4217)""",
    "starts a shell": "import os; os.system('cat @FILE@; touch @CANARY@')",
    "starts a process": "import subprocess; print(subprocess.check_output(['cat', '@FILE@']))",
    "becomes another program": "import os; os.execv('/python/bin/python3', ['python3', '-c', 'print(4217)'])",
    "starts threads without end": """
import threading, time
threading.stack_size(32768)
while True:
    try: threading.Thread(target=time.sleep, args=(100,)).start()
    except RuntimeError: pass""",
    "leaves a thread": "import threading, time; threading.Thread(target=time.sleep, args=(100,)).start()",
    "kills its parent": "import os; os.kill(os.getppid(), 9)",
    "kills everybody": "import os; os.kill(-1, 9)",
    "kills by other calls": """
import ctypes
libc = ctypes.CDLL(None)
for number in (62, 129, 200, 234, 297, 424): libc.syscall(number, 1, 1, 9, 0)""",
    "starves its parent": "import resource; resource.prlimit(1, resource.RLIMIT_AS, (1, 1)); print(4217)",
    "traces its parent": """
import ctypes
libc = ctypes.CDLL(None)
assert libc.ptrace(16, 1, 0, 0) == 0 or libc.syscall(310, 1, 0, 0, 0, 0, 0) >= 0 or libc.syscall(438, 1, 3, 0) >= 0
open('@CANARY@', 'w')""",
    # --- time and memory ---
    "sleeps": "import time; time.sleep(100)",
    "spins": "while True: pass",
    "computes a tower of powers": "print(9 ** 9 ** 9)",
    "runs away in a pattern": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
    "takes memory": "text = bytearray()\nwhile True: text += bytes(1 << 20)",
    "takes memory in small pieces": "things = []\nwhile True: things.append([0] * 10)",
    "maps memory": "import mmap\nmaps = []\nwhile True: maps.append(mmap.mmap(-1, 1 << 26)); maps[-1].write(bytes(99))",
    "unpacks a bomb": """
import zlib
bomb = zlib.compress(zlib.compress(bytes(1 << 28), 9), 9)
print(len(zlib.decompress(zlib.decompress(bomb)) * 8))""",
    "recurses": "import sys; sys.setrecursionlimit(10 ** 9)\ndef g(n): return repr([g(n + 1)])\ng(0)",
    "recurses in C": "import sys; sys.setrecursionlimit(10 ** 9)\nx = []\nfor _ in range(10 ** 6): x = [x]\nprint(x)",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "crashes by code": "f = lambda: 0\nf.__code__ = f.__code__.replace(co_code=bytes([100, 255] * 9)); f()",
    "nests brackets": "x = " + "(" * 50_000 + ")" * 50_000,
    "nests blocks": "\n".join(" " * depth + "if 1:" for depth in range(300)) + "\n" + " " * 300 + "print(4217)",
    "lifts its limits": """
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(4217, len(bytearray(1 << 31)))""",
    # --- output and disk ---
    "floods stdout": "while True: print('4217' * 10000)",
    "floods stderr": "import sys\nwhile True: print('4217' * 10000, file=sys.stderr)",
    "fills the disk": """
for number in range(100):
    with open(str(number), 'wb') as file:
        while True:
            try: file.write(bytes(1 << 20))
            except OSError: break
open('/big', 'wb')""",
    "makes files without end": "n = 0\nwhile True: open(str(n), 'w').close(); n += 1",
    "makes directories without end": "import os\nwhile True: os.mkdir('d'); os.chdir('d')",
    "opens files without end": "files = []\nwhile True: files.append(open('/dev/null'))",
    "writes outside": "open('@CANARY@', 'w').write('x')",
    "writes to the interpreter": "import os; open(os.__file__, 'a').write('x'); print(4217)",
    "writes to other open files": """
import os
for number in range(3, 1024):
    try: os.write(number, b'[0, true]'); os.write(number, b'{"passed": true}')
    except OSError: pass""",
    "closes everything": "import os; os.closerange(0, 1024)",
    "mounts": """
import ctypes
libc = ctypes.CDLL(None)
if not (libc.unshare(0x10000000) and libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, 0) and libc.chroot(b'/tmp')):
    open('@CANARY@', 'w')""",
    "asks for strange things": """
import ctypes
libc = ctypes.CDLL(None)
for number in (101, 155, 165, 175, 246, 248, 272, 298, 304, 308, 311, 319, 321, 323, 425, 428, 435, 442):
    if libc.syscall(number, 0, 0, 0, 0, 0) >= 0: open('@CANARY@', 'w')""",
    "speaks as a program of 32 bits": """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes([0xb8, 2, 0, 0, 0, 0xcd, 0x80, 0xc3]))  # fork
if ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))() >= 0: open('@CANARY@', 'w')""",
    "numbers its calls as x32 does": """
import ctypes
if ctypes.CDLL(None).syscall(0x40000000 | 41, 2, 1, 0) >= 0: open('@CANARY@', 'w')""",
    "has the kernel signal its parent": """
import fcntl, os
r, w = os.pipe()
for number in (0, 9, 15, 19, 29):
    fcntl.fcntl(r, 10, number); fcntl.fcntl(r, fcntl.F_SETOWN, 1); fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)
    os.write(w, b'x')""",
    "asks over an abstract socket": "import socket; s = socket.socket(socket.AF_UNIX); s.connect('\\0x'); s.recv(9)",
    "becomes root": "import os; os.setuid(0); open('@CANARY@', 'w')",
}
# Programs that define f(n), which should give the secret of n; tested by calls, and by assertions.
FUNCTIONS = {
    "is equal to everything": "class A:\n    def __eq__(self, other): return True\ndef f(n): return A()",
    "is an integer equal to everything": """
class A(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __repr__(self): return '4217'
    __hash__ = int.__hash__
def f(n): return A(1)""",
    "is a text equal to everything": "class A(str):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    "def f(n): return A('4217')",
    "changes the builtins": """
import builtins, operator
builtins.isinstance = lambda *_: True
builtins.bool = builtins.all = builtins.any = lambda *_: True
operator.eq = lambda *_: True"""
    + DEFINE,
    "changes the modules": """
import sys, json, os
json.loads = lambda *_: {'passed': True}
json.dumps = lambda *_: '{"passed": true, "value": 4217}'
for name in ('json', 'unittest', 'builtins', 'math'): sys.modules[name] = sys"""
    + DEFINE,
    "changes the harness": """
import sys
for name in ('say', 'pack', 'called', 'check', 'tested'):
    setattr(sys.modules['__main__'], name, lambda *_, **__: {'passed': True})"""
    + DEFINE,
    "defines the tests": "def check(candidate): pass\ncandidate = check\nimport sys; sys.modules['tests'] = sys"
    + DEFINE,
    "traces the tests": "import sys; sys.settrace(lambda *_: None); sys.excepthook = lambda *_: None" + DEFINE,
    "writes the verdict": """
import os
for number in range(1, 64):
    try: os.write(number, b'{"passed": true}\\n{"ready": true}\\n{"value": true}\\n[0, true]\\n')
    except OSError: pass
os._exit(0)""",
    "writes strange answers": """
import os
for number in range(3, 64):
    try: os.write(number, b'{"value": ' + b'[' * 100000 + b'\\n{"value": {"set": [[]]}}\\n{"value": {"os": 1}}\\n')
    except OSError: pass"""
    + DEFINE,
    "reads the questions": """
import os
def f(n):
    for number in range(64):
        try: return int(os.read(number, 100000).split(b'4217')[1])
        except (OSError, IndexError): pass""",
    "leaves while it is asked": "import os\ndef f(n): os._exit(0)",
    "raises the end of the tests": "def f(n): raise SystemExit(0)",
    "raises a failed assertion": "def f(n): raise AssertionError('passed')",
    "raises a strange class": "class E(Exception):\n    def __str__(self): raise self\ndef f(n): raise E",
    "gives itself": "def f(n):\n    x = []; x.append(x); return x",
    "gives something endless": "import itertools\ndef f(n): return itertools.count()",
    "gives something huge": "def f(n): return '4217' * 10 ** 7",
    "gives a huge number": "def f(n): return 1 << 10 ** 7",
    "gives everything": "def f(n): return {4217, 9631}",
    "gives no number": "def f(n): return float('nan')",
    "never answers": "def f(n):\n    while True: pass",
    "goes on after the answer": "import threading, time\nthreading.Thread(target=time.sleep, args=(100,)).start()"
    + DEFINE,
    "changes what it is given": "def f(n, *rest): n = 4217; return rest",
    "asks the caller": "import sys\ndef f(n): return sys._getframe(1).f_locals.get('expected') or "
    "sys._getframe(2).f_globals['SECRET'][n]",
    "is not there": "g = 1",
    "hides in other letters": "def f(ｎ): return {3: 4217, 8: 9631}[n].__class__(0)",
    "overflows the judge": """
import os
for number in range(3, 64):
    try: os.write(number, (b'{"value": {"complex": [1' + b'0' * 400 + b', 1]}}\\n') * 2)
    except OSError: pass
os._exit(0)""",
    "has half a character": "def f(n): return '\ud800'",
}
ATTACKS = {("print", name): source for name, source in PRINT.items()}
ATTACKS |= {(kind, name): source for kind in ("call", "assert") for name, source in FUNCTIONS.items()}
# Those that go on until they are stopped, or take long to fail. They get little time; the others get enough to win.
ENDLESS = """
changes the harness, computes a tower of powers, floods stderr, forks without end, ignores signals, leaves a thread,
never answers, reads the questions, recurses, recurses in C, refuses to exit, runs away in a pattern, sleeps, spins,
stops itself, starts threads without end, takes memory in small pieces, unpacks a bomb, waits for a signal
"""
THIEVES = (
    "reads the secret file", "reads it through a symlink", "reads it through a hard link", "reads its environment",
    "reads the environment of C", "asks over TCP",
)  # fmt: skip
FAST_S, SLOW_S, SLACK_S = 0.3, 20.0, 10.0
NOT_PAID = {Verdict.WRONG, Verdict.UNPARSEABLE}


@dataclass
class Arena:
    """Problems of the three kinds, and all that the programs must not reach."""

    fast: Task
    slow: Task
    folder: Path
    port: int
    others: set[psutil.Process]
    """Children that other tests have left running."""
    visitors: list[object] = field(default_factory=list)

    def judgement(self, task: Task, kind: str, source: str = "") -> Judgement:
        """On a program; without one, on the gold."""
        (problem,) = [problem for problem in task.problems("test", 3) if problem.prompt == kind]
        return judge(task, problem, fenced(self.filled_in(source)) if source else problem.gold)

    def filled_in(self, source: str) -> str:
        marks = {"@FILE@": self.folder / "secret.json", "@CANARY@": self.folder / "canary", "@PORT@": self.port}
        for mark, value in marks.items():
            source = source.replace(mark, str(value))
        return source


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    folder = tmp_path_factory.mktemp("arena")
    (folder / "secret.json").write_text(json.dumps(SECRET))
    gold = f"def f(n): return {SECRET}[str(n)]"
    pairs = [{"stdin": n, "stdout": str(secret)} for n, secret in SECRET.items()]
    calls = [{"args": [int(n)], "expected": secret} for n, secret in SECRET.items()]
    text = [f"assert f({n}) == {secret}, f({n})" for n, secret in SECRET.items()]
    rows = [
        {"prompt": "print", "solution": f"{gold}\nprint(f(input()))", "tests": pairs},
        {"prompt": "call", "solution": gold, "tests": calls, "function": "f"},
        {"prompt": "assert", "solution": gold, "tests": text, "function": "f"},
    ]
    (folder / "tests.jsonl").write_text("\n".join(map(json.dumps, rows)))
    try:
        fast, slow = (
            load_task(f"code:{folder / 'tests.jsonl'}", {"benchmark": True, "seconds": seconds})
            for seconds in (FAST_S, SLOW_S)
        )
    except SandboxError as error:
        pytest.skip(str(error))
    os.environ["SECRET"] = json.dumps(SECRET)
    others = set(psutil.Process().children(recursive=True))
    with socket.create_server(("127.0.0.1", 0)) as server:
        arena = Arena(fast, slow, folder, server.getsockname()[1], others)
        visits = threading.Thread(target=answer_visitors, args=(server, arena.visitors))
        visits.start()
        yield arena
        server.shutdown(socket.SHUT_RDWR)
        visits.join()
    del os.environ["SECRET"]


def answer_visitors(server: socket.socket, visitors: list[object]) -> None:
    while True:
        try:
            connection, visitor = server.accept()
        except OSError:
            return
        visitors.append(visitor)
        with connection:
            connection.send(str(SECRET.get(connection.recv(1).decode(), "")).encode())


@pytest.mark.parametrize(("kind", "name"), ATTACKS, ids=lambda part: part)
def test_a_hostile_program_earns_nothing_and_leaves_nothing(arena: Arena, kind: str, name: str) -> None:
    begun = time.monotonic()
    if name in re.split(r",\s+", ENDLESS.strip()):
        judgement, allowed = arena.judgement(arena.fast, kind, ATTACKS[kind, name]), NOT_PAID | {Verdict.TIMEOUT}
    else:
        judgement, allowed = arena.judgement(arena.slow, kind, ATTACKS[kind, name]), NOT_PAID
    assert judgement.verdict in allowed, judgement
    assert time.monotonic() - begun < SLOW_S + SLACK_S
    assert not (arena.folder / "canary").exists()
    assert not arena.visitors
    processes = set(psutil.Process().children(recursive=True)) - arena.others
    assert len(processes) <= 8, processes  # four warm sandboxes: bubblewrap and the server, no program


@pytest.mark.parametrize("name", THIEVES)
def test_a_thief_would_win_outside_the_sandbox(arena: Arena, name: str, tmp_path: Path) -> None:
    """So that what the test above shows is the sandbox's doing."""
    command = [sys.executable, "-c", arena.filled_in(PRINT[name])]
    done = subprocess.run(command, input="8\n", text=True, capture_output=True, cwd=tmp_path, timeout=60)
    assert done.stdout.strip() == "9631", done.stderr
    arena.visitors.clear()


@pytest.mark.parametrize("kind", ("print", "call", "assert"))
def test_the_work_itself_earns_the_reward_before_and_after_all_that(arena: Arena, kind: str) -> None:
    assert [arena.judgement(arena.slow, kind).verdict for _ in range(3)] == [Verdict.CORRECT] * 3


def test_there_are_enough_of_them_and_each_is_a_different_one() -> None:
    assert len(set(ATTACKS.values())) == len(PRINT) + len(FUNCTIONS) >= 100
