"""The packaged counts of the networks are those of the networks."""

import dataclasses
import functools
import runpy
import sys

import pytest

from tests.runs import ROOT
from xkd_jax.analysis import counts
from xkd_jax.errors import UserError
from xkd_jax.models import MODELS

SCRIPT = ROOT / "scripts" / "make_network_counts.py"


@functools.cache
def count_again(name):
    return counts.count(MODELS[name])


def test_every_network_has_a_current_entry():
    """After a change of a network: python scripts/make_network_counts.py NAME ..."""
    fingerprints = {name: counts.fingerprint(variant) for name, variant in MODELS.items()}
    entries = counts.read()
    assert {name: entry["fingerprint"] for name, entry in entries.items()} == fingerprints


DEFAULT = {"resnet50", "resnet18_32", "mobilenetv2_100", "vit_base_patch16_384"}
# The first network of each class.
FIRST = {MODELS[name].network: name for name in reversed(MODELS)}


def marks(name):
    if name in DEFAULT:
        return ()
    return pytest.mark.slow if name in FIRST.values() else pytest.mark.exhaustive


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in MODELS])
def test_entries_are_what_tracing_counts(name):
    """After a change of a network: python scripts/make_network_counts.py NAME ..."""
    entry = dict(counts.read()[name])
    del entry["fingerprint"]
    assert entry == count_again(name)


def test_resnet50_is_as_published():
    row = counts.describe("resnet50")
    assert row["kind"] == "cnn"
    assert row["image_size"] == 224
    assert row["parameters"] == 25_557_032
    assert round(row["gflops"], 1) == 4.1
    assert row["taps"]["stage3"] == (14, 14, 1024)
    assert row["taps"]["logits"] == (1000,)


@pytest.mark.parametrize(
    ("name", "gflops"),
    [("vit_base_patch16_384", 55.4), ("mobilenetv2_100", 0.3), ("resnet18_32", 0.56)],
)
def test_gflops_are_the_papers_whatever_the_backend(name, gflops):
    assert count_again(name)["flops"] / 1e9 == pytest.approx(gflops, rel=0.01)


def test_changed_and_new_networks_are_traced(monkeypatch):
    packaged = counts.describe("resnet8")
    smaller = dataclasses.replace(MODELS["resnet8"], args={"depth": 8, "channels": (4, 4, 8, 8)})
    monkeypatch.setitem(MODELS, "resnet8", smaller)
    monkeypatch.setitem(MODELS, "mine", smaller)
    changed = counts.describe("resnet8")
    assert changed["parameters"] < 0.1 * packaged["parameters"]
    assert changed["taps"]["pooled"] == (8,)
    assert counts.describe("mine") == changed


def test_fingerprints_depend_on_all_that_counts():
    variant = MODELS["resnet20"]  # of the default depth
    same = dataclasses.replace(variant, args={}, mean=(0.5, 0.5, 0.5))
    assert counts.fingerprint(same) == counts.fingerprint(variant)
    network = type("CifarResNet", (variant.network,), {})
    others = [{"network": network}, {"args": {"depth": 14}}, {"image_size": 64}]
    found = {counts.fingerprint(dataclasses.replace(variant, **other)) for other in others}
    assert len(found | {counts.fingerprint(variant)}) == 4


def test_damaged_file(tmp_path):
    path = tmp_path / "networks.json.xz"
    with pytest.raises(UserError, match=r"networks\.json\.xz is missing or damaged; reinstall"):
        counts.read(path)
    path.write_bytes(counts.PATH.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"networks\.json\.xz is missing or damaged; reinstall"):
        counts.read(path)


def test_the_script_counts_the_named_networks(tmp_path, monkeypatch, capsys):
    path = tmp_path / "networks.json.xz"
    read, packaged = counts.read, counts.read()
    old = {name: entry for name, entry in packaged.items() if name != "resnet8"}
    monkeypatch.setattr(counts, "read", lambda: {**old, "removed": old["vgg8"]})
    monkeypatch.setattr(sys, "argv", ["make_network_counts.py", "resnet8", "--out", str(path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out == "resnet8\n"
    assert list(read(path).items()) == list(packaged.items())
    monkeypatch.setattr(sys, "argv", ["make_network_counts.py", "resnet9"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "unknown: resnet9" in capsys.readouterr().err
