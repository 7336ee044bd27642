"""Similarities of feature spaces, against forward passes by hand."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from tests.analysis.finished_run import write_run
from xkd_jax import data, load
from xkd_jax.analysis import transferability
from xkd_jax.analysis.finished import cakd_part, load_runs
from xkd_jax.analysis.linear_map import cosines, linear_cka
from xkd_jax.analysis.tables import write_transferability
from xkd_jax.analysis.transferability import (
    Pair,
    Similarity,
    measure,
    pair_of,
    pairs_of,
    pairs_of_runs,
)
from xkd_jax.augment import ops
from xkd_jax.distributed.sharding import create_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow
def test_a_run_is_measured_with_and_without_its_projectors(tmp_path):
    write_run(tmp_path / "cakd")
    (run,) = load_runs([tmp_path / "cakd"])
    rows = measure(pair_of(run), create_mesh())
    assert [(row.features, row.mapping) for row in rows] == [
        ("pooled", "linear map"),
        ("tokens (stage3)", "linear map"),
        ("attention", "PCA projector"),
        ("tokens", "GL projector"),
    ]
    assert {row.kind for row in rows} == {"T→CNN"}
    outs = []
    for model in (run.teacher, run.student):
        images = model.preprocess(ops.to_float(run.test.images))
        outs.append(model.forward(model.variables, images)[1])
    method, params = cakd_part(run)
    done = method.project(params, *outs)
    teacher, student = (
        np.asarray(tokens).reshape(-1, 16) for tokens in (done.teacher_tokens, done.student_tokens)
    )
    assert rows[3].cosine == pytest.approx(cosines(student, teacher).mean(), abs=1e-3)
    assert rows[3].cka == pytest.approx(linear_cka(student, teacher), abs=1e-3)
    assert rows[3].strength is None
    assert rows[0].cka == pytest.approx(
        linear_cka(np.asarray(outs[1]["pooled"]), np.asarray(outs[0]["pooled"])), abs=1e-3
    )
    text = write_transferability(rows, tmp_path)
    assert f"report: {tmp_path / 'transferability.md'}" in text
    lines = (tmp_path / "transferability.csv").read_text().splitlines()
    assert lines[0] == "name,kind,features,mapping,cosine,centred,constant,cka,strength"
    assert len(lines) == 5
    assert (tmp_path / "transferability.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_files_are_compared_in_all_pairs_but_not_with_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(transferability, "ROWS", 200)  # some of the tokens of each image
    write_run(tmp_path / "cnn", "none", checkpoint=False)
    cnn, vit = str(tmp_path / "cnn" / "student.safetensors"), "packaged:quickstart_teacher"
    splits = "fashion_mnist_mini", "", "train[:64]", "validation[:50]"
    pairs = pairs_of([cnn, vit], [cnn, vit], *splits)
    assert [pair.name for pair in pairs] == ["cnn / quickstart_teacher", "quickstart_teacher / cnn"]
    rows = [row for pair in pairs for row in measure(pair, create_mesh(), images=32)]
    kinds = [(row.kind, row.features) for row in rows]
    assert kinds == [
        ("CNN→T", "pooled"), ("CNN→T", "tokens (block04)"),
        ("T→CNN", "pooled"), ("T→CNN", "tokens (stage3)"),
    ]  # fmt: skip
    for row in rows:
        assert 0 < row.cosine <= 1
        assert row.strength is not None


def test_seeds_of_a_cell_are_averaged(tmp_path):
    similarity = Similarity("table/a/seed0", "T→CNN", "pooled", "linear map", 0.5, 0.4, 0.2, 0.3, 1)
    rows = [
        similarity,
        similarity._replace(features="tokens (stage3)"),
        similarity._replace(name="table/a/seed1", cosine=0.7, strength=0.1),
        similarity._replace(name="table/b/seed0"),
    ]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in write_transferability(rows, tmp_path).splitlines()
        if line.startswith("|")
    ]
    assert [line[:2] + line[3:4] for line in lines[2:]] == [
        ["table/a", "2", "pooled"], ["table/a", "1", "tokens (stage3)"], ["table/b", "1", "pooled"],
    ]  # fmt: skip
    assert lines[2][5:7] == ["0.600 ± 0.141", "0.400 ± 0.000"]
    assert lines[2][-1] == "0.1 to 1"
    assert lines[3][5] == "0.500"
    assert len((tmp_path / "transferability.csv").read_text().splitlines()) == 5


@dataclasses.dataclass
class FakeTeacher:
    fingerprint: str


@pytest.mark.parametrize(("teachers", "expected"), [("-a-a", "aaaa"), ("-ab", "ab"), ("-", "")])
def test_a_run_without_a_teacher_gets_that_of_all_others(monkeypatch, teachers, expected):
    monkeypatch.setattr(transferability, "cakd_part", lambda run: None)
    config = SimpleNamespace(method=SimpleNamespace(name="none"))
    experiment = SimpleNamespace(config=config, train=None)
    runs = [
        SimpleNamespace(
            name="run",
            teacher=None if name == "-" else FakeTeacher(name),
            student=None,
            test=None,
            experiment=experiment,
        )
        for name in teachers
    ]
    assert "".join(pair.teacher.fingerprint for pair in pairs_of_runs(runs)) == expected


def test_a_network_is_perfectly_transferable_to_itself():
    vit, splits = load("packaged:quickstart_teacher"), ("train[:200]", "validation[:50]")
    train, test = (data.load("fashion_mnist_mini", split) for split in splits)
    for row in measure(Pair("itself", vit, vit, train, test), create_mesh()):
        assert row.kind == "T→T"
        assert min(row.cosine, row.centred, row.cka) > 0.98
