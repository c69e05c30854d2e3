"""How an optimizer's state scales with its parameter.

Where w ↦ s·w, gradients scale by 1/s. A state tensor that is homogeneous of degree d in gradients scales by s^−d; one that
is an average of weights scales by s. The exponent of s is tabulated here for every state of every optimizer that is known.
"""

from collections.abc import Iterator

from torch import Tensor, optim

from equinorm._errors import RescaleError

STATE_EXPONENTS: dict[type[optim.Optimizer], dict[str, int]] = {
    optim.SGD: {"momentum_buffer": -1},
    optim.Adam: {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2},
    optim.AdamW: {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2},
    optim.Adamax: {"exp_avg": -1, "exp_inf": -1},
    optim.NAdam: {"exp_avg": -1, "exp_avg_sq": -2},
    optim.RAdam: {"exp_avg": -1, "exp_avg_sq": -2},
    optim.Adagrad: {"sum": -2},
    optim.RMSprop: {"square_avg": -2, "grad_avg": -1, "momentum_buffer": 0},
    optim.Adadelta: {"square_avg": -2, "acc_delta": 2},
}
"""Exponent of s in each state tensor of the shape of its parameter. Scalars such as step counts do not scale."""


def scaled_state(optimizer: optim.Optimizer, parameters: dict[int, str]) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Every state tensor that scales: description, parameter, tensor, exponent of s.

    Args:
        optimizer: one of the known classes.
        parameters: name by `id` of every parameter that moves.

    Raises:
        RescaleError: if the optimizer or one of its states is unknown, or a momentum buffer contains coupled weight decay,
            which scales by s where gradients scale by 1/s.
    """
    kind = type(optimizer)
    if kind not in STATE_EXPONENTS:
        known = ", ".join(sorted(known.__name__ for known in STATE_EXPONENTS))
        raise RescaleError(f"cannot rescale the state of {kind.__name__}: how it scales is not known. Known: {known}.")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = parameters.get(id(parameter))
            if name is None:
                continue
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor) or value.shape != parameter.shape or (value.dim() == 0 and key == "step"):
                    continue
                if key not in STATE_EXPONENTS[kind]:
                    what = f"state {key!r} of {kind.__name__} for {name}"
                    raise RescaleError(f"cannot rescale {what}: how it scales is not known.")
                exponent = STATE_EXPONENTS[kind][key]
                decoupled = group.get("decoupled_weight_decay", kind is optim.AdamW)
                if group.get("weight_decay", 0) != 0 and not decoupled and exponent != 0:
                    raise RescaleError(
                        f"cannot rescale state {key!r} of {kind.__name__} for {name} exactly: its weight decay of "
                        f"{group['weight_decay']} is mixed into it and scales by s where gradients scale by 1/s. "
                        "Use decoupled weight decay, or rescale before the first step."
                    )
                yield f"{key} of {name}", parameter, value, exponent
