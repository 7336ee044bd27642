"""The paper's tables: their numbers, their cells, what seeds share, and a sweep that is killed."""

import functools
import importlib
import itertools
import json
import re
import shlex
import signal
import types

import jax
import numpy as np
import pytest

from tests.cli.test_sweep import recipe
from tests.runs import finish, timeless, wait_for_step
from xkd_jax.cli import run_folder, tables
from xkd_jax.configs import dinov2_cifar100
from xkd_jax.configs.tables import common
from xkd_jax.errors import UserError
from xkd_jax.experiment import (
    create_experiment,
    create_student,
    describe_teacher,
    load_teacher_file,
)
from xkd_jax.methods import check_pair, create_method
from xkd_jax.reporting import table_report
from xkd_jax.table import Cell, Table
from xkd_jax.train import experiment_step, init_state
from xkd_jax.validation import validate

PROGRAM = ("-m", "xkd_jax.sweep")
NAMES = ("table1", "table2", "table3", "ablation")
VARIANTS = ("", *common.FORMS)
# Transcribed from the paper: test accuracy in percent, top-1.
TABLE_1 = """
ResNet152x2 ResNet50: S 85.02 Logits 86.53 FitNet 85.37 AT 86.41 RKD 86.22 IRG 86.87 OFD 86.79
  CRD 86.91 ReviewKD 87.03 LONDON 87.16
ResNet101x3 ResNet50x2: S 88.21 Logits 89.07 FitNet 88.51 AT 89.18 RKD 89.39 IRG 89.89 OFD 89.62
  CRD 89.94 ReviewKD 90.04 LONDON 89.98
ViT-B/16 ResNet50: S 85.02 Logits 86.42 RKD 86.13 IRG 86.59 Ours 87.39
ViT-L/16 ResNet50: S 85.02 Logits 86.69 RKD 86.73 IRG 86.91 Ours 88.09
ViT-B/16 ResNet50x2: S 88.21 Logits 88.86 RKD 89.11 IRG 89.38 Ours 90.33
ViT-L/16 ResNet50x2: S 88.21 Logits 89.28 RKD 89.51 IRG 89.68 Ours 90.97
Swin-L ResNet50: S 85.02 Logits 86.78 RKD 86.91 IRG 87.06 Ours 88.46
Swin-L ResNet50x2: S 88.21 Logits 88.93 RKD 90.02 IRG 89.97 Ours 91.21
ViT-L/16 ViT-B/16: S 90.92 Logits 91.45 IRG 91.59 DeiT 91.57 MINILM 91.44
Swin-L ViT-B/16: S 90.92 Logits 91.74 IRG 91.88 DeiT 91.91
ViT-L/16 Xceptionx2: S 90.27
ViT-L/16 ViT-B/32: S 89.46 Logits 90.22 IRG 90.39 DeiT 90.40 Ours 90.66
Swin-L ViT-B/32: S 89.46 Logits 90.59 IRG 90.95 DeiT 90.99 MINILM 90.62 Ours 91.20
ViT-L/16 ResNet152: S 89.57 Ours 90.66
Swin-L ResNet152: S 89.57 Ours 91.20
"""
TABLE_2 = """
ResNet152x2 ResNet50x2: S 78.16 Logits 79.06 AT 79.01 FT 79.12 AB 78.93 OFD 79.63 AFD 79.38
  IRG 79.85 ReviewKD 80.12 LONDON 80.09
ResNet101x3 ResNet50x2: S 78.16 Logits 79.19 AT 78.92 FT 79.11 AB 79.01 OFD 79.55 AFD 79.45
  IRG 79.75 ReviewKD 80.08 LONDON 80.15
ViT-B/16 ResNet50: S 76.28 Logits 77.02 RKD 77.27 IRG 77.39 Ours 78.34
ViT-L/16 ResNet50: S 76.28 Logits 77.45 RKD 77.82 IRG 77.75 Ours 78.85
ViT-B/16 ResNet50x2: S 78.16 Logits 79.02 RKD 79.68 IRG 79.60 Ours 80.72
ViT-L/16 ResNet50x2: S 78.16 Logits 79.31 RKD 79.78 IRG 79.83 Ours 81.01
Swin-L ResNet50: S 76.28 Logits 77.60 RKD 77.85 IRG 77.89 Ours 78.96
Swin-L ResNet50x2: S 78.16 Logits 79.68 RKD 79.92 IRG 80.10 Ours 81.39
ViT-L/16 ViT-B/16: S 82.17 Logits 83.18 IRG 83.27 DeiT 83.38 MINILM 83.17
Swin-L ViT-B/16: S 82.17 Logits 83.49 IRG 83.60 DeiT 83.71
ViT-L/16 Xceptionx2: S 80.37
ViT-L/16 ViT-B/32: S 78.29 Logits 79.40 IRG 79.20 DeiT 79.37
Swin-L ViT-B/32: S 78.29 Logits 79.30 IRG 79.10 DeiT 79.27 MINILM 79.19
ViT-L/16 ResNet152: S 78.31
"""
TABLE_3 = """
ViT-B/16 ResNet50: S 76.28 Ours 78.34
ViT-L/16 ResNet50: S 76.28 Ours 78.85
DeiT-B ResNet50: S 76.28 Ours 78.53
Swin-B ResNet50: S 76.28 Ours 78.87
Swin-L ResNet50: S 76.28 Ours 78.96
ViT-B/16 ResNet18: S 69.76 Ours 71.73
ViT-L/16 ResNet18: S 69.76 Ours 72.02
DeiT-B ResNet18: S 69.76 Ours 71.85
Swin-B ResNet18: S 69.76 Ours 72.01
Swin-L ResNet18: S 69.76 Ours 72.09
ViT-B/16 MobileNetV2: S 71.88 Ours 73.34
ViT-L/16 MobileNetV2: S 71.88 Ours 73.52
DeiT-B MobileNetV2: S 71.88 Ours 73.40
Swin-B MobileNetV2: S 71.88 Ours 73.56
Swin-L MobileNetV2: S 71.88 Ours 73.66
ViT-B/16 EfficientNetB0: S 77.69 Ours 79.23
ViT-L/16 EfficientNetB0: S 77.69 Ours 79.34
DeiT-B EfficientNetB0: S 77.69 Ours 79.30
Swin-B EfficientNetB0: S 77.69 Ours 79.38
Swin-L EfficientNetB0: S 77.69 Ours 79.52
"""
# AP in percent: alone, by logits from ResNet152x2 and ViT-L/16, and by the paper's method.
TABLE_4 = """
frcnn: resnet50 34.5 35.0 34.9 35.5, resnet101 37.1 37.7 37.4 38.1, resnext101 39.2 39.8 39.6 40.3
mrcnn: resnet50 32.6 33.3 33.1 33.6, resnet101 33.9 34.5 34.2 34.8, resnext101 35.1 35.5 35.3 35.9
"""
RENAMED = {"S": "none", "Ours": "cakd", "ReviewKD": "review", "EfficientNetB0": "efficientnet_b0"}


