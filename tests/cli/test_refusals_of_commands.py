"""Bad input, full disks and interrupts: one clear message, the right exit code, and every file as it was."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cli_models
import pytest
import safetensors.torch
import torch
from cli_tools import HERE, balanced, folder, invoke, record, refusal

from equinorm.cli import exactness
from equinorm.reporting import files

__all__ = ["folder"]


def test_existing_files_are_not_replaced(folder):
    (folder / "out.safetensors").write_bytes(b"precious")
    assert "--force" in refusal("balance", "cli_models:mlp", "--input", "2x8", "-o", "out.safetensors")
    assert (folder / "out.safetensors").read_bytes() == b"precious"
    (folder / "report.png").write_bytes(b"precious")
    assert "--force" in refusal(
        "balance", "cli_models:mlp", "--input", "2x8", "-o", "new.safetensors", "--report", "report.png"
    )
    assert not (folder / "new.safetensors").exists()
    balanced("mlp", "--force")
    assert safetensors.torch.load_file("out.safetensors")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("missing/out.safetensors", "no folder"),
        ("out.bin", "suffix"),
        ("/proc/out.safetensors", "cannot write /proc/out.safetensors"),
    ],
)
def test_targets_that_cannot_be_written(folder, target, expected):
    assert expected in refusal("balance", "cli_models:mlp", "--input", "2x8", "-o", target)
    assert os.listdir(folder) == []


def test_read_only_folder(folder, monkeypatch):
    (folder / "locked").mkdir(mode=0o500)
    if os.geteuid() == 0:  # the superuser may write everywhere
        monkeypatch.setattr(files.os, "access", lambda path, mode: mode & os.W_OK == 0)
    assert "read-only" in refusal("balance", "cli_models:mlp", "--input", "2x8", "-o", "locked/out.safetensors")


@pytest.mark.parametrize("step", ["save_file", "replace", "fsync"])
def test_failure_while_writing_leaves_everything(folder, monkeypatch, step):
    (folder / "out.safetensors").write_bytes(b"precious")

    def fail(*arguments, **options):
        if step == "save_file":
            Path(arguments[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch if step == "save_file" else files.os, step, fail)
    message = refusal("balance", "cli_models:mlp", "--input", "2x8", "-o", "out.safetensors", "--force")
    assert "No space left on device" in message
    assert os.listdir(folder) == ["out.safetensors"]
    assert (folder / "out.safetensors").read_bytes() == b"precious"


def test_inexact_results_are_refused(folder, monkeypatch):
    monkeypatch.setitem(exactness.LIMITS, torch.float32, 1e-12)
    message = refusal("balance", "cli_models:mlp", "--input", "2x8", "-o", "out.safetensors")
    assert "limit of 1e-12 for float32" in message
    assert "--power-of-two" in message
    assert os.listdir(folder) == []
    assert balanced("mlp", "--power-of-two")["deviation"] == 0


@pytest.mark.parametrize("command", ["align", "canonical", "equalize"])
def test_other_commands_refuse_inexact_results_in_the_same_words(folder, monkeypatch, command):
    monkeypatch.setitem(exactness.LIMITS, torch.float32, -1.0)
    models = ["cli_models:mlp"] * (2 if command == "align" else 1)
    message = refusal(command, *models, "--input", "2x8", "-o", "out.safetensors")
    assert "limit of -1 for float32" in message
    assert ("--permute-only" if command == "align" else "--power-of-two") in message
    assert os.listdir(folder) == []


def test_a_folder_that_is_not_there_is_named_before_its_output(folder):
    message = refusal("balance", "my-llama", "-o", "balanced", "--power-of-two")
    assert "'my-llama' is no model, and there is no folder of this name" in message
    (folder / "notes.md").touch()
    assert "'notes.md' is no model. Write" in refusal("inspect", "notes.md")


def test_models_without_numbers_are_told(folder):
    (folder / "bare.py").write_text("import torch\n\ndef net():\n    return torch.nn.Linear(8, 2, device='meta')\n")
    assert "weight of bare:net is on the meta device" in refusal("balance", "bare:net", "--input", "2x8", "-o", "o.safetensors")
    assert "--device meta" in refusal("compare", "bare:net", "bare:net", "--input", "2x8")
    assert record("inspect", "bare:net", "--input", "2x8", "--device", "meta")["num_free"] == 0


def test_keys_that_do_not_match_are_listed(folder):
    state = cli_models.mlp().state_dict()
    state["extra"] = torch.zeros(1)
    state["2.weight"] = torch.zeros(3, 3)
    del state["4.bias"]
    torch.save(state, folder / "w.pt")
    message = refusal("inspect", "cli_models:mlp", "--weights", "w.pt", "--input", "2x8")
    assert "1 missing in the file: 4.bias" in message
    assert "1 unexpected in the file: extra" in message
    assert "2.weight (file 3×3, model 12×16)" in message


def test_weights_saved_from_a_wrapper(folder):
    torch.save({f"module.{key}": value for key, value in cli_models.mlp().state_dict().items()}, folder / "w.pt")
    found = record("inspect", "cli_models:mlp", "--weights", "w.pt", "--input", "2x8")
    assert found["notes"] == ["w.pt: names were read without 'module.', which wrappers add"]
    torch.save({"epoch": 3, "state_dict": cli_models.mlp().state_dict()}, folder / "checkpoint.pt")
    assert record("inspect", "cli_models:mlp", "--weights", "checkpoint.pt", "--input", "2x8")["num_free"] == 28


def test_weights_are_never_unpickled(folder):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, ("owned",))

    torch.save({"0.weight": Evil()}, folder / "evil.pt")
    assert "evil.pt" in refusal("inspect", "cli_models:mlp", "--weights", "evil.pt", "--input", "2x8")
    assert not (folder / "owned").exists()


def test_weights_that_are_not_finite(folder):
    state = cli_models.mlp().state_dict()
    state["2.weight"][0, 0] = math.inf
    torch.save(state, folder / "w.pt")
    assert "NaN or inf in 2.weight" in refusal(
        "balance", "cli_models:mlp", "--weights", "w.pt", "--input", "2x8", "-o", "o.safetensors"
    )
    assert "2.weight" in refusal("balance", "cli_models:with_nan", "--input", "2x4", "-o", "o.safetensors")
    assert not (folder / "o.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("cli_models:mlp",), "--input"),
        (("cli_models:mlp", "--input", "2x9"), "float32[2, 9]"),
        (("cli_models:mlp", "--input", "two"), "'two' is no input"),
        (("cli_models:mlp", "--input", "float99:2x8"), "unknown dtype 'float99'"),
        (("cli_models:mlp", "--input", "missing.pt"), "no file missing.pt"),
        (("cli_models:nothing", "--input", "2x8"), "has no 'nothing'"),
        (("cli_modules:mlp", "--input", "2x8"), "no module 'cli_modules'"),
        (("cli_models", "--input", "2x8"), "package.module:factory"),
        (("cli_models:broken", "--input", "2x8"), "no such dataset"),
        (("cli_models:not_a_model", "--input", "2x8"), "returned no torch.nn.Module, but a value of type int"),
        (("missing.pt2",), "no file missing.pt2"),
        (("garbage.pt2",), "exported program"),
        (("cli_models:mlp", "--input", "2x8", "--weights", "garbage.safetensors"), "cannot read weights"),
        (("cli_models:mlp", "--input", "2x8", "--weights", "garbage.pt"), "cannot read weights"),
        (("cli_models:mlp", "--input", "2x8", "--weights", "garbage.txt"), "unknown suffix '.txt'"),
        (("cli_models:mlp", "--input", "2x8", "--weights", "missing.pt"), "no file missing.pt"),
    ],
)
def test_bad_input_is_one_message(folder, arguments, expected):
    for suffix in ("pt2", "safetensors", "pt", "txt"):
        (folder / f"garbage.{suffix}").write_bytes(b"garbage")
    assert expected in refusal("inspect", *arguments)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (("--p", "0"), "--p must be"),
        (("--p", "-1"), "--p must be"),
        (("--p", "nan"), "--p must be"),
        (("--p", "two"), "--p must be"),
        (("--c", "0"), "c must be"),
        (("--cycles", "-1"), "cycles must be"),
        (("--tol", "-1"), "tol must be"),
        (("--method", "fast"), "'two-level', 'cyclic'"),
    ],
)
def test_bad_options(folder, option, expected):
    for model in ("cli_models:mlp", "cli_models:not_there"):  # before a model is looked for
        assert expected in refusal("balance", model, "--input", "2x8", "-o", "o.safetensors", *option)
    assert os.listdir(folder) == []


def test_what_to_do_about_another_suffix(folder):
    assert "export the network with torch.onnx.export" in refusal("balance", "cli_models:mlp", "--input", "2x8", "-o", "o.onnx")
    assert "write my-llama without hf:" in refusal("balance", "hf:my-llama", "-o", "out")
    assert "without hf:" not in refusal("balance", "cli_models:mlp", "--input", "2x8", "-o", "out")


def test_files_that_are_cut_short(folder):
    state = cli_models.mlp().state_dict()
    safetensors.torch.save_file(state, folder / "w.safetensors")
    torch.save(state, folder / "w.pt")
    for path in (folder / "w.safetensors", folder / "w.pt"):
        path.write_bytes(path.read_bytes()[:-400])
        message = refusal("inspect", "cli_models:mlp", "--input", "2x8", "--weights", path.name)
        assert "it is damaged, cut short or something else (" in message


def test_debug_shows_what_the_exporter_said():
    assert "--debug shows the exporter's full report." in refusal("inspect", "cli_models:branching", "--input", "2x8")
    result = invoke("inspect", "cli_models:branching", "--input", "2x8", "--debug", code=2)
    assert "torch/export/_trace.py" in result.stderr


def test_debug_shows_the_traceback():
    result = invoke("inspect", "cli_models:broken", "--input", "2x8", "--debug", code=2)
    assert "Traceback" in result.stderr
    assert "ValueError: no such dataset" in result.stderr


# ------------------------------------------------------------------------------------------------------------ in a process


def command(*arguments, **options):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1] / "src"), str(HERE)]),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "equinorm.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def test_disk_that_fills_up(folder):
    """Files may hold 1,000 bytes here: the write itself fails half-way."""
    resource = pytest.importorskip("resource", reason="limits of processes are Unix's")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    with command("balance", "cli_models:mlp", "--input", "2x8", "-o", "out.safetensors", preexec_fn=limit) as process:
        out, err = process.communicate()
    assert process.returncode == 2, err
    assert out == ""
    assert err.startswith("error: cannot write out.safetensors")
    assert os.listdir(folder) == []


def test_interrupt(folder, interruptible):
    (folder / "slow.py").write_text(
        "import time, pathlib\ndef net():\n    pathlib.Path('started').touch()\n    time.sleep(60)\n", encoding="utf-8"
    )
    with command("balance", "slow:net", "--input", "2x8", "-o", "out.safetensors") as process:
        while not (folder / "started").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert out == ""
    assert err == "error: interrupted; no file is half-written.\n"
    assert set(os.listdir(folder)) <= {"started", "slow.py", "__pycache__"}
