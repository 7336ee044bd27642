"""The command `xkd-jax`, and what its verbs share."""

import os
import subprocess
import sys
import tomllib

import pytest

from tests.runs import ROOT
from xkd_jax.cli import verbs
from xkd_jax.cli.command import Parser, guard
from xkd_jax.distributed import processes
from xkd_jax.errors import UserError

HELP = """
import contextlib, importlib, sys
from xkd_jax.cli import verbs
for verb in ["", *verbs.VERBS]:
    with contextlib.suppress(SystemExit):
        sys.exit(verbs.main([verb, "--help"] if verb else ["--help"]))
print(sorted({"jax", "flax", "numpy"} & sys.modules.keys()))
"""


def call(*arguments, program=("-m", "xkd_jax")):
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_help_of_no_verb_imports_jax():
    done = call(program=("-c", HELP))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    for verb, (_, example) in verbs.VERBS.items():
        assert example in done.stdout
        assert done.stdout.count(f"usage: xkd-jax {verb} ") == 1
        assert f"  xkd-jax {verb} " in done.stdout.split(f"usage: xkd-jax {verb} ")[1]


@pytest.mark.parametrize("verb", [verb for verb in verbs.VERBS if verb != "train"])
def test_every_verb_is_a_module_too(verb):
    done = call("--help", program=("-m", f"xkd_jax.{verb}"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: xkd-jax {verb} ")


def test_the_installed_command_is_this_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"xkd-jax": f"{verbs.__name__}:main"}


def test_without_a_verb_it_lists_them(capsys):
    assert verbs.main([]) == 2
    assert "xkd-jax train --config quickstart" in capsys.readouterr().err
    assert verbs.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("xkd_jax ")


def test_an_unknown_verb_is_refused(capsys):
    assert verbs.main(["modles"]) == 2
    assert capsys.readouterr().err == "xkd_jax: unknown verb 'modles'; did you mean models?\n"


def test_arguments_reach_the_verb(tmp_path, capsys):
    assert verbs.main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no finished run" in capsys.readouterr().err
    assert verbs.main(["report"]) == 2
    assert capsys.readouterr().err == (
        "xkd_jax: the following arguments are required: folder; see xkd-jax report --help.\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("a is b; try c."), 2, "a is b; try c."),
        (FileNotFoundError(2, "No such file", "x"), 2, "x can't be read or written (No such file)"),
        (TimeoutError("timed out"), 2, "a file or connection failed (timed out)"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
        (
            RuntimeError("Unable to initialize backend 'tpu': no chip. (you may need to uninstall"),
            2,
            "JAX can't use the platform 'tpu' here (no chip); ",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_expected_failures_are_sentences(error, code, sentence, capsys):
    @guard
    def main(argv=None):
        raise error

    assert main() == code
    err = capsys.readouterr().err
    assert err.startswith("xkd_jax: ")
    assert sentence in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("bug"), AssertionError("bug")])
def test_bugs_keep_their_traceback(error):
    @guard
    def main(argv=None):
        raise error

    with pytest.raises(type(error), match="bug"):
        main()


def test_all_processes_of_a_run_end_together(monkeypatch):
    failures = []
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "fail", lambda text, code: failures.append((text, code)) or code)

    @guard
    def main(argv=None):
        raise ValueError("bug") if argv else UserError("a is b; try c.")

    assert main([]) == 2
    assert main(["x"]) == 1
    assert failures[0] == ("xkd_jax: a is b; try c.", 2)
    assert "Traceback" in failures[1][0]
    assert "ValueError: bug" in failures[1][0]


def test_a_closed_pipe_ends_quietly():
    code = """
from xkd_jax.cli.command import guard
@guard
def main(argv=None):
    for _ in range(100_000):
        print("a line of text")
    return 0
raise SystemExit(main())
"""
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=write, stderr=subprocess.PIPE
    ) as process:
        os.close(write)
        os.read(read, 10)
        os.close(read)
        assert process.communicate(timeout=60)[1] == b""
        assert process.returncode == 141


def test_wrong_options_raise_a_sentence():
    with pytest.raises(UserError, match=r"unrecognized arguments: --b; see xkd-jax a --help\."):
        Parser("a", "", "").parse_args(["--b"])
