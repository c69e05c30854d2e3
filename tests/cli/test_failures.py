"""However a command fails: exit code 2, in the words of the command line, as JSON with --json; interrupts from the start on."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cli_models
import pytest
import torch
from cli_tools import HERE, balanced, folder, invoke, record, refusal
from experiment_tools import TINY, result
from safetensors.torch import save_file

import equinorm
from equinorm.cli import compare, wording
from equinorm.cli.wording import worded
from equinorm.experiments import results

__all__ = ["folder"]

SOURCE = HERE.parents[1] / "src"
COMMAND = [sys.executable, str(SOURCE / "equinorm_command.py")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SOURCE), str(HERE)])}
MLP = ["cli_models:mlp", "--input", "2x8"]


@pytest.fixture
def broken(monkeypatch):
    """Comparing fails in a way that nobody has foreseen."""

    def fail(*arguments, **options):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(compare, "deviation", fail)


# -------------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize("more", [[], ["--debug"]])
def test_compare_that_fails_does_not_say_that_models_differ(broken, more):
    result = invoke("compare", "cli_models:mlp", *MLP, *more, code=2)
    assert "unexpected ZeroDivisionError: division by zero" in result.stderr
    assert ("Traceback" in result.stderr) == bool(more)


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit(1), MemoryError(), RecursionError("deep")])
def test_whatever_ends_a_comparison_is_no_verdict(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(compare, "deviation", fail)
    assert invoke("compare", "cli_models:mlp", *MLP, code=2).stdout == ""


def test_compare_that_cannot_print_has_compared_all_the_same():
    """`equinorm compare … | true`: whoever reads may stop."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [*COMMAND, "compare", "cli_models:mlp", "cli_models:mlp", "--input", "2x8"]
    with subprocess.Popen(arguments, stdout=writer, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        os.close(writer)
        _, err = process.communicate()
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize(("shell", "code"), [(">&- 2>&-", 0), ("> /dev/full", 2)])
@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_closed_and_full_streams(shell, code):
    command = " ".join([*COMMAND, "compare", "cli_models:mlp", "cli_models:mlp", "--input", "2x8", shell])
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert ran.returncode == code
    assert ran.stderr == ("error: cannot print the result: No space left on device.\n" if code else "")
    assert ("outputs  equal" in ran.stdout) == (shell == "2>&-")


def test_scripts_and_models_that_end_the_program(folder):
    (folder / "script.py").write_text("import sys\nsys.exit(0)\n")
    assert "ends the program (code 0)" in refusal("inspect", "script:net", "--input", "2x8")
    (folder / "ending.py").write_text(
        "import sys, torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        sys.exit(0)\n"
    )
    assert "ends the program (code 0)" in refusal("inspect", "ending:Net", "--input", "2x8")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["figures", "results.jsonl", "-o", "file"], "cannot create the folder file: File exists"),
        (["figures", "results.jsonl", "-o", "file/x"], "cannot create the folder file/x: Not a directory"),
        (["train", "--results", "folder.jsonl"], "cannot read folder.jsonl: Is a directory"),
        (["train", "--preset", "sweep.json"], "depths must be a list such as [1]"),
        (["train", "--methods", ""], "write values such as bn,enorm"),
        (["train", "--set", "width=0"], "width must be a number of at least 1, not 0"),
        (["train", "--set", "weight_decay=nan"], "weight_decay must be a number of at least 0, not nan"),
        (["train", "--batches", "-4"], "batch must be a number of at least 1, not -4"),
        (["train", "--methods", "path_sgd:path_every=0"], "path_every must be a number of at least 1, not 0"),
        (["train", "--methods", "enorm_exact:p=inf"], "enorm_exact follows the minimum of a finite p"),
        (["train", "--methods", "enorm:p=-1"], "p must be a number from 0.01 to 100, or inf, not -1.0"),
        (["train", "--device", "gpu"], "--device gpu: there are cpu, cuda"),
        (["train", "--workers", "0"], "--workers must be at least 1, not 0"),
    ],
)
def test_experiments_refuse_what_cannot_be_run(folder, arguments, part):
    (folder / "file").touch()
    (folder / "folder.jsonl").mkdir()
    (folder / "sweep.json").write_text('{"depths": 3}')
    kept = results.Results(folder / "results.jsonl")
    kept.append(result(TINY))
    assert part in refusal(
        *arguments, *(["--workers", "1"] if arguments[0] == "train" and "--workers" not in arguments else [])
    )


