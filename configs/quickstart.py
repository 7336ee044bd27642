"""A small ViT teaches a small ResNet on packaged images of Fashion-MNIST.

The same student is trained on 1,000 labelled images three times, with the same recipe and seed: on
the labels alone, with the teacher's logits, and with cakd. All hyperparameters were chosen on the
validation split; each run evaluates the test split once, at its end.

Claim and cost: docs/quickstart.md, with means over five seeds; under 4 minutes on two CPU cores.
Command:
  python -m xkd_jax.main --config configs/quickstart.py
`:control` replaces the teacher with an untrained one; `:methods` runs every method that supports a
ViT teacher and a CNN student, `:transformer` those for a DeiT student, with published loss weights;
`:smoke` takes half a minute.
"""

from xkd_jax.config import Config, default_config
from xkd_jax.configs import common

METHODS = (
    "none", "logits", "fitnet", "at", "irg", "rkd", "crd", "ofd", "review", "london", "afd", "ab",
    "ft", "dkd", "dist", "ofa", "rsd", "cakd",
)  # fmt: skip


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("smoke", "control", "methods", "transformer"))
    config = default_config()
    config.epochs = 56
    config.batch_size = 64
    config.compare = ("none", "logits", "cakd")
    # On such a short schedule the generated views trade clean accuracy for robustness; enable them
    # with --config.method.cakd.multi_view.
    config.method.cakd.multi_view = False
    config.method.cakd.attention_weight = 10.0
    config.method.cakd.token_weight = 0.5  # docs/results/cakd_audit.md
    config.method.logits.update(label_weight=1.0, weight=1.0)
    config.student.model = "resnet18"
    config.student.args = {"layers": (1, 1, 1, 1), "width": 0.125, "stem": "cifar"}
    config.teacher.weights = "packaged:quickstart_teacher"
    config.data.name = "fashion_mnist_mini"
    config.data.train = "train[:1000]"
    config.data.eval = "validation"
    config.data.noisy = True
    config.augment.crop_padding = 1
    config.views.rotation = 10.0
    config.views.min_scale = 0.9
    config.optimizer.clip_norm = 2.0
    config.schedule.name = "cosine"
    config.eval_every = 7
    config.checkpoint_every = 250
    config.pictures = True
    if variant == "smoke":
        common.smoke(config, epochs=2, log_every=10, eval_every=1, compare=("none", "cakd"))
    elif variant == "control":
        # The same losses with an untrained teacher: their effect without its knowledge.
        config.compare = ("cakd",)
        common.untrained_teacher(config, "vit_tiny_patch16_224", **common.VIT_28)
    elif variant in ("methods", "transformer"):
        _compare_all(config, transformer=variant == "transformer")
    return config


def _compare_all(config: Config, transformer: bool) -> None:
    """Compares all methods at their published loss weights, with a CNN or Transformer student."""
    config.compare = ("none", "logits", "deit", "minilm") if transformer else METHODS
    config.method.logits.update(label_weight=0.1, weight=0.9)
    # Durations in epochs are scaled with the schedule, from 240 to 56.
    config.method.ab.first_epochs = config.method.ft.first_epochs = 7
    config.method.review.warmup_epochs = config.method.dkd.warmup_epochs = 5
    config.method.crd.negatives = 512
    if transformer:
        config.student.model = "deit_tiny_distilled_patch16_224"
        sizes = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
        config.student.args = sizes
        config.optimizer.name = "adamw"
        config.optimizer.learning_rate = 2e-3
        config.optimizer.weight_decay = 0.05
