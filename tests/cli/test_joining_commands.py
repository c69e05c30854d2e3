"""`equinorm align` and `equinorm canonical`, and what `equinorm compare` says of what they write."""

import copy

import pytest
import torch
from cli_tools import folder, invoke, record, refusal
from safetensors.torch import load_file

import equinorm

__all__ = ["folder"]

MLP = "cli_models:mlp", "--input", "4x8"


@pytest.fixture
def twin(folder):
    """A file of weights for the same function: permuted and rescaled."""
    import cli_models

    net, x = cli_models.mlp(), torch.randn(4, 8)
    for group in (equinorm.permutations(net, x), equinorm.symmetries(net, x)):
        if isinstance(group, equinorm.Permutations):
            group.permute_(group.random(torch.Generator().manual_seed(0)))
        else:
            group.rescale_(torch.randn(group.num_free, generator=torch.Generator().manual_seed(1)).double())
    torch.save(net.state_dict(), "twin.pt")
    return net


def test_compare_says_what_joins(twin):
    found = record("compare", "cli_models:mlp", "twin.pt", "--input", "4x8")
    assert found["equivalent"]
    assert found["joined_by"] == ["permutation", "rescaling"]
    said = invoke("compare", "cli_models:mlp", "twin.pt", "--input", "4x8").stdout
    assert "equivalent by permutation and rescaling" in said
    assert record("compare", "cli_models:mlp", "cli_models:mlp", "--input", "4x8")["joined_by"] == []


def test_copies_have_one_canonical_file(twin):
    first = record("canonical", *MLP, "-o", "one.safetensors")
    invoke("canonical", *MLP, "--weights", "twin.pt", "-o", "other.safetensors")
    one, other = load_file("one.safetensors"), load_file("other.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)
    assert first["deviation"] <= first["limit"]
    assert first["ties"] == 0
    joined = record("compare", "cli_models:mlp", "one.safetensors", "--input", "4x8")["joined_by"]
    assert joined == ["permutation", "rescaling"]
    assert "exists" in refusal("canonical", *MLP, "-o", "one.safetensors")


def test_permuted_copies_have_the_same_bits(folder):
    import cli_models

    net, x = cli_models.mlp(), torch.randn(4, 8)
    permutations = equinorm.permutations(net, x)
    permutations.permute_(permutations.random())
    torch.save(net.state_dict(), "twin.pt")
    said = invoke("canonical", *MLP, "--power-of-two", "-o", "one.safetensors").stdout
    assert "rounded to powers of two" in said
    invoke("canonical", *MLP, "--power-of-two", "--weights", "twin.pt", "-o", "other.safetensors")
    assert (folder / "one.safetensors").read_bytes() == (folder / "other.safetensors").read_bytes()


def test_align_finds_a_copy_again(twin):
    pytest.importorskip("scipy")
    import cli_models

    found = record("align", "cli_models:mlp", "twin.pt", "--input", "4x8", "-o", "near.safetensors")
    assert found["distance_after"] < 1e-3 < found["distance_before"]
    near = copy.deepcopy(cli_models.mlp())
    near.load_state_dict(load_file("near.safetensors"))
    for a, b in zip(near.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    again = "align", "cli_models:mlp", "twin.pt", "--input", "4x8", "--permute-only", "--force", "-o", "near.safetensors"
    assert "distance" in invoke(*again).stdout
    halves = "align", "cli_models:half", "cli_models:half", "--input", "4x8", "-o", "half.safetensors"
    assert "float16 would round them: --power-of-two moves them too" in record(*halves)["notes"][0]
    assert not record(*halves, "--force", "--power-of-two")["notes"]


def test_what_cannot_be_is_refused(folder):
    assert "is an ONNX file" in refusal("canonical", "net.onnx", "-o", "out.safetensors")
    assert "is an ONNX file" in refusal("align", "cli_models:mlp", "net.onnx", "--input", "4x8", "-o", "out.safetensors")
    others = "align", "cli_models:mlp", "cli_models:gelu", "--input", "4x8", "-o", "out.safetensors"
    assert "different operations" in refusal(*others)
    assert ".safetensors" in refusal("canonical", *MLP, "-o", "out.pt")
    assert not list(folder.glob("*.safetensors"))
