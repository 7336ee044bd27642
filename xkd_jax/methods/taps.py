"""Where cakd taps a Transformer teacher."""

import jax
import jax.numpy as jnp

from xkd_jax.methods.base import Outputs


def teacher_taps(out: Outputs, block: int) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """(Q_T, K_T, V_T), each [N, H, T, d], and h_T [N, T, D], all float32 without gradient.

    Args:
      out: a Transformer's outputs; the tokens exclude class and distillation tokens.
      block: -1 taps the last block and the network's final tokens, after the last LayerNorm if that
        precedes the pooling; -2 taps the block before it, and so on, with its tokens standardised
        without a learned scale.
    """
    prefix = block_prefix(out, block)
    if block == -1:
        tokens = out["tokens"]
    else:
        tokens = out[prefix.removesuffix("_")].astype(jnp.float32)
        tokens = jax.nn.standardize(tokens, epsilon=1e-6)
    taps = (*(out[f"{prefix}{name}"] for name in ("query", "key", "value")), tokens)
    *qkv, tokens = (jax.lax.stop_gradient(tap.astype(jnp.float32)) for tap in taps)
    return tuple(qkv), tokens


def teacher_bias(out: Outputs, block: int) -> jax.Array | float:
    """The bias of a block's scores (Swin, BEiT) for `attention`, without gradient; else 0."""
    bias = out.get(f"{block_prefix(out, block)}bias")
    return 0.0 if bias is None else jax.lax.stop_gradient(bias)


def block_prefix(out: Outputs, block: int) -> str:
    """What the names of a block's taps begin with; the last block's have short names."""
    return "" if block == -1 else f"block{max(block_numbers(out)) + 1 + block:02d}_"


def block_numbers(out: Outputs) -> list[int]:
    """The numbers of a Transformer's blocks."""
    return [int(name[5:]) for name in out if name.startswith("block") and name[5:].isdigit()]
