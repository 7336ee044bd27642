"""Training from a teacher's cache: the same run as without, written once, and never a wrong one."""

import dataclasses
import errno
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from PIL import Image

from tests.experiments import changed, leaves, run, tiny_config
from xkd_jax.data.loader import Order
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.teacher import store as store_module

pytestmark = pytest.mark.usefixtures("quick_compilation")

QKV_TOKENS = {"query", "key", "value", "tokens"}


def make(folder, method="cakd", views=2, seed=0, change=None):
    """A tiny experiment with a cache, or with fixed views alone if `folder` is ""."""
    config = tiny_config(method, seed)
    config.teacher.update(cache=str(folder), cache_views=views)
    config.augment.update(crop_padding=2, flip=True)
    if change:
        change(config)
    return create_experiment(config)


def names(folder):
    """The complete arrays of the only cache in a folder."""
    (cache,) = folder.iterdir()
    return {path.name for path in cache.glob("*.npy")}


def assert_equal_runs(cached, online, rtol=2e-3):
    for ours, theirs in zip(cached.metrics, online.metrics, strict=True):
        shared = ours.keys() & theirs.keys() - {"finite"}
        assert "loss" in shared
        for name in shared:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=1e-4, err_msg=name)
    after, expected = (leaves(r.states[-1].params["student"]) for r in (cached, online))
    for path, leaf in after.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=1e-3, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["logits", "cakd"])
def test_a_cached_run_equals_one_over_the_same_views(tmp_path, method):
    cached, online = (run(make(folder, method), 6) for folder in (tmp_path, ""))
    assert not changed(cached.states[0], online.states[0])
    assert_equal_runs(cached, online)
    assert ("teacher_accuracy" in cached.metrics[0]) == ("logits" in method)
    read = {"logits"} if "logits" in method else set()
    read |= QKV_TOKENS if "cakd" in method else set()
    assert names(tmp_path) == {f"{name}.v{view:02d}.npy" for name in read for view in (0, 1)}


@pytest.mark.slow
def test_the_views_cycle_and_differ_and_the_seeds_share_them(tmp_path):
    first = make(tmp_path, views=3)
    first.cache.fill()
    stored = first.cache.store.arrays(first.cache.plan, 3)["tokens"]
    assert all(not np.array_equal(stored[0], other) for other in stored[1:])
    before = {path: path.stat().st_mtime_ns for path in first.cache.store.folder.iterdir()}
    make(tmp_path, views=3).create_loader()
    after = {path: path.stat().st_mtime_ns for path in first.cache.store.folder.iterdir()}
    assert after == before
    loader = first.create_loader().batches(0)
    for step, batch in zip(range(16), loader, strict=False):  # four epochs of four steps
        view = step // 4 % 3
        assert set(np.asarray(batch["view"]).tolist()) == {view}
        expected = stored[view][np.asarray(batch["index"])]
        np.testing.assert_array_equal(batch["teacher"]["tokens"], expected)


@pytest.mark.slow
def test_another_seed_of_the_run_takes_the_same_cache(tmp_path):
    def fixed_teacher(config):
        config.teacher.update(model="", args={}, weights="packaged:quickstart_teacher")

    one, two = (make(tmp_path, "logits", seed=seed, change=fixed_teacher) for seed in (0, 1))
    assert one.cache.store.folder == two.cache.store.folder
    one.cache.fill()
    assert two.cache.is_complete()
    two.create_loader()
    assert len(list(tmp_path.iterdir())) == 1


def test_repeated_examples_get_different_views():
    order = Order(16, 8, seed=0, repeats=2, views=3)
    for step in range(6):
        index, view = order.indices(step), order.view(step)
        assert (index[::2] == index[1::2]).all()
        assert ((view[1::2] - view[::2]) % 3 == 1).all()
    assert order.view(0).tolist()[:2] == [0, 1]
    assert order.view(2).tolist()[:2] == [2, 0]


