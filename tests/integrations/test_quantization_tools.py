"""Equalized networks in tools that people ship with: torchao's weight-only and PT2E quantizers, onnxruntime's static one."""

import collections
import copy
import importlib.util
import logging

import pytest
import torch
from torch import nn

import equinorm
from equinorm.quantization import Scheme

for package in ("torchao", "onnx", "onnxruntime", "onnxscript"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

# Of these packages' own making.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

GAIN = 3.0
"""dB that equalizing must gain at least on networks whose channels differ by a factor of about 30."""


class Bounded(nn.Module):
    """ReLU with one upper bound for each channel."""

    def __init__(self, channels):
        super().__init__()
        self.high = nn.Parameter(torch.full((channels, 1, 1), 3.0))

    def forward(self, x):
        return torch.minimum(torch.relu(x), self.high)


def spread(model, args, seed=0):
    """The same function, its channels unevenly scaled."""
    symmetries = equinorm.symmetries(model, args)
    assert symmetries.num_free > 0
    generator = torch.Generator().manual_seed(seed)
    symmetries.rescale_(1.2 * torch.randn(symmetries.num_free, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def perceptron():
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    return spread(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 10)), (x,)), x


def convolutional(activation):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 24, 3, padding=1), activation(), nn.Conv2d(24, 24, 3, padding=1, groups=24), activation()]
    layers += [nn.Conv2d(24, 16, 1), nn.Conv2d(16, 24, 1), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, 10)).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bounded(images):
    return spread(convolutional(lambda: Bounded(24)), (images,))


@pytest.fixture(scope="module")
def equalized(bounded, images):
    """The networks that were equalized, by granularity."""
    schemes = {kind: Scheme(8, kind, activation_bits=8) for kind in ("tensor", "channel")}
    return {kind: equinorm.equalize(bounded, (images,), calibration=[(images,)], scheme=s) for kind, s in schemes.items()}


@torch.no_grad()
def decibels(found, model, x):
    wanted = model(x)
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum()))


# -------------------------------------------------------------------------------------------------------- torchao, weights


def weight_only(kind):
    from torchao import quantization as ao

    if kind == "int8":
        return ao.Int8WeightOnlyConfig(), Scheme(8, "channel", activation_bits=None)
    from torchao.quantization.granularity import PerGroup

    return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), Scheme(4, 32, activation_bits=None)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_of_linear_layers_lose_less_in_torchao(perceptron, kind):
    from torchao.quantization import quantize_

    model, x = perceptron
    config, scheme = weight_only(kind)
    result = equinorm.equalize(model, (x,), calibration=[(x,)], scheme=scheme)
    found = {}
    for name, network in (("before", model), ("after", result.model)):
        rounded = copy.deepcopy(network)
        quantize_(rounded, config)
        assert type(rounded[0].weight.data) is not torch.Tensor  # torchao's own tensor
        with torch.no_grad():
            found[name] = decibels(rounded(x), model, x)
    assert found["after"] > found["before"] + 1.0  # within one channel only its inputs differ
    assert found["after"] == pytest.approx(result.measured_after, abs=1.5)  # our rounding is theirs


# ------------------------------------------------------------------------------------------------------------------- PT2E


