"""Many equal blocks, compiled once."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xkd_jax import backend
from xkd_jax.distributed import sharding


def pays(depth: int, train: bool) -> bool:
    """Whether scanning over `depth` blocks is worth its copy of the weights.

    On a CPU XLA compiles a forward pass in no time: there only gradients of deep networks gain.
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
) -> tuple[jax.Array, list[Any]]:
    """Puts `x` through the blocks called `names`, compiling only `modules`, the first few of them.

    XLA takes as long over the twentieth equal block as over the first; `lax.scan` shows it one.
    The parameters stay with the parent, block by block, and are stacked on the way in. Split ones
    (`sharding.gather_lazily`) are gathered by each turn of the loop.

    Args:
      parent: whose parameters they are; it must not be initialising.
      modules: one for each block of a period, unbound; they are called with
        `(x, train, drop_path)` and return their output and whatever else they want to show.
      names: of all blocks, a whole number of periods.
      x: the first block's input, of the same shape as each block's output.
      train: whether dropout is on.
      drop_paths: the rate of stochastic depth, block by block.
      remat: whether the backward pass computes each period anew.

    Returns:
      The last block's output, and every block's `(output, rest)`.
    """
    period = len(modules)
    variables = parent.variables
    params = [variables.get(sharding.SHARES, variables["params"])[name] for name in names]
    stacked = [sharding.stack(params[i::period]) for i in range(period)]
    rates, keys = None, None
    if train and any(drop_paths):
        rates = jnp.asarray(drop_paths).reshape(-1, period)
        keys = jax.random.split(parent.make_rng("dropout"), rates.shape)

    def body(x: jax.Array, step: tuple) -> tuple[jax.Array, list]:
        params, rates, keys = step
        params, outs = sharding.whole(params), []
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
