"""The label term: cross-entropy, which the training step adds to every method's own loss."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from xkd_jax.methods.base import Method

AUXILIARY_WEIGHT = 0.4  # of Inception's second classifier, as TF-Slim and torchvision train it


def label_term(method: Method, student_out: dict[str, Any], targets: jax.Array) -> jax.Array:
    """The cross-entropy with the targets [N, K], that of a second classifier included."""
    label = label_loss(method.label_logits(student_out), targets)
    if "aux_logits" in student_out:
        label = label + AUXILIARY_WEIGHT * label_loss(student_out["aux_logits"], targets)
    return label


def label_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of logits [N, K] with probabilities [N, K], the batch mean in float32."""
    return jnp.mean(optax.softmax_cross_entropy(logits.astype(jnp.float32), targets))
