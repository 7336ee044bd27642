"""The notebook runs as a script, as a reader would run it, and converts to Jupyter's format."""

import os
import re
import subprocess
import sys

import pytest

import xkd_jax as xkd
from tests.runs import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.py"


@pytest.mark.slow
def test_it_runs(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # it mostly compiles
    code = NOTEBOOK.read_text()
    assert code.count("STEPS, BATCH = 200, 64") == 1
    short = tmp_path / "short.py"
    short.write_text(code.replace("STEPS, BATCH = 200, 64", "STEPS, BATCH = 20, 64"))
    done = subprocess.run(
        [sys.executable, short], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    top1 = {
        name: float(x) for name, x in re.findall(r"^([\w+ -]+): (\d+\.\d)%$", done.stdout, re.M)
    }
    assert top1.keys() == {"cross-entropy alone", "logits", "cakd by hand"}
    assert all(0 < value < 100 for value in top1.values())
    difference = re.search(
        r"exported/model\.onnx: largest difference of a logit (\S+)", done.stdout
    )
    assert float(difference[1]) < 1e-3
    assert (tmp_path / "features.png").read_bytes().startswith(b"\x89PNG")
    assert xkd.load(tmp_path / "student.safetensors").num_classes == 10


def test_it_uses_public_names_only():
    code = NOTEBOOK.read_text()
    assert set(re.findall(r"\bxkd\.(\w+)", code)) <= set(xkd.__all__)
    assert re.findall(r"^(?:from|import) .*xkd_jax.*$", code, re.M) == ["import xkd_jax as xkd"]
    assert not re.findall(r"\w\._\w+", code)


def test_jupytext_makes_a_notebook_of_it():
    jupytext = pytest.importorskip("jupytext", reason="needs the extra docs")
    cells = jupytext.read(NOTEBOOK).cells
    kinds = [cell.cell_type for cell in cells]
    assert kinds.count("markdown") >= 6
    assert kinds.count("code") >= 6
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert "\n".join(code).count("xkd.Distiller(") == 1
    for source in code:
        compile(source, "cell", "exec")
    # Ten lines: the body of `distil`.
    (body,) = re.findall(r"def distil\(method\):\n(.*?)\n\n", "\n".join(code), re.S)
    assert len(body.splitlines()) <= 10
