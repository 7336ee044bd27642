"""Tiny networks of every kind, and experiments with pairs of them."""

from xkd_jax.config import default_config
from xkd_jax.experiment import create_experiment

VIT = {"img_size": 28, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
NETWORKS = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "deit": ("deit_tiny_distilled_patch16_224", VIT | {"embed_dim": 12}),
    "swin": (
        "swin_tiny_patch2_window4_32",
        {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    ),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "width": 0.125, "stem": "cifar"}),
    "small_resnet": ("resnet8", {"channels": (4, 4, 8, 8)}),
    "mobilenetv2": ("mobilenetv2_100", {"width": 0.1, "depth": 0.3, "stem": "cifar"}),
}
# Every method must train or refuse each of these.
PAIRS = {
    "ViT to ResNet": ("vit", "resnet"),
    "Swin to MobileNetV2": ("swin", "mobilenetv2"),
    "ResNet to ResNet": ("resnet", "small_resnet"),
    "ViT to ViT": ("vit", "deit"),
}


def pair_experiment(name, pair, **changes):
    """An experiment on 64 images, four steps per epoch; `pair` names two of NETWORKS."""
    config = default_config()
    config.batch_size = 16
    config.epochs = 3
    config.method.name = name
    config.update(changes)
    teacher, student = (NETWORKS[of] for of in pair)
    config.teacher.update(model=teacher[0], weights="random")
    config.teacher.args = dict(teacher[1])
    config.student.model = student[0]
    config.student.args = dict(student[1])
    config.data.update(name="fashion_mnist_mini", train="train[:64]", eval="validation[:64]")
    config.optimizer.learning_rate = 0.01
    config.optimizer.clip_norm = 1.0
    return create_experiment(config)
