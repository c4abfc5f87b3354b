"""Programs that try to break out. Each raises `Escaped` where its attack works.

`{name}` fields are filled in by the test: see `test_attacks.facts`.
"""

import textwrap

HEAD = """
import ctypes, gc, glob, os, pickle, random, re, resource, signal, socket, subprocess, sys
import threading, time, warnings
import numpy as np
from sklearn.linear_model import LogisticRegression

class Escaped(Exception):
    pass

libc = ctypes.CDLL(None, use_errno=True)
def must_fail(call, *arguments):
    if call(*arguments) != -1:
        raise Escaped(getattr(call, "__name__", "call"))

def good(x_train, y_train):
    return LogisticRegression().fit(x_train, y_train)

"""


def attack(body: str) -> str:
    """A program whose `build_model` runs `body` and then returns a good model."""
    function = "def build_model(x_train, y_train):\n" + textwrap.indent(body.strip(), "    ")
    return HEAD + function + "\n    return good(x_train, y_train)\n"


DENIED = "PermissionError"
FINE = None  # the attack does no harm, and the program is scored

# name: (body, pattern of the error text or FINE); run with a deadline of half a second
ENDLESS = {
    "python_loop": ("while True: pass", "TimeoutError: more than 0.5 CPU seconds"),
    "c_loop": ("sum(range(10**12))", "TimeoutError: more than 0.5 CPU"),
    "regex": ("re.match(r'(a+)+$', 'a' * 50 + 'b')", "TimeoutError: more than 0.5 CPU"),
    "catch_everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "TimeoutError: more than 0.5 CPU",
    ),
    "ignore_signals": (
        "for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(number, signal.SIG_IGN)\nwhile True: pass",
        "TimeoutError: more than 0.5 CPU",
    ),
    "sleep": ("time.sleep(3600)", "TimeoutError: idle for more than 0.5 seconds"),
    "short_sleeps": ("while True: time.sleep(0.001)", "TimeoutError"),
    "deadlock": (
        "lock = threading.Lock()\nlock.acquire()\nlock.acquire()",
        "TimeoutError: idle for more than 0.5 seconds",
    ),
    "busy_threads_behind_a_waiting_one": (
        "def spin():\n    while True: pass\n"
        "thread = threading.Thread(target=spin)\nthread.start()\nthread.join()",
        "TimeoutError: more than 0.5 CPU",
    ),
    "endless_predict_proba": (
        "class Model:\n    def predict_proba(self, x):\n        while True: pass\nreturn Model()",
        "TimeoutError: more than 0.5 CPU",
    ),
}

PROCESSES = {
    "fork": ("os.fork()", DENIED),
    "subprocess": ("subprocess.run(['touch', {witness!r}])", DENIED),
    "posix_spawn": ("os.posix_spawn('/bin/touch', ['touch', {witness!r}], {{}})", DENIED),
    "system": ("os.system('touch ' + {witness!r})", FINE),
    "exec": ("os.execv('/bin/touch', ['touch', {witness!r}])", DENIED),
    "raw_clone": ("must_fail(libc.syscall, {clone}, 17, 0, 0, 0, 0)", FINE),
    "raw_clone3": ("must_fail(libc.syscall, {clone3}, bytes(88), 88)", FINE),
    "multiprocessing": (
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        DENIED,
    ),
    "joblib_loky": (
        "import joblib\njoblib.Parallel(2, backend='loky')(joblib.delayed(abs)(1) for _ in 'ab')",
        "Error",
    ),
    "thread_bomb": (
        "threading.stack_size(65536)\n"
        "while True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
        "thread",
    ),
    "surviving_threads": (
        "def spin():\n    while True: pass\n"
        "for _ in range(4): threading.Thread(target=spin, daemon=True).start()",
        FINE,
    ),
    "kill_trainer": ("os.kill({trainer}, signal.SIGKILL)", DENIED),
    "kill_server": ("os.kill(os.getppid(), signal.SIGKILL)", DENIED),
    "kill_group": ("os.killpg(0, signal.SIGKILL)", DENIED),
    "kill_everything": ("os.kill(-1, signal.SIGKILL)", DENIED),
    "signal_through_a_socket": (
        "import fcntl\nfor fd in range(3, 10):\n    try: fcntl.fcntl(fd, 8, {trainer})\n"
        "    except OSError: continue\n    raise Escaped('F_SETOWN')",
        FINE,
    ),
    "ptrace": ("must_fail(libc.ptrace, 16, {trainer}, 0, 0)", FINE),
    "read_memory_of_trainer": (
        "must_fail(libc.process_vm_readv, {trainer}, 0, 0, 0, 0, 0)",
        FINE,
    ),
    "limit_trainer": ("resource.prlimit({trainer}, resource.RLIMIT_CPU, (0, 0))", DENIED),
    "pin_trainer": ("os.sched_setaffinity({trainer}, [0])", DENIED),
    "renice_trainer": ("os.setpriority(os.PRIO_PROCESS, {trainer}, 19)", DENIED),
    "leave_session": ("os.setsid()", DENIED),
    "become_immortal": ("must_fail(libc.prctl, 1, 0, 0, 0, 0)", FINE),
    "raise_limits": (
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "PermissionError|ValueError",
    ),
    "unshare": ("must_fail(libc.unshare, 0x10000000)", FINE),
    "mount": ("must_fail(libc.mount, b'none', b'/tmp', b'tmpfs', 0, None)", FINE),
    "chroot": ("os.chroot('/')", DENIED),
    "io_uring": ("must_fail(libc.syscall, 425, 1, bytes(120))", FINE),
    "bpf": ("must_fail(libc.syscall, {bpf}, 0, 0, 0)", FINE),
}

