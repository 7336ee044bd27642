"""Optimizers and learning-rate schedules by name, from optax."""

from typing import Any

import optax

SCHEDULES = ("step", "cosine", "linear", "constant")
OPTIMIZERS = ("sgd", "adam", "adamw", "lamb")


def create_learning_rate_fn(
    schedule: Any, learning_rate: float, epochs: int, steps_per_epoch: int
) -> optax.Schedule:
    """The learning rate as a function of the step.

    Args:
      schedule: `config.schedule`. "step" multiplies by `factor` at every epoch of `boundaries`
        (the paper: x0.1 at 100 and 150); "cosine" and "linear" go down to 0 at the end.
        `warmup_epochs` climb linearly from 0.
      learning_rate: the highest.
      epochs: of the whole run.
      steps_per_epoch: whole batches.
    """
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    rest = max(1, epochs * steps_per_epoch - warmup)
    if schedule.name == "step":
        scales = {
            round(epoch * steps_per_epoch) - warmup: schedule.factor
            for epoch in schedule.boundaries
        }
        main = optax.piecewise_constant_schedule(learning_rate, scales)
    elif schedule.name == "cosine":
        main = optax.cosine_decay_schedule(learning_rate, rest)
    elif schedule.name == "linear":
        main = optax.linear_schedule(learning_rate, 0.0, rest)
    else:
        main = optax.constant_schedule(learning_rate)
    if not warmup:
        return main
    climb = optax.linear_schedule(0.0, learning_rate, warmup)
    return optax.join_schedules([climb, main], [warmup])


def create_optimizer(
    optimizer: Any, learning_rate_fn: optax.Schedule
) -> optax.GradientTransformation:
    """The optax optimizer that `config.optimizer` describes.

    For "sgd" and "adam" weight decay is added to the gradient, as PyTorch's optimizers of those
    names do it; "adamw" and "lamb" decouple it.
    """
    clip = [optax.clip_by_global_norm(optimizer.clip_norm)] if optimizer.clip_norm > 0 else []
    decay = [optax.add_decayed_weights(optimizer.weight_decay)] if optimizer.weight_decay else []
    if optimizer.name == "sgd":
        main = optax.sgd(learning_rate_fn, optimizer.momentum, nesterov=optimizer.nesterov)
        return optax.chain(*clip, *decay, main)
    if optimizer.name == "adam":
        return optax.chain(*clip, *decay, optax.adam(learning_rate_fn))
    decoupled = {"adamw": optax.adamw, "lamb": optax.lamb}[optimizer.name]
    return optax.chain(*clip, decoupled(learning_rate_fn, weight_decay=optimizer.weight_decay))
