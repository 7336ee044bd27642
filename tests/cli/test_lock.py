"""One owner for each run folder."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from xkd_jax.cli import lock
from xkd_jax.errors import UserError

IN_USE = r"is in use by process \d+ on .*; wait until it has finished, or choose another --workdir"


def write(folder, **changes):
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": lock._started(os.getpid())}
    (folder / lock.NAME).write_text(json.dumps(mine | changes))


def test_the_second_is_refused_until_the_first_has_finished(tmp_path):
    with lock.hold(tmp_path):
        for refused in (lambda: lock.check(tmp_path), lock.hold(tmp_path).__enter__):
            with pytest.raises(UserError, match=IN_USE):
                refused()
    lock.check(tmp_path)
    assert not list(tmp_path.iterdir())
    with lock.hold(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {lock.NAME}


def test_a_killed_owner_leaves_the_folder_free(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom xkd_jax.cli import lock\n"
        "with lock.hold(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {process.pid} on {socket.gethostname()}"):
        lock.check(tmp_path)
    process.kill()
    process.communicate()
    with lock.hold(tmp_path):
        pass


@pytest.mark.parametrize("change", [{"started": "1"}, {"pid": 2**22 + 1}])
def test_a_number_that_another_process_has_now_is_stale(tmp_path, change):
    write(tmp_path, **change)
    with lock.hold(tmp_path):
        pass


def test_another_machines_lock_counts_while_it_is_touched(tmp_path):
    write(tmp_path, host="elsewhere")
    with pytest.raises(UserError, match="on elsewhere"):
        lock.check(tmp_path)
    long_ago = time.time() - lock.SILENCE - 1
    os.utime(tmp_path / lock.NAME, (long_ago, long_ago))
    with lock.hold(tmp_path):
        pass


def test_a_damaged_lock_ages_like_another_machines(tmp_path):
    (tmp_path / lock.NAME).write_text("")
    with pytest.raises(UserError, match="is in use"):
        lock.check(tmp_path)
    os.utime(tmp_path / lock.NAME, (0, 0))
    with lock.hold(tmp_path):
        pass


def test_the_owner_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    with lock.hold(tmp_path):
        os.utime(tmp_path / lock.NAME, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / lock.NAME).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / lock.NAME).stat().st_mtime > 0


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    write(tmp_path, started="1")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom xkd_jax.cli import lock\n"
        "from xkd_jax.errors import UserError\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "try:\n    lock._take(Path(sys.argv[1]))\nexcept UserError:\n    print('refused')\n"
        "else:\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / lock.NAME)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(6)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.stdout.readline() for process in started]
    for process in started:
        process.kill()
        process.communicate()
    assert sorted(said) == ["held\n"] + ["refused\n"] * 5
