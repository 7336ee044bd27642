"""Saving and restoring a run."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from xkd_jax.errors import UserError
from xkd_jax.reporting import nan_guard
from xkd_jax.reporting.logger import say


def place(folder: Path, checkpoint_dir: str) -> epath.Path:
    """The folder of the checkpoints of the run in `folder`, given `config.checkpoint_dir`."""
    if checkpoint_dir:
        return epath.Path(checkpoint_dir) / folder.absolute().name
    return epath.Path(folder) / "checkpoints"


class Checkpoints:
    """The checkpoints of one run, written asynchronously.

    Args:
      folder: a path or a URI such as gs://bucket/run; the same for all processes.
      keep: number of newest checkpoints to keep.
      teacher: fingerprint of the teacher, "" for none; checkpoints can only be restored with the
        teacher they were saved with.

    Raises:
      UserError: the folder can't be created.
    """

    def __init__(self, folder: epath.PathLike, keep: int, teacher: str):
        path = epath.Path(folder)
        if "://" not in str(folder):
            path = path.absolute()
        # The remains of an interrupted save can be as large as a checkpoint.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True
        )
        # Weights hardly compress, and compressing takes CPU time from the next steps.
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._folder = folder
        with self._writing():
            self._manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)
        self._meta = {"teacher": teacher}

    def restore(self, state: Any) -> Any | None:
        """The newest saved state, sharded like `state`; None if there is no checkpoint.

        Damaged checkpoints are skipped, and deleted once an older one has been restored.

        Raises:
          UserError: it was saved with another teacher, doesn't fit `state`, or all are damaged.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            saved = self._read(step, abstract, damaged)
            # Otherwise processes could resume from different steps.
            if not np.all(multihost_utils.process_allgather(np.array(saved is not None))):
                damaged.setdefault(step, "another process can't read it")
                continue
            assert saved is not None
            if saved["meta"] != self._meta:
                raise UserError(
                    f"the checkpoint of step {step} was trained with teacher "
                    f"{saved['meta']['teacher']}, but teacher.weights now holds "
                    f"{self._meta['teacher']}; restore the old file or choose another --workdir."
                )
            for torn, reason in damaged.items():
                say(
                    f"the checkpoint of step {torn} is damaged ({reason}) and is deleted; "
                    f"training resumes from step {step}."
                )
                self._manager.delete(torn)
            return saved["state"]
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise UserError(
                f"the checkpoint of step {step} doesn't fit this run or is damaged ({reason}); "
                "choose another --workdir."
            )
        return None

    def _read(self, step: int, abstract: Any, damaged: dict[int, str]) -> Any | None:
        """The checkpoint of `step`; None, with the reason in `damaged`, if it can't be read."""
        layout = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(abstract, restore_args=layout),
            meta=ocp.args.JsonRestore(),
        )
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:  # the type depends on which file is damaged
            damaged[step] = _first_line(error)
            return None

    def save(self, step: int, state: Any) -> None:
        """Starts saving `state` in the background; its arrays are copied before this returns.

        Raises:
          UserError: `state` has non-finite values; or it, or the previous one, can't be written.
        """
        if step == self._manager.latest_step():
            return
        nan_guard.check_state(step, state)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(self._meta)
        )
        with self._writing():
            self._manager.save(step, args=args)

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          UserError: the last checkpoint can't be written.
        """
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # OSError, or whatever Orbax and TensorStore turn it into
            raise UserError(
                f"{self._folder} can't be written ({_first_line(error)}); earlier checkpoints are "
                "kept: free disk space or fix its permissions, then run the same command again to "
                "resume."
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
