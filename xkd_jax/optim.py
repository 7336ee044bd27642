"""Optimizers by name, weight averaging, and gradient accumulation.

The optimizers are optax's, except that the learning rate is a function of the run's step instead of
the number of updates: parameters that a method freezes for a while resume at the schedule's current
rate. Their `update` takes the step as a keyword: `update(gradients, state, params, step=step)`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xkd_jax.errors import UserError
from xkd_jax.schedules import check_range

OPTIMIZERS = ("sgd", "adam", "adamw", "lamb", "lars", "rmsprop")

# Never decayed with `weight_decay_skip_1d`, whatever their shape, as in timm's `no_weight_decay`.
_NOT_DECAYED = re.compile(
    r"(bias|pos_embed|_token|relative_position_bias_table|logit_scale|cpb_mlp_\d/kernel)$"
)
# Paths of parameters, by position. Swin's downsampling counts as part of the next block.
_BLOCK = re.compile(r"(layers_\d+/(blocks_\d+|downsample)|blocks_\d+(_\d+)?|layer\d+_\d+)/")
_STEM = re.compile(
    r"(patch_embed|pos_embed|(cls|dist|reg)_token|rel_pos_bias|norm_pre|conv1|conv_stem|bn1)(/|$)"
)
_AFTER_BLOCKS = re.compile(r"(norm|conv_head|norm_head|bn2)/")


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """`config.optimizer`, `config.method_optimizer` and `config.adversary_optimizer`.

    Attributes:
      name: the update rule; see `OPTIMIZERS`. Of `method_optimizer` also "": all is as in
        `optimizer`.
      learning_rate: peak learning rate.
      momentum: momentum of "sgd", "lars" and "rmsprop".
      nesterov: whether their momentum is Nesterov's.
      betas: decay rates of the first and second moments of "adam", "adamw" and "lamb".
      weight_decay: weight decay of all parameters, except as below.
      weight_decay_skip_1d: no weight decay for norms, biases, position embeddings and class tokens.
      clip_norm: maximum gradient norm, separately for each part (student, method); 0: off.
    """

    name: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    weight_decay_skip_1d: bool = False
    clip_norm: float = 0.0

    def __post_init__(self):
        for field in ("learning_rate", "weight_decay", "clip_norm"):
            check_range(f"optimizer.{field}", getattr(self, field), 0)
        if len(self.betas) != 2:
            raise UserError(f"optimizer.betas are {self.betas}, but must be two numbers.")
        for field, value in (("momentum", self.momentum), *(("betas", b) for b in self.betas)):
            if not 0 <= value < 1:
                raise UserError(f"optimizer.{field} is {value}, but must be in [0, 1).")


def create_optimizer(
    optimizer: Mapping[str, Any], learning_rate_fn: optax.Schedule, layer_decay: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `config.optimizer` describes.

    For "sgd", "adam" and "rmsprop" weight decay is added to the gradient, as in PyTorch's
    optimizers of those names; "adamw" and "lamb" decouple it. "lars" and "lamb" don't adapt the
    rate of parameters that `weight_decay_skip_1d` excludes. "rmsprop" follows TensorFlow, with the
    constants of the MobileNet and EfficientNet papers.

    Args:
      optimizer: fields of `OptimizerOptions`.
      learning_rate_fn: from `create_learning_rate_fn`.
      layer_decay: factor of the learning rate from each layer to the one below it (see
        `layer_ids`); the head keeps the full rate. For the student's optimizer only. 1: off.

    Raises:
      UserError: an option is out of range.
    """
    options = OptimizerOptions(**optimizer)
    if not 0 < layer_decay <= 1:
        raise UserError(f"layer_decay is {layer_decay}, but must be in (0, 1].")
    mask = _decayed if options.weight_decay_skip_1d else True
    decay = optax.identity()
    if options.weight_decay:
        decay = optax.add_decayed_weights(options.weight_decay, mask)
    rate = _scale_by_learning_rate(learning_rate_fn)
    momentum = optax.trace(options.momentum, options.nesterov)
    b1, b2 = options.betas
    parts: dict[str, tuple[optax.GradientTransformation, ...]] = {
        "sgd": (decay, momentum, rate),
        "lars": (
            decay,
            optax.masked(optax.scale_by_trust_ratio(trust_coefficient=0.001), mask),
            rate,
            momentum,
        ),
        "rmsprop": (
            decay,
            optax.scale_by_rms(0.9, eps=1e-3, initial_scale=1.0, eps_in_sqrt=True),
            rate,
            momentum,
        ),
        "adam": (decay, optax.scale_by_adam(b1, b2), rate),
        "adamw": (optax.scale_by_adam(b1, b2), decay, rate),
        "lamb": (
            optax.scale_by_adam(b1, b2, eps=1e-6),
            decay,
            optax.masked(optax.scale_by_trust_ratio(), mask),
            rate,
        ),
    }
    clip, by_layer = optax.identity(), optax.identity()
    if options.clip_norm > 0:
        clip = optax.clip_by_global_norm(options.clip_norm)
    if layer_decay < 1:
        by_layer = _scale_by_layer(layer_decay)
    return optax.chain(clip, *parts[options.name], by_layer)


