import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.runs import ROOT
from xkd_jax.errors import UserError
from xkd_jax.models import create_model
from xkd_jax.weights import (
    check_weights,
    fingerprint,
    list_sources,
    load_weights,
    save_weights,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

METADATA = {"model": "resnet18", "args": {"width": 0.125}, "num_classes": 5, "mean": [0.5] * 3}


def variables():
    return {
        "params": {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.float32(3)},
        "batch_stats": {"a": {"mean": jnp.ones(3)}},
    }


def expected():
    return jax.eval_shape(variables)


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "w.safetensors"
    save_weights(path, variables(), METADATA)
    loaded, metadata = load_weights(str(path))
    assert metadata == METADATA
    same = jax.tree.map(np.array_equal, loaded, jax.device_get(variables()))
    assert all(jax.tree.leaves(same))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))
    check_weights(path, loaded, expected())
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    ("metadata", "sources"),
    [
        ({}, [("a.safetensors", "")]),
        ({"source": "hub/vit", "license": "mit"}, [("hub/vit", "mit")]),
        ({"sources": []}, []),  # trained from random weights
        ({"source": "xkd_jax", "sources": [("hub/vit", "mit")]}, [("hub/vit", "mit")]),
        # Whoever states the licence of a trained network overrides that of its sources.
        ({"source": "ours", "sources": [("vit", "")], "license": "mit"}, [("ours", "mit")]),
    ],
)
def test_the_sources_of_weights(metadata, sources):
    def objects(pairs):
        return tuple({"weights": name, "license": licence} for name, licence in pairs)

    if "sources" in metadata:
        metadata = metadata | {"sources": objects(metadata["sources"])}
    assert list_sources("a.safetensors", metadata) == objects(sources)


def test_packaged_weights_have_the_licence_of_the_package():
    (source,) = list_sources("packaged:quickstart_teacher", {"source": "xkd_jax, method none"})
    assert source == {"weights": "packaged:quickstart_teacher", "license": "Apache-2.0"}
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


def test_a_network_round_trips(tmp_path):
    args = {"embed_dim": 16, "num_heads": 2, "depth": 1}
    model = create_model("vit_tiny_patch4_32", num_classes=5, **args)
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    saved = jax.jit(model.init)(jax.random.key(0), x)
    save_weights(tmp_path / "w.safetensors", saved, METADATA)
    loaded, _ = load_weights(tmp_path / "w.safetensors")
    check_weights("w", loaded, jax.eval_shape(model.init, jax.random.key(0), x))
    apply = jax.jit(model.apply)
    assert jnp.array_equal(apply(saved, x)[0], apply(loaded, x)[0])
    assert fingerprint(saved) == fingerprint(loaded)


def test_strided_and_bfloat16_arrays_keep_their_values(tmp_path):
    tree = {"params": {"t": np.arange(6.0).reshape(2, 3).T, "h": jnp.full((2,), 1.5, jnp.bfloat16)}}
    save_weights(tmp_path / "w.safetensors", tree, {})
    loaded, _ = load_weights(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(loaded["params"]["t"], tree["params"]["t"])
    assert loaded["params"]["h"].dtype == jnp.bfloat16
    assert (loaded["params"]["h"] == 1.5).all()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, variables(), METADATA)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_weights(path, variables(), {"mean": object()})
    with pytest.raises(Exception, match="dtype"):
        save_weights(path, {"params": {"a": np.array(["text"])}}, METADATA)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"there is no weights file at .*nothing"):
        load_weights(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="there is no weights file at"):
        load_weights(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 60, -1])
def test_torn_file(tmp_path, size):
    path = tmp_path / "w.safetensors"
    save_weights(path, variables(), METADATA)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        load_weights(path)


def test_not_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"PK\x03\x04 a zip, as torch.save writes" * 10)
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        load_weights(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_somebody_elses_safetensors(tmp_path, metadata):
    path = tmp_path / "w.safetensors"
    save_file({"conv1.weight": np.zeros(3)}, path, metadata=metadata)
    with pytest.raises(UserError, match=r"without xkd_jax's metadata; give one that"):
        load_weights(path)


@pytest.mark.parametrize("text", ["{torn", "[1]"])
def test_damaged_metadata(tmp_path, text):
    path = tmp_path / "w.safetensors"
    save_file({"params/a": np.zeros(3)}, path, metadata={"xkd_jax": text})
    with pytest.raises(UserError, match="metadata that is not"):
        load_weights(path)


def test_check_collects_everything():
    have = variables()
    del have["batch_stats"]
    have["params"]["a"]["kernel"] = jnp.zeros((3, 2))
    have["params"]["c"] = jnp.zeros(1)
    with pytest.raises(UserError) as error:
        check_weights("w.safetensors", have, expected(), "resnet18")
    assert str(error.value) == (
        "w.safetensors does not fit resnet18 in 3 of its tensors: "
        "batch_stats/a/mean is missing; "
        "params/a/kernel has the shape [3, 2] instead of [2, 3]; "
        "unexpected tensor params/c."
    )


def test_check_names_five_and_counts_the_rest():
    want = {"params": {f"p{i}": jax.ShapeDtypeStruct((1,), jnp.float32) for i in range(8)}}
    with pytest.raises(UserError, match=r"in 8 of its tensors: .*p4 is missing, and 3 more\.$"):
        check_weights("w", {"params": {}}, want)


def test_fingerprint():
    one = fingerprint(variables())
    assert one == fingerprint(jax.device_get(variables()))
    assert len(one) == 16
    assert int(one, 16) >= 0
    # Pinned: checkpoints hold it, so it must not change between releases.
    assert one == "56f71c36734fc707"
    backwards = {key: variables()[key] for key in reversed(variables())}
    assert fingerprint(backwards) == one
    changed = variables()
    changed["params"]["b"] += 1e-6
    assert fingerprint(changed) != one
    renamed = variables()
    renamed["params"]["d"] = renamed["params"].pop("b")
    assert fingerprint(renamed) != one
    reshaped = variables()
    reshaped["params"]["a"]["kernel"] = reshaped["params"]["a"]["kernel"].reshape(3, 2)
    assert fingerprint(reshaped) != one
