"""A teacher for your data without training: a linear classifier on a frozen network's features.

The features of every image are computed once and kept in the run's folder; the classifier, a
logistic regression, is fitted to them. The run's `teacher.safetensors` is the network with that
classifier, for teacher.weights of any method; the report also has the features' k-NN accuracy.

Claim: none yet. The L2 strength is chosen on a fifth of the training split, not on the test split.
Cost: one forward pass of the network over all images, and a few minutes for the fit. `:smoke` takes
seconds on two CPU cores.
Command:
  python -m xkd_jax.main --config configs/probe_teacher.py \
    --config.teacher.weights=dinov2.safetensors --config.data.name=tfds:cifar100 \
    --config.data.dir=DIR --workdir runs/probe

`--config.probe.pool` is "both" for a ViT (class token and mean of the patch tokens), "cls", "mean",
or, for any network, "pooled", what its own classifier would read.
"""

from xkd_jax.config import Config, default_config
from xkd_jax.configs import common


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("smoke",))
    config = default_config()
    config.probe.pool = "both"
    config.teacher.weights = "teacher.safetensors"
    config.data.name = "tfds:cifar100"
    if variant == "smoke":
        common.untrained_teacher(
            config, "vit_tiny_patch16_224", img_size=28, patch_size=4, embed_dim=32, depth=2,
            num_heads=2,
        )  # fmt: skip
        config.data.name = "fashion_mnist_mini"
        config.data.train = "train[:400]"
        config.data.eval = config.data.test = "test[:200]"
    return config
