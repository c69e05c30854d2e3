"""Weights on the command line are those of the file: its dtype, its numbers, its names but for what wrappers add."""

import os
from pathlib import Path

import cli_models
import numpy as np
import pytest
import safetensors.torch
import torch
from cli_tools import folder, record, refusal
from torch import nn

from equinorm.cli.weights import InputError, load_weights

__all__ = ["folder"]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


@pytest.fixture
def factories(folder, monkeypatch):
    """One factory for each dtype, with weights of its own."""
    (folder / "sized.py").write_text(
        "import torch\nimport cli_models\n"
        + "".join(f"def {name}():\n    return cli_models.mlp().to(torch.{name})\n" for name in DTYPES)
    )
    state = {key: value.double() * 1.01 for key, value in cli_models.mlp().state_dict().items()}
    for name, dtype in DTYPES.items():
        safetensors.torch.save_file({key: value.to(dtype) for key, value in state.items()}, f"{name}.safetensors")


@pytest.mark.parametrize("file", DTYPES)
@pytest.mark.parametrize("factory", DTYPES)
def test_dtype_is_that_of_the_file(factories, factory, file):
    rounded = ["--power-of-two"] if file == "bfloat16" else []
    arguments = [f"sized:{factory}", "--input", "2x8", "--weights", f"{file}.safetensors"]
    found = record("balance", *arguments, *rounded, "-o", "out.safetensors")
    assert found["dtype"] == file
    assert {value.dtype for value in safetensors.torch.load_file("out.safetensors").values()} == {DTYPES[file]}
    assert [f"6 in {file} where the model has {factory}" in note for note in found["notes"]] == [True] * (factory != file)
    verdict = record("compare", f"sized:{factory}", "out.safetensors", *arguments[1:])
    assert verdict["limit"] == {"float64": 1e-12, "float32": 1e-5, "bfloat16": 8e-2}[file]
    assert verdict["equivalent"]


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_tensor_is_bitwise_that_of_the_file(folder, dtype):
    state = {
        key: value + 0.1 if value.is_floating_point() else value for key, value in network(torch.float64).state_dict().items()
    }
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    torch.save(state, "w.pt")
    model = network()
    objects = list(model.parameters())
    load_weights(model, folder / "w.pt")
    assert all(torch.equal(value, state[key]) and value.dtype == state[key].dtype for key, value in model.state_dict().items())
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))


def test_several_dtypes_in_one_file(folder):
    state = network().state_dict()
    state["3.weight"] = state["3.weight"].half()
    torch.save(state, "w.pt")
    model = network(torch.float64)
    load_weights(model, folder / "w.pt")
    assert [parameter.dtype for parameter in model.parameters()] == [*[torch.float32] * 4, torch.float16, torch.float32]


def test_ties_outlast_another_dtype(folder):
    """Tied by one parameter, and by two that share memory; the file holds one name of each."""
    model, shared = cli_models.tied(), nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    shared[1].weight.data = shared[0].weight.data
    state = {key: value.double() + 1e-9 for key, value in model.state_dict().items() if key != "head.weight"}
    torch.save(state, "tied.pt")
    load_weights(model, folder / "tied.pt")
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, state["embed.weight"])
    torch.save({"0.weight": torch.eye(3, dtype=torch.float64)}, "shared.pt")
    load_weights(shared, folder / "shared.pt")
    assert torch.equal(shared[1].weight, torch.eye(3, dtype=torch.float64))
    assert shared[0].weight.data_ptr() == shared[1].weight.data_ptr()


def test_ties_that_differ_in_the_file_are_refused(folder):
    state = cli_models.tied().state_dict()
    state["head.weight"] = state["head.weight"] + 1
    torch.save(state, "w.pt")
    with pytest.raises(InputError, match=r"does not hold the weights of .* as they are"):
        load_weights(cli_models.tied(), folder / "w.pt")


def test_numbers_of_another_kind_are_refused(folder):
    torch.save({key: value.long() for key, value in cli_models.mlp().state_dict().items()}, "w.pt")
    message = refusal("inspect", "cli_models:mlp", "--weights", "w.pt", "--input", "2x8")
    assert "6 of another kind of number: 0.weight (file int64, model float32)" in message


def test_exported_programs_keep_their_dtype(folder):
    torch.export.save(torch.export.export(cli_models.mlp().eval(), (torch.randn(3, 8),)), "net.pt2")
    torch.save(cli_models.double().state_dict(), "w.pt")
    assert "exported in float32" in refusal("inspect", "net.pt2", "--weights", "w.pt")


def test_models_of_two_dtypes_are_not_compared(factories):
    arguments = ["compare", "sized:float32", "float32.safetensors", "--weights", "float64.safetensors", "--input", "2x8"]
    message = refusal(*arguments)
    assert "sized:float32 holds float64 and float32.safetensors holds float32" in message


# ------------------------------------------------------------------------------------------------------------------- names


STATE = cli_models.mlp().state_dict()


