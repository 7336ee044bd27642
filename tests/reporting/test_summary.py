"""Which student is kept as the best."""

from types import SimpleNamespace

import numpy as np

from xkd_jax.reporting import summary
from xkd_jax.tasks.classification import Classification
from xkd_jax.weights import save_weights


def test_the_best_student_is_kept_and_of_equals_the_first(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(summary, "save_student", lambda *arguments: kept.append(arguments[-1]))
    best = summary.Best(SimpleNamespace(mesh=None), tmp_path)
    for step, top1 in enumerate((0.3, 0.5, 0.5, 0.4, 0.6), start=1):
        best.update(step, {}, {"top1": top1})
    assert [scores["step"] for scores in kept] == [1, 2, 5]
    assert kept[-1] == {"step": 5, "eval_top1": 0.6}
    # A resumed run knows the earlier best.
    save_weights(tmp_path / summary.BEST, {"params": {"a": np.zeros(1)}}, kept.pop())
    best = summary.Best(SimpleNamespace(mesh=None), tmp_path)
    best.update(5, {}, {"top1": 0.6})
    best.update(6, {}, {"top1": 0.7})
    assert [scores["step"] for scores in kept] == [1, 2, 6]


def test_a_cached_teacher_is_evaluated_once_for_all_processes(tmp_path, monkeypatch):
    evaluated = []

    def describe(*arguments):
        evaluated.append(arguments[2])
        return {"top1": 0.5}

    def ask(cache, test, fingerprint="abc"):
        monkeypatch.setattr(summary, "_teachers", {})  # as in another process
        teacher = SimpleNamespace(
            fingerprint=fingerprint, class_order=(), num_classes=10, variables={}
        )
        config = SimpleNamespace(
            teacher=SimpleNamespace(cache=cache),
            data=SimpleNamespace(noisy=False),
            dtype="float32",
        )
        distiller = SimpleNamespace(teacher=teacher, task=Classification())
        experiment = SimpleNamespace(config=config, distiller=distiller)
        return summary.describe_teacher(experiment, test)

    monkeypatch.setattr(summary, "describe", describe)
    first, second = (
        SimpleNamespace(crop_pct=1.0, images=np.zeros((count, 4, 4, 3)), identity={})
        for count in (5, 6)
    )
    cache = str(tmp_path / "cache")
    assert [ask(cache, first) for _ in range(2)] == [{"top1": 0.5}] * 2
    assert len(evaluated) == 1
    ask(cache, second)  # other images
    ask(cache, first, "xyz")  # another teacher
    assert len(evaluated) == 3
    ask("", first)  # nothing is kept without a cache
    ask("", first)
    assert len(evaluated) == 5


def test_extra_parameters_are_those_that_only_training_needs():
    params = {
        "student": {"kernel": np.zeros((2, 3))},
        "method": {"projector": np.zeros((4, 5))},
        "adversary": {"kernel": np.zeros(6)},
    }
    distiller = SimpleNamespace(state_shapes=SimpleNamespace(params=params))
    assert summary.count_extra(SimpleNamespace(distiller=distiller)) == 26
