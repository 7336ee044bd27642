"""Run folders as training leaves them, for tests of reports."""

import json

CONFIG = {
    "seed": 0,
    "epochs": 2,
    "batch_size": 50,
    "data": {"name": "photos", "train": "train", "eval": "eval", "test": "test", "dir": "/a"},
    "method": {"name": "none"},
    "optimizer": {"learning_rate": 0.1},
}


def write_run(folder, top1, curve=(0.5,), summary=None, data="0123", **fields):
    """A finished run; `fields` of its config have `__` for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(CONFIG))
    for name, value in fields.items():
        *parents, last = name.split("__")
        inner = config
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "data.json").write_text(json.dumps({"train": {"digest": data, "examples": 100}}))
    lines = []
    for epoch, value in enumerate(curve, 1):
        lines.append({"step": 2 * epoch, "label_loss": 1 / epoch, "images_per_second": 100.0})
        lines.append({"step": 2 * epoch, "eval_top1": value})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    student = {"model": "resnet18", "top1": top1, "parameters": 9, "flops": 2_000_000}
    contents = {
        "method": config["method"]["name"],
        "seed": config["seed"],
        "steps": 2 * len(curve),
        "train": "photos train",
        "test": "photos test",
        "devices": "1 cpu",
        "extra_parameters": 1234,
        "student": student,
        "teacher": {"model": "vit", "weights": "a.safetensors", "top1": 0.875},
    }
    (folder / "summary.json").write_text(json.dumps(contents | (summary or {})))
