"""The launch scripts: the commands they would run, and that XLA knows their flags."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = ("local.sh", "slurm.sh", "kubernetes.sh", "tpu_pod.sh", "until_done.sh")

# The rendered part of the JobSet API v1alpha2 (jobset.sigs.k8s.io) and batch/v1: every allowed
# field; "!" marks required ones.
JOBSET = {
    "apiVersion!": "jobset.x-k8s.io/v1alpha2",
    "kind!": "JobSet",
    "metadata!": {"name!": str},
    "spec!": {
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs!": [
            {
                "name!": str,
                "replicas": int,
                "template!": {
                    "spec!": {
                        "completionMode": "Indexed",
                        "completions": int,
                        "parallelism": int,
                        "backoffLimit": int,
                        "template!": {
                            "spec!": {
                                "restartPolicy!": "Never",
                                "terminationGracePeriodSeconds": int,
                                "nodeSelector": dict,
                                "containers!": [
                                    {
                                        "name!": str,
                                        "image!": str,
                                        "ports": [{"containerPort!": int}],
                                        "command": [str],
                                        "args": [str],
                                        "resources": {"limits": dict},
                                        "volumeMounts": [{"name!": str, "mountPath!": str}],
                                    }
                                ],
                                "volumes": [
                                    {
                                        "name!": str,
                                        "persistentVolumeClaim": {"claimName!": str},
                                        "emptyDir": {"medium": "Memory"},
                                    }
                                ],
                            }
                        },
                    }
                },
            }
        ],
    },
}


def conform(value, schema, where="JobSet"):
    """Asserts that `value` conforms to `schema`."""
    if isinstance(schema, dict):
        known = {name.rstrip("!"): inner for name, inner in schema.items()}
        required = {name[:-1] for name in schema if name.endswith("!")}
        assert required <= value.keys() <= known.keys(), where
        for name, inner in value.items():
            conform(inner, known[name], f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for inner in value:
            conform(inner, schema[0], f"{where}[]")
    elif isinstance(schema, type):
        assert type(value) is schema, where
    else:
        assert value == schema, where


def launch(script, *arguments, code=0, **variables):
    """The output of a script."""
    done = subprocess.run(
        [ROOT / "launch" / script, *map(str, arguments)],
        env=os.environ | {"PYTHON": sys.executable} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_an_example_and_a_wrong_option_is_named(script):
    assert f"launch/{script} " in launch(script, "--help")
    assert launch(script, "--hlep", code=2).startswith(f"{script}: unknown option --hlep;")


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("local.sh", ["--config", "a.py"], "unknown option --config"),
        ("local.sh", ["a.py"], "the number of processes is missing"),
        ("slurm.sh", ["--nodes", 2], "--workdir is missing"),
        ("slurm.sh", ["--nodes"], "--nodes needs a value"),
        ("kubernetes.sh", ["--name=a", "--image=b"], "--claim is missing"),
        ("kubernetes.sh", ["--name=a", "--image=b", "--claim=c", "--platform=x"], "platform 'x'"),
        ("tpu_pod.sh", ["--name=a"], "--zone is missing"),
    ],
)
def test_mistakes_end_in_one_sentence(script, arguments, sentence):
    error = launch(script, *arguments, code=2)
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_local_starts_a_command_for_each_process():
    lines = launch("local.sh", "--dry_run", "--port=99", 2, "--config", "a b.py").splitlines()
    for number, line in enumerate(lines):
        assert shlex.split(line)[1:] == [
            *("-m", "xkd_jax.main", "--config", "a b.py", "--coordinator", "127.0.0.1:99"),
            *("--num_processes", "2", "--process_id", str(number)),
        ]
    assert len(lines) == 2
    lines = launch("local.sh", "--dry_run", "--platform", "gpu", 3, "--config=a.py").splitlines()
    devices = [shlex.split(line)[:2] for line in lines]
    assert devices == [["env", f"JAX_LOCAL_DEVICE_IDS={number}"] for number in range(3)]


def test_slurm_job():
    job = launch(
        *("slurm.sh", "--workdir=/shared/my run", "--nodes", 4, "--gpus=2", "--partition=big"),
        *("--dry_run", "--", "--config", "a.py"),
    )
    directives = [line.split()[1] for line in job.splitlines() if line.startswith("#SBATCH")]
    assert {
        *("--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--partition=big"),
        *("--requeue", "--signal=TERM@300"),
    } <= set(directives)
    assert not any("account" in line for line in directives)
    # SLURM reads directives up to the first command.
    first = job.splitlines().index("set -euo pipefail")
    assert all("#SBATCH" not in line for line in job.splitlines()[first:])
    (command,) = (line for line in job.splitlines() if line.startswith("srun"))
    assert shlex.split(command)[2:] == [
        *("python", "-m", "xkd_jax.main", "--workdir", "/shared/my run", "--config", "a.py"),
    ]
    subprocess.run(["bash", "-n"], input=job, text=True, check=True)


@pytest.mark.parametrize(
    ("options", "limits", "selector"),
    [
        ([], {"nvidia.com/gpu": 8}, {}),
        (
            ["--platform=tpu", "--devices=4", "--accelerator=tpu-v5-lite-podslice",
             "--topology=4x4"],
            {"google.com/tpu": 4},
            {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
             "cloud.google.com/gke-tpu-topology": "4x4"},
        ),
    ],
)  # fmt: skip
def test_jobset(options, limits, selector):
    required = ("--name=a", "--image=hub/image:1", "--claim=runs", "--nodes=4")
    text = launch("kubernetes.sh", *required, *options, "--dry_run", "--", "--config", "a b.py")
    jobset = yaml.safe_load(text)
    conform(jobset, JOBSET)
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == 4
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == limits
    assert pod["nodeSelector"] == selector
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    words = shlex.split(container["args"][0])
    assert words[words.index("--config") + 1] == "a b.py"
    # JobSet's name of the first pod: SET-REPLICATEDJOB-JOB-POD.SUBDOMAIN.
    port = container["ports"][0]["containerPort"]
    assert words[words.index("--coordinator") + 1] == f"a-{job['name']}-0-0.a:{port}"
    assert words[words.index("--num_processes") + 1] == "4"
    assert words[words.index("--process_id") + 1] == "$JOB_COMPLETION_INDEX"
    assert words[words.index("launch/until_done.sh") + 1] == "/runs/a"


def test_tpu_pod_asks_trains_on_all_workers_and_gives_back():
    lines = launch(
        *("tpu_pod.sh", "--name=a", "--zone=z", "--accelerator=v5litepod-16"),
        *("--workdir=/mnt/a", "--dry_run", "--", "--config", "a.py"),
    ).splitlines()
    commands = [shlex.split(line) for line in lines]
    assert [command[4] for command in commands[1:]] == ["create", "scp", "ssh", "ssh", "delete"]
    assert "--spot" in commands[1]
    for command in commands[2:5]:
        assert command[command.index("--worker") + 1] == "all"
    train = commands[4][-1]
    assert train.endswith("xkd_jax.main --workdir /mnt/a --config a.py")
    assert "xla_flags tpu" in train


def test_until_done(tmp_path):
    """Exit code 75 if training stopped early without an error."""
    launch("until_done.sh", tmp_path, "true", code=75)
    launch("until_done.sh", tmp_path, "sh", "-c", "exit 3", code=3)
    (tmp_path / "report.md").touch()
    launch("until_done.sh", tmp_path, "true")


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_xla_knows_the_flags(platform):
    """XLA aborts on unknown flags; every build knows the flags of all platforms."""
    code = "import jax; print(jax.device_count())"
    command = f". launch/xla_flags.sh && xla_flags {platform} && exec {sys.executable} -c '{code}'"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.split()[-1] == "3"  # earlier flags are kept
