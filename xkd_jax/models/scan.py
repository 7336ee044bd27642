"""A stack of identical blocks as one `lax.scan`, so that XLA compiles only one of them."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import backend


class Gather(Protocol):
    """Access to parameters that are sharded over devices, for a scan over blocks.

    `xkd_jax.distributed.sharding.BlockGather` is one.
    """

    def stack(self, paths: Sequence[tuple[str, ...]]) -> Any:
        """The parameters at `paths`, of identical blocks, stacked along a new first axis."""
        ...

    def whole(self, params: Any) -> Any:
        """One block's parameters, a slice of what `stack` returned, on every device."""
        ...


def pays(depth: int, train: bool) -> bool:
    """Whether scanning over `depth` blocks is worth the copy of their weights.

    On a CPU, XLA compiles a forward pass quickly: only the gradients of deep networks gain there.
    """
    return depth > 12 and (train or backend.current() != "cpu")


def scan_blocks(
    parent: nn.Module,
    modules: Sequence[nn.Module],
    names: Sequence[str],
    x: jax.Array,
    train: bool,
    drop_paths: Sequence[float],
    remat: bool = False,
    gather: Gather | None = None,
) -> tuple[jax.Array, list[Any]]:
    """Applies the blocks called `names` to `x` in turn, compiling only one period of them.

    Unrolled, XLA spends as long on the twentieth identical block as on the first. The parameters
    are stored per block in `parent`, and are stacked here.

    Args:
      parent: the module that holds the blocks' parameters; it must not be initialising.
      modules: one unbound module per block of a period, called with `(x, train, drop_path)`; each
        returns its output and any further results.
      names: the names of all blocks, a whole number of periods.
      x: the first block's input, of the same shape as each block's output.
      train: whether stochastic depth is on.
      drop_paths: the rate of stochastic depth of each block.
      remat: whether the backward pass recomputes each period.
      gather: for sharded parameters: each step of the scan gathers its own period's.

    Returns:
      The last block's output, and every block's `(output, rest)`.
    """
    period = len(modules)
    stacked = [_stack(parent, names[i::period], gather) for i in range(period)]
    rates, keys = None, None
    if train and any(drop_paths):
        rates = jnp.asarray(drop_paths).reshape(-1, period)
        keys = jax.random.split(parent.make_rng("dropout"), rates.shape)

    def body(x: jax.Array, step: tuple) -> tuple[jax.Array, list]:
        params, rates, keys = step
        params, outs = params if gather is None else gather.whole(params), []
        for i, module in enumerate(modules):
            rate = 0.0 if rates is None else rates[i]
            rngs = None if keys is None else {"dropout": keys[i]}
            x, rest = module.apply({"params": params[i]}, x, train, rate, rngs=rngs)
            outs.append((x, rest))
        return x, outs

    if remat:
        # The scan itself keeps XLA from merging the two computations.
        body = jax.checkpoint(body, prevent_cse=False)
    x, outs = jax.lax.scan(body, x, (stacked, rates, keys))
    return x, [
        jax.tree.map(lambda leaf, turn=i // period: leaf[turn], outs[i % period])
        for i in range(len(names))
    ]


def _stack(parent: nn.Module, names: Sequence[str], gather: Gather | None) -> Any:
    if gather is not None:
        return gather.stack([(*parent.path, name) for name in names])
    params = parent.variables["params"]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[params[name] for name in names])
