"""The two loaders: equal examples in equal order, resumable anywhere."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from tests.tiny import get_config
from xkd_jax import train
from xkd_jax.data import open_source
from xkd_jax.data.encoded import EncodedImages, open_split
from xkd_jax.data.loader import DeviceLoader, HostLoader, Order
from xkd_jax.data.order import batch_indices
from xkd_jax.distributed import sharding
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """26 photographs of two classes and of several sizes."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(26):
        folder = root / "train" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + i % 3, 36, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def open_photos(root, feed="auto", size=28):
    return open_split(f"folder:{root}", "train", "", size, feed, "stop", 0.875)


@pytest.fixture(scope="module")
def split(photos):
    return open_photos(photos)


@pytest.fixture(scope="module")
def mesh():
    return sharding.create_mesh()


def take(feed, start, count):
    return jax.device_get(list(itertools.islice(feed.batches(start), count)))


def test_images_of_several_sizes_stay_encoded(photos, split):
    assert isinstance(split.images, EncodedImages)
    assert split.images.shape == (26, 28, 28, 3)
    assert split.num_classes == 2
    some = split.images[np.array([3, 0, 3])]
    assert some.shape == (3, 28, 28, 3)
    assert some.dtype == np.uint8
    np.testing.assert_array_equal(some[0], some[2])
    whole = open_photos(photos, feed="resident")
    assert isinstance(whole.images, np.ndarray)
    assert whole.images.shape == (26, 28, 28, 3)
    np.testing.assert_array_equal(whole.labels, split.labels)


def test_images_of_one_size_that_fit_lie_in_memory():
    packaged = open_split("fashion_mnist_mini", "test[:9]", "", 0, "auto", "stop", 0.875)
    assert isinstance(packaged.images, np.ndarray)
    assert packaged.images.shape == (9, 28, 28, 3)
    encoded = open_split("fashion_mnist_mini", "test[:9]", "", 28, "host", "stop", 1.0)
    np.testing.assert_array_equal(encoded.images[np.arange(9)], packaged.images)


def test_evaluation_crops_what_the_host_has_not_cropped(photos):
    def shares(feed, crop_pct):
        opened = open_split(f"folder:{photos}", "train", "", 28, feed, "stop", crop_pct)
        return opened.crop_pct, opened.images[np.arange(3)]

    resident, host = (shares(feed, 0.5) for feed in ("resident", "host"))
    assert (resident[0], host[0]) == (0.5, 0.0)
    assert shares("resident", 0.0)[0] == 0.0
    # By itself the host cuts the centre out of a larger image: resize 256, crop 224.
    np.testing.assert_array_equal(shares("host", 0.0)[1], shares("host", 0.875)[1])
    assert not np.array_equal(host[1], shares("host", 0.875)[1])


def test_a_size_that_shows_late_moves_the_images_to_the_host(tmp_path):
    for i in range(40):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 30)).save(path)
    examples = open_source(f"folder:{tmp_path}").examples("train", 0, 40)
    Image.new("RGB", (30, 31)).save(examples[1].name)  # between the few that are looked at
    opened = open_photos(tmp_path)
    assert isinstance(opened.images, EncodedImages)
    assert opened.images[np.arange(3)].shape == (3, 28, 28, 3)
    for wanted, size in (("resident", 28), ("auto", 0)):
        with pytest.raises(
            UserError, match=r"differ in size \(.* is 30x31 and others 30x30\); set"
        ):
            open_photos(tmp_path, wanted, size)


def test_batches_of_several_sizes_need_one(photos):
    with pytest.raises(UserError, match="set image_size, such as image_size=224"):
        open_photos(photos, size=0)


