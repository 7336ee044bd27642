"""A pair of every newer family of networks, tiny, trains for two steps."""

import numpy as np
import pytest

from tests.experiments import run, tiny_config
from tests.models.networks import TINY_REGNET
from xkd_jax.experiment import create_experiment
from xkd_jax.models import MODELS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
_SWINV2 = {"embed_dim": 4, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 2), "mlp_ratio": 1.0}
_MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_blocks": 2}
_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}
_SHALLOW = {"layers": (1, 1, 1, 1), "width": 0.0625}
_NARROW = {"width": 0.1, "depth": 0.1}
# Method, teacher and student, with their arguments. Of cakd's pairs the teachers are Transformers.
PAIRS = [
    ("cakd", "vit_base_patch16_clip_224", _VIT, "resnet18d", _SHALLOW),
    ("cakd", "vit_base_patch16_siglip_224", _VIT, "repvgg_a0_32",
     {"depths": (1, 1, 1, 1), "channels": (4, 6, 8, 10)}),
    ("cakd", "beit_base_patch16_224", _VIT, "regnety_004_32", TINY_REGNET),
    ("cakd", "eva02_base_patch14_224", _VIT, "ghostnet_100_32", {"width": 0.1}),
    ("cakd", "vit_small_patch16_dinov3", _VIT, "convnext_atto_32", _CONVNEXT),
    ("cakd", "swinv2_tiny_patch2_window4_32", _SWINV2, "mobilenetv4_conv_small_32", _NARROW),
    ("logits", "mixer_b16_224", _MIXER, "mobilenetv3_small_100_32", _NARROW),
    ("fitnet", "convnext_base", _CONVNEXT, "tf_efficientnetv2_b0_32", _NARROW),
    ("review", "convnext_base", _CONVNEXT, "convnextv2_atto", _CONVNEXT),
    ("cakd", "vit_base_patch32_clip_quickgelu_224", _VIT, "efficientnet_b1", _NARROW),
    ("logits", "mixer_b16_224", _MIXER, "mobilenetv4_hybrid_medium", {**_NARROW, "stem": "cifar"}),
]  # fmt: skip


def test_every_newer_family_is_in_a_pair():
    older = {"vit", "deit", "swin", "resnet", "mobilenetv2", "xception", "inception", "cifar"}
    families = {variant.network.__module__.rpartition(".")[2] for variant in MODELS.values()}
    used = {
        MODELS[name].network.__module__.rpartition(".")[2] for pair in PAIRS for name in pair[1::2]
    }
    assert families - older <= used


# In CI: attention with relative and with rotary positions, and no attention.
IN_CI = ("beit", "vit_small_patch16_dinov3", "mixer_b16_224-mobilenetv3")


def cases():
    for pair in PAIRS:
        name = f"{pair[1]}-{pair[3]}"
        marks = () if name.startswith(IN_CI) else pytest.mark.exhaustive
        yield pytest.param(*pair, id=name, marks=marks)


@pytest.mark.parametrize(
    ("method", "teacher", "teacher_args", "student", "student_args"), list(cases())
)
def test_a_pair_trains(method, teacher, teacher_args, student, student_args):
    config = tiny_config(method)
    config.image_size = 32
    config.batch_size = 8
    config.teacher.model, config.teacher.args = teacher, teacher_args
    config.student.model, config.student.args = student, student_args
    done = run(create_experiment(config), 2)
    for metrics in done.metrics:
        assert np.isfinite(metrics["loss"])
        assert metrics["finite"].all()
    assert done.metrics[0]["gradient_norm"] > 0
