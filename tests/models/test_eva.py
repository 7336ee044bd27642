import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.networks import count_parameters, images, init, initial, shapes
from xkd_jax.errors import UserError
from xkd_jax.models import create_model, eva, scan

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
# timm 1.0.31's counts of trainable parameters, with 1000 classes.
TIMM_COUNTS = {
    "vit_small_patch16_dinov3": 21_971_944,
    "vit_base_patch16_dinov3": 86_410_216,
    "vit_large_patch16_dinov3": 304_104_424,
    "eva02_small_patch14_224": 22_006_120,
    "eva02_small_patch14_336": 22_129_000,
    "eva02_base_patch14_224": 86_527_720,
    "eva02_base_patch14_448": 87_117_544,
}


def tiny(name="vit_small_patch16_dinov3", **args):
    return create_model(name, num_classes=5, **{**TINY, **args})


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TIMM_COUNTS)
def test_parameter_count_is_timms(name):
    assert count_parameters(create_model(name, num_classes=1000)) == TIMM_COUNTS[name]


def test_dinov3_out():
    qkv = {f"{block}{name}": (2, 2, 16, 8) for block in ("", "block01_", "block02_")
           for name in ("query", "key", "value")}  # fmt: skip
    prefix = {f"prefix_{name}": (2, 2, 5, 8) for name in ("query", "key", "value")}
    block = (2, 16, 16)
    expected = qkv | prefix | {
        "grid": (4, 4), "block01": block, "block02": block, "tokens": block, "cls": (2, 16),
        "pooled": (2, 16), "logits": (2, 5),
    }  # fmt: skip
    assert shapes(tiny(), images()) == expected


@pytest.mark.parametrize("rope_type", ["cat", "dinov3"])
def test_scores_of_rotated_tokens_depend_on_their_distance(rope_type):
    rng = np.random.default_rng(0)
    query, key = (np.tile(rng.normal(size=(1, 1, 1, 16)), (1, 1, 2 + 9, 1)) for _ in range(2))
    rotated = [np.asarray(eva.rotate(jnp.float32(x), 2, rope_type)) for x in (query, key)]
    for before, after in zip((query, key), rotated, strict=True):
        np.testing.assert_array_equal(after[:, :, :2], np.float32(before[:, :, :2]))
        np.testing.assert_allclose(np.linalg.norm(after, axis=-1), np.linalg.norm(before, axis=-1))
    scores = np.einsum("qd,kd->qk", rotated[0][0, 0, 2:], rotated[1][0, 0, 2:])
    row, column = np.divmod(np.arange(9), 3)
    found = {}
    for q in range(9):
        for k in range(9):
            found.setdefault((row[q] - row[k], column[q] - column[k]), []).append(scores[q, k])
    assert len(found) == 25
    assert all(np.ptp(values) < 1e-4 for values in found.values())
    assert np.std([values[0] for values in found.values()]) > 0.1


def test_the_positions_of_other_grids_are_scaled():
    """EVA-02 counts to 16 on any grid; DINOv3's first and last row mirror each other."""
    assert eva.rotary_angles(32, 8, "cat")[:, 0].tolist() == [i / 2 for i in range(32)]
    angles = eva.rotary_angles(5, 8, "dinov3")
    np.testing.assert_allclose(angles, -angles[::-1], atol=1e-12)
    np.testing.assert_allclose(angles[-1], [2 * np.pi * 0.8, 2 * np.pi * 0.08])


@pytest.mark.exhaustive
def test_starts_as_timms():
    x = initial(tiny(embed_dim=64), "blocks_1", "head", "reg_token", "cls_token")
    block, head, *tokens = x
    for token in tokens:
        assert 0.01 < token.std() < 0.03
    np.testing.assert_allclose(block["attn"]["qkv"]["kernel"].std(), 0.02, rtol=0.05)
    for kernel in (block["attn"]["proj"]["kernel"], block["mlp"]["fc2"]["kernel"]):
        np.testing.assert_allclose(kernel.std(), 0.02 / 2, rtol=0.05)  # sqrt(2 * 2)
    np.testing.assert_allclose(head["kernel"].std(), 2e-5, rtol=0.2)
    assert (block["gamma_2"] == jnp.float32(1e-5)).all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"img_size": 30}, "img_size 30 must be a multiple of patch_size 8"),
        ({"global_pool": "token_avg"}, "unknown global_pool 'token_avg'; did you mean token"),
        ({"rope_type": "dinov2"}, "unknown rope_type 'dinov2'; did you mean dinov3"),
        ({"num_heads": 3}, "embed_dim 16 must be a multiple of num_heads 3"),
        ({"num_heads": 8}, "embed_dim 16 / num_heads 8, must be a multiple of 4"),
        ({"scale_mlp": True}, "needs swiglu_mlp=True"),
    ],
)
def test_wrong_values(args, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tiny(**args).init, jax.random.key(0), images())


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [pytest.param(0, marks=pytest.mark.exhaustive), 2])
def test_scanned_and_frozen_blocks(frozen, monkeypatch):
    model = tiny("eva02_base_patch14_224", depth=4, frozen=frozen, init_values=0.5)
    variables, x = init(model), images(2)

    def loss(params):
        logits, out = model.apply({"params": params}, x, train=True)
        return (logits**2).mean() + (out["block03_key"] ** 2).mean(), out

    run = jax.value_and_grad(loss, has_aux=True)
    unrolled = run(variables["params"])
    monkeypatch.setattr(scan, "pays", lambda depth, train: True)
    scanned = run(variables["params"])
    assert jax.tree.structure(scanned) == jax.tree.structure(unrolled)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(scanned), jax.tree.leaves(unrolled), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))
    grads = scanned[1]
    for name in ("blocks_0", "blocks_1", "cls_token", "pos_embed"):
        assert any(leaf.any() for leaf in jax.tree.leaves(grads[name])) != bool(frozen), name
    assert all(leaf.any() for leaf in jax.tree.leaves(grads["blocks_2"]))