def test_both_ways_see_the_same_examples(split, mesh, photos):
    order = Order(26, 4, seed=5)
    host = take(HostLoader(split, mesh, order), 0, 9)
    resident = DeviceLoader(open_photos(photos, feed="resident"), mesh, order)
    for step, (batch, other) in enumerate(zip(host, take(resident, 0, 9), strict=True)):
        np.testing.assert_array_equal(batch["index"], batch_indices(26, 4, 5, step))
        np.testing.assert_array_equal(batch["index"], other["index"])
        np.testing.assert_array_equal(batch["label"], split.labels[batch["index"]])
        assert batch["image"].shape == (4, 28, 28, 3)
        assert batch["image"].dtype == np.uint8
    # Six steps are an epoch, and no example comes twice in it.
    assert len({i for batch in host[:6] for i in batch["index"].tolist()}) == 24


def test_resuming_gives_the_very_next_batch(split, mesh):
    feed = HostLoader(split, mesh, Order(26, 4, seed=5))
    whole, rest = take(feed, 0, 8), take(feed, 5, 3)
    for a, b in zip(whole[5:], rest, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in ("image", "label", "index"))
    other = take(HostLoader(split, mesh, Order(26, 4, seed=6)), 0, 1)[0]
    assert not np.array_equal(whole[0]["image"], other["image"])


def test_an_example_is_cropped_anew_in_every_epoch(split, mesh):
    batches = take(HostLoader(split, mesh, Order(26, 13, seed=5)), 0, 4)
    crops = {}
    for batch in batches:
        for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            crops.setdefault(index, []).append(image)
    assert {len(of_one) for of_one in crops.values()} == {2}
    assert all(not np.array_equal(*of_one) for of_one in crops.values())


def test_repeated_examples_stand_side_by_side_and_are_cropped_differently(split, mesh):
    (batch,) = take(HostLoader(split, mesh, Order(26, 8, seed=5, repeats=4)), 0, 1)
    assert len(set(batch["index"].tolist())) == 2
    assert not np.array_equal(batch["image"][0], batch["image"][1])
    indices = np.concatenate([batch_indices(26, 8, 5, step, 4) for step in range(3)])
    assert len(set(indices.tolist())) == 6  # three batches of eight: a quarter as many examples


def test_two_processes_read_halves_of_what_one_reads(split, mesh, monkeypatch):
    order = Order(26, 4, seed=5)
    whole, halves = take(HostLoader(split, mesh, order), 5, 3), []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        halves.append(take(HostLoader(split, mesh, order), 5, 3))
    for batch, first, second in zip(whole, *halves, strict=True):
        assert len(first["index"]) == len(second["index"]) == 2
        assert not set(first["index"].tolist()) & set(second["index"].tolist())
        for name in ("index", "label", "image"):
            np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), batch[name])


@pytest.mark.slow
def test_worker_processes_change_nothing(split, mesh):
    order = Order(26, 4, seed=5)
    alone, helped = (
        take(HostLoader(split, mesh, order), 3, 4),
        take(HostLoader(split, mesh, order, workers=2), 3, 4),
    )
    for a, b in zip(alone, helped, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("feed", ["host", "resident"])
def test_a_run_resumed_in_mid_epoch_ends_bit_identical(photos, tmp_path, feed):
    config = get_config("none")
    config.data.update(
        name=f"folder:{photos}", train="train", eval="train", test="train", feed=feed
    )
    config.image_size, config.batch_size, config.epochs = 28, 8, 2
    experiment = create_experiment(config)
    assert (experiment.distiller.steps_per_epoch, experiment.total_steps) == (3, 6)
    assert isinstance(experiment.create_loader(), HostLoader if feed == "host" else DeviceLoader)
    unbroken, _ = train.run(experiment, tmp_path / "unbroken")
    train.run(dataclasses.replace(experiment, total_steps=4), tmp_path / "resumed")
    resumed, _ = train.run(experiment, tmp_path / "resumed")
    unbroken, resumed = (
        dataclasses.replace(state, key=jax.random.key_data(state.key))
        for state in (unbroken, resumed)
    )
    for a, b in zip(jax.tree.leaves(unbroken), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
