import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.networks import images, initial, shapes
from xkd_jax.errors import UserError
from xkd_jax.models import create_model
from xkd_jax.models.repvgg import reparameterize

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {"depths": (1, 2, 1, 1), "channels": (8, 12, 16, 24)}


def tiny(name="repvgg_a0_32", **args):
    return create_model(name, num_classes=5, **{**TINY, **args})


def trained(model):
    """Variables of which none has a special value."""
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(model.init, jax.random.key(0), images(1))

    def fill(path, leaf):
        if path[-1].key == "kernel":
            return rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5
        low = 0.5 if path[-1].key in ("scale", "var") else -0.5
        return rng.uniform(low, low + 1, leaf.shape)

    return jax.tree_util.tree_map_with_path(lambda *leaf: fill(*leaf).astype(np.float32), tree)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg_a0_32", "repvgg_a0"])
def test_folded_branches_compute_the_same(name):
    model, x = tiny(name), images()
    variables = trained(model)
    folded, weights = reparameterize(model, variables)
    assert folded == tiny(name, branches=False)
    assert variables["params"]["stages_1_0"].keys() == {"conv_kxk", "conv_1x1"}
    assert variables["params"]["stages_1_1"].keys() == {"conv_kxk", "conv_1x1", "identity"}
    wanted = jax.eval_shape(folded.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, weights) == jax.tree.map(jnp.shape, wanted)
    (_, want), (_, got) = jax.jit(model.apply)(variables, x), jax.jit(folded.apply)(weights, x)
    assert got.keys() == want.keys()
    for key in want:
        scale = np.abs(want[key]).max()
        np.testing.assert_allclose(got[key] / scale, want[key] / scale, atol=1e-5)
    assert reparameterize(folded, weights) == (folded, weights)


@pytest.mark.parametrize(
    ("name", "size", "sides"),
    [("repvgg_a0", 224, (56, 28, 14, 7)), ("repvgg_a0_32", 32, (32, 16, 8, 4))],
)
def test_out(name, size, sides):
    expected: dict[str, tuple[int, ...]] = {"pooled": (2, 24)}
    for stage, (side, channels) in enumerate(zip(sides, TINY["channels"], strict=True), start=1):
        expected[f"stage{stage}"] = expected[f"stage{stage}_pre"] = (2, side, side, channels)
    model = create_model(name, num_classes=0, **TINY)
    assert shapes(model, jnp.zeros((2, size, size, 3)), train=size == 32) == expected


def test_the_stem_has_at_most_64_channels():
    wide = jax.eval_shape(tiny(channels=(96, 8, 8, 8)).init, jax.random.key(0), images(1))
    assert wide["params"]["stem"]["conv_1x1"]["conv"]["kernel"].shape == (1, 1, 3, 64)


@pytest.mark.exhaustive
def test_starts_as_timms():
    model = tiny(channels=(64, 8, 8, 512), depths=(2, 1, 1, 1))
    block, head = initial(model, "stages_0_1", "head")
    scales, biases = (
        np.concatenate([block["identity"][leaf], block["conv_kxk"]["bn"][leaf]])
        for leaf in ("scale", "bias")
    )
    for values, mean in ((scales, 0.1), (biases, 0.0)):
        assert abs(values.mean() - mean) < 0.03
        assert abs(values.std() - 0.1) < 0.02
    kernel = block["conv_kxk"]["conv"]["kernel"]
    assert abs(kernel.std() / (2 / (9 * 64)) ** 0.5 - 1) < 0.05
    assert abs(head["fc"]["kernel"].std() - 0.01) < 0.001


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"stem": "cifar10"}, "did you mean cifar"),
        ({"depths": (1, 1, 0, 1)}, "depths must be four numbers of at least 1, not"),
        ({"channels": (8, 8, 8)}, "channels must be four numbers of at least 1, not"),
    ],
)
def test_wrong_values(args, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tiny(**args).init, jax.random.key(0), images(1))


@pytest.mark.parity
def test_timms_folded_network_is_read():
    from tests.parity import reference
    from tests.parity.specimen import Specimen
    from xkd_jax.convert.conversion import convert
    from xkd_jax.convert.files import Checkpoint, to_state

    torch, theirs = reference.torch, reference.build(Specimen("repvgg_a0", 64)).eval()
    theirs = reference.timm.utils.model.reparameterize_model(theirs)
    state = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    converted = convert(Checkpoint("w", state, {}), "repvgg_a0")
    assert converted.metadata["args"] == {"branches": False}
    assert to_state(converted.variables, "repvgg_a0").keys() == state.keys()
    x = images(2, 64)
    with torch.no_grad():
        want = theirs(torch.from_numpy(np.array(x.transpose(0, 3, 1, 2)))).numpy()
    model = create_model("repvgg_a0", num_classes=10, branches=False)
    got, _ = jax.jit(model.apply)(converted.variables, x)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