# ----------------------------------------------------------------------------------------------------------- errors as JSON


@pytest.mark.parametrize(
    ("arguments", "kind", "part"),
    [
        (["inspect", "cli_models:nothing", "--input", "2x8"], "InputError", "has no 'nothing'"),
        (["balance", *MLP, "-o", "o.safetensors", "--p", "-1"], "BalanceError", "--p must be"),
        (["compare", "cli_models:mlp"], "MissingParameter", "'B'"),
        (["inspect", *MLP, "--colour"], "NoSuchOption", "--colour"),
        (["balance", *MLP, "-o", "o.safetensors", "--cycles", "many"], "BadParameter", "--cycles"),
        (["bogus"], "UsageError", "bogus"),
        (["train", "--methods", "adam"], "ExperimentError", "there is no method 'adam'"),
        (["figures", "missing.jsonl"], "ExperimentError", "no file missing.jsonl"),
        (["demo", "--report", "a.pdf"], "OutputError", "a.pdf"),
    ],
)
def test_errors_are_json_with_json(arguments, kind, part):
    result = invoke(*arguments, "--json", code=2)
    error = json.loads(result.stdout)["error"]
    assert (error["kind"], error["exit_code"]) == (kind, 2)
    assert part in error["message"]
    assert result.stderr == ""


def test_unexpected_errors_are_json_too(broken):
    error = record("compare", "cli_models:mlp", *MLP, code=2)["error"]
    assert error["kind"] == "ZeroDivisionError"
    assert record("compare", "cli_models:mlp", *MLP, "--debug", code=2)["error"] == error


def test_json_leaves_help_and_versions_alone():
    assert "Usage" in invoke("inspect", "--json", "--help").stdout


# ------------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Use powers of two (power_of_two=True), or", "Use powers of two (--power-of-two), or"),
        ("declare it opaque (opaque='a.b') so", "declare it opaque (--opaque a.b) so"),
        ("(opaque=['a.b', 'c'])", "(--opaque a.b --opaque c)"),
        ("opaque: the model never calls", "--opaque: the model never calls"),
        ("cycles must be None or an integer of at least 0, not -1.", "--cycles must be an integer of at least 0, not -1."),
        ("p must be a number from 0.01 to 100, or math.inf, not -1.", "--p must be a number from 0.01 to 100, or inf, not -1."),
        ("method='two-level' or method='cyclic' for p = inf", "--method two-level or --method cyclic for p = inf"),
        ("biases=True counts; tol=1e-06, c=1.2, p=math.inf", "--biases counts; --tol 1e-06, --c 1.2, --p inf"),
        ("with use_cache=False", "with use_cache=False"),
        ("largest must be a number above 1, not 0.5.", "--largest must be a number above 1, not 0.5."),
        ("free='act' is the name of no bounded", "--free-only act is the name of no bounded"),
        ("Give fold=False or free=False to prepare", "Give --no-fold or --no-free to prepare"),
        ("x.p=3 and `p=3`", "x.p=3 and `p=3`"),
        ("group must be 1, or a step c must be", "group must be 1, or a step c must be"),
    ],
)
def test_arguments_are_worded_as_options(text, expected):
    assert worded(text) == expected


def test_every_option_exists():
    text = "".join(invoke(command, "--help").stdout for command in ("inspect", "balance", "compare", "equalize"))
    for option in (*wording.OPTIONS.values(), *wording.OFF.values()):
        assert re.search(rf"{option}\s", text), option


