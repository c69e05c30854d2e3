"""A pretended accelerator: numbers lie on the CPU. Waits for them are counted, and products with tensors of the CPU refused.

    python tests/support/pretended_device.py

It prints what steps of training on it waited for, as JSON, and whether they end in the weights of the same steps on the CPU. It
runs in a process of its own, since PyTorch takes one such device for as long as it lives.
"""

import copy
import dataclasses
import json
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn, optim
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import equinorm

aten = torch.ops.aten

LOOKS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
}
"""Operations whose result decides what comes next, so that the CPU waits for it."""

waits: list[str] = []


class Far(Tensor):
    """A tensor on the pretended device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        shell = torch.empty_strided(near.shape, near.stride(), dtype=near.dtype, device="meta")
        self = Tensor._make_subclass(cls, shell, False, dispatch_device=True, device_for_backend_keys=DEVICE)
        self.near = near
        return self

    device = property(lambda self: DEVICE)
    is_cpu = is_meta = False

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def untyped_storage(self) -> Any:
        return self.near.untyped_storage()

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """What is made on the device goes there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    """One operation, on the numbers."""
    if function is torch.ops.prim.device.default:
        return DEVICE
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_far, device = any(isinstance(tensor, Far) for tensor in tensors), kwargs.get("device")
    goes_far = is_far if device is None else torch.device(device).type == DEVICE.type
    check(function, tensors, is_far, goes_far)
    found = function(*tree_map(near, args), **tree_map(near, kwargs))
    written = [argument for argument in function._schema.arguments if argument.alias_info and argument.alias_info.is_write]
    if written and function._schema.returns:
        places = {argument.name: place for place, argument in enumerate(function._schema.arguments)}
        own = [kwargs[one.name] if one.name in kwargs else args[places[one.name]] for one in written]
        return own[0] if len(own) == 1 else tuple(own)
    return tree_map(lambda leaf: Far(leaf) if isinstance(leaf, Tensor) else leaf, found) if goes_far else found


def check(function, tensors, is_far: bool, goes_far: bool) -> None:
    """Count a wait; refuse tensors of two devices."""
    is_copy = function in (aten._to_copy.default, aten.copy_.default)
    mixes = is_far and any(not isinstance(tensor, Far) and tensor.dim() for tensor in tensors)
    picks = function is aten.index.Tensor and any(tensor.dtype == torch.bool for tensor in tensors[1:])
    if (is_far and function in LOOKS) or picks or (is_copy and (is_far != goes_far or mixes)):
        waits.append(str(function))
    elif mixes and not is_copy:
        raise RuntimeError(f"{function}: expected all tensors on one device")


def near(leaf: Any) -> Any:
    """The numbers of a tensor; the CPU in place of the device."""
    is_device = isinstance(leaf, torch.device) and leaf.type == DEVICE.type
    return leaf.near if isinstance(leaf, Far) else torch.device("cpu") if is_device else leaf


def network(kind: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)), torch.randn(4, 5)
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    return nn.Sequential(*layers), torch.randn(4, 2, 6, 6)


PLAIN = {"foreach": False}
OPTIMIZERS = {
    "SGD": lambda p: [optim.SGD(p, 0.05, momentum=0.9, **PLAIN)],
    "SGD decay": lambda p: [optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, **PLAIN)],
    "Adam decay": lambda p: [optim.Adam(p, 0.01, weight_decay=0.1, **PLAIN)],
    "Muon, AdamW": lambda p: [
        optim.Muon([one for one in p if one.dim() == 2], 0.01),
        optim.AdamW([one for one in p if one.dim() != 2], 0.01, **PLAIN),
    ],
}
OPTIONS: list[dict[str, Any]] = [
    {}, {"c": 1.2}, {"method": "two-level"}, {"method": "two-level", "c": 1.2}, {"p": 1.0}, {"p": 3.0}, {"p": float("inf")},
    {"power_of_two": True}, {"modules": ["0", "2"]}, {"cycles": 2, "every": 2},
]  # fmt: skip


def train(model, example, make, options, send) -> list[Tensor]:
    """Weights after four steps, of which the last two are watched; `send` brings gradients to where the model is."""
    parameters, generator = [*model.parameters()], torch.Generator().manual_seed(1)
    averages = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = make(parameters)
    equinorm.ENorm(optimizers, model, example, compile=False, averages=averages, **options)
    for step in range(4):
        for parameter in parameters:
            parameter.grad = send(0.1 * torch.randn(parameter.shape, generator=generator))
        if step == 2:
            waits.clear()
        for optimizer in optimizers:
            optimizer.step()
    return [near(tensor.detach()).clone() for tensor in (*parameters, *averages.values())]


def far(kind: str, make, options) -> list[Tensor]:
    """The same on the device. What moves is found on the CPU: torch.export does not know it."""
    model, example = network(kind)
    twin = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = nn.Parameter(Far(parameter.detach().clone()))
    found = dataclasses.replace(equinorm.symmetries(twin, example, both_modes=True), model=model)
    with mock.patch("equinorm.training.enorm.symmetries", return_value=found), Pretending():
        return train(model, example, make, options, Far)


def main() -> None:
    report: dict[str, Any] = {}
    for kind in ("linear", "convolution"):
        for name, make in OPTIMIZERS.items():
            if name == "Muon, AdamW" and kind == "convolution":
                continue  # Muon takes matrices only
            for options in OPTIONS if name == "SGD decay" else OPTIONS[1:3]:
                expected = train(*network(kind), make, options, lambda tensor: tensor)
                weights = far(kind, make, options)
                same = all(torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in zip(weights, expected, strict=True))
                report[f"{kind}, {name}, {options}"] = {"waits": [*waits], "same": same}
    waits.clear()
    ones = Far(torch.ones(3))
    float(ones.sum()), ones.to("cpu"), ones[ones > 0], ones.copy_(torch.zeros(3))
    report["control"] = {"waits": [*waits], "same": True}
    try:
        ones + torch.ones(3)
    except RuntimeError as error:
        report["control"]["refused"] = str(error)
    print(json.dumps(report))  # noqa: T201  # a script of its own


if __name__ == "__main__":
    backend_registration._setup_privateuseone_for_python_backend("far")
    torch._C._set_only_lift_cpu_tensors(True)
    DEVICE = torch.device("far", 0)
    main()
