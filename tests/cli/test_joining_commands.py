"""`equinorm align` and `equinorm canonical`, and what `equinorm compare` says of what they write."""

import copy

import pytest
import torch
from checkpoint_models import logits, save
from cli_tools import folder, invoke, record, refusal
from safetensors.torch import load_file

import equinorm
from equinorm.checkpoints.folder import open_checkpoint
from equinorm.checkpoints.saving import write_folder
from equinorm.checkpoints.stored import CheckpointError
from equinorm.cli import memory

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


def names(path):
    return sorted(part.name for part in path.iterdir())


def test_folders_become_folders(folder, monkeypatch):
    pytest.importorskip("scipy")
    save("llama", "a", "60KB", torch.float32)
    (folder / "a" / "tokenizer.json").write_text("{}")
    (folder / "a" / "pytorch_model.bin").write_bytes(b"old")
    found = record("canonical", "a", "--power-of-two", "-o", "b")
    assert found["families_moved"]
    assert "pytorch_model.bin" in found["notes"][0]
    near = record("align", "a", "b", "--rescale", "--power-of-two", "-o", "near")
    assert near["distance_after"] < 1e-6 < near["distance_before"]
    assert near["output"] == "near"
    expected = logits("a")
    for name in ("b", "near"):
        assert names(folder / "a") == sorted([*names(folder / name), "pytorch_model.bin"])
        torch.testing.assert_close(logits(name), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert len([*(folder / "near").glob("*.safetensors")]) > 1
    assert "near exists, and folders are not replaced" in refusal("align", "a", "b", "--force", "-o", "near")
    assert "goes to a folder: name one with --output" in refusal("align", "a", "b", "-o", "near.safetensors")
    assert "hf:a is loaded as a whole" in refusal("canonical", "a", "-o", "near.safetensors")
    monkeypatch.setattr(memory, "_free_memory", lambda: 1_000_000)
    assert "Go to a larger machine, or name hf:a and hf:b to try it" in refusal("align", "a", "b", "-o", "other")
    assert not (folder / "other").exists()


def test_files_of_another_form_than_the_model_are_written_back(folder):
    """Experts that the model has in one tensor, and files apart."""
    transformers = pytest.importorskip("transformers")
    save("mixtral", "model", "15KB")
    model = transformers.AutoModelForCausalLM.from_pretrained("model", dtype="auto")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    source = open_checkpoint(folder / "model")
    write_folder(model, source, folder / "out")
    written = open_checkpoint(folder / "out")
    assert written.entries == source.entries
    for key in source.entries:
        assert torch.equal(written.where[key].mapped(key), -source.where[key].mapped(key)), key
    wide = model.float()
    write_folder(wide, source, folder / "again")
    assert (folder / "again" / "model.safetensors.index.json").is_file()
    with torch.no_grad():
        wide.lm_head.weight[0, 0] *= 1.001
    with pytest.raises(CheckpointError, match=r"lm_head.weight is BF16 in the files and float32 in the model"):
        write_folder(wide, source, folder / "rounded")
    assert "rounded" not in names(folder)