PYTHON = re.compile(r"\b(?:power_of_two|opaque|biases|cycles|tol|method|p|c)=|math\.inf|\bNone\b|None or")


@pytest.mark.parametrize(
    "arguments",
    [
        ["balance", "cli_models:half", "--input", "2x8"],
        ["balance", "cli_models:branching", "--input", "2x8"],
        *([["balance", *MLP, option, value] for option, value in [("--p", "0"), ("--p", "200"), ("--cycles", "-1")]]),
        *([["balance", *MLP, option, value] for option, value in [("--c", "0"), ("--tol", "-1"), ("--method", "fast")]]),
        ["balance", *MLP, "--opaque", ""],
    ],
)
def test_errors_of_commands_do_not_speak_python(arguments):
    message = refusal(*arguments, "-o", "o.safetensors")
    assert "--" in message
    assert PYTHON.search(message) is None


def test_bounds_of_p_are_in_the_help():
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", invoke("balance", "--help").stdout).split())
    assert "a number from 0.01 to 100, or inf" in text


# ------------------------------------------------------------------------------------------------------------------ advice


def test_a_factory_with_a_fault_of_its_own(folder):
    (folder / "faulty.py").write_text("def net():\n    return {}['hidden']\n\ndef sized(width, depth=2):\n    pass\n")
    message = refusal("inspect", "faulty:net", "--input", "2x8")
    assert "raised KeyError: 'hidden', at faulty.py:2 `return {}['hidden']`" in message
    assert "Wrap" not in message
    message = refusal("inspect", "faulty:sized", "--input", "2x8")
    assert "takes arguments (width)" in message
    assert "Say --set width=…, or wrap it" in message


def test_a_factory_is_not_the_file_that_was_balanced(folder):
    """Compared without --weights, the factory's own weights are those of another network: a hint, and only then."""
    torch.save({key: value + 1 for key, value in cli_models.mlp().state_dict().items()}, "w.pt")
    balanced("mlp", "--weights", "w.pt")
    found = record("compare", "cli_models:mlp", "out.safetensors", "--input", "2x8", code=1)
    assert any("with --weights" in note for note in found["notes"])
    assert record("compare", "cli_models:mlp", "out.safetensors", "--weights", "w.pt", "--input", "2x8")["notes"] == []
    torch.save(cli_models.mlp().state_dict(), "own.pt")
    assert record("compare", "cli_models:mlp", "own.pt", "--input", "2x8")["notes"] == []


# ------------------------------------------------------------------------------------------------------------ piped output


def test_names_stay_whole_where_output_is_piped(folder):
    (folder / "deep.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))\n"
        f"    for name in {[f'{word}_projection_of_the_block' for word in ('outer', 'middle', 'inner', 'last')]}:\n"
        "        model = nn.Sequential(__import__('collections').OrderedDict({name: model}))\n"
        "    return model\n"
    )
    name = ".".join(f"{word}_projection_of_the_block" for word in ("last", "inner", "middle", "outer"))
    assert len(name) > 100
    text = invoke("inspect", "deep:net", "--input", "2x8").stdout
    assert f"{name}.0.weight[0]" in text
    assert f"{name}.2.weight[0]" in text.split("Pinned channels")[1]
    assert f"{name}.2.weight" in invoke("balance", "deep:net", "--input", "2x8", "-o", "o.safetensors").stdout


def test_stdout_holds_the_result_alone(folder):
    (folder / "loud.py").write_text(
        "import os, cli_models\n"
        "def net():\n    os.system('echo of a shell')\n    print('of Python')\n    return cli_models.mlp()\n"
    )
    arguments = [*COMMAND, "inspect", "loud:net", "--input", "2x8", "--json"]
    ran = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert json.loads(ran.stdout)["num_free"] == 28
    assert sorted(ran.stderr.splitlines()) == ["of Python", "of a shell"]


