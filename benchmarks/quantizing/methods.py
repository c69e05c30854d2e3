"""Ways to move a trained network along its rescaling symmetries before it is rounded.

All start from the network with batch normalization folded into the convolution in front, as every quantizer folds it: ours fold
by themselves and set ReLU6 free (`equinorm.quantization.prepare`), peers get what torch.fx folds. Tools
that do not know ReLU6 are given ReLU, and the bounds are put back afterwards, moved along with their channels: the reading that
favours them, since ReLU6 replaced for good costs more than rounding does.
"""

import contextlib
import copy
import importlib
import inspect
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional

import equinorm
from equinorm.quantization import Clamp, Scheme, settle_
from quantizing.rounding import GROUP, Setting, rounds_sums
from zoo.from_torchvision import declare_operators

Args = tuple[Tensor, ...]


@dataclass(frozen=True)
class Method:
    """A way of rescaling.

    Attributes:
        apply: the moved network, from one that stays untouched, a calibration batch and the setting.
        prepares: does it fold by itself?
        reads_data: does the result depend on calibration data?
        reads_setting: … on the setting?
        imports: modules whose loading is not part of its seconds.
    """

    apply: Callable[[nn.Module, Args, Setting], nn.Module]
    prepares: bool = False
    reads_data: bool = False
    reads_setting: bool = False
    imports: tuple[str, ...] = ()

    def load(self) -> None:
        """Import what it needs; torchvision, whose compiled operators may be missing here, in our own way."""
        declare_operators()
        for name in self.imports:
            importlib.import_module(name)


def folded(model: nn.Module) -> nn.Module:
    """A copy with batch normalization folded where a convolution or linear layer stands in front.

    ReLU and ReLU6 are modules, one for each call, and nothing works in place: some tools look for nothing else.
    """
    copied = copy.deepcopy(model).eval()
    for module in copied.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    try:
        graph = fuse(copied)
    except Exception:  # networks that symbolic tracing refuses have no batch normalization here
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in copied.modules())
        return copied
    for i, node in enumerate(graph.graph.nodes):
        is_function = node.op == "call_function" and node.target in (torch.relu, functional.relu)
        is_bounded = node.op == "call_module" and isinstance(graph.get_submodule(node.target), nn.ReLU6)
        if is_function or is_bounded:
            name = f"bounded_{i}" if is_bounded else f"relu_{i}"
            graph.add_submodule(name, nn.ReLU6() if is_bounded else nn.ReLU())
            node.op, node.target, node.args, node.kwargs = "call_module", name, node.args[:1], {}
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph.eval()


def freed(model: nn.Module, args: Args) -> nn.Module:
    """A copy, folded, whose ReLU6 have one bound for each channel."""
    return equinorm.quantization.prepare(model, args)[0]


def least_norm(p: float) -> Method:
    """Least ℓp norm of what was freed; bounds do not count."""

    def apply(model: nn.Module, args: Args, setting: Setting) -> nn.Module:
        moved = freed(model, args)
        equinorm.balance_(moved, args, p=p)
        settle_(moved)
        return moved

    return Method(apply, prepares=True)


def as_if_unbounded(tool: Callable[[nn.Module, Args], nn.Module], *imports: str) -> Method:
    """A tool that knows ReLU: it is given ReLU, and the bounds are put back, moved by what it did to their channels.

    Where it moves nothing, the network stays the object that it is.
    """

    def apply(model: nn.Module, args: Args, setting: Setting) -> nn.Module:
        plain = copy.deepcopy(model)
        for name in [name for name, _ in plain.named_children() if name.startswith("bounded_")]:
            setattr(plain, name, nn.ReLU())
        moved = copy.deepcopy(plain)
        tensors = tool(copy.deepcopy(plain), args).state_dict()  # its own graph may hold constants too
        moved.load_state_dict({name: tensors[name] for name in moved.state_dict()})
        if all(torch.equal(value, moved.state_dict()[name]) for name, value in plain.state_dict().items()):
            return model
        before, after = _read_by_bounds(plain, args), _read_by_bounds(moved, args)
        for name, value in before.items():
            module = Clamp(nn.ReLU6(), (value.shape[1], *[1] * (value.dim() - 2)), value.dtype)
            others = [i for i in range(value.dim()) if i != 1]
            ratio = after[name].double().abs().sum(others) / value.double().abs().sum(others).clamp_min(1e-300)
            with torch.no_grad():
                module.upper.mul_(torch.where(ratio > 0, ratio, 1.0).float().reshape(module.upper.shape))
            setattr(moved, name, module)
        settle_(moved)
        return moved

    return Method(apply, imports=imports)


@torch.no_grad()
def _read_by_bounds(model: nn.Module, args: Args) -> dict[str, Tensor]:
    """What each of the modules that were ReLU6 reads."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, read, name=name: found.__setitem__(name, read[0].clone()))
        for name, module in model.named_children()
        if name.startswith("bounded_")
    ]
    model(*args)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def brevitas(model: nn.Module, args: Args) -> nn.Module:
    """EqualizeGraph of brevitas, as it comes, on brevitas' own trace."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brevitas.fx import value_trace
        from brevitas.graph.equalize import EqualizeGraph

        inputs = dict(zip(inspect.signature(model.forward).parameters, args, strict=False))
        return EqualizeGraph().apply(value_trace(model, inputs))