@pytest.mark.slow
def test_another_method_and_more_views_extend_the_cache(tmp_path):
    make(tmp_path, "logits", views=1).cache.fill()
    assert names(tmp_path) == {"logits.v00.npy"}
    make(tmp_path, "fitnet", views=2).cache.fill()
    extended = names(tmp_path)
    assert {"logits.v00.npy"} < extended
    assert "logits.v01.npy" not in extended
    assert {name.partition(".")[2] for name in extended} == {"v00.npy", "v01.npy"}


def different(name, value):
    def change(config):
        config.update_from_flattened_dict({name: value})

    return change


@pytest.mark.slow
def test_a_wrong_cache_is_never_used(tmp_path):
    changes = {
        "teacher.args.depth": 1, "augment.crop_padding": 1, "augment.flip": False,
        "augment.blur": 0.5, "data.train": "train[64:128]", "dtype": "bfloat16",
        "views.rotation": 5.0,
    }  # fmt: skip
    others = [make(tmp_path, change=different(*change)) for change in changes.items()]
    folders = {experiment.cache.store.folder for experiment in (make(tmp_path), *others)}
    assert len(folders) == 1 + len(changes)
    same = make(tmp_path, views=5, change=different("views.noise", 0.0))
    assert same.cache.store.folder in folders


def test_another_teacher_or_size_or_pixels_is_another_cache(tmp_path):
    experiment = make(tmp_path)
    cache, folder = experiment.cache, experiment.cache.store.folder

    def with_teacher(**changes):
        teacher = dataclasses.replace(cache.distiller.teacher, **changes)
        return dataclasses.replace(
            cache, distiller=dataclasses.replace(cache.distiller, teacher=teacher)
        )

    others = [
        with_teacher(fingerprint="0" * 16),
        with_teacher(mean=(0.1, 0.2, 0.3)),
        dataclasses.replace(
            cache, split=dataclasses.replace(cache.split, images=cache.split.images + 1)
        ),
    ]
    folders = {other.store.folder for other in others}
    assert len(folders) == 3
    assert folder not in folders
    assert dataclasses.replace(cache, views=9).store.folder == folder
    unlabelled = dataclasses.replace(
        cache.split, labels=np.zeros_like(cache.split.labels), class_names=()
    )
    assert dataclasses.replace(cache, split=unlabelled).store.folder == folder


def test_a_folder_with_another_recipe_is_refused(tmp_path):
    experiment = make(tmp_path)
    experiment.cache.fill()
    path = experiment.cache.store.folder / store_module.RECIPE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(UserError, match="doesn't describe the cache"):
        make(tmp_path).create_loader()


def test_a_damaged_file_is_named(tmp_path):
    experiment = make(tmp_path, "logits", views=1)
    experiment.cache.fill()
    path = experiment.cache.store.path("logits", 0)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"logits\.v00\.npy is damaged .*; delete it"):
        experiment.create_loader()


class Killed(BaseException):
    pass


def fail_at(monkeypatch, call, error):
    """Makes the writer's `call`-th batch raise, after it has been written in part."""
    original, calls = store_module.ViewWriter.write, []

    def write(self, arrays):
        calls.append(1)
        if len(calls) == call:
            name = next(iter(arrays))
            self._files[name].write(np.ascontiguousarray(arrays[name]).data)
            raise error
        original(self, arrays)

    monkeypatch.setattr(store_module.ViewWriter, "write", write)


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 3, 6])
def test_an_interrupted_writing_resumes_with_the_same_files(tmp_path, monkeypatch, call):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make(whole).cache.fill()  # four batches for each of two views
    with monkeypatch.context() as patch:
        fail_at(patch, call, Killed())
        with pytest.raises(Killed):
            make(broken).cache.fill()
    cache = make(broken).cache
    assert not cache.is_complete()
    done = {name: rows for name, rows in cache.store.record().items() if rows}
    assert all(rows == 16 * ((call - 1) % 4) for rows in done.values())
    cache.fill()
    assert cache.store.record() == {}
    files = {path.name for path in cache.store.folder.iterdir()}
    assert not any(name.endswith(".part") for name in files)
    expected = make(whole).cache.store.folder
    assert {path.name for path in expected.iterdir()} == files
    for name in names(broken):
        assert (cache.store.folder / name).read_bytes() == (expected / name).read_bytes()