def get(name, variant=""):
    module = importlib.import_module(f"xkd_jax.configs.tables.{name}")
    return module.get_config(variant), module.get_table(variant)


def transcribed(text):
    """The cells' numbers, by our names."""
    numbers = {}
    for line in text.strip().replace("\n  ", " ").splitlines():
        pair, results = line.split(": ")
        teacher, student = (
            RENAMED.get(name, name.replace("/", "").replace("-", "_").lower())
            for name in pair.split()
        )
        words = results.split()
        for method, top1 in zip(words[::2], words[1::2], strict=True):
            method = RENAMED.get(method, method.lower())
            cell = f"{student}-none" if method == "none" else f"{teacher}-{student}-{method}"
            assert numbers.setdefault(cell, float(top1)) == float(top1)
    return numbers


@pytest.mark.parametrize(
    ("name", "text"), [("table1", TABLE_1), ("table2", TABLE_2), ("table3", TABLE_3)]
)
def test_the_papers_numbers(name, text):
    cells = get(name, "paper")[1].cells
    assert {n: c.paper for n, c in cells.items() if c.paper is not None} == transcribed(text)


def test_the_papers_numbers_of_detectors():
    config, table = get("table4")
    expected = {}
    for line in TABLE_4.strip().splitlines():
        detector, cells = line.split(": ")
        for cell in cells.split(", "):
            student, *numbers = cell.split()
            names = (f"{student}-none", f"resnet152x2-{student}-logits",
                     f"vit_l16-{student}-logits", f"vit_l16-{student}-cakd")  # fmt: skip
            expected |= {f"{detector}-{n}": float(x) for n, x in zip(names, numbers, strict=True)}
    assert {name: cell.paper for name, cell in table.cells.items()} == expected
    weights = [cell.fields["student.weights"] for cell in table.cells.values()]
    assert len(set(weights)) == len(weights) / 2  # a backbone serves both kinds of detectors
    for variant in ("", "online", "smoke"):
        config, table = get("table4", variant)
        tables.check_fields(table, config, list(table.cells))
        for name, cell in table.cells.items():
            taught = tables.with_fields(config, cell.fields).method.name
            assert taught == ("cakd" if "cakd" in name and variant else "none")
    with pytest.raises(UserError, match="unknown variant 'gpu'"):
        get("table4", "gpu")


