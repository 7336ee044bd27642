"""Steps with replicated and with split weights, in a process with eight devices: prints JSON.

python -m tests.fsdp (run by test_fsdp.py)
"""

import dataclasses
import json

import jax

from tests.distributed import difference
from tests.pairs import PAIRS, pair_task
from xkd_jax import hlo, memory, partition, train
from xkd_jax.feed import create_feed

STEPS = 3
# Of the teacher and the student.
CASES = {
    "replicated": ("replicated", "replicated"),
    "teacher": ("fsdp", "replicated"),
    "student": ("replicated", "fsdp"),
}


def split_leaves(tree):
    return sum("data" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(tree))


def train_steps(teacher_rule, student_rule):
    """The last state, and what there is to tell about it and the compiled step."""
    changes = {"mesh": {"teacher": teacher_rule, "student": student_rule}, "ema": {"decay": 0.9}}
    task = pair_task("cakd", PAIRS["ViT to ResNet"], **changes)
    state, feed, variables = train.init_state(task), create_feed(task), task.teacher.variables
    rule = task.config.mesh.teacher
    teacher = partition.put(variables, partition.of_teacher(task.mesh, variables, rule))
    step_fn = train.compile_step(task, state, teacher, feed.arrays)
    facts = {"sizes": memory.parts(state, teacher, feed.arrays)}
    for _, batch in zip(range(STEPS), feed.batches(0), strict=False):
        state, _ = step_fn(state, teacher, feed.arrays, batch)
    facts["split"] = {
        "teacher": split_leaves(teacher),
        "params": split_leaves(state.params),
        "opt_state": split_leaves(state.opt_state),
        "ema": split_leaves(state.ema["params"]),
        "method_params": split_leaves(state.method_params),
    }
    facts["collectives"] = [dataclasses.asdict(c) for c in hlo.collectives(step_fn.as_text())]
    trained = state.params, state.method_params, state.adversary
    facts["trained"] = sum(leaf.nbytes for leaf in jax.tree.leaves(trained))
    facts["teacher"] = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    facts["student"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    facts["images"] = feed.arrays["image"].nbytes
    return state, facts


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    partition.SPLIT_FROM = 128  # the networks are tiny; no vector is split
    first = None
    for case, rules in CASES.items():
        state, facts = train_steps(*rules)
        first = first or state
        facts["difference"] = difference(first, state)
        print(json.dumps({"case": case, **facts}), flush=True)