def pt2e(model, x, backend):
    """The converted network, and how often each operation stands in it."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    if backend == "x86":
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as tool

        quantizer = tool.X86InductorQuantizer().set_global(tool.get_default_x86_inductor_quantization_config())
    else:
        from torchao.testing.pt2e import _xnnpack_quantizer as tool

        config = tool.get_symmetric_quantization_config(is_per_channel=backend == "xnnpack channel")
        quantizer = tool.XNNPACKQuantizer().set_global(config)
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
        prepared(x)
        converted = convert_pt2e(prepared)
    calls = [node.target for node in converted.graph.nodes if node.op == "call_function"]
    return converted, collections.Counter(str(target).split(".")[1] for target in calls if "." in str(target))


@pytest.mark.parametrize(
    ("backend", "kind"), [("x86", "channel"), ("xnnpack channel", "channel"), ("xnnpack tensor", "tensor")]
)
def test_networks_lose_less_in_pt2e(bounded, equalized, images, backend, kind):
    before, _ = pt2e(bounded, images, backend)
    after, _ = pt2e(equalized[kind].model, images, backend)
    with torch.no_grad():
        assert decibels(after(images), bounded, images) > decibels(before(images), bounded, images) + GAIN


def test_bounds_by_channel_are_not_rounded_more_often_than_relu6_by_pt2e_for_x86(images):
    """A bound for each channel costs a `minimum` in float, and no further rounding."""
    _, six = pt2e(convolutional(nn.ReLU6), images, "x86")
    _, each = pt2e(convolutional(lambda: Bounded(24)), images, "x86")
    assert 4 <= each["quantize_per_tensor"] <= six["quantize_per_tensor"]
    assert each["minimum"] == six["hardtanh"] == 3


def test_what_torchao_has_quantized_is_refused(perceptron):
    from torchao.quantization import quantize_

    model, x = perceptron
    rounded = copy.deepcopy(model)
    quantize_(rounded, weight_only("int8")[0])
    converted, _ = pt2e(model, x, "x86")
    for network in (rounded, converted):
        for function in (equinorm.quantization.prepare, equinorm.equalize):
            with pytest.raises(equinorm.EqualizeError, match=r"is quantized already\. Equalize the float model"):
                function(network, (x,))


# ------------------------------------------------------------------------------------------------------------ onnxruntime


def onnxruntime_static(model, x, folder, per_channel):
    """Outputs of the rounded network in onnxruntime, and how often each operation stands in what it runs."""
    import onnx
    import onnxruntime
    from onnxruntime import quantization

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises to prepare the model, by the root logger
    exported, rounded, optimized = (str(folder / f"{name}.onnx") for name in ("float", "rounded", "optimized"))
    torch.onnx.export(model, (x,), exported, dynamo=True, verbose=False)
    name = onnx.load(exported).graph.input[0].name

    class Reader(quantization.CalibrationDataReader):
        batches = iter([{name: x.numpy()}])

        def get_next(self):
            return next(self.batches, None)

    options = {"activation_type": quantization.QuantType.QUInt8, "weight_type": quantization.QuantType.QInt8}
    quantization.quantize_static(exported, rounded, Reader(), per_channel=per_channel, **options)
    logging.root.setLevel(level)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level, settings.optimized_model_filepath = 1, 3, optimized
    session = onnxruntime.InferenceSession(rounded, settings, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: x.numpy()})
    return torch.from_numpy(found), collections.Counter(node.op_type for node in onnx.load(optimized).graph.node)


@pytest.mark.parametrize("kind", ["tensor", "channel"])
def test_networks_lose_less_in_onnxruntime(bounded, equalized, images, tmp_path, kind):
    before, _ = onnxruntime_static(bounded, images, tmp_path, kind == "channel")
    after, operations = onnxruntime_static(equalized[kind].model, images, tmp_path, kind == "channel")
    assert decibels(after, bounded, images) > decibels(before, bounded, images) + GAIN
    assert operations["QLinearConv"] == 4  # convolutions run in integers


def test_bounds_by_channel_cost_onnxruntime_a_minimum_each(images, tmp_path):
    """ReLU6 goes into the convolution in front; a bound for each channel stands as a minimum between two roundings."""
    _, six = onnxruntime_static(convolutional(nn.ReLU6), images, tmp_path, True)
    _, each = onnxruntime_static(convolutional(lambda: Bounded(24)), images, tmp_path, True)
    assert six["QLinearConv"] == each["QLinearConv"] == 4
    assert (six["Min"], six["Clip"], each["Min"], each["Relu"]) == (0, 0, 3, 0)
    assert each["QuantizeLinear"] == six["QuantizeLinear"] + 2  # what the pooling reads is in float