def test_only_the_same_pair_has_a_published_number():
    for name in NAMES:
        assert all(cell.paper is None for cell in get(name)[1].cells.values())
        for cell, facts in get(name, "gpu")[1].cells.items():
            assert facts.paper is None or re.search(r"resnet20|resnet8x4", cell), cell


@pytest.mark.parametrize(
    ("name", "variant"),
    [*itertools.product(NAMES, VARIANTS), ("ablation", "tuned"), ("ablation", "audit")],
)
def test_every_cell_is_valid(name, variant):
    config, cells = get(name, variant)
    tables.check_fields(cells, config, list(cells.cells))
    for cell, facts in cells.cells.items():
        baseline = cells.cells[cells.baseline_of(cell)].fields
        assert baseline["method.name"] == "none"
        assert baseline["student.model"] == facts.fields["student.model"] or (
            facts.fields["method.name"] == "deit"
        )
    with pytest.raises(UserError, match="unknown variant 'smoek'; did you mean smoke"):
        get(name, "smoek")


def test_the_tuned_parts_have_no_other_terms_and_the_same_budget():
    config, table = get("ablation", "tuned")
    assert len({table.count(cell) for name, cell in table.cells.items() if name != "labels"}) == 1
    off = {"method.cakd.token_weight", "method.cakd.adversarial_weight"}
    for name in ("pca", "pca_last", "pooled", "pca_pooled", "pca_logits"):
        cell = table.cells[name]
        assert all(alternative.keys().isdisjoint(off) for alternative in cell.stages[0])
        chosen = tables.with_fields(config, {**cell.fields, **cell.stages[0][1]}).method.cakd
        assert not any((chosen.token_weight, chosen.adversarial_weight, chosen.multi_view))
        assert (chosen.pooled_weight > 0) == ("pooled" in name)
        assert (chosen.attention_weight > 0) == (chosen.value_weight > 0) == ("pca" in name)


def test_the_audit_changes_one_setting_and_opens_no_test_split():
    config, table = get("ablation", "audit")
    assert config.data.test == config.data.eval
    usual = table.cells["cakd"].fields
    for name in table.cells.keys() - {"labels", "cakd", "adam"}:
        fields = table.cells[name].fields
        assert sum(fields[key] != usual.get(key) for key in fields) == 1
        assert not usual.keys() - fields.keys()


def test_the_tables_of_a_foundation_teacher_are_valid():
    for variant in ("few25", "few100", "labels10"):
        config, table = dinov2_cifar100.get_config(variant), dinov2_cifar100.get_table(variant)
        tables.check_fields(table, config, list(table.cells))
        taught = [table.count(cell) for name, cell in table.cells.items() if name != "none"]
        assert len(set(taught)) == 1  # the same budget
    started = {cell.fields.get("student.weights") for cell in table.cells.values()}
    assert len(started) == len(table.cells) - 1  # two begin with random weights
    unlabelled = dinov2_cifar100.get_config("unlabelled")
    validate(unlabelled)
    assert not unlabelled.data.labels
    with pytest.raises(UserError, match="unknown variant 'unlabelled'"):
        dinov2_cifar100.get_table("unlabelled")


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["", "gpu", pytest.param("paper", marks=pytest.mark.exhaustive)]
)
def test_every_method_supports_its_pair(variant):
    """Without weights and data: shapes suffice."""
    side, classes = {"gpu": (32, 100), "paper": (224, 100)}.get(variant, (28, 10))
    train = types.SimpleNamespace(
        num_classes=classes, images=np.zeros((1, side, side, 3), np.uint8),
        mean=(0.5,) * 3, std=(0.2,) * 3, class_names=(),
    )  # fmt: skip
    outputs = {}
    for name in NAMES:
        config, cells = get(name, variant)
        for facts in cells.cells.values():
            cell = tables.with_fields(config, facts.fields)
            student, teacher = (
                json.dumps(part) for part in (cell.student.to_dict(), cell.teacher.to_dict())
            )
            student += str(cell.image_size)
            if student not in outputs:
                outputs[student] = create_student(cell, train, train).output_shapes
            method = create_method(cell.method.name, cell.method)
            if not method.needs_teacher:
                continue
            if teacher not in outputs:
                metadata = {"model": cell.teacher.model}
                if cell.teacher.weights.startswith("packaged:"):
                    metadata = load_teacher_file(cell)[1]
                outputs[teacher] = describe_teacher(cell, train, metadata).output_shapes
            check_pair(method, outputs[teacher], outputs[student])


