"""The command line, files, the hub (a fake one), and weights named in a config."""

import json
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import xkd_jax as xkd
from tests.convert.test_conversion import TINY_RESNET, TINY_VIT, checkpoint
from tests.tiny import get_config
from xkd_jax import experiment
from xkd_jax.cli.convert import main
from xkd_jax.convert.conversion import convert, fetch
from xkd_jax.convert.hub import DEFAULT_TAGS, download
from xkd_jax.errors import UserError
from xkd_jax.models import MODELS
from xkd_jax.weights import load_weights, save_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY_ARGS = ["--arg", "layers=[1,1,1,1]", "--arg", "width=0.125"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line; its exit code, and its stdout and stderr."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, argv)])
        try:
            code = main()
        except SystemExit as stopped:  # argparse's
            code = stopped.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def resnet(tmp_path):
    """A tiny ResNet's state dict, as timm would have written it."""
    path = tmp_path / "resnet.safetensors"
    state = checkpoint("resnet18", TINY_RESNET).state
    counters = {
        name.replace("running_mean", "num_batches_tracked"): np.array(12)
        for name in state
        if name.endswith("running_mean")
    }
    save_file({f"module.{name}": array for name, array in (state | counters).items()}, path)
    return path


def test_there_and_back(run, resnet, tmp_path):
    ours, back = tmp_path / "new" / "ours.safetensors", tmp_path / "back.safetensors"
    code, out, _ = run("--from", resnet, "--model", "resnet18", *TINY_ARGS, "--out", ours)
    assert code == 0
    assert out.splitlines() == [
        f"{resnet}: took the prefix module. off the tensors' names",
        f"wrote {ours}: resnet18, 5 classes, 224 pixels",
        "assumed, not in the tensors: mean 0.485 0.456 0.406 and std 0.229 0.224 0.225 "
        "(ImageNet's), 224 pixels, bilinear interpolation of images; change with "
        "--mean R G B --std R G B --image_size PIXELS",
    ]
    variables, metadata = load_weights(ours)
    assert metadata["args"] == {"layers": [1, 1, 1, 1], "width": 0.125}
    assert metadata["source"] == str(resnet)
    assert variables["params"]["fc"]["kernel"].shape == (64, 5)

    # The file's metadata describes the network: no other options are needed.
    code, out, _ = run("--from", ours, "--to_timm", back)
    assert code == 0
    assert out == f"wrote {back}: resnet18, 5 classes, 224 pixels, as timm's state dict\n"
    theirs, again = load_file(resnet), load_file(back)
    assert theirs.keys() == {f"module.{name}" for name in again}
    assert all(np.array_equal(array, theirs[f"module.{name}"]) for name, array in again.items())
    assert {a.dtype.name for n, a in again.items() if n.endswith("tracked")} == {"int64"}
    code, _, _ = run("--from", back, "--out", tmp_path / "again.safetensors")
    assert code == 0
    assert (tmp_path / "again.safetensors").read_bytes() == ours.read_bytes()


def test_it_says_what_it_changes(run, resnet, tmp_path):
    out = tmp_path / "out.safetensors"
    argv = ["--from", resnet, "--model", "resnet18", *TINY_ARGS, "--out", out]
    code, text, _ = run(*argv, "--num_classes", 3, "--mean", 0, 0, 0, "--image_size", 32)
    assert code == 0
    assert text.splitlines()[1] == f"{resnet}: set fc.bias and fc.weight to zero, for 3 classes"
    assert load_weights(out)[1]["mean"] == [0, 0, 0]


def test_the_hubs_config_beside_a_file(run, resnet, tmp_path):
    config = {
        "architecture": "resnet18",
        "model_args": TINY_RESNET,
        "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3, "input_size": [3, 288, 288]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run("--from", resnet, "--out", tmp_path / "out.safetensors")[0] == 0
    _, metadata = load_weights(tmp_path / "out.safetensors")
    assert (metadata["image_size"], metadata["mean"], metadata["std"]) == (
        288,
        [0.1] * 3,
        [0.2] * 3,
    )


@pytest.mark.slow
def test_a_forced_network_is_a_warning(run, resnet, tmp_path):
    config = {"architecture": "resnet14t", "pretrained_cfg": {"input_size": [3, 64, 64]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["--from", resnet, *TINY_ARGS, "--out", tmp_path / "out.safetensors"]
    code, _, error = run(*argv)
    assert code == 2
    assert "resnet14t, which is not among the networks here" in error
    code, out, _ = run(*argv, "--model", "resnet18")
    assert code == 0
    assert f"{resnet}: warning: the checkpoint states resnet14t and is read as resnet18" in out
    assert "resnet18, 5 classes, 64 pixels" in out


def test_one_of_two_networks(run, tmp_path):
    path, out = tmp_path / "both.safetensors", tmp_path / "out.safetensors"
    state = checkpoint("resnet18", TINY_RESNET).state
    state["fc.bias"][0] = np.nan
    both = {f"{part}.{k}": v for part in ("student", "teacher") for k, v in state.items()}
    save_file(both, path)
    argv = ["--from", path, "--model", "resnet18", *TINY_ARGS, "--out", out]
    code, _, error = run(*argv)
    assert code == 2
    assert "holds two networks, 'student' and 'teacher'; choose one, such as --key student" in error
    code, _, error = run(*argv, "--key", "teacher")
    assert code == 2
    assert "holds NaN or infinite values in fc.bias" in error
    assert run(*argv, "--key", "teacher", "--allow_not_finite")[0] == 0
    assert run("--timm", "resnet18", "--key", "teacher", "--out", out)[0] == 2


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--from", "FILE", "--out", "FOLDER/a.pth"], "a.pth must end in .safetensors."),
        (["--from", "FILE"], "no output file is given; add --out FILE"),
        (["--from", "no.pth", "--out", "FOLDER/a.safetensors"], "there is no file at no.pth"),
        (["--from", "FILE", "--model", "resnet81", "--out", "FOLDER/a.safetensors"], "resnet18"),
        (["--timm", "vit_basic", "--out", "FOLDER/a.safetensors"], "did you mean vit_base"),
        (["--timm", "resnet8", "--out", "FOLDER/a.safetensors"], "no weights for resnet8"),
        (["--timm", "resnet18.a/b", "--out", "FOLDER/a.safetensors"], "is not a name of weights"),
        (["--from", "FILE", "--arg", "width", "--out", "FOLDER/a.safetensors"], "NAME=VALUE"),
        (["--from", "FILE", "--num_classes", "0", "--out", "FOLDER/a.safetensors"], "'0'"),
        (["--from", "OURS", "--to_timm", "FOLDER/a.npz"], "must end in .safetensors, .pth or"),
        (["--from", "OURS", "--out", "FOLDER/resnet.safetensors/a.safetensors"], "another path"),
        (["--from", "CUT", "--out", "FOLDER/a.safetensors"], "it is cut off: 5 of"),
        (["--from", "CUT_ZIP", "--out", "FOLDER/a.safetensors"], "is cut off: its end is missing"),
        (["--from", "PAGE", "--out", "FOLDER/a.safetensors"], "was not written by torch.save"),
        (["--out", "FOLDER/a.safetensors"], "one of the arguments --timm --from is required"),
    ],
)
def test_mistakes(run, resnet, tmp_path, argv, error):
    places = {name: tmp_path / name for name in ("CUT.safetensors", "CUT_ZIP.pth", "PAGE.bin")}
    places["CUT.safetensors"].write_bytes(resnet.read_bytes()[:5])
    places["CUT_ZIP.pth"].write_bytes(b"PK\x03\x04" + bytes(100))
    places["PAGE.bin"].write_text("<html>not found</html>")
    ours = convert(checkpoint("resnet18", TINY_RESNET), "resnet18", args=TINY_RESNET)
    save_weights(tmp_path / "OURS.safetensors", ours.variables, ours.metadata)
    names = {path.name.partition(".")[0]: path for path in tmp_path.iterdir()} | {"FILE": resnet}
    argv = [str(names.get(text, text.replace("FOLDER", str(tmp_path)))) for text in argv]
    code, _, text = run(*argv)
    assert code == 2
    assert error in text
    assert "Traceback" not in text
    assert not (tmp_path / "a.safetensors").exists()


def test_a_cut_file_says_how_much_is_there(resnet):
    size = resnet.stat().st_size
    resnet.write_bytes(resnet.read_bytes()[: size - 10])
    with pytest.raises(UserError, match=f"it is cut off: {size - 10:,} of {size:,} bytes"):
        load_weights(resnet)


def test_foreign_weights_in_a_config_name_the_converter(resnet, tmp_path):
    with pytest.raises(UserError, match=r"python -m xkd_jax\.convert --from .*resnet\.safe"):
        load_weights(resnet)
    path = tmp_path / "w.pth"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"python -m xkd_jax\.convert --from .*w\.pth"):
        load_weights(path)


class Hub:
    """Repositories in a folder, behind `huggingface_hub`'s function and errors."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.downloads, self.online = folder, [], True
        names = ("OfflineModeIsEnabled", "HfHubHTTPError", "EntryNotFoundError")
        errors = {name: type(name, (Exception,), {}) for name in names}
        errors["RepositoryNotFoundError"] = type("R", (errors["HfHubHTTPError"],), {})
        errors["LocalEntryNotFoundError"] = type("L", (errors["EntryNotFoundError"],), {})
        self.errors = types.SimpleNamespace(**errors)
        package = types.ModuleType("huggingface_hub")
        package.hf_hub_download, package.errors = self.get, self.errors
        monkeypatch.setitem(sys.modules, "huggingface_hub", package)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))

    def get(self, repository, filename):
        self.downloads.append((repository, filename))
        if not self.online:
            raise self.errors.LocalEntryNotFoundError
        path = self.folder / repository / filename
        if not path.parent.exists():
            raise self.errors.RepositoryNotFoundError
        if not path.exists():
            raise self.errors.EntryNotFoundError
        return str(path)

    def publish(self, name, state, **model_args):
        folder = self.folder / "timm" / name
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors")
        config = {"architecture": name.partition(".")[0], "model_args": model_args}
        side = model_args.get("img_size", 224)
        size = {"input_size": [3, side, side]}
        config["pretrained_cfg"] = {"mean": [0.4] * 3, "std": [0.3] * 3, **size}
        config["pretrained_cfg"]["license"] = "apache-2.0"
        (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path, monkeypatch)
    hub.publish("resnet18.a1_in1k", checkpoint("resnet18", TINY_RESNET).state, **TINY_RESNET)
    return hub


def test_download(hub, run, tmp_path):
    code, out, _ = run("--timm", "resnet18", "--out", tmp_path / "out.safetensors")
    assert code == 0
    assert "resnet18, 5 classes, 224 pixels" in out
    _, metadata = load_weights(tmp_path / "out.safetensors")
    assert metadata["source"] == "https://huggingface.co/timm/resnet18.a1_in1k"
    assert (metadata["mean"], metadata["std"]) == ([0.4] * 3, [0.3] * 3)
    assert metadata["license"] == "apache-2.0"


def test_load_downloads_and_converts_once(hub):
    model = xkd.load("timm:resnet18")
    assert (model.name, model.num_classes, model.mean) == ("resnet18", 5, (0.4, 0.4, 0.4))
    address = "https://huggingface.co/timm/resnet18.a1_in1k"
    assert model.sources == ({"weights": address, "license": "apache-2.0"},)
    downloads = len(hub.downloads)
    xkd.load("timm:resnet18.a1_in1k")
    assert len(hub.downloads) == downloads


def test_a_licence_that_the_file_does_not_state(run, resnet, tmp_path):
    argv = ["--from", resnet, "--model", "resnet18", *TINY_ARGS]
    for given in ((), ("--license", "mit")):
        out = tmp_path / f"out{len(given)}.safetensors"
        assert run(*argv, *given, "--out", out)[0] == 0
        license = "mit" if given else ""
        assert xkd.load(out).sources == ({"weights": str(resnet), "license": license},)


def test_the_hub_fails(hub, monkeypatch):
    with pytest.raises(
        UserError, match=r"no weights timm/resnet18\.b; timm's default is .*a1_in1k"
    ):
        download("resnet18.b")
    (hub.folder / "timm/resnet18.a1_in1k/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights .*; give its file with --from"):
        download("resnet18")
    assert hub.downloads[-1] == ("timm/resnet18.a1_in1k", "pytorch_model.bin")
    hub.online = False
    with pytest.raises(UserError, match="can't be reached"):
        download("resnet18")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'xkd_jax\[hub\]'"):
        download("resnet18")


def test_default_tags():
    assert DEFAULT_TAGS.keys() <= MODELS.keys()


def test_a_teacher_of_timms_in_a_config(hub):
    args = {**TINY_VIT, "img_size": 28}
    state = checkpoint("vit_tiny_patch16_224", args, classes=10).state
    hub.publish("vit_tiny_patch16_224.augreg_in21k_ft_in1k", state, **args)
    config = get_config("logits")
    config.teacher.update(model="", weights="timm:vit_tiny_patch16_224")
    config.teacher.args = {}
    made = experiment.create_experiment(config)
    assert made.distiller.teacher.image_size == 28
    assert made.distiller.teacher.mean == (0.4, 0.4, 0.4)
    assert made.distiller.teacher.module.depth == 1
    assert [source["license"] for source in made.distiller.teacher.sources] == ["apache-2.0"]
    downloads = len(hub.downloads)
    assert fetch("vit_tiny_patch16_224") == fetch("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert len(hub.downloads) == downloads
    config.teacher.weights = "timm:vit_tiny_patch16_225"
    with pytest.raises(UserError, match="did you mean vit_tiny_patch16_224"):
        experiment.create_experiment(config)


def test_a_student_that_starts_from_timms(hub, capsys):
    config = get_config("none")
    config.student.args = TINY_RESNET
    config.student.weights = "timm:resnet18"
    student = experiment.create_experiment(config).distiller.student
    assert "student.weights timm:resnet18: set fc.bias and fc.weight to zero, for 10 classes" in (
        capsys.readouterr().err
    )
    np.testing.assert_array_equal(
        student.variables["params"]["bn1"]["bias"],
        checkpoint("resnet18", TINY_RESNET).state["bn1.bias"],
    )
    assert [source["license"] for source in student.sources] == ["apache-2.0"]
    config.student.args = {**TINY_RESNET, "stem": "cifar"}
    wrong = r"conv1.weight has the shape \[8, 3, 7, 7\] instead of \[8, 3, 3, 3\]"
    with pytest.raises(UserError, match=wrong):
        experiment.create_experiment(config)
