"""CLIP's and SigLIP's image encoders: what they add to Vision Transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.networks import images, shapes
from xkd_jax.errors import UserError
from xkd_jax.models import create_model
from xkd_jax.models.vit_layers import ACTIVATIONS, AttentionPool, Mlp

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def tiny(kind, **args):
    return create_model(f"vit_base_patch16_{kind}_224", num_classes=5, **TINY | args)


def params_of(model):
    return jax.eval_shape(model.init, jax.random.key(0), images())["params"]


def test_clip_normalises_its_embedded_tokens():
    params = params_of(tiny("clip"))
    assert params["norm_pre"]["scale"].shape == (16,)
    assert params["patch_embed"]["proj"].keys() == {"kernel"}
    model = tiny("clip")
    assert (model.norm_epsilon, model.act_layer) == (1e-5, "gelu")
    assert tiny("clip_quickgelu").act_layer == "quick_gelu"


def test_siglip_pools_by_attention():
    model = tiny("siglip")
    found = shapes(model, images())
    assert not {key for key in found if key == "cls" or key.startswith("prefix_")}
    assert found["tokens"] == (2, 16, 16)
    assert found["pooled"] == (2, 16)
    params = params_of(model)
    assert params["pos_embed"].shape == (1, 16, 16)
    assert params["attn_pool"]["latent"].shape == (1, 1, 16)
    assert params["attn_pool"]["kv"]["kernel"].shape == (16, 32)
    assert params["attn_pool"]["mlp"]["fc1"]["kernel"].shape == (16, 64)
    bare = shapes(model.clone(num_classes=0), images())
    assert bare == {key: shape for key, shape in found.items() if key != "logits"}


def test_attention_pooling():
    pool, heads = AttentionPool(2), 2
    x = images(2, 4).reshape(2, 12, 4)
    params = jax.eval_shape(pool.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    got = jax.jit(pool.apply)({"params": params}, x)

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    query = dense("q", params["latent"][0, 0]).reshape(heads, 2)
    keys, values = np.split(dense("kv", np.asarray(x)), 2, axis=-1)
    pooled = []
    for head in range(heads):
        part = slice(2 * head, 2 * head + 2)
        weights = np.exp(keys[..., part] @ query[head] / np.sqrt(2))
        weights /= weights.sum(1, keepdims=True)
        pooled.append(np.einsum("nt,ntd->nd", weights, values[..., part]))
    y = dense("proj", np.concatenate(pooled, 1))
    z = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-6)
    z = jnp.asarray(z * params["norm"]["scale"] + params["norm"]["bias"])
    y += Mlp(16).apply({"params": params["mlp"]}, z)
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-4)


def test_attention_pooling_starts_as_timms():
    x = images(1, 8).reshape(1, 3, 64)
    init = jax.jit(lambda key: AttentionPool(4).init(key, x)["params"]["latent"])
    # timm cuts this normal off at two standard deviations, unlike the others.
    assert 64**-0.5 < jnp.abs(init(jax.random.key(0))).max() <= 2 * 64**-0.5


@pytest.mark.parametrize(
    ("name", "expected"), [("gelu", 0.841345), ("gelu_tanh", 0.841192), ("quick_gelu", 0.845796)]
)
def test_activations(name, expected):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.ones(())), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("clip", {"act_layer": "quickgelu"}, "unknown act_layer 'quickgelu'; did you mean quick_"),
        ("siglip", {"global_pool": "token"}, "needs class_token=True; without it, use 'avg' or"),
        ("siglip", {"global_pool": "mapp"}, "did you mean map"),
    ],
)
def test_wrong_values(kind, args, message):
    with pytest.raises(UserError, match=message):
        params_of(tiny(kind, **args))
