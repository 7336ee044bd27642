"""DINOv2's weights as Meta publishes them, converted by timm and by us, give equal networks."""

import numpy as np
import pytest

from tests.parity.filling import fill, images, noise
from tests.parity.specimen import TOLERANCE, difference
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import Checkpoint
from xkd_jax.models import create_model

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_compilation")]

_ARGS = {"depth": 2, "embed_dim": 48, "num_heads": 3}


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("model", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_features_of_metas_files_are_timms(model, antialias):
    import torch

    from tests.parity.reference import timm

    published = timm.create_model(model, num_classes=0, **_ARGS)
    state = {
        name: torch.from_numpy(fill(name, tuple(tensor.shape)).copy())
        for name, tensor in published.state_dict().items()
    }
    state["mask_token"] = torch.zeros(1, 48)
    state["pos_embed"] = torch.from_numpy(noise("positions", (1, 1 + 37 * 37, 48), 0.1).copy())
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
    ours = Checkpoint("w", {name: tensor.numpy() for name, tensor in state.items()}, {})

    smaller = timm.create_model(model, num_classes=0, img_size=112, **_ARGS).eval()
    module = timm.models.vision_transformer
    smaller.load_state_dict(module.checkpoint_filter_fn(state, smaller, antialias=antialias))
    x = images(2, 112)
    with torch.no_grad():
        want = smaller.forward_features(torch.from_numpy(x.transpose(0, 3, 1, 2)).contiguous())
    want = want.numpy()

    result = convert(ours, model, args=_ARGS, image_size=112, num_classes=3, antialias=antialias)
    network = create_model(model, num_classes=3, **result.metadata["args"])
    _, out = network.apply(result.variables, x)
    prefix = smaller.num_prefix_tokens
    assert difference(np.asarray(out["tokens"]), want[:, prefix:]) < TOLERANCE
    assert difference(np.asarray(out["cls"]), want[:, 0]) < TOLERANCE
