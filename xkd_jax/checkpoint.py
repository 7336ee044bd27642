"""Saving and restoring a run, and stopping it without loss."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import orbax.checkpoint as ocp

from xkd_jax.errors import UserError


class Checkpoints:
    """The checkpoints of one run, written while training goes on.

    Args:
      folder: where they lie.
      keep: how many of the newest stay.
      teacher: fingerprint of the teacher, "" for none; a checkpoint belongs to one teacher.
    """

    def __init__(self, folder: Path, keep: int, teacher: str):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._meta = {"teacher": teacher}

    def restore(self, state: Any) -> Any | None:
        """The newest saved state, laid out on the devices as `state` is; None if there is none.

        Raises:
          UserError: it was saved under another teacher, doesn't fit `state`, or is damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
        )
        try:
            saved = self._manager.restore(step, args=args)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"the checkpoint of step {step} doesn't fit this run or is damaged "
                f"({str(error).splitlines()[0][:200]}); choose another --workdir."
            ) from error
        if saved["meta"] != self._meta:
            raise UserError(
                f"the checkpoint of step {step} learnt from teacher {saved['meta']['teacher']}, "
                f"and teacher.weights now holds {self._meta['teacher']}; give the old file back "
                "or choose another --workdir."
            )
        return saved["state"]

    def save(self, step: int, state: Any) -> None:
        """Starts saving `state`; its arrays are copied before this returns."""
        if step != self._manager.latest_step():
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(self._meta)
            )
            self._manager.save(step, args=args)

    def close(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


class StopSignal:
    """Turns the first SIGTERM or Ctrl-C into a wish that the loop can ask for.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._previous = {}

    def __enter__(self):
        for name in (signal.SIGINT, signal.SIGTERM):
            self._previous[name] = signal.signal(name, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = signal.Signals(number)
        signal.signal(number, self._previous[self.received])

    def __exit__(self, *exception):
        for name, handler in self._previous.items():
            signal.signal(name, handler)
