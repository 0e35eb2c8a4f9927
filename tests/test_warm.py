"""The fork server, driven as the workflow drives it: real processes, clients of their own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prunebench.runtime import warm

CLIENT = """
import sys
from prunebench.runtime.warm import delegate
status = delegate(sys.argv[1:])
sys.exit(99 if status is None else status)
"""
ALONE = 99  # what the client above exits with when no server did the work

MAIN = "'warm_jobs:main'"
JOBS = '''
import os, signal, sys, time
from pathlib import Path

import numpy as np
import torch


def main(argv):
    return globals()[argv[0]](*argv[1:])


def status(code): return int(code)
def leave(code): sys.exit(int(code))
def leave_message(): sys.exit("bad input")
def die(): os.kill(os.getpid(), signal.SIGKILL)
def fail(): raise ValueError("on purpose")
def nothing(): pass
def server(): print(os.getppid())


def where():
    print(Path.cwd(), os.environ["ANSWER"], os.environ.get("ONLY_SERVER"), sys.argv[1:])
    print(sys.stdin.read(), file=sys.stderr)


def tick(marker):
    """Appends to the marker for ever; a helper process of the job does the same."""
    if os.fork() == 0:
        marker += ".helper"
    while True:
        with open(marker, "a") as file:
            file.write(".")
        time.sleep(0.01)


def polite(marker):
    def stop(*_):
        Path(marker).write_text("stopped")
        sys.exit(7)

    signal.signal(signal.SIGTERM, stop)
    Path(marker).write_text("ready")
    time.sleep(60)


def sleep(marker):
    Path(marker).write_text(str(os.getpid()))
    time.sleep(60)


def litter(marker):
    """Ends, and leaves a process in its group and one in a session of its own."""
    import subprocess
    left = [subprocess.Popen(["sleep", "60"], start_new_session=new) for new in (False, True)]
    Path(marker).write_text(" ".join(str(process.pid) for process in left))


def meet(mine, other):
    Path(mine).touch()
    deadline = time.monotonic() + 20
    while not Path(other).exists():
        if time.monotonic() > deadline:
            return 1
        time.sleep(0.01)


def blas():
    matrix = np.ones((1000, 1000))
    matrix @ matrix
    print(len(os.listdir("/proc/self/task")))


def compute():
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 16, 32, 32, generator=generator)
    kernel = torch.randn(16, 16, 3, 3, generator=generator)
    matrix = torch.randn(400, 400, generator=generator)
    value = torch.nn.functional.conv2d(images, kernel).relu().sum() + (matrix @ matrix).norm()
    print(value.item().hex())
'''


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def command(*argv):
    return [sys.executable, "-P", "-c", CLIENT, *map(str, argv)]


def alive(pid):
    """Running, not just waiting to be reaped by a parent that does not care."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Server:
    """A warm server with an owner that can be killed, on a copy of the code that can be edited."""

    def __init__(self, folder, preload=("torch",)):
        (folder / "warm_jobs.py").write_text(JOBS)
        self.package = folder / "prunebench"
        for name in (
            "__init__.py",
            "runtime/__init__.py",
            "runtime/warm.py",
            "runtime/warm_server.py",
        ):
            copy = self.package / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(warm.PACKAGE / name, copy)
        self.owner = subprocess.Popen(["sleep", "600"])
        call = f"w.start({self.owner.pid}, {preload}, {MAIN})"
        start = f"import prunebench.runtime.warm as w; print({call})"
        self.environment = os.environ | {"PYTHONPATH": str(folder), "ANSWER": "42"}
        self.path = subprocess.run(
            [sys.executable, "-P", "-c", start],
            env=self.environment | {"ONLY_SERVER": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        self.environment[warm.VARIABLE] = self.path

    def run(self, *argv, **options):
        options = {"env": self.environment, "capture_output": True, "text": True} | options
        return subprocess.run(command(*argv), timeout=60, check=False, **options)

    def spawn(self, *argv):
        return subprocess.Popen(command(*argv), env=self.environment, stderr=subprocess.PIPE)

    def pid(self):
        return int(self.run("server").stdout)

    def close(self):
        self.owner.kill()
        self.owner.wait()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("shared"))
    yield server
    server.close()
    shutil.rmtree(Path(server.path).parent, ignore_errors=True)  # a killed server leaves it


@pytest.fixture
def own(tmp_path):
    """A server that a test may break; it imports torch all the same, the jobs need it."""
    server = Server(tmp_path)
    yield server
    server.close()
    shutil.rmtree(Path(server.path).parent, ignore_errors=True)  # a killed server leaves it


@pytest.mark.parametrize(
    ("argv", "expected"),
    [(("status", 0), 0), (("status", 3), 3), (("nothing",), 0), (("leave", 5), 5), (("die",), 137)],
)
def test_exit_status_passes_through(shared, argv, expected):
    assert shared.run(*argv).returncode == expected


def test_failures_are_shown_and_give_status_one(shared):
    failed = shared.run("fail")
    assert failed.returncode == 1
    assert "ValueError: on purpose" in failed.stderr
    left = shared.run("leave_message")
    assert (left.returncode, left.stderr) == (1, "bad input\n")


def test_streams_folder_environment_and_arguments_pass_through(shared, tmp_path):
    done = shared.run("where", cwd=tmp_path, input="from stdin")
    assert done.stdout == f"{tmp_path} 42 None ['where']\n"
    assert done.stderr == "from stdin\n"


def test_server_works_in_another_process_which_has_no_threads(shared):
    pid = shared.pid()
    assert pid not in (os.getpid(), shared.owner.pid)
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1  # or a fork would not be safe


def test_numpy_has_the_one_thread_of_a_workflow_job(shared):
    assert shared.run("blas").stdout == "1\n"


def test_twenty_requests_are_quick(shared):
    shared.run("nothing")
    begin = time.monotonic()
    for _ in range(20):
        assert shared.run("nothing").returncode == 0
    busy = max(1, os.getloadavg()[0] / os.cpu_count())
    assert time.monotonic() - begin < 2 * busy


def test_two_requests_run_side_by_side(shared, tmp_path):
    names = tmp_path / "a", tmp_path / "b"
    clients = [shared.spawn("meet", *names), shared.spawn("meet", *reversed(names))]
    assert [client.wait(60) for client in clients] == [0, 0]


def test_threaded_arithmetic_is_that_of_a_fresh_process(shared, tmp_path):
    (tmp_path / "warm_jobs.py").write_text(JOBS)
    fresh = subprocess.run(
        [sys.executable, "-c", "import warm_jobs; warm_jobs.compute()"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shared.run("compute").stdout == fresh.stdout != ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killing_the_client_kills_the_whole_job(shared, tmp_path, number):
    marker, helper = tmp_path / "marker", tmp_path / "marker.helper"
    client = shared.spawn("tick", marker)
    until(lambda: marker.exists() and helper.exists())
    client.send_signal(number)
    assert client.wait(20) == (-number if number == signal.SIGKILL else 128 + number)
    time.sleep(0.3)
    sizes = marker.stat().st_size, helper.stat().st_size
    time.sleep(0.3)
    assert (marker.stat().st_size, helper.stat().st_size) == sizes
    assert shared.run("status", 4).returncode == 4  # the server goes on


def test_a_job_may_answer_a_signal(shared, tmp_path):
    marker = tmp_path / "marker"
    client = shared.spawn("polite", marker)
    until(lambda: marker.exists() and marker.read_text() == "ready")
    client.terminate()
    assert client.wait(20) == 7
    assert marker.read_text() == "stopped"


def test_folder_is_private_and_goes_with_the_owner(own):
    folder = Path(own.path).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(own.path) < 100
    pid = own.pid()
    own.close()
    until(lambda: not alive(pid) and not folder.exists())


def test_jobs_do_not_outlive_the_owner(own, tmp_path):
    client = own.spawn("tick", tmp_path / "marker")
    until((tmp_path / "marker.helper").exists)
    own.close()
    assert client.wait(20) != 0
    size = (tmp_path / "marker.helper").stat().st_size
    time.sleep(0.2)
    assert (tmp_path / "marker.helper").stat().st_size == size


def test_death_of_the_server_ends_job_and_client_and_leaves_a_harmless_socket(own, tmp_path):
    server, marker = own.pid(), tmp_path / "marker"
    client = own.spawn("sleep", marker)
    until(lambda: marker.exists() and marker.read_text())
    os.kill(server, signal.SIGKILL)
    assert client.wait(20) == 1
    until(lambda: not alive(server) and not alive(int(marker.read_text())))
    assert b"the warm server died" in client.stderr.read()
    assert Path(own.path).exists()
    later = own.run("status", 0)
    assert later.returncode == ALONE
    assert later.stderr.count("\n") == 1


def test_no_server_asked_for_and_socket_from_elsewhere(own, tmp_path):
    for path, lines in (("", 0), (str(tmp_path / "no-such-socket"), 1)):
        done = own.run("status", 0, env=own.environment | {warm.VARIABLE: path})
        assert (done.returncode, done.stderr.count("\n")) == (ALONE, lines)


def test_failed_import_leaves_the_work_to_the_client(tmp_path):
    server = Server(tmp_path, preload=("no_such_module",))
    done = server.run("status", 0)
    server.close()
    shutil.rmtree(Path(server.path).parent)
    assert done.returncode == ALONE
    assert "no warm server" in done.stderr


def test_edited_code_is_not_served(own):
    assert own.run("status", 0).returncode == 0
    with (own.package / "__init__.py").open("a") as file:
        file.write("EDITED = True\n")
    done = own.run("status", 0)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "changed while it ran; give the same command again" in done.stderr


def test_fingerprint_sees_edits_additions_and_removals(tmp_path):
    module = tmp_path / "models" / "dit.py"
    module.parent.mkdir()
    module.write_text("a = 1\n")
    first = warm.fingerprint(tmp_path)
    assert first == warm.fingerprint(tmp_path)
    os.utime(module, ns=(1, 1))
    touched = warm.fingerprint(tmp_path)
    (tmp_path / "new.py").touch()
    added = warm.fingerprint(tmp_path)
    module.unlink()
    removed = warm.fingerprint(tmp_path)
    seen = [first, touched, added, removed]
    assert all(one != other for one in seen for other in seen if one is not other)


def test_client_imports_nothing_heavy():
    code = "import sys, prunebench.runtime.warm; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "subprocess", "tempfile", "ctypes"} & set(modules)


def test_a_run_goes_without_a_server_where_no_folder_can_be_made(monkeypatch, tmp_path, capfd):
    import tempfile

    def full(prefix, dir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    assert warm.start(os.getpid(), [], MAIN) is None
    assert "no warm server (no folder can be made in /tmp" in capfd.readouterr().err


def test_a_full_tmp_leaves_tmpdir(monkeypatch, tmp_path):
    import tempfile

    own = tempfile.mkdtemp

    def full(prefix, dir):
        if dir == "/tmp":
            raise OSError(28, "No space left on device")
        return own(prefix=prefix, dir=dir)

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/var/tmp")
    folder = warm._folder(7)
    Path(folder).rmdir()
    assert folder.startswith("/var/tmp/prunebench-7-")


def test_what_killed_runs_left_goes_with_the_next_one(monkeypatch, tmp_path):
    """Folders of owners that are no more and where nobody listens, and no others."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {f"prunebench-{ended.pid}-dead": True, f"prunebench-{os.getpid()}-alive": False}
    names |= {f"prunebench-{ended.pid}-served": False, "prunebench-gpus-0": False, "other": False}
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / f"prunebench-{ended.pid}-dead" / "log").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / f"prunebench-{ended.pid}-served" / "socket"))
        listener.listen()
        warm._clear(tmp_path)
    assert {folder.name for folder in tmp_path.iterdir()} == {n for n in names if not names[n]}


SLOW = "import time\nPath = __import__('pathlib').Path\nPath({file!r}).touch()\ntime.sleep(60)\n"
OWNER = """
import os, time, prunebench.runtime.warm as w
print(w.start(os.getpid(), ["slow"], {main}), flush=True)
time.sleep(60)
"""


def test_a_server_that_still_imports_ends_with_its_owner(tmp_path):
    begun = tmp_path / "begun"
    (tmp_path / "slow.py").write_text(SLOW.format(file=str(begun)))
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(main=MAIN)],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{warm.PACKAGE.parent}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = Path(owner.stdout.readline().strip()).parent
    until(begun.exists)
    environment = os.environ | {"PYTHONPATH": str(warm.PACKAGE.parent)}
    environment[warm.VARIABLE] = str(folder / "socket")
    client = subprocess.Popen(command("status", 0), env=environment, stderr=subprocess.PIPE)
    time.sleep(0.5)  # it waits for the imports
    owner.kill()
    owner.wait()
    until(lambda: not folder.exists())
    assert client.wait(20) == 1
    assert b"has ended; nothing was done" in client.stderr.read()


def test_what_a_job_leaves_running_is_ended(own, tmp_path):
    marker = tmp_path / "marker"
    assert own.run("litter", marker).returncode == 0
    group, session = map(int, marker.read_text().split())
    until(lambda: not alive(group) and not alive(session))


def test_systems_without_pidfd_have_no_server(monkeypatch):
    monkeypatch.delattr(os, "pidfd_open")
    assert warm.start(os.getpid(), [], "warm_jobs:main") is None
