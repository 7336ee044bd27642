"""Runs steps with replicated and sharded weights on eight devices; prints facts as JSON.

python -m tests.distributed.fsdp (run by test_fsdp.py)
"""

import dataclasses
import json

import jax

from tests.distributed.devices import difference
from tests.methods.pairs import PAIRS, VIT, pair_experiment
from xkd_jax import backend, train
from xkd_jax.analysis import hlo, memory
from xkd_jax.distributed import sharding
from xkd_jax.models import create_model

STEPS = 3
# Sharding rules of the teacher and the student.
CASES = {
    "replicated": ("replicated", "replicated"),
    "teacher": ("fsdp", "replicated"),
    "student": ("replicated", "fsdp"),
}


DEPTH = 14


def split_leaves(tree):
    return sum("data" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(tree))


def facts_of(compiled, teacher):
    return {
        "collectives": [dataclasses.asdict(c) for c in hlo.collectives(compiled.as_text())],
        "teacher": sum(leaf.nbytes for leaf in jax.tree.leaves(teacher)),
    }


def train_steps(teacher_rule, student_rule):
    """The last state, and facts about it and the compiled step."""
    changes = {"mesh": {"teacher": teacher_rule, "student": student_rule}, "ema": {"decay": 0.9}}
    experiment = pair_experiment("cakd", PAIRS["ViT to ResNet"], **changes)
    state, distiller = train.init_state(experiment), experiment.distiller
    variables, teacher = distiller.teacher.variables, distiller.teacher_variables
    step_fn = train.Stepper(experiment, state)
    resident = step_fn.loader.arrays
    facts = {"sizes": memory.parts(state, teacher, resident)}
    for _, batch in zip(range(STEPS), step_fn.loader.batches(0), strict=False):
        state, _ = step_fn(state, batch)
    facts["split"] = {
        "teacher": split_leaves(teacher),
        "params": split_leaves(state.params["student"]),
        "opt_state": split_leaves(state.opt_state["student"]),
        "ema": split_leaves(state.ema["params"]),
        "method_params": split_leaves(state.params["method"]),
    }
    facts |= facts_of(step_fn.compiled, variables)
    facts["trained"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    facts["student"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params["student"]))
    facts["images"] = resident["image"].nbytes
    return state, facts


def deep_forward(rule):
    """The logits of a deep Transformer for eight images, with a scan over blocks as on TPUs."""
    module = create_model("vit_tiny_patch16_224", num_classes=10, **VIT | {"depth": DEPTH})
    images = jax.random.normal(jax.random.key(1), (8, 28, 28, 3))
    variables = module.init(jax.random.key(0), images)
    mesh = sharding.create_mesh()
    layout = sharding.of_teacher(mesh, variables, rule)

    def forward(variables, images):
        blocks = sharding.BlockGather(variables["params"], layout["params"])
        return module.apply(sharding.gather(mesh, variables), images, gather=blocks)[0]

    args = sharding.put(variables, layout), jax.device_put(images, sharding.over_batch(mesh))
    with backend.assume("tpu"):
        compiled = jax.jit(forward).lower(*args).compile()
    return compiled(*args), facts_of(compiled, variables)


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    sharding.SPLIT_FROM = 128  # shard even tiny networks, but no vectors
    first = None
    for case, rules in CASES.items():
        state, facts = train_steps(*rules)
        first = first or state
        facts["difference"] = difference(first, state)
        print(json.dumps({"case": case, **facts}), flush=True)
    whole, _ = deep_forward("replicated")
    split, facts = deep_forward("fsdp")
    print(json.dumps({"case": "deep", "difference": float(abs(whole - split).max()), **facts}))