def test_rows_that_were_not_recorded_do_not_count(tmp_path, monkeypatch):
    """After a power cut: the record is older than the file, or the file is shorter than it says."""
    cache = make(tmp_path, "logits", views=1).cache
    with monkeypatch.context() as patch:
        fail_at(patch, 4, Killed())
        with pytest.raises(Killed):
            cache.fill()
    part = cache.store.path("logits", 0).with_name("logits.v00.npy.part")
    part.write_bytes(part.read_bytes()[:-40])
    cache.fill()
    reference = make(tmp_path / "other", "logits", views=1).cache
    reference.fill()
    path = cache.store.path("logits", 0)
    assert path.read_bytes() == reference.store.path("logits", 0).read_bytes()


def test_a_disk_that_is_too_small_is_refused_before_the_start(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs 0\.000\d+ GB more, but only 1e-06 GB are free; "):
        make(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_is_reported_and_resumed(tmp_path, monkeypatch):
    cache = make(tmp_path).cache
    with monkeypatch.context() as patch:
        fail_at(patch, 2, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(UserError, match=r"the disk is full.*run the same command again"):
            cache.fill()
    assert not names(tmp_path)
    cache.fill()
    assert cache.is_complete()


def test_numbers_beyond_float16_are_refused(tmp_path):
    experiment = make(tmp_path, "logits", views=1)
    teacher = experiment.distiller.teacher
    huge = jax.tree.map(lambda leaf: leaf * 1e6, teacher.variables)
    distiller = dataclasses.replace(
        experiment.distiller, teacher=dataclasses.replace(teacher, variables=huge)
    )
    with pytest.raises(UserError, match="logits is not finite or exceeds 65504"):
        dataclasses.replace(experiment.cache, distiller=distiller).fill()


def test_only_one_process_writes_at_a_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store_module, "_POLL", 0.01)
    first, second = (make(tmp_path, "logits", views=1).cache for _ in range(2))
    first.store.create(first.recipe)
    with ThreadPoolExecutor(1) as pool:
        with first.store.lock(lambda: None):
            waiting = pool.submit(second.fill)
            time.sleep(0.5)
            assert not waiting.done()
        waiting.result()
    assert first.is_complete()
    assert "another process writes" in capsys.readouterr().err


@pytest.mark.slow
def test_accumulation_reads_the_rows_of_its_microbatches(tmp_path):
    def halves(config):
        config.accumulate = 2

    cached, online = (run(make(folder, "logits", change=halves), 4) for folder in (tmp_path, ""))
    assert_equal_runs(cached, online)


def photos(folder):
    rng = np.random.default_rng(0)
    for i in range(16):
        path = folder / "train" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70 + i, 64, 3), np.uint8)).save(path)

    def change(config):
        config.data.update(name=f"folder:{folder}", train="train", eval="train", test="train")
        config.image_size, config.batch_size = 24, 8
        config.data.feed = "host"
        config.teacher.args = config.teacher.args.to_dict() | {"img_size": 48, "patch_size": 8}

    return change


@pytest.mark.slow
def test_host_fed_images_have_fixed_crops_too(tmp_path):
    change = photos(tmp_path / "photos")
    folders = tmp_path / "cache", ""
    cached, online = (run(make(folder, "logits", change=change), 5) for folder in folders)
    assert_equal_runs(cached, online)
    one, two, three = [
        make("", change=lambda c, seed=seed: (change(c), c.update(seed=seed))) for seed in (0, 1, 0)
    ]
    crops = []
    for experiment in (one, two, three):
        batch = next(iter(experiment.create_loader().batches(0)))
        index, images = np.asarray(batch["index"]).tolist(), np.asarray(batch["image"])
        crops.append(dict(zip(index, images, strict=True)))
    for index in crops[0].keys() & crops[1].keys():
        np.testing.assert_array_equal(crops[0][index], crops[1][index])
    assert crops[0].keys() & crops[1].keys()
    assert crops[0].keys() == crops[2].keys()


def test_one_line_says_what_is_written(tmp_path, capsys):
    make(tmp_path, "logits", views=1).cache.fill()
    text = capsys.readouterr().err
    assert "writing the teacher's logits (64 images, views: 1, 1.28e-06 GB) to " in text
