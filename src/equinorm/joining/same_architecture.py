"""Can two networks be compared at all: do they have the same parameters, in the same dtypes, and run the same operations?"""

import itertools
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from equinorm._deviation import check_model
from equinorm._display import and_more
from equinorm._errors import EquivalenceError, describe, dtype_name
from equinorm._memory import place_of
from equinorm._scaling import Scaling
from equinorm._symmetries import Symmetries
from equinorm.modules.choosing import refuse_sharded, tensors_of, unwrapped


def check_batch_norm(batch_norm: str, *models: nn.Module) -> None:
    """Refuse readings of batch normalization that change outputs of these models."""
    if batch_norm not in ("affine", "evaluation"):
        why = " 'statistics' is exact up to the normalization's eps only, and copies compute the same."
        why = why if batch_norm == "statistics" else ""
        raise EquivalenceError(f"batch_norm must be 'affine' or 'evaluation', not {batch_norm!r}.{why}")
    for model in models if batch_norm == "evaluation" else ():
        for name, module in model.named_modules():
            if isinstance(module, _NormBase) and module.training and module.running_mean is not None:
                raise EquivalenceError(
                    f"batch_norm='evaluation' holds in evaluation mode only, and {name or 'the model itself'} of "
                    f"{describe(model)} is in training mode. Call model.eval() first, or leave out batch_norm."
                )


def same_parameters(model_a: nn.Module, model_b: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both without what wraps them; refuses models of other parameters or buffers, and those that are sharded or no models."""
    for model in (model_a, model_b):
        check_model(model)
    model_a, model_b = unwrapped(model_a), unwrapped(model_b)
    for model in (model_a, model_b):
        refuse_sharded(model, "a comparison", EquivalenceError)
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()} for model in (model_a, model_b)]
    apart = [name for name in dict.fromkeys([*shapes[0], *shapes[1]]) if shapes[0].get(name) != shapes[1].get(name)]
    if apart:
        rows = [f"{name}: {shapes[0].get(name, 'absent')} and {shapes[1].get(name, 'absent')}" for name in apart]
        raise EquivalenceError(
            f"{describe(model_a)} and {describe(model_b)} have different parameters or buffers: "
            f"{and_more(rows, 8, between='; ')}. Rescalings join networks of one architecture only."
        )
    return model_a, model_b


def same_dtypes(model_a: nn.Module, model_b: nn.Module) -> None:
    """Refuse models of which one holds a parameter or buffer in another dtype."""
    theirs = tensors_of(model_b)
    for name, tensor in tensors_of(model_a).items():
        kinds = [dtype_name(side.dtype) for side in (tensor, theirs[name])]
        if kinds[0] != kinds[1]:
            raise EquivalenceError(
                f"{name} is {kinds[0]} in the first network and {kinds[1]} in the second. Bring both to one dtype, as "
                "model.float() does."
            )


def _same_ties(model_a: nn.Module, model_b: nn.Module) -> None:
    """Refuse models of which one holds two tensors where the other holds one by two names."""
    ties = [_ties(model) for model in (model_a, model_b)]
    for (one, which), (other, where) in itertools.permutations(zip(ties, ("first", "second"), strict=True)):
        for name, first in one.items():
            if name != first and other[name] != other[first]:
                raise EquivalenceError(
                    f"{first} and {name} are one tensor in the {which} network and two in the {where}. Tie them in both, or in "
                    "neither."
                )


def _ties(model: nn.Module) -> dict[str, str]:
    """For each tensor the first name of those that lie where it lies."""
    first: dict[tuple, str] = {}
    return {name: first.setdefault(place_of(tensor), name) for name, tensor in tensors_of(model).items() if tensor.numel()}


def same_group(a: Symmetries, b: Symmetries) -> tuple[Symmetries, Symmetries]:
    """Both, with tensors in the order in which the first model lists them; refuses models that run other operations."""
    if a.fingerprint != b.fingerprint:
        modes = ["training" if model.training else "evaluation" for model in (a.model, b.model)]
        if modes[0] != modes[1]:
            raise EquivalenceError(
                f"the first network is in {modes[0]} mode, the second in {modes[1]} mode, and they run different operations. "
                "Bring both to one mode: model.eval()."
            )
        same_dtypes(a.model, b.model)
        _same_ties(a.model, b.model)
        raise EquivalenceError(
            f"{describe(a.model)} and {describe(b.model)} have the same parameters but run different operations "
            "(other activations, constants or modes): rescalings join networks of one architecture only."
        )
    theirs = {scaling.name: scaling for scaling in b.scalings}
    if unlike := [one.name for one in a.scalings if not _moves_alike(one, theirs.get(one.name))]:
        raise EquivalenceError(
            f"{unlike[0]} moves differently in the two models: their parameters agree, but not their graphs, modes or ties."
        )
    return a, replace(b, scalings=tuple(theirs[one.name] for one in a.scalings))


def _moves_alike(one: Scaling, other: Scaling | None) -> bool:
    """Does a tensor have the same names and factors in another network?"""
    if other is None or one.names != other.names or len(one.factors) != len(other.factors):
        return False
    return all(e == f and torch.equal(i, j) for (e, i), (f, j) in zip(one.factors, other.factors, strict=True))
