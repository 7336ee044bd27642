"""Runs of another recipe are found."""

from tests.reporting.folders import write_run
from xkd_jax.config import default_config
from xkd_jax.reporting.recipe import Recipe, find_differences, read_recipe


def recipes(folder, *changes, **fields):
    """The recipes of runs with changed configs, of which the table sets the learning rate."""
    found = []
    for index, change in enumerate(changes):
        write_run(folder / str(index), 0.5, **change)
        found.append(read_recipe(folder / str(index), {"optimizer.learning_rate": 0.1, **fields}))
    return found


def test_a_field_differs_from_the_table_or_from_most_runs(tmp_path):
    changes = {}, {"epochs": 4}, {"optimizer__learning_rate": 0.3}, {"data__dir": "/b"}
    assert find_differences(recipes(tmp_path, *changes)) == [
        "",
        "epochs is 4, but 2 in most runs",
        "optimizer.learning_rate is 0.3, but 0.1 in the table",
        "",
    ]


def test_at_most_three_differences_are_named(tmp_path):
    other = {"epochs": 4, "batch_size": 10, "data__train": "a", "data__eval": "b"}
    found = find_differences(recipes(tmp_path, {}, {}, other))
    assert found[:2] == ["", ""]
    assert found[2].endswith("(and 1 more)")


def test_other_images_are_found(tmp_path):
    found = find_differences(recipes(tmp_path, {}, {"data": "4567"}, {}))
    assert found == ["", "the digest of photos train is '4567', but '0123' in most runs", ""]


def test_cells_may_differ_in_what_one_of_them_sets(tmp_path):
    (tmp_path / "a").mkdir()
    cell = recipes(tmp_path / "a", {"epochs": 9}, {"epochs": 2}, epochs=9)
    others = recipes(tmp_path / "b", {}, {}, {"epochs": 3})
    assert find_differences(cell + others) == [
        "",
        "epochs is 2, but 9 in the table",
        "",
        "",
        "epochs is 3, but 2 in most runs",
    ]


def test_a_field_that_a_run_is_too_old_for_has_its_default(tmp_path):
    smoothing = default_config().label_smoothing
    found = recipes(tmp_path, {"label_smoothing": smoothing}, {}, {"label_smoothing": 0.25})
    assert find_differences(found)[:2] == ["", ""]
    assert find_differences(found)[2] == f"label_smoothing is 0.25, but {smoothing} in most runs"


def test_options_of_other_methods_are_not_compared(tmp_path):
    weights = [{"method__name": "logits", "method__logits__weight": w} for w in (3.0, 3.0, 1.0)]
    plain = [Recipe(r.found, {"method.name": "none"}) for r in recipes(tmp_path / "a", {}, {}, {})]
    logits = recipes(tmp_path / "b", *weights, **{"method.name": "logits"})
    assert find_differences(plain + logits) == [
        *[""] * 5,
        "method.logits.weight is 1.0, but 3.0 in most runs",
    ]


def test_a_run_without_a_config_has_no_differences(tmp_path):
    (tmp_path / "empty").mkdir()
    empty = read_recipe(tmp_path / "empty", {"epochs": 9})
    assert find_differences([empty, *recipes(tmp_path, {}, {})]) == ["", "", ""]
    assert find_differences([]) == []