@torch.no_grad()
def aimet(model: nn.Module, args: Args) -> nn.Module:
    """Cross-layer scaling of AIMET."""
    from aimet_torch.cross_layer_equalization import CrossLayerScaling

    CrossLayerScaling.scale_model(model, dummy_input=args if len(args) > 1 else args[0])
    return model


def smooth(model: nn.Module, args: Args, setting: Setting) -> nn.Module:
    """SmoothQuant's rule, α = ½: a channel is divided by √(largest activation / largest weight that reads it)."""
    moved = freed(model, args)
    symmetries = equinorm.symmetries(moved, args)
    largest = _largest_read(moved, args)
    modules = dict(moved.named_modules())
    activation = torch.zeros(symmetries.num_free + 1, dtype=torch.float64)
    weight = torch.zeros_like(activation)
    for scaling in symmetries.scalings:
        name, _, kind = scaling.name.rpartition(".")
        layer = modules.get(name)
        if kind != "weight" or not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)) or name not in largest:
            continue
        for exponent, ids in scaling.factors:
            if exponent < 0 and ids.dim() > 1 and ids.shape[1] == layer.weight.shape[1]:
                value, reads = layer.weight.detach().double().abs(), largest[name]
                groups = getattr(layer, "groups", 1)
                wide = ids.expand(layer.weight.shape[0], layer.weight.shape[1], *[1] * (ids.dim() - 2))
                rows = torch.arange(len(wide)) // (len(wide) // groups)
                which = rows[:, None] * wide.shape[1] + torch.arange(wide.shape[1])
                weight.scatter_reduce_(
                    0, wide.flatten(), value.flatten(2).amax(2).flatten() if value.dim() > 2 else value.flatten(), "amax"
                )
                activation.scatter_reduce_(0, wide.flatten(), reads[which].flatten(), "amax")
    known = (activation > 0) & (weight > 0)
    scales = torch.where(known, (activation / weight.clamp_min(1e-300)).clamp_min(1e-300).sqrt(), 1.0)[1:]
    symmetries.rescale_(-scales.clamp(1e-5, 1e5).log())
    settle_(moved)
    return moved


@torch.no_grad()
def _largest_read(model: nn.Module, args: Args) -> dict[str, Tensor]:
    """The largest value of each channel that a layer reads."""
    found: dict[str, Tensor] = {}

    def look(name: str, layer: nn.Module, read: Tensor) -> None:
        channels = read.dim() - 1 if isinstance(layer, nn.Linear) else 1
        found[name] = read.double().abs().amax([i for i in range(read.dim()) if i != channels])

    hooks = [
        module.register_forward_pre_hook(lambda layer, read, name=name: look(name, layer, read[0]))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))
    ]
    model(*args)
    for hook in hooks:
        hook.remove()
    return found


class Scaled(nn.Module):
    """A linear layer that reads scaled channels."""

    def __init__(self, scale: Tensor, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale)


def modelopt(model: nn.Module, args: Args, setting: Setting) -> nn.Module:
    """SmoothQuant of NVIDIA's ModelOpt, which multiplies in front of linear layers: its scales, without its rounding."""
    from modelopt.torch import quantization

    scaled, plain = copy.deepcopy(model), copy.deepcopy(model)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        quantization.quantize(scaled, quantization.INT8_SMOOTHQUANT_CFG, lambda net: net(*args))
    for name, layer in [*plain.named_modules()]:
        scale = getattr(getattr(scaled.get_submodule(name), "input_quantizer", None), "_pre_quant_scale", None)
        if isinstance(layer, nn.Linear) and scale is not None:
            with torch.no_grad():
                layer.weight.div_(scale)
            holder, _, last = name.rpartition(".")
            setattr(plain.get_submodule(holder), last, Scaled(scale.detach().clone(), layer))
    return plain


def equalized(model: nn.Module, args: Args, setting: Setting) -> equinorm.Equalization:
    """Least noise of this setting's own rounding, with its record."""
    granularity = GROUP if setting.granularity == "group" else setting.granularity
    options = {"activation_bits": setting.activation_bits, "clip": setting.clipped, "sums": rounds_sums(args)}
    options |= {"outputs": setting.rounds_outputs, "fused_clamps": setting.fuses_clamps}
    return equinorm.equalize(model, args, calibration=[args], scheme=Scheme(setting.weight_bits, granularity, **options))


def noise(model: nn.Module, args: Args, setting: Setting) -> nn.Module:
    """The network of least noise."""
    return equalized(model, args, setting).model


def untouched(model: nn.Module, args: Args, setting: Setting) -> nn.Module:
    """The folded network."""
    return model


METHODS = {
    "none": Method(untouched),
    "p=2": least_norm(2.0),
    "p=inf": least_norm(math.inf),
    "brevitas": as_if_unbounded(brevitas, "brevitas.graph.equalize"),
    "aimet": as_if_unbounded(aimet, "aimet_torch.cross_layer_equalization"),
    "smooth": Method(smooth, prepares=True, reads_data=True),
    "modelopt": Method(modelopt, reads_data=True, imports=("modelopt.torch.quantization",)),
    "noise": Method(noise, prepares=True, reads_data=True, reads_setting=True),
}