# -------------------------------------------------------------------------------------------------------------- interrupts


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_interrupt_while_pytorch_is_imported(folder, interruptible, more):
    """Ctrl-C in the first seconds, wherever imports are by then."""
    (folder / "torch.py").write_text("import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(60)\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(folder), ENVIRONMENT["PYTHONPATH"]])}
    arguments = [*COMMAND, "inspect", *MLP, *more]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not (folder / "started").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    message = "interrupted; no file is half-written."
    if more:
        assert json.loads(out) == {"error": {"kind": "KeyboardInterrupt", "message": message, "exit_code": 130}}
        assert err == ""
    else:
        assert (out, err) == ("", f"error: {message}\n")


def test_little_is_imported_before_interrupts_are_listened_to():
    """Ctrl-C before that shows a traceback of imports."""
    program = "import sys; before = {*sys.modules}; import equinorm_command; print(*sorted({*sys.modules} - before))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    imported = ran.stdout.split()
    assert "equinorm_command" in imported
    assert not {"email", "importlib.metadata", "rich", "torch", "typer"} & {*imported}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("seconds", [0.3])
def test_interrupt_while_workers_start(folder, interruptible, seconds):
    """Ctrl-C reaches the whole group; processes that still import PyTorch have nothing to say to it."""
    arguments = [*COMMAND, "train", "--workers", "2"]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while process.poll() is None and len(children.read_text().split()) < 3:  # two, and one that tracks resources
            time.sleep(0.01)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "error: interrupted; no file is half-written.\n")


def test_the_command_is_the_command_line():
    for argument, text in (("--version", f"equinorm {equinorm.__version__}\n"), ("--help", invoke("--help").stdout)):
        program = "import sys, equinorm_command\ntry: equinorm_command.main()\nfinally: assert 'torch' not in sys.modules"
        run = [sys.executable, "-c", program, argument]
        ran = subprocess.run(run, capture_output=True, text=True, env=ENVIRONMENT, check=True)
        assert re.sub(r"Usage: \S+", "", ran.stdout).split() == re.sub(r"Usage: \S+", "", text).split()
    script = (HERE.parents[1] / "pyproject.toml").read_text("utf-8")
    assert 'equinorm = "equinorm_command:main"' in script
    assert "src/equinorm_command.py" in script


# ------------------------------------------------------------------------------------------------------- other systems


UNIX = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "posix", "readline", "curses"}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.stem)
def test_what_only_unix_has_is_imported_where_it_is_used(path):
    tree = ast.parse(path.read_text("utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert not names & UNIX


def test_commands_start_without_what_only_unix_has():
    program = (
        "import sys\nfor name in ('fcntl', 'resource', 'termios'):\n    sys.modules[name] = None\n"
        "import equinorm_command\nequinorm_command.application()"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_commands_are_listed_without_sources():
    """As in an archive: then by importing them."""
    program = (
        "import sys, pathlib, equinorm_command\nread = pathlib.Path.read_text\n"
        "def sourceless(path, *options, **more):\n    if path.parent.name == 'cli': raise FileNotFoundError\n"
        "    return read(path, *options, **more)\npathlib.Path.read_text = sourceless\n"
        "assert equinorm_command.described(equinorm_command.COMMANDS) == []\n"
        "sys.argv = ['equinorm', '--help']\nequinorm_command.main()"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Write the rescaling-equivalent weights" in ran.stdout


def test_results_need_locks(monkeypatch, folder):
    """Said before the first run, not after it."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr("equinorm.cli.train.compare", lambda *arguments: pytest.fail("a run was started"))
    message = refusal("train", "--workers", "1", "--results", "r.jsonl")
    assert "fcntl" in message
    assert "Leave out --results" in message
    assert os.listdir(folder) == []
    assert results.Results(Path("r.jsonl")).by_run == {}  # reading needs none


def test_names_of_tensors_do_not_drive_the_terminal(folder):
    save_file({"we\x1b[31mred": torch.ones(2)}, "red.safetensors")
    assert "1 unexpected in the file: we\\x1b[31mred." in invoke("compare", *MLP, "red.safetensors", code=2).stderr
