"""Every network against golden files of timm's: logits, taps and running statistics.

Both sides derive the weights from parameter names. `python -m tests.parity.make_goldens` wrote the
files with PyTorch, which these tests don't need.
"""

import functools

import pytest

from tests.parity import goldens, specimen
from tests.parity.pairs import two_at_a_time
from xkd_jax.models import MODELS
from xkd_jax.models.beit import Beit
from xkd_jax.models.efficientnet import EfficientNet
from xkd_jax.models.efficientnetv2 import EfficientNetV2
from xkd_jax.models.ghostnet import GhostNet
from xkd_jax.models.inception import InceptionV3
from xkd_jax.models.mixer import MlpMixer
from xkd_jax.models.mobilenetv2 import MobileNetV2
from xkd_jax.models.mobilenetv3 import MobileNetV3
from xkd_jax.models.mobilenetv4 import MobileNetV4
from xkd_jax.models.regnet import RegNet
from xkd_jax.models.repvgg import RepVGG
from xkd_jax.models.swinv2 import SwinTransformerV2
from xkd_jax.models.xception import Xception

read = functools.cache(goldens.read)


def test_every_network_has_a_golden():
    families = {goldens.family_of(name) for name in MODELS}
    kept = {name for family in families for name in read(family)}
    assert kept == set(MODELS)
    assert {path.stem for path in goldens.FOLDER.iterdir()} == families


@pytest.fixture(scope="module")
def pending(request, quick_compilation):
    with two_at_a_time(request, test_equals_its_golden, differences) as futures:
        yield futures


def differences(name):
    """The largest relative difference to the golden, by tap."""
    golden = read(goldens.family_of(name))[name]
    case = specimen.small(name)
    for field in ("size", "batch", "train_size", "train_batch"):
        assert golden[field] == getattr(case, field), "made at another size: regenerate it"
    records = specimen.ours(case, specimen.filled(case))
    assert {key: list(array.shape) for key, array in records.items()} == golden["shapes"]
    return {
        key: goldens.sketch_difference(key, goldens.sketch(key, records[key]), want)
        for key, want in golden["sketches"].items()
    }


LARGE = {  # 2 to 12 s each
    Beit, EfficientNet, EfficientNetV2, GhostNet, InceptionV3, MlpMixer, MobileNetV2, MobileNetV3,
    MobileNetV4, RegNet, RepVGG, SwinTransformerV2, Xception,
}  # fmt: skip


def marks(name):
    """By default one network of each smaller class.

    CI compares one network for each set of arguments with timm itself; the others only differ in
    numbers.
    """
    default = name in CLASSES and MODELS[name].network not in LARGE
    return () if default else pytest.mark.exhaustive


# The first network of each class.
CLASSES = set({MODELS[name].network: name for name in reversed(MODELS)}.values())


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in MODELS])
def test_equals_its_golden(name, pending):
    found = pending[name].result()
    # Not "above": NaN is wrong too.
    assert not {key: value for key, value in found.items() if not value < specimen.TOLERANCE}