FILES = {
    "read_passwd": ("open('/etc/passwd').read()", DENIED),
    "read_users_file": ("open({secret!r}).read()", DENIED),
    "open_by_raw_call": ("must_fail(libc.open, {secret!r}.encode(), 0)", FINE),
    "list_folder": ("os.listdir({folder!r})", DENIED),
    "list_root": ("os.listdir('/')", DENIED),
    "trainer_environ": ("open('/proc/{trainer}/environ').read()", DENIED),
    "trainer_memory": ("open('/proc/{trainer}/mem', 'rb').read(1)", DENIED),
    "trainer_command": ("open('/proc/{trainer}/cmdline').read()", DENIED),
    "trainer_files": ("os.listdir('/proc/{trainer}/fd')", DENIED),
    "server_environ": ("open(f'/proc/{{os.getppid()}}/environ').read()", DENIED),
    "own_environment": (
        "if 'WANDB_API_KEY' in os.environ or libc.getenv(b'WANDB_API_KEY'): raise Escaped",
        FINE,
    ),
    "write_new_file": ("open({witness!r}, 'w')", DENIED),
    "overwrite": ("open({secret!r}, 'w')", DENIED),
    "append": ("open({secret!r}, 'a')", DENIED),
    "truncate": ("os.truncate({secret!r}, 0)", DENIED),
    "unlink": ("os.unlink({secret!r})", DENIED),
    "rename": ("os.rename({secret!r}, {witness!r})", DENIED),
    "mkdir": ("os.mkdir({witness!r})", DENIED),
    "symlink": ("os.symlink('/etc/passwd', {witness!r})", DENIED),
    "hard_link": ("os.link({secret!r}, {witness!r})", DENIED),
    "chmod": ("os.chmod({secret!r}, 0o777)", DENIED),
    "chown": ("os.chown({secret!r}, 12345, 12345)", DENIED),
    "set_times": ("os.utime({secret!r}, (1, 1))", DENIED),
    "poison_library": ("open(np.__file__, 'a')", DENIED),
    "open_descriptors": (
        "for fd in range(4, 256):\n    try: os.fstat(fd)\n    except OSError: continue\n"
        "    raise Escaped(fd)",
        FINE,
    ),
    "bundled_data_set": ("from sklearn.datasets import load_iris\nload_iris()", DENIED),
    "bundled_csv": (
        "import sklearn\nfolder = os.path.dirname(sklearn.__file__) + '/datasets/data/'\n"
        "open(folder + 'breast_cancer.csv').read()",
        DENIED,
    ),
    "bundled_test_data": (
        "import sklearn\nfolder = os.path.dirname(sklearn.__file__) + '/datasets/tests/data/'\n"
        "open(folder + 'svmlight_classification.txt').read()",
        DENIED,
    ),
    "fetch_openml": (
        "from sklearn.datasets import fetch_openml\nfetch_openml('iris', version=1)",
        "Error",
    ),
}

NETWORK = {
    "tcp": ("socket.create_connection(('127.0.0.1', {port}))", DENIED),
    "udp": ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", DENIED),
    "unix_socket": ("socket.socket(socket.AF_UNIX)", DENIED),
    "socket_pair": ("socket.socketpair()", DENIED),
    "netlink": ("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", DENIED),
    "download": ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1')", "Error"),
}

MEMORY = {
    "list_bomb": ("bomb = []\nwhile True: bomb.append(bytearray(10**7))", "MemoryError"),
    "doubling_bomb": ("bomb = [0]\nwhile True: bomb += bomb", "MemoryError"),
    "terabyte": ("np.ones(10**12 // 8)", "MemoryError: Unable to allocate"),
    "small_objects_bomb": (
        "bomb = None\nwhile True: bomb = [bomb, b'x' * 10**5 + bytes(1)]",
        "MemoryError",
    ),
    "huge_exception_text": ("raise ValueError('x' * 10**8)", "ValueError: x{{580,}}$"),
    "deep_recursion": ("def f(): f()\nf()", "RecursionError"),
    "stack_overflow": (
        "sys.setrecursionlimit(10**9)\ndef f(x): return f([x]) + 1\n"
        "class A:\n    __repr__ = lambda self: repr(self)\n"
        "class B:\n    def __eq__(self, other): return other == self\nrepr(A())\nB() == B()\nf(0)",
        "signal 11|MemoryError|RecursionError",
    ),
    "segmentation_fault": ("ctypes.string_at(0)", "ended the process .signal 11"),
    "abort": ("os.abort()", "ended the process .signal"),
}