def renamed(name):
    return {name(key): value for key, value in STATE.items()}


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        (STATE, []),
        (renamed(lambda key: f"module.{key}"), ["names were read without 'module.', which wrappers add"]),
        (renamed(lambda key: f"_orig_mod.{key}"), ["names were read without '_orig_mod.', which wrappers add"]),
        (
            renamed(lambda key: f"_orig_mod.module.{key}"),
            ["names were read without '_orig_mod.' and 'module.', which wrappers add"],
        ),
        (renamed(lambda key: key.replace(".", "._orig_mod.")), ["names were read without '_orig_mod.', which wrappers add"]),
        (renamed(lambda key: f"net.{key}"), ["names were read without the prefix 'net.'"]),
        ({"state_dict": STATE, "epoch": 3}, ["the weights below 'state_dict' were read"]),
        ({"model": STATE, "optimizer": {"state": {}, "param_groups": []}}, ["the weights below 'model' were read"]),
        ({"model": STATE, "model_ema": STATE}, ["the weights below 'model' were read, not those below 'model_ema'"]),
        ({"generator": STATE, "step": 1}, ["the weights below 'generator' were read"]),
        (
            {"state_dict": renamed(lambda key: f"model.{key}")},
            ["the weights below 'state_dict' were read", "names were read without the prefix 'model.'"],
        ),
    ],
)
def test_what_is_left_out_of_a_file_is_said(folder, content, notes):
    torch.save(content, "w.pt")
    found = record("compare", "cli_models:mlp", "w.pt", "--input", "2x8")
    assert found["deviation"] == 0
    assert found["notes"] == [f"w.pt: {note}" for note in notes]


def test_wrapped_models_take_plain_names(folder):
    model = nn.DataParallel(cli_models.mlp())
    torch.save(STATE, "w.pt")
    (note,) = load_weights(model, folder / "w.pt")
    assert "'module.'" in note


def test_several_state_dicts_are_a_question(folder):
    torch.save({"a": STATE, "b": STATE}, "w.pt")
    assert "below 'a', 'b'" in refusal("inspect", "cli_models:mlp", "--weights", "w.pt", "--input", "2x8")


def test_a_name_of_the_model_is_no_wrapper(folder):
    """What only looks like a wrapper's prefix does not make two tensors one."""
    model = nn.ModuleDict({"module": nn.Linear(2, 2, bias=False)})
    model.weight = nn.Parameter(torch.zeros(2, 2))
    torch.save({"module.weight": torch.ones(2, 2)}, "w.pt")
    with pytest.raises(InputError, match="1 missing in the file: weight"):
        load_weights(model, folder / "w.pt")


# ------------------------------------------------------------------------------------------------------------------- files


def half(name):
    content = Path(name).read_bytes()
    Path(name).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("suffix", "write", "cause"),
    [
        ("safetensors", lambda name: (safetensors.torch.save_file(STATE, name), half(name)), "file not fully covered"),
        ("safetensors", lambda name: Path(name).write_text("<!doctype html>" * 9), "header too large"),
        ("safetensors", lambda name: Path(name).touch(), "it is empty"),
        ("pt", lambda name: (torch.save(STATE, name), half(name)), "failed finding central directory"),
        ("pt", lambda name: Path(name).write_text("import torch\n"), "was not written by torch.save"),
        ("pt", lambda name: Path(name).write_text("0.1 0.2\n"), "was not written by torch.save"),
        ("pt", lambda name: Path(name).touch(), "it is empty"),
        ("pt", lambda name: torch.save(cli_models.mlp(), name), "more than tensors (torch.nn.modules.container.Sequential)"),
        ("pt", lambda name: torch.save({"x": np.zeros(3)}, name), "more than tensors (numpy"),
        ("pt", lambda name: torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), name), "a TorchScript archive"),
    ],
)
@pytest.mark.parametrize("option", ["--weights", "--input"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_files_that_cannot_be_read_say_why(folder, suffix, write, cause, option):
    name = f"file.{suffix}"
    write(name)
    message = refusal("inspect", "cli_models:mlp", "--input", "2x8", option, name)
    assert f"cannot read {'weights' if option == '--weights' else 'inputs'} from {name}: " in message
    assert cause in message
    assert "weights_only" not in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([STATE["0.weight"]], "a value of type list"),
        (3, "a value of type int"),
        ({0: torch.zeros(2)}, "0: Tensor"),
        ({**STATE, "epoch": 3}, "'epoch': int"),
    ],
)
def test_files_without_a_state_dict(folder, content, part):
    torch.save(content, "w.pt")
    message = refusal("inspect", "cli_models:mlp", "--input", "2x8", "--weights", "w.pt")
    assert "holds no state dict" in message
    assert part in message


@pytest.mark.parametrize("content", ["text", ["text"], {0: torch.zeros(2, 8)}])
def test_inputs_that_no_model_takes(folder, content):
    torch.save(content, "x.pt")
    assert "x.pt holds inputs that no model takes" in refusal("inspect", "cli_models:mlp", "--input", "x.pt")


@pytest.mark.parametrize("shape", ["99999999999x99999999999", "qint8:2x8"])
def test_shapes_that_cannot_be_made(shape):
    assert f"cannot make the input {shape!r}" in refusal("inspect", "cli_models:mlp", "--input", shape)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_files_that_may_not_be_read(folder):
    torch.save(STATE, "w.pt")
    (folder / "w.pt").chmod(0)
    assert "Permission denied" in refusal("inspect", "cli_models:mlp", "--input", "2x8", "--weights", "w.pt")


def test_floats_of_one_byte_are_read(folder):
    """torch cannot tell whether they are finite."""
    state = {key: value.to(torch.float8_e4m3fn) if value.dim() == 2 else value for key, value in network().state_dict().items()}
    torch.save(state, "w.pt")
    model = network()
    load_weights(model, folder / "w.pt")
    assert model[0].weight.dtype == torch.float8_e4m3fn
