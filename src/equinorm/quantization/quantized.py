"""What is quantized already, which nothing here may scale."""

import torch
from torch import fx, nn

from equinorm._errors import EqualizeError, describe
from equinorm._memory import is_wrapped

HOMES = ("torch.ao.nn.quant", "torch.ao.nn.qat", "torch.ao.quantization", "torchao", "brevitas")
"""Where modules and tensors of quantizers come from."""

NAMESPACES = ("quantized_decomposed", "quantized", "torchao", "onednn", "pt2e")
"""Of operators that quantizers put into graphs."""


def check_floats(model: nn.Module) -> None:
    """Refuse what is quantized already, or holds what a quantizer put in.

    Raises:
        EqualizeError: naming the first of its parts.
    """
    for name, module in model.named_modules():
        parts = module.parameters(recurse=False)
        if type(module).__module__.startswith(HOMES) or any(part.is_quantized or is_wrapped(part) for part in parts):
            _refuse(name or "the model", describe(module))
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in NAMESPACES:
                _refuse(f"{name}.{node.name}".lstrip("."), str(node.target))


def _refuse(name: str, what: str) -> None:
    raise EqualizeError(f"{name} ({what}) is quantized already. Equalize the float model, then quantize it.")
