"""How pictures are drawn, and their files."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from xkd_jax.errors import UserError
from xkd_jax.reporting import pictures
from xkd_jax.reporting.figures import to_png
from xkd_jax.reporting.pictures import Change, Drawing


def draw(figure):
    return np.asarray(Image.open(io.BytesIO(to_png(figure))).convert("RGB"))


def test_maps_and_images_have_a_column_for_each_image():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(4, 28, 28, 3))
    maps = {"a": rng.uniform(size=(4, 7, 7)), "b": np.zeros((4, 7, 7))}
    figure = pictures.plot_maps(images, maps)
    assert [axes.get_ylabel() for axes in figure.axes] == ["image", "a", "b"]
    assert [len(axes.images) for axes in figure.axes] == [4, 8, 8]
    for column in range(4):
        image, heat = (figure.axes[1].images[i] for i in (column, 4 + column))
        np.testing.assert_array_equal(image.get_array(), images[column])
        np.testing.assert_array_equal(heat.get_array(), maps["a"][column])
        assert image.get_extent() == heat.get_extent()
        # The maps of an image share their scale.
        scales = [axes.images[4 + column].get_clim() for axes in figure.axes[1:]]
        assert scales == [(0, maps["a"][column].max())] * 2
    pixels = draw(figure)
    assert pixels.shape[0] > 300
    # Random colours fill the first row, from the name to the right edge.
    assert (pixels[60, 60:-10].std(-1) > 0).mean() > 0.9
    figure = pictures.plot_images(images, {"c": rng.uniform(size=(4, 7, 7, 3))})
    assert [axes.get_ylabel() for axes in figure.axes] == ["image", "c"]
    assert draw(figure).shape[1] > 500


@pytest.mark.parametrize(("classes", "panels"), [(3, 2), (100, 3)])
def test_the_most_confused_pairs_of_many_classes_are_listed(classes, panels):
    confusion = 90 * np.eye(classes, dtype=int)
    confusion[0, 2], confusion[1, 0] = 10, 30
    names = tuple(f"class {label}" for label in range(classes))
    figure = pictures.plot_confusion(confusion, names)
    assert len(figure.axes) == panels  # with the colour bar
    assert draw(figure).shape[0] > 400
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert (ticks == list(names)) == (classes <= 40)
    if panels == 3:
        bars = figure.axes[1]
        labels = [text.get_text() for text in bars.get_yticklabels()]
        assert labels == ["class 1 → class 0", "class 0 → class 2"]
        assert [bar.get_width() for bar in bars.patches] == pytest.approx([25, 10])


def test_gained_and_lost_images_are_named():
    image = np.full((8, 8, 3), 200, np.uint8)
    change = Change(image, "a name that is too long", ("cat", 0.914), ("dog", 0.5))
    figure = pictures.plot_changes([change], [], columns=3)
    first = figure.axes[0]
    assert first.get_title() == "a name that is to…"
    assert first.get_xlabel() == "baseline: dog 50%\nstudent: cat 91%"
    assert sum(bool(axes.images) for axes in figure.axes) == 1
    assert draw(figure).min() < 100


def test_captions_are_read_back_and_damage_is_named(tmp_path):
    folder = tmp_path / "pictures"
    assert pictures.read_captions(tmp_path) == {}
    figure = pictures.plot_confusion(np.eye(3, dtype=int), ("a", "b", "c"))
    pixels = pictures.write({"confusion": Drawing(figure, "counts")}, folder)
    assert pixels["confusion"].dtype == np.uint8
    assert pictures.read_captions(tmp_path) == {folder / "confusion.png": "counts"}
    captions = {"confusion.png": "counts", "../summary.json": "elsewhere", "views.png": "gone"}
    (folder / "captions.json").write_text(json.dumps(captions))
    assert list(pictures.read_captions(tmp_path)) == [folder / "confusion.png"]
    (folder / "captions.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        pictures.read_captions(tmp_path)