def _scale_by_learning_rate(
    learning_rate_fn: optax.Schedule,
) -> optax.GradientTransformationExtraArgs:
    """optax's `scale_by_learning_rate`, with the run's step instead of its own counter."""

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del params
        rate = jnp.asarray(learning_rate_fn(extra_args["step"]))
        return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def scale_parts(
    optimizer: optax.GradientTransformation, rates: Any
) -> optax.GradientTransformation:
    """`optimizer` with its updates multiplied by `rates`, a prefix of the tree of parameters."""
    if all(rate == 1 for rate in jax.tree.leaves(rates)):
        return optimizer

    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda u, rate: rate * u, updates, jax.tree.broadcast(rates, updates))

    return optax.chain(optimizer, optax.stateless(scale))


def select(moves: Any, new: Any, old: Any, params: Any) -> Any:
    """`new`, except that frozen leaves keep their `old` value.

    Args:
      moves: which parameters are updated: True; a boolean array; or a tree of booleans that is a
        prefix of the tree of `params`.
      new: the part's parameters, or its optimizer state, after an update. Subtrees of the state
        with the structure of the parameters (such as momentum) are selected leaf by leaf; the rest
        (counters) is updated if any parameter is.
      old: the same before the update.
      params: the part's parameters.
    """
    if moves is True:
        return new
    mask = jax.tree.broadcast(moves, params)
    structure = jax.tree.structure(params)
    any_moves = functools.reduce(jnp.logical_or, jax.tree.leaves(mask), False)

    def like_params(tree: Any) -> bool:
        return jax.tree.structure(tree) == structure

    def choose(new: Any, old: Any) -> Any:
        if like_params(new):
            return jax.tree.map(jnp.where, mask, new, old)
        return jnp.where(any_moves, new, old)

    return jax.tree.map(choose, new, old, is_leaf=like_params)


def average(
    averaged: Any, current: Any, decay: float, step: jax.Array | int, warmup: bool = False
) -> Any:
    """The exponential moving average after a step: `averaged + (1 - decay_t)(current - averaged)`.

    `decay_t` is 0 at the first step, so that the average doesn't depend on the initialisation, and
    `decay` afterwards, as in timm's `ModelEmaV3` (Ross Wightman, Apache-2.0). With `warmup`, which
    follows timm too, it grows as `1 - (1 + step)^(-2/3)` until it reaches `decay`: 0.9 after 31
    steps, 0.999 after 31,622. This helps short runs.

    Args:
      averaged: the average so far, a tree of float arrays.
      current: the values after this step; the same structure.
      decay: in [0, 1).
      step: number of steps before this one.
      warmup: see above.
    """
    step = jnp.asarray(step, jnp.float32)
    decay_t = jnp.where(step > 0, decay, 0.0)
    if warmup:
        decay_t = jnp.minimum(decay, 1 - (1 + step) ** (-2 / 3))
    return optax.incremental_update(current, averaged, 1 - decay_t)