def test_one_command_for_each_cell(start):
    arguments = ["--config", "tables/table3:gpu", "--config.data.dir=a b", "--commands"]
    code, out, err = finish(start(*arguments, program=PROGRAM))
    assert code == 0, err
    lines = out.splitlines()
    names = list(get("table3", "gpu")[1].cells)
    assert len(lines) == len(names) == 12
    assert [line.split("# ")[1] for line in lines] == names
    assert shlex.split(lines[2], comments=True) == [
        "python", "-m", "xkd_jax.sweep", "--config", "tables/table3:gpu",
        "--config.data.dir=a b", "--shard=3/12",
    ]  # fmt: skip
    code, _, err = finish(start(*arguments, "--shard=1/2", program=PROGRAM))
    assert (code, "leave out --shard" in err) == (2, True)


def test_a_cell_that_cannot_work_is_named_before_training(tmp_path):
    def run(fields, **options):
        cells = {"none": Cell({}), "b": Cell({"method.name": "logits"} | fields, **options)}
        return tables.run(Table(cells, "none"), recipe(), tmp_path / "new")

    packaged = {"teacher.weights": "packaged:quickstart_teacher"}
    with pytest.raises(UserError, match=r"^cell b: .*absent.safetensors"):
        run({"teacher.weights": "absent.safetensors"})
    with pytest.raises(UserError, match=r"^cell b: minilm compares the attention of two"):
        run(packaged | {"method.name": "minilm"})
    with pytest.raises(UserError, match=r"^cell b: .*logits.weight is -1.0"):
        run(packaged, stages=(({"method.logits.weight": -1.0},),))
    with pytest.raises(UserError, match=r"^cell b: its baseline, c, is not in the table"):
        run(packaged, baseline="c")
    compare = recipe()
    compare.compare = ("none",)
    with pytest.raises(UserError, match="has no effect in a table"):
        tables.run(Table({"a": Cell({})}, "a"), compare, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_each_cell_has_its_baseline(tmp_path):
    cells = {"a": Cell({}), "b": Cell({}), "c": Cell({}, baseline="b")}
    table_report.describe(Table(cells, "a"), tmp_path)
    facts = json.loads((tmp_path / table_report.CELLS).read_text())
    assert facts["baselines"] == {"a": "a", "b": "a", "c": "b"}


def with_teacher(seed):
    config = recipe()
    config.method.name, config.teacher.weights = "logits", "packaged:quickstart_teacher"
    config.seed = seed
    return config


@pytest.mark.slow
def test_the_seed_is_not_in_the_compiled_step():
    texts = set()
    for seed in (0, 1):
        experiment = create_experiment(with_teacher(seed))
        step = functools.partial(experiment_step, experiment)
        arrays = experiment.teacher_arrays(), experiment.create_loader().arrays
        lowered = jax.jit(step).lower(init_state(experiment), *arrays, experiment.batch_shapes())
        texts.add(lowered.as_text())
    assert len(texts) == 1


@pytest.mark.slow
def test_seeds_share_the_compiled_step(tmp_path):
    lowered = []

    def listen(event, _, fun_name="", **_others):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            lowered.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        table = Table({"logits": Cell({})}, "logits", seeds=(0, 1))
        assert tables.run(table, with_teacher(0), tmp_path) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len([name for name in lowered if "experiment_step" in name]) == 1
    # What is shared doesn't change the result.
    (tmp_path / "alone").mkdir()
    run_folder.train_one(with_teacher(1), tmp_path / "alone")
    assert timeless(tmp_path / "alone") == timeless(tmp_path / "logits" / "seed1")


@pytest.mark.slow
def test_a_killed_table_resumes_and_reports(start, tmp_path):
    command = ("--config", "tables/table1:smoke", "--workdir", tmp_path)
    process = start(*command, program=PROGRAM)
    first, second = (tmp_path / "resnet-none" / f"seed{seed}" for seed in (0, 1))
    wait_for_step(second, 2, process)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err
    assert "stopped by SIGTERM; everything is saved" in err
    assert not (second / "summary.json").exists()
    done = (first / "summary.json").stat().st_mtime_ns
    code, out, err = finish(start(*command, program=PROGRAM))
    assert code == 0, err
    assert (first / "summary.json").stat().st_mtime_ns == done
    assert int(re.search(r"seed1: step (\d+)/8", err)[1]) > 1
    assert re.search(r"resnet-none +\| 2 of 2", out)
    assert re.search(r"vit-resnet-logits +\| 2 of 2", out)
    assert (tmp_path / "report.md").exists()
    tuning = list((tmp_path / "vit-resnet-logits" / "tuning").iterdir())
    assert sorted(path.name for path in tuning) == [
        "name=logits,weight=0.3,seed=0",
        "name=logits,weight=1,seed=0",
    ]
