"""CIFAR-100 with few labels: DINOv2's ViT-S/14 teaches a ResNet of a quarter of the width.

The teacher sees the images at 112 x 112, as 8 x 8 tokens; the student's third stage, at 32 x 32, is
the same grid. Its outputs are computed once for a few fixed views of each image and kept in
`teacher.cache`. The teacher comes from `finetune_teacher.py:dinov2` or `probe_teacher.py`.

Claim and cost: docs/results/foundation.md.
Command, one run, and the table of all methods:
  python -m xkd_jax.main --config configs/dinov2_cifar100.py --config.data.dir=DIR \
    --config.teacher.weights=FILE --config.method.name=cakd --workdir runs/cakd
  python -m xkd_jax.sweep --config configs/dinov2_cifar100.py --config.data.dir=DIR \
    --config.teacher.weights=FILE --config.teacher.cache=runs/cache --workdir runs/table
`:few25`, the default, has 25 labels a class and `:few100` 100, on average over the classes. Choices
are made on the last 5,000 training images. `:smoke` takes under two minutes on two CPU cores.

`:unlabelled` trains the student on 10,000 images without their labels, and `:labels10` on a tenth
of the labels, as a table: from random weights, also for as many steps as both take, and from the
students that `:unlabelled` has left in runs/unlabelled/METHOD.
"""

from xkd_jax.config import Config, default_config
from xkd_jax.configs import common
from xkd_jax.table import Cell, Table, grid, scaled

VARIANTS = {
    "few25": ("train[:2500]", 20),
    "few100": ("train[:10000]", 10),
    "unlabelled": ("train[:10000]", 5),
    "labels10": ("train[:4500]", 8),
}
# Whose students `:labels10` compares: "pooled" is cakd's term on pooled features alone.
UNLABELLED = ("logits", "dist", "ofd", "cakd_adam+dist", "pooled", "cakd")
# The loss weights that are tuned together, by method: these, a third of them and three times them.
# This teacher's features are large: cakd's terms with weights of 1 would be several times the
# cross-entropy.
ALL_TERMS = {
    "method__cakd__attention_weight": 0.1,
    "method__cakd__value_weight": 0.1,
    "method__cakd__token_weight": 0.1,
}
PCA = {"method__cakd__attention_weight": 0.1, "method__cakd__value_weight": 0.1}
DIST = {"method__dist__inter_weight": 2 / 3, "method__dist__intra_weight": 2 / 3}
WEIGHTS = {
    "logits": {"method__logits__weight": 3.0},
    "cakd": ALL_TERMS,
    "rkd": {"method__rkd__distance_weight": 25.0, "method__rkd__angle_weight": 50.0},
    "fitnet": {"method__fitnet__weight": 1.0},
    "crd": {"method__crd__weight": 0.8},
    "review": {"method__review__weight": 1.0},
    "ofd": {"method__ofd__weight": 1e-3},
    "dkd": {"method__dkd__target_weight": 1.0, "method__dkd__non_target_weight": 8.0},
    "dist": DIST,
    "ofa": {"method__ofa__weight": 1.0},
    "rsd": {"method__rsd__weight": 0.01},
    "pca": PCA,
    "pca_pooled": PCA | {"method__cakd__pooled_weight": 1.0},
    "cakd_adam": ALL_TERMS,
    "cakd+logits": ALL_TERMS | {"method__logits__weight": 3.0},
    "cakd_adam+dist": {name: 3 * weight for name, weight in ALL_TERMS.items()} | DIST,
}
# The PCA projector of cakd, alone and with the term on pooled features; all of cakd but its
# adversary, with projectors whose steps don't depend on the terms' weights.
WITHOUT_ADVERSARY = {"method.name": "cakd", "method.cakd.adversarial_weight": 0.0}
WITHOUT_OTHERS = WITHOUT_ADVERSARY | {"method.cakd.token_weight": 0.0}
ADAM = WITHOUT_ADVERSARY | common.ADAM_FOR_PROJECTORS
PARTS = {
    "pca": WITHOUT_OTHERS,
    "pca_pooled": WITHOUT_OTHERS,
    "cakd_adam": ADAM,
    "cakd_adam+dist": ADAM | {"method.name": "cakd+dist"},
}


def get_config(variant: str = "") -> Config:
    common.check_variant(variant, ("smoke", *VARIANTS))
    config = default_config()
    config.batch_size = 64
    config.data.name = "tfds:cifar100"
    config.data.train, config.epochs = VARIANTS.get(variant, VARIANTS["few25"])
    config.data.eval = "train[45000:]"
    config.student.model = "resnet18"
    config.student.args = {"layers": (1, 1, 1, 1), "stem": "cifar", "width": 0.25}
    config.teacher.weights = "dinov2_vits14_cifar100.safetensors"
    config.teacher.cache_views = 4
    config.optimizer.learning_rate = 0.4
    config.optimizer.weight_decay = 5e-4
    config.optimizer.clip_norm = 2.0
    config.schedule.name = "cosine"
    # The weights of these two that the table chose on the validation split for 25 labels a class,
    # with a fine-tuned teacher.
    config.method.logits.update(label_weight=1.0, weight=3.0)
    weight = 0.1 / 3
    config.method.cakd.update(attention_weight=weight, value_weight=weight, token_weight=weight)
    # And with a frozen one.
    config.method.dist.update(inter_weight=2 / 3, intra_weight=2 / 3)
    config.method.cakd.multi_view = False  # so that all methods share the cached views
    config.method.crd.negatives = 1024
    config.method.review.warmup_epochs = 5
    config.data.noisy = True
    config.eval_every = 5
    if variant == "unlabelled":
        config.teacher.cache_views = 2
        config.data.labels = config.data.noisy = False
        config.monitor.update(name="tfds:cifar100", train="train[:2500]", test="train[45000:]")
        config.eval_every = 1
    elif variant == "smoke":
        common.smoke(config, epochs=2, log_every=5, train="train[:640]", test="test[:500]")
        common.untrained_teacher(config, "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2)
        config.method.name = "cakd"
    return config


def get_table(variant: str = "") -> Table:
    common.check_variant(variant, ("smoke", "few25", "few100", "labels10"))
    rates = grid(optimizer__learning_rate=(0.2, 0.4, 0.8))
    start = {"optimizer.learning_rate": 0.4}
    if variant == "labels10":
        cells = {
            "none": Cell({"method.name": "none"}, (rates,)),
            "longer": Cell({"method.name": "none", "epochs": 19}, (rates,)),
        }
        for name in UNLABELLED:
            weights = {"student.weights": f"runs/unlabelled/{name}/student.safetensors"}
            cells[name] = Cell({"method.name": "none"} | weights, (rates,))
        return Table(cells, "longer", seeds=(0, 1, 2))
    cells = {"none": Cell({"method.name": "none"} | start, (rates,))}
    for name, weights in WEIGHTS.items():
        stages = (scaled((1 / 3, 1.0, 3.0), **weights), rates)
        fields = PARTS.get(name, {"method.name": name})
        cells[name] = Cell(fields | start, stages)
    return Table(cells, "none", seeds=(0, 1, 2))