def _path(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _decayed(params: Any) -> Any:
    """The mask of the parameters that `weight_decay_skip_1d` still decays."""
    return jax.tree.map_with_path(
        lambda keys, leaf: jnp.ndim(leaf) > 1 and not _NOT_DECAYED.search(_path(keys)), params
    )


def _scale_by_layer(layer_decay: float) -> optax.GradientTransformation:
    """Multiplies updates, which include the learning rate, by each layer's factor.

    Momentum and the adaptive optimizers' moments are unaffected, as with the learning rates of
    PyTorch's parameter groups.
    """

    def scale(updates, params):
        del params
        layers = layer_ids(updates)
        head = max(jax.tree.leaves(layers))
        return jax.tree.map(lambda u, layer: u * layer_decay ** (head - layer), updates, layers)

    return optax.stateless(scale)


def layer_ids(params: Any) -> Any:
    """Each parameter's layer: 0 for the stem, 1 for the first block, ..., the highest for the head.

    Layers are numbered as in BEiT (arXiv:2106.08254) and timm's `group_matcher` (Ross Wightman,
    Apache-2.0): layers between the last block and the head count as part of that block.

    Args:
      params: the parameters of a ViT, DeiT, Swin, ResNet, MobileNet or EfficientNet, a nested dict.

    Returns:
      A tree of integers with the same structure.

    Raises:
      UserError: it is another kind of network.
    """

    def block(path: str) -> tuple[int, ...]:
        match = _BLOCK.match(path)
        numbers = tuple(int(number) for number in re.findall(r"\d+", match[0])) if match else ()
        return (*numbers, 0) if len(numbers) == 1 else numbers

    paths = [_path(keys) for keys, _ in jax.tree.leaves_with_path(params)]
    order = sorted({block(path) for path in paths} - {()})
    if not order:
        raise UserError(
            "layer_decay needs a ViT, DeiT, Swin, ResNet, MobileNet or EfficientNet; set it to 1 "
            "for other networks."
        )
    numbers = {key: number for number, key in enumerate(order, 1)}

    def layer(keys: tuple, _: Any) -> int:
        path = _path(keys)
        if block(path):
            return numbers[block(path)]
        if _STEM.match(path):
            return 0
        return len(order) if _AFTER_BLOCKS.match(path) else len(order) + 1

    return jax.tree.map_with_path(layer, params)


def accumulate(
    function: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, batch: Any, steps: int
) -> tuple[Any, Any]:
    """Means over a batch, accumulated over equal microbatches to save memory.

    Gradients of a mean over the examples equal those of the whole batch. Operations that mix
    examples, such as batch normalisation, see one microbatch at a time.

    Args:
      function: `(carry, microbatch, its index) -> (carry, means)`, where `means` is a tree of float
        arrays, such as gradients and metrics.
      carry: values passed from one microbatch to the next, such as running statistics.
      batch: a tree of arrays `[N, ...]`.
      steps: number of microbatches, a divisor of N. 1: `function` is called once, on the whole
        batch.

    Returns:
      The last carry and the mean of `means`.
    """
    if steps == 1:
        return function(carry, batch, 0)

    def split(array: jax.Array) -> jax.Array:
        # Strided, so that a batch sharded over devices doesn't have to be moved.
        return array.reshape(-1, steps, *array.shape[1:]).swapaxes(0, 1)

    def body(state: tuple, part: tuple) -> tuple[tuple, None]:
        carry, total = state
        carry, means = function(carry, *part)
        return (carry, jax.tree.map(jnp.add, total, means)), None

    parts = (jax.tree.map(split, batch), jnp.arange(steps))
    first = jax.tree.map(lambda array: array[0], parts)
    shapes = jax.eval_shape(function, carry, *first)[1]
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    (carry, total), _ = jax.lax.scan(body, (carry, zeros), parts)
    return carry, jax.tree.map(lambda array: array / steps, total)
