"""Two models of one architecture, as a command line names them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from equinorm.cli.loading import Loaded, ModelSource, load, takes_settings
from equinorm.cli.terminal import Steps
from equinorm.cli.weights import WEIGHTS, InputError


class Pair(NamedTuple):
    """Both models, on the inputs of the first, and what to note if their outputs differ."""

    a: Loaded
    b: Loaded
    hint: str


def load_pair(source: ModelSource, model_b: str, weights_b: Path | None, inputs: Sequence[str], steps: Steps) -> Pair:
    """Load two models.

    Args:
        source: what the first is made from.
        model_b: the second, or a file of weights for the first.
        weights_b: weights of the second.
        inputs: shapes or files; none for the example inputs of whichever brings some.
        steps: says what is loaded.

    Raises:
        InputError: for whatever cannot be found, read or matched.
    """
    model_a, settings = source.name, source.settings
    second, file, hint = model_b, weights_b, ""
    if Path(model_b).suffix in WEIGHTS:
        if weights_b is not None:
            raise InputError(f"B is {model_b}, a file of weights: leave out --weights-b, or name a model as B.")
        second, file = model_a, Path(model_b)
    steps.say(f"loading {model_a}")
    given = settings if takes_settings(model_a) or not takes_settings(second) else ()
    a = load(replace(source, settings=given), inputs, needs_inputs=False)
    steps.say(f"loading {model_b}")
    other = replace(source, name=second, weights=file, settings=settings if takes_settings(second) else ())
    b = load(other, inputs, needs_inputs=not (a.args or a.kwargs))
    if not (a.args or a.kwargs):
        a = replace(a, args=b.args, kwargs=b.kwargs)
    if a.model is b.model:
        raise InputError(f"{model_a} is one module, not a factory: it cannot hold two sets of weights. Name a factory.")
    if file is not None and source.weights is None and not model_a.endswith(".pt2"):
        hint = f"A has the weights that {model_a} gives it. Name the file that {file} was made from with --weights."
    return Pair(a, replace(b, name=model_b), hint)
