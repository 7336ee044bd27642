"""Multi-process training: start-up, rank-0 output, coordinated shutdown."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from xkd_jax.errors import UserError

HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat until a process counts as dead and all exit
_POLL = 1.0  # seconds between checks for another process's failure
_FAILED = "xkd_jax/exit_code"


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes; does nothing if there is only this one.

    Without arguments, JAX's cluster detection (Cloud TPU, SLURM, Open MPI, Kubernetes) is used, but
    only if the environment indicates several processes. Must be called before JAX is first used.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: total number of processes; 1 disables distributed start-up, whatever the
        environment says.
      process_id: index of this process, from 0.

    Raises:
      UserError: the arguments are incomplete or wrong, or the other processes can't be reached.
    """
    from jax._src import cloud_tpu_init  # as JAX's own detection does; there is no public function

    if num_processes == 1:
        return
    # A host of a TPU pod looks like a single TPU VM until JAX queries the metadata server.
    on_tpu = cloud_tpu_init.running_in_cloud_tpu_vm
    flags, detection = (coordinator, num_processes, process_id), None
    if flags != (None, None, None):
        check_flags(*flags)
        detection = "deactivate"
    elif not (on_tpu or in_cluster(os.environ)):
        return
    try:
        jax.distributed.initialize(
            *flags,
            cluster_detection_method=detection,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        if on_tpu and isinstance(error, ValueError):  # not part of a pod, such as a notebook's TPU
            return
        raise UserError(
            f"can't connect to the other processes ({str(error).splitlines()[0][:200]}); set "
            "--coordinator HOST:PORT, --num_processes and --process_id, or --num_processes 1 to "
            "train in a single process."
        ) from error
    _watch()


def check_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Checks the arguments of `start`.

    Raises:
      UserError: one of the three is missing or wrong.
    """
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            "--coordinator, --num_processes and --process_id go together: set all three or none."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.2:8476.")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be from 0 to {num_processes - 1}, because "
            f"--num_processes={num_processes}."
        )


def in_cluster(variables: Mapping[str, str]) -> bool:
    """Whether environment `variables` indicate several processes.

    SLURM and Open MPI state their number. An indexed Kubernetes Job doesn't tell its pods how many
    there are, and counts as several.
    """
    sizes = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(variables.get(name, 1)) > 1 for name in sizes):
        return True
    return {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= variables.keys()


def several() -> bool:
    """Whether this is a multi-process run."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is process 0, the one that prints and writes files."""
    return not several() or jax.process_index() == 0


def gather(part: bytes) -> list[bytes]:
    """The parts of all processes, in each of them; all must call it."""
    if not several():
        return [part]
    lengths = multihost_utils.process_allgather(np.array([len(part)], np.int32))
    padded = np.zeros(np.max(lengths), np.uint8)
    padded[: len(part)] = np.frombuffer(part, np.uint8)
    parts = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(parts, lengths[:, 0], strict=True)]


def fail(text: str, code: int) -> int:
    """Prints `text` once, even if several processes fail, and ends all processes with `code`.

    Returns:
      `code` in a single-process run; otherwise it doesn't return.
    """
    if not several():
        print(text, file=sys.stderr)
        return code
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has failed first
        _store().key_value_set(_FAILED, str(code))
        print(text, file=sys.stderr)
    _leave(code)
    raise AssertionError("unreachable")


def _global_state():
    from jax._src import distributed  # as Orbax does: its key-value store has no public API

    return distributed.global_state


def _store():
    client = _global_state().client
    assert client is not None
    return client


def _watch() -> None:
    """Ends this process soon after another one has failed, even while it waits for that one."""
    done = threading.Event()

    def watch():
        while not done.wait(_POLL):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # no process has failed
                _leave(int(_store().key_value_try_get(_FAILED)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def stop():
        done.set()
        thread.join()

    atexit.register(stop)  # runs before JAX's shutdown, which was registered earlier


def _leave(code: int) -> None:
    """Ends this process without waiting for the others, unlike JAX's shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    # `is_first` would raise again if JAX's backend has failed to initialise.
    if _global_state().process_id == 0:
        time.sleep(3 * _POLL)  # the store ends with this process; the others must read it first
    os._exit(code)


class StopSignal:
    """A context in which the first SIGTERM or Ctrl-C is a request to stop, polled by the loop.

    A second Ctrl-C ends the process at once. In multi-process runs any process may get the signal.

    Attributes:
      received: the signal that stops the loop, or None.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._noted: signal.Signals | None = None
        self._previous = {}

    def __enter__(self):
        # In multi-process runs JAX itself handles SIGTERM and notifies the other processes.
        names = (signal.SIGINT,) if several() else (signal.SIGINT, signal.SIGTERM)
        for name in names:
            self._previous[name] = signal.signal(name, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, self._previous[number])
        if several():
            self._noted = signal.Signals(number)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.received = signal.Signals(number)

    def asked(self, number: int) -> bool:
        """Whether to stop after a dispatch, which is the same one in every process.

        Must be called after every dispatch, with consecutive numbers.
        """
        if several() and multihost_utils.reached_preemption_sync_point(number):
            self.received = self._noted or signal.SIGTERM
        return self.received is not None

    def __exit__(self, *exception):
        for name, handler in self._previous.items():
            signal.signal(name, handler)