OUTPUT = {
    "stdout_flood": (
        "for _ in range(2000):\n    print('x' * 10000)\n    os.write(1, b'y' * 10000)\n"
        "    print('z' * 10000, file=sys.stderr)",
        FINE,
    ),
    "warnings_flood": (
        "warnings.simplefilter('always')\nfor _ in range(5000): warnings.warn('w' * 1000)",
        FINE,
    ),
    "exit_in_str": (
        "class Error(Exception):\n    def __str__(self): os._exit(3)\nraise Error",
        "exit status 3",
    ),
    "error_in_str": (
        "class Error(Exception):\n    def __str__(self): raise self\nraise Error",
        "Error: <exception str.. failed>",
    ),
    "class_name_bomb": ("raise type('E' * 10**7, (Exception,), {{}})('x')", "EEEE"),
    "exit_zero": ("os._exit(0)", "exit status 0"),
    "sys_exit": ("sys.exit('bye')", "SystemExit: bye"),
    "close_channel": ("os.closerange(0, 64)\nwhile True: pass", "RuntimeError|TimeoutError"),
    "result_flood": ("while True: os.write(3, b'P' * 65536)", "ValueError"),
    "fitted_flood": ("while True: os.write(3, b'F' * 65536)", "RuntimeError"),
    "unknown_message": ("os.write(3, b'?' * 100)\nos._exit(0)", "ended the process"),
    "short_result": ("os.write(3, b'P' + bytes(80))\nos._exit(0)", "exit status 0"),
    "failed_then_flood": (
        "os.write(3, b'E' + b'x' * 10**6)\nwhile True: os.write(3, b'y' * 65536)",
        "xxxx",
    ),
    "pickle_as_result": (
        "class Bomb:\n    def __reduce__(self): return os.system, ('touch ' + {witness!r},)\n"
        "data = pickle.dumps(Bomb())\n"
        "os.write(3, b'P' + data + bytes(8 * {n_test} * 2 - len(data)))\nos._exit(0)",
        "",
    ),
    "pickle_as_probabilities": (
        "class Model:\n    def predict_proba(self, x):\n        return Bomb()\n"
        "class Bomb:\n    def __reduce__(self): return os.system, ('touch ' + {witness!r},)\n"
        "return Model()",
        "TypeError: predict_proba returned dtype object",
    ),
    "patched_metric": (
        "import sklearn.metrics\nsklearn.metrics.roc_auc_score = lambda *a, **k: 1.0\n"
        "np.isfinite = np.allclose = lambda *a, **k: True",
        FINE,
    ),
    "patched_child": (
        "for module in list(sys.modules.values()):\n"
        "    if getattr(module, '__name__', '').endswith('sandbox.child'):\n"
        "        module._probabilities = lambda *a: np.full(({n_test}, 2), np.inf)",
        "NaN or infinite|^None$",
    ),
}

LABELS = {
    "hunt_through_gc": (
        "for thing in gc.get_objects():\n"
        "    for part in [thing, *gc.get_referents(thing)]:\n"
        "        if isinstance(part, np.ndarray) and len(part.shape) and len(part) == {n_test}:\n"
        "            raise Escaped(part.shape)",
        FINE,
    ),
    "hunt_through_frames": (
        "frame = sys._getframe()\nwhile frame:\n    for value in frame.f_locals.values():\n"
        "        if isinstance(value, (np.ndarray, bytes, bytearray)):\n"
        "            if len(value) in ({n_test}, 8 * {n_test}, 8 * {n_test} * {n_features}):\n"
        "                raise Escaped(len(value))\n    frame = frame.f_back",
        FINE,
    ),
    "wait_for_test_rows_before_fitting": (
        "import select\nif select.select([3], [], [], 0.3)[0]: raise Escaped",
        FINE,
    ),
    "cache_across_splits": (
        "places = [np, sys, random, threading]\n"
        "for place in places:\n    if hasattr(place, 'leak'): raise Escaped(place)\n"
        "    place.truncation_kl_coef = y_train\n"
        "if 'LEAK' in os.environ: raise Escaped('environment')\nos.environ['LEAK'] = '1'\n"
        "for path in ('/tmp/leak', '/dev/shm/leak', '/var/tmp/leak', 'leak', '/leak'):\n"
        "    if os.path.exists(path): raise Escaped(path)\n"
        "    try: open(path, 'w').close()\n    except OSError: pass\n"
        "if libc.shmget(4711, 4096, 0) != -1: raise Escaped('shared memory')\n"
        "libc.shmget(4711, 4096, 0o1600)",
        FINE,
    ),
}

ATTACKS = PROCESSES | FILES | NETWORK | MEMORY | OUTPUT | LABELS
