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
    """Where the checkpoints of the run in `folder` lie, by `config.checkpoint_dir`."""
    if checkpoint_dir:
        return epath.Path(checkpoint_dir) / folder.absolute().name
    return epath.Path(folder) / "checkpoints"


class Checkpoints:
    """The checkpoints of one run, written while training goes on.

    Args:
      folder: where they lie, a path or a URI such as gs://bucket/run; the same for all processes.
      keep: how many of the newest stay.
      teacher: fingerprint of the teacher, "" for none; a checkpoint belongs to one teacher.

    Raises:
      UserError: there can't be such a folder.
    """

    def __init__(self, folder: epath.PathLike, keep: int, teacher: str):
        path = epath.Path(folder)
        if "://" not in str(folder):
            path = path.absolute()
        # What a killed save left is as big as a checkpoint.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True
        )
        # Weights hardly shrink, and compressing them takes processors from the steps that follow.
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._folder = folder
        with self._writing():
            self._manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)
        self._meta = {"teacher": teacher}

    def restore(self, state: Any) -> Any | None:
        """The newest saved state, laid out on the devices as `state` is; None if there is none.

        Damaged ones are passed over, and deleted once an older one is found whole.

        Raises:
          UserError: it was saved under another teacher, doesn't fit `state`, or all are damaged.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            saved = self._read(step, abstract, damaged)
            # Else one process could go on from another step than the rest.
            if not np.all(multihost_utils.process_allgather(np.array(saved is not None))):
                damaged.setdefault(step, "another process can't read it")
                continue
            assert saved is not None
            if saved["meta"] != self._meta:
                raise UserError(
                    f"the checkpoint of step {step} learnt from teacher "
                    f"{saved['meta']['teacher']}, and teacher.weights now holds "
                    f"{self._meta['teacher']}; give the old file back or choose another --workdir."
                )
            for torn, reason in damaged.items():
                say(
                    f"the checkpoint of step {torn} is damaged ({reason}) and is deleted; "
                    f"training goes on from step {step}."
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
        """What was saved after `step`; None, and the reason in `damaged`, if it can't be read."""
        layout = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(abstract, restore_args=layout),
            meta=ocp.args.JsonRestore(),
        )
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:  # of many kinds, by which of the files is damaged
            damaged[step] = _first_line(error)
            return None

    def save(self, step: int, state: Any) -> None:
        """Starts saving `state`; its arrays are copied before this returns.

        Raises:
          UserError: `state` is not finite; or it, or the one before, can't be written.
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
        """Returns when everything is on disk.

        Raises:
          UserError: the last one can't be written.
        """
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # the file system's, or what Orbax and TensorStore make of it
            raise UserError(
                f"{self._folder} can't be written ({_first_line(error)}); the checkpoints from "
                "before stay: make room or give access, and run the same command again to go on."
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
