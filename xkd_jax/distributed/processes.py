"""Several processes that train together: how they start, who speaks, and how they stop together."""

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
from jax.experimental import multihost_utils

from xkd_jax.errors import UserError

HEARTBEAT_TIMEOUT = 30  # seconds after which a silent process counts as dead, and the rest end
_POLL = 1.0  # seconds between two looks whether another process has failed
_FAILED = "xkd_jax/exit_code"


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes; does nothing where there is just this one.

    Without arguments it asks JAX's cluster detection (Cloud TPU, SLURM, Open MPI, Kubernetes), and
    that only where the environment speaks of several processes. Comes before JAX's first use.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: of the whole run; 1 is one process, whatever the environment says.
      process_id: of this one, from 0.

    Raises:
      UserError: the arguments are incomplete or wrong, or the others can't be joined.
    """
    from jax._src import cloud_tpu_init  # what JAX's own detection goes by; nothing public tells

    if num_processes == 1:
        return
    # A TPU pod's host looks like one that is alone: JAX has to ask around.
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
        if on_tpu and isinstance(error, ValueError):  # it belongs to no pod, as a notebook's
            return
        raise UserError(
            f"the other processes can't be joined ({str(error).splitlines()[0][:200]}); give "
            "--coordinator HOST:PORT, --num_processes and --process_id, or --num_processes 1 to "
            "train alone."
        ) from error
    _watch()


def check_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """See `start`.

    Raises:
      UserError: one of the three is missing or wrong.
    """
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            "--coordinator, --num_processes and --process_id go together: give all three, or none."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.2:8476.")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be from 0 to {num_processes - 1}, as "
            f"--num_processes={num_processes}."
        )


def in_cluster(variables: Mapping[str, str]) -> bool:
    """Whether environment `variables` speak of several processes.

    On SLURM and Open MPI by their number. An indexed Kubernetes Job doesn't tell its pods how many
    they are, and counts as several.
    """
    sizes = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(variables.get(name, 1)) > 1 for name in sizes):
        return True
    return {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= variables.keys()


def several() -> bool:
    """Whether this process trains together with others."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return not several() or jax.process_index() == 0


def fail(text: str, code: int) -> int:
    """Prints `text`, once however many processes come here, and ends all of them with `code`.

    Returns:
      `code`, where this process is alone; else it doesn't return.
    """
    if not several():
        print(text, file=sys.stderr)
        return code
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was quicker
        _store().key_value_set(_FAILED, str(code))
        print(text, file=sys.stderr)
    _leave(code)
    raise AssertionError("unreachable")


def _store():
    from jax._src import distributed  # as Orbax does: JAX has no public way to its key-value store

    client = distributed.global_state.client
    assert client is not None
    return client


def _watch() -> None:
    """Ends this process soon after another one has failed, even if it waits for that one."""
    done = threading.Event()

    def watch():
        while not done.wait(_POLL):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has
                _leave(int(_store().key_value_try_get(_FAILED)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def stop():
        done.set()
        thread.join()

    atexit.register(stop)  # before JAX leaves the others, which it registered first


def _leave(code: int) -> None:
    """Ends this process without waiting for the others, as JAX would."""
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(3 * _POLL)  # with this one the store ends: the others have to see it before
    os._exit(code)


class StopSignal:
    """Turns the first SIGTERM or Ctrl-C into a wish that the loop can ask for.

    A second Ctrl-C ends the process at once. Of several processes, any one may get the signal.

    Attributes:
      received: the signal that stops the loop.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._noted: signal.Signals | None = None
        self._previous = {}

    def __enter__(self):
        # Of several processes, JAX itself listens for SIGTERM and lets the others know.
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

    def asked(self, step: int) -> bool:
        """Whether the loop should stop after `step`, the same step in every process.

        To be called after every step.
        """
        if several() and multihost_utils.reached_preemption_sync_point(step):
            self.received = self._noted or signal.SIGTERM
        return self.received is not None

    def __exit__(self, *exception):
        for name, handler in self._previous.items():
            signal.signal(name, handler)
