import sys

import pytest

from xkd_jax.analysis import counts
from xkd_jax.cli import models as listing
from xkd_jax.errors import UserError
from xkd_jax.models import MODELS


def names_of(out):
    """The networks that are listed, if their taps are not."""
    return [line.split()[0] for line in out.splitlines()[1:]]


def test_papers_counts_that_differ_are_explained():
    for name, (paper, note) in listing._PAPER.items():
        differs = abs(counts.describe(name)["gflops"] / paper - 1) >= 0.05
        assert differs == bool(note), name


def test_list(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["models", "vit_tiny_patch4_32", "*_tiny_patch4_32"])
    assert listing.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # a header, the network once, its taps
    assert lines[1].split() == ["vit_tiny_patch4_32", "32", "5.55", "0.37"]
    assert "block01_key..block12_key 3x64x64" in lines[2]
    assert "grid 8x8" in lines[2]


def test_all_networks_have_a_line_each_and_none_is_traced(capsys, monkeypatch):
    monkeypatch.delattr(counts, "count")
    assert listing.main([]) == 0
    assert names_of(capsys.readouterr().out) == list(MODELS)
    assert listing.main(["--taps"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * len(MODELS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("resnet8 vit_tiny* --kind cnn", ["resnet8"]),
        ("--kind transformer resnet8 vit_tiny*_32", ["vit_tiny_patch4_32"]),
        ("resnet18* --size 32", ["resnet18_32"]),
        # The options may stand between names, and compare what is listed: 25.557 million.
        (
            "resnet18 resnet34 --min_params 21.8 --max_params 25.56 resnet50",
            ["resnet34", "resnet50"],
        ),
        ("resnet18 resnet34 resnet50 --min_gflops 2 --max_gflops 4", ["resnet34"]),
        ("resnet50 resnet34 resnet8 --sort gflops", ["resnet8", "resnet34", "resnet50"]),
        ("vgg8 resnet8 --sort name", ["resnet8", "vgg8"]),
    ],
)
def test_filters(options, expected, capsys):
    assert listing.main(options.split()) == 0
    assert names_of(capsys.readouterr().out)[::2] == expected  # every other line has the taps


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("resnet18* --size 100", "no network passes --size 100; size before this filter: 32, 224."),
        ("--max_params 0.001", "no network passes --max_params 0.001; params before this filter: "),
        ("vit* --kind cnn", "no network passes --kind cnn; kind before this filter: transformer."),
        ("resnet8 --min_gflops nan", "gflops before this filter: 0.01."),
        ("--max_params few", "argument --max_params: invalid float value: 'few'; see xkd-jax "),
        ("--kind rnn", "argument --kind: invalid choice: 'rnn'"),
        ("distilled", "unknown network 'distilled'; did you mean '*distilled*'?"),
        ("distilled*", "unknown network 'distilled*'; did you mean '*distilled*'?"),
    ],
)
def test_wrong_filters_are_sentences(options, sentence, capsys):
    assert listing.main(options.split()) == 2
    out, err = capsys.readouterr()
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert not out


def test_unknown_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["models", "resnt50"])
    assert listing.main() == 2
    assert "did you mean resnet50" in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown network"):
        listing.find(["resnet18", "nothing*"])
