"""Models of transformers and timm, factories with arguments, and models without numbers, named on the command line."""

import json
import shutil
import socket
import sys

import pytest
import safetensors.torch
import torch
from cli_tools import folder, record, refusal

from zoo.from_torchvision import declare_operators

__all__ = ["folder"]

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32, **TOKENS}
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT |= {"image_size": 16, "patch_size": 4}
AST = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
AST |= {"max_length": 24, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
SPEECH = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
}
SPEECH |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "input_feat_per_channel": 8, "conv_channels": 16}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "decoder_start_token_id": 0}

CUSTOM = """
import pathlib
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

pathlib.Path("ran").touch()

class OwnConfig(PretrainedConfig):
    model_type = "own_of_this_folder"
    vocab_size = 16

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(16, 8)
        self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 16)
        self.post_init()
    def _init_weights(self, module):
        pass
    def forward(self, input_ids):
        return CausalLMOutput(logits=self.down(torch.relu(self.up(self.embed(input_ids)))))
"""


def checkpoint(name="LlamaForCausalLM", config="LlamaConfig", path="model", dtype=torch.float32, size="1GB", **options):
    """A tiny random model, saved."""
    declare_operators()
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**(options or LLAMA))).to(dtype)
    model.save_pretrained(path, max_shard_size=size)
    return model


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whoever asks for a connection fails the test."""

    def refused(*arguments, **options):
        pytest.fail("a connection was asked for")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


# ------------------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_language_model_is_balanced_as_its_folder_holds_it(folder, size):
    model = checkpoint(size=size)
    shards = len(list((folder / "model").glob("*.safetensors")))
    assert (shards > 1) == (size == "20KB")
    found = record("balance", "hf:model", "-o", "out.safetensors", "--cycles", "20")
    assert found["inputs"] == "(input_ids=int64[1, 8])"
    assert found["changed"]
    assert found["norm_after"] < found["norm_before"]
    written = safetensors.torch.load_file("out.safetensors")
    assert written.keys() == model.state_dict().keys()
    verdict = record("compare", "hf:model", "out.safetensors")
    assert (verdict["same_outputs"], verdict["equivalent"]) == (True, True)
    assert verdict["notes"] == []


def test_weights_and_dtype_are_those_of_the_folder(folder):
    model = checkpoint(dtype=torch.bfloat16)
    torch.save(model.state_dict(), "w.pt")
    verdict = record("compare", "hf:model", "w.pt")
    assert (verdict["deviation"], verdict["limit"]) == (0, 8e-2)


@pytest.mark.parametrize(
    ("name", "config", "options", "inputs"),
    [
        ("ViTForImageClassification", "ViTConfig", VIT, "pixel_values=float32[1, 3, 16, 16]"),
        ("ASTModel", "ASTConfig", AST, "input_values=float32[1, 24, 16]"),
        (
            *("Speech2TextForConditionalGeneration", "Speech2TextConfig", SPEECH),
            "input_features=float32[1, 32, 8], decoder_input_ids=int64[1, 8]",
        ),
        ("T5ForConditionalGeneration", "T5Config", T5, "input_ids=int64[1, 8], decoder_input_ids=int64[1, 8]"),
        ("GPT2Model", "GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64}, "input_ids=int64[1, 8]"),
    ],
)
def test_inputs_come_from_the_configuration(folder, name, config, options, inputs):
    checkpoint(name, config, **options)
    found = record("inspect", "hf:model")
    assert found["inputs"] == f"({inputs})"
    assert found["num_free"] > 0
    meta = record("inspect", "hf:model", "--device", "meta")
    assert {key: value for key, value in meta.items() if not key.startswith("seconds")} == {
        key: value for key, value in found.items() if not key.startswith("seconds")
    }


def test_inputs_can_be_named(folder):
    checkpoint()
    assert record("inspect", "hf:model", "--input", "input_ids=int64:2x5")["inputs"] == "(input_ids=int64[2, 5])"


def test_a_configuration_need_not_tell_shapes(folder):
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    checkpoint("SegformerForSemanticSegmentation", "SegformerConfig", decoder_hidden_size=8, **sizes)
    assert "hf:model needs inputs" in (message := refusal("inspect", "hf:model"))
    assert "--input pixel_values=1x3x224x224" in message
    assert record("inspect", "hf:model", "--input", "pixel_values=1x3x64x64")["num_free"] > 0


def test_a_folder_without_weights_can_be_inspected_on_meta(folder):
    checkpoint()
    (folder / "model" / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor" in refusal("inspect", "hf:model")
    assert record("inspect", "hf:model", "--device", "meta")["num_free"] > 0


def test_folders_that_are_no_checkpoints(folder):
    assert "there is no folder nowhere" in refusal("inspect", "hf:nowhere")
    (folder / "empty").mkdir()
    assert "empty is no checkpoint of transformers: it holds no config.json" in refusal("inspect", "hf:empty")
    (folder / "empty" / "config.json").write_text("{")
    assert "cannot read empty/config.json" in refusal("inspect", "hf:empty")
    (folder / "empty" / "config.json").write_text("[]")
    assert "describes no model" in refusal("inspect", "hf:empty")
    (folder / "empty" / "config.json").write_text('{"model_type": "nobody_knows"}')
    (folder / "empty" / "model.safetensors").touch()
    assert "transformers cannot load empty: ValueError: " in refusal("inspect", "hf:empty")


def test_parts_of_a_checkpoint_that_are_missing(folder):
    checkpoint(size="20KB")
    shard = sorted((folder / "model").glob("*.safetensors"))[0]
    shard.rename("kept")
    assert f"files that its index names: {shard.name}" in refusal("inspect", "hf:model")
    shutil.rmtree("model")
    checkpoint()
    state = safetensors.torch.load_file("model/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    torch.manual_seed(0)
    for change, words in (({name: None}, "lacks 1 weight"), ({name: torch.randn(3, 3)}, "has in another shape 1 weight")):
        changed = {key: value for key, value in {**state, **change}.items() if value is not None}
        safetensors.torch.save_file(changed, "model/model.safetensors", metadata={"format": "pt"})
        message = refusal("inspect", "hf:model")
        assert f"{words} of LlamaForCausalLM: {name}." in message
    safetensors.torch.save_file({**state, "extra": torch.ones(1)}, "model/model.safetensors", metadata={"format": "pt"})
    (note,) = record("inspect", "hf:model")["notes"]
    assert "holds 1 weight that LlamaForCausalLM does not have: extra" in note


def test_other_architectures(folder):
    checkpoint()
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["NobodyForCausalLM"]}))
    assert "has no NobodyForCausalLM, which model/config.json names" in refusal("inspect", "hf:model")


def test_code_of_a_folder_runs_only_where_it_is_trusted(folder, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "cache"))
    monkeypatch.syspath_prepend(str(folder / "cache"))
    own = folder / "own"
    own.mkdir()
    (own / "modelling.py").write_text(CUSTOM)
    auto = {"AutoConfig": "modelling.OwnConfig", "AutoModelForCausalLM": "modelling.OwnForCausalLM"}
    described = {"model_type": "own_of_this_folder", "architectures": ["OwnForCausalLM"], "auto_map": auto}
    (own / "config.json").write_text(json.dumps(described))
    sizes = {"embed.weight": (16, 8), "up.weight": (12, 8), "up.bias": (12,), "down.weight": (16, 12), "down.bias": (16,)}
    state = {name: torch.randn(size) for name, size in sizes.items()}
    safetensors.torch.save_file(state, own / "model.safetensors", metadata={"format": "pt"})
    message = refusal("inspect", "hf:own")
    assert "needs Python code of its own (modelling.py), which is not run unasked" in message
    assert "--trust-remote-code" in message
    assert not (folder / "ran").exists()
    assert record("inspect", "hf:own", "--trust-remote-code")["num_free"] == 12 + 8
    assert (folder / "ran").exists()
    assert record("inspect", "hf:own", "--trust-remote-code", "--device", "meta")["num_free"] == 12 + 8
    found = record("balance", "hf:own", "--trust-remote-code", "-o", "out.safetensors")
    assert found["norm_after"] < found["norm_before"]


def test_checkpoints_take_no_arguments(folder):
    checkpoint()
    assert "hf:model takes no --set" in refusal("inspect", "hf:model", "--set", "hidden_size=8")


# -------------------------------------------------------------------------------------------------------------------- timm


@pytest.fixture
def timm():
    """Importing it needs operators of torchvision, which tests declare."""
    declare_operators()
    pytest.importorskip("timm")


def test_a_model_of_timm_at_its_own_size(folder, timm):
    found = record("inspect", "timm:resnet18")
    assert found["inputs"] == "(float32[1, 3, 224, 224])"
    assert "weights are random, drawn with seed 0" in found["notes"][0]
    meta = record("inspect", "timm:resnet18", "--device", "meta")
    assert (meta["num_free"], meta["moving"], meta["notes"]) == (found["num_free"], found["moving"], found["notes"][1:])


def test_models_of_timm_are_the_same_every_time(folder, timm):
    more = ["--set", "num_classes=3", "--set", "in_chans=1"]
    found = record("balance", "timm:resnet10t", *more, "-o", "out.safetensors", "--cycles", "3")
    assert found["inputs"] == "(float32[1, 1, 176, 176])"
    verdict = record("compare", "timm:resnet10t", "out.safetensors", *more)
    assert verdict["equivalent"]
    assert safetensors.torch.load_file("out.safetensors")["fc.weight"].shape[0] == 3


def test_what_timm_does_not_have(folder, timm):
    assert "has no model 'resnet19'. Near are resnet18" in refusal("inspect", "timm:resnet19")
    assert "has no model 'hf-hub:someone/something'" in refusal("inspect", "timm:hf-hub:someone/something")
    assert "timm.list_models()" in refusal("inspect", "timm:")
    assert "takes no --set pretrained: nothing is fetched" in refusal("inspect", "timm:resnet18", "--set", "pretrained=True")
    message = refusal("inspect", "timm:resnet18", "--set", "colour=1")
    assert "timm cannot build resnet18: TypeError" in message
    assert "colour" in message


@pytest.mark.parametrize(("library", "name"), [("transformers", "hf:model"), ("timm", "timm:resnet18")])
def test_libraries_that_are_not_installed(folder, monkeypatch, library, name):
    checkpoint()
    monkeypatch.setitem(sys.modules, library, None)
    message = refusal("inspect", name)
    assert f"needs {library}, which is not installed. Run pip install " in message


def test_libraries_that_cannot_be_imported(folder, monkeypatch):
    (folder / "timm").mkdir()
    (folder / "timm" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    for module in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(folder))
    message = refusal("inspect", "timm:resnet18")
    assert "timm: needs timm, whose import raised RuntimeError: operator nms does not exist." in message


# --------------------------------------------------------------------------------------------------------------- factories


@pytest.fixture
def flexible(folder):
    (folder / "flexible.py").write_text(
        "import torch\n"
        "def net(width, depth=1, *, name='relu', sizes=()):\n"
        "    act = {'relu': torch.nn.ReLU, 'gelu': torch.nn.GELU}[name]\n"
        "    torch.manual_seed(0)\n"
        "    inner = [m for _ in range(depth) for m in (act(), torch.nn.Linear(width, width))]\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, width), *inner)\n"
        "def open_net(**options):\n    return net(**options)\n"
        "def stubborn():\n    return torch.nn.Linear(4, 4, device='cpu')\n"
        "def huge(size=2**18):\n"
        "    act = torch.nn.ReLU()\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, size), act, torch.nn.Linear(size, size), act, "
        "torch.nn.Linear(size, 4))\n"
        "held = net(4)\n"
    )


def test_arguments_of_factories(flexible):
    model = ["flexible:net", "--input", "2x4"]
    assert record("inspect", *model, "--set", "width=8")["num_free"] == 8
    assert record("inspect", *model, "--set", "width=8", "--set", "depth=3")["num_free"] == 24
    assert record("inspect", *model, "--set", "width=8", "--set", "name=gelu")["num_free"] == 0
    assert record("inspect", *model, "--set", "width=8", "--set", "name='relu'")["num_free"] == 8
    assert record("inspect", "flexible:open_net", "--input", "2x4", "--set", "width=6")["num_free"] == 6
    record("balance", *model, "--set", "width=8", "-o", "out.safetensors")
    assert record("compare", "flexible:net", "out.safetensors", "--set", "width=8", "--input", "2x4")["equivalent"]


def test_arguments_go_to_the_side_that_takes_them(folder, flexible, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    from flexible import net

    torch.export.save(torch.export.export(net(8).eval(), (torch.randn(2, 4),)), "net.pt2")
    for pair in (["flexible:net", "net.pt2"], ["net.pt2", "flexible:net"]):
        assert record("compare", *pair, "--set", "width=8")["same_outputs"]
    assert "Leave out --set" in refusal("compare", "net.pt2", "net.pt2", "--set", "width=8")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["flexible:net", "--set", "width=8", "--set", "widht=8"],
            "takes no argument 'widht'. It takes width, depth, name, sizes.",
        ),
        (["flexible:net"], "takes arguments (width) that are not given. Say --set width="),
        (["flexible:net", "--set", "width"], "--set width: write an argument's name and value"),
        (["flexible:net", "--set", "width=8", "--set", "width=9"], "--set width is given twice"),
        (["flexible:net", "--set", "width=wide"], "flexible:net() raised TypeError"),
        (["flexible:held", "--set", "width=8"], "flexible:held is one module, made when it was imported. Leave out --set"),
        (
            ["flexible:held", "--device", "meta"],
            "flexible:held is one module, made when it was imported. Leave out --device meta",
        ),
        (["flexible:stubborn", "--device", "meta"], "flexible:stubborn() builds weights elsewhere"),
        (["flexible:net", "--set", "width=8", "--device", "cuda"], "--device cuda: there are cpu and meta"),
        (["flexible:net", "--set", "width=8", "--device", "meta", "--weights", "w.pt"], "Leave out --weights, or --device"),
        (["net.pt2", "--device", "meta"], "net.pt2 is exported as it is. Leave out --device meta"),
    ],
)
def test_arguments_and_devices_that_are_refused(flexible, arguments, expected):
    assert expected in refusal("inspect", *arguments, "--input", "2x4")


def test_nothing_is_allocated_on_meta(flexible):
    """Its largest weight would take 256 GiB."""
    found = record("inspect", "flexible:huge", "--input", "2x4", "--device", "meta")
    assert found["num_free"] == 2 * 2**18
    assert found["moving"] == found["parameters"] - 4 == 2**36 + 10 * 2**18
