import sys

import pytest

from xkd_jax.cli import models as listing
from xkd_jax.errors import UserError


def test_resnet50_is_as_published():
    row = listing.describe("resnet50")
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
    assert listing.describe(name)["gflops"] == pytest.approx(gflops, rel=0.01)


@pytest.mark.slow  # it traces the largest networks
def test_papers_counts_that_differ_are_explained():
    for name, (paper, note) in listing._PAPER.items():
        differs = abs(listing.describe(name)["gflops"] / paper - 1) >= 0.05
        assert differs == bool(note), name


def test_list(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["models", "vit_tiny_patch4_32", "*_tiny_patch4_32"])
    assert listing.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # a header, the network once, its taps
    assert lines[1].split() == ["vit_tiny_patch4_32", "32", "5.55", "0.37"]
    assert "block01_key..block12_key 3x64x64" in lines[2]
    assert "grid 8x8" in lines[2]


def test_unknown_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["models", "resnt50"])
    assert listing.main() == 2
    assert "did you mean resnet50" in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown network"):
        listing.find(["resnet18", "nothing*"])
