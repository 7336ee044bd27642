"""Every method gives the same result on one device and on eight."""

import json
import os
import subprocess
import sys

import pytest

from xkd_jax.methods import METHODS

pytestmark = pytest.mark.slow


# In CI the sum of three kinds: an adversary, a memory bank, a loss over all pairs of images.
KINDS = "cakd+crd+rkd"
ALL = [
    KINDS,
    *(
        pytest.param(name, marks=pytest.mark.exhaustive)
        for name, method in METHODS.items()
        if method.needs_teacher
    ),
]


@pytest.fixture(scope="module")
def differences(request):
    """The differences of each selected method, from one process with eight devices."""
    names = [
        item.callspec.params["method"]
        for item in request.session.items
        if getattr(item, "function", None) is test_ten_steps_on_eight_devices_are_those_on_one
    ]
    names = dict.fromkeys([KINDS, *names])
    flags = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "tests.distributed.devices", *names]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["method"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("method", ALL)
def test_ten_steps_on_eight_devices_are_those_on_one(differences, method):
    # The gradient of FT's distance is a sign: where rounding flips it, results differ by a step.
    assert differences[method]["difference"] < (1e-2 if method == "ft" else 1e-3)


def test_memory_banks_are_split_over_the_devices(differences):
    assert differences[KINDS]["sharded"] == 2  # crd's, of the teacher and of the student


@pytest.mark.exhaustive
def test_margins_are_on_every_device(differences):
    assert differences["ofd"]["sharded"] == 0
