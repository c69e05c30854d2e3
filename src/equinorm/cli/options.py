"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

Result = tuple[Any, RenderableType, int]
"""A command's record, what it prints for it, and its exit code."""


def _models(folders: str, onnx: str = "an .onnx file, ") -> str:
    return f"package.module:factory, a transformers checkpoint's {folders}, timm:NAME, {onnx}or an exported .pt2 file."


_AS_A_WHOLE = "FOLDER or hf:FOLDER (both loaded as a whole)"
MODELS = _models("FOLDER (read in parts) or hf:FOLDER (loaded)")
LOADED = _models(_AS_A_WHOLE)
"""Of commands that read no folder in parts."""
OF_PYTORCH = _models(_AS_A_WHOLE, onnx="")
"""Of those that refuse ONNX files as well."""

Model = Annotated[str, typer.Argument(help=MODELS)]
Weights = Annotated[Path | None, typer.Option(help="Load these weights: .safetensors, or a state dict (.pt, .pth).")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", help="Shape such as 1x3x224x224, int64:1x16 or (by keyword) mask=bool:1x16; or a file. Once for each."
    ),
]
Opaque = Annotated[
    list[str] | None,
    typer.Option("--opaque", help="Name of a submodule that is not looked into, where torch.export fails. Repeatable."),
]
WeightsB = Annotated[Path | None, typer.Option(help="Load these weights into B.")]
ModelB = Annotated[str, typer.Argument(metavar="B", help="Another one, or a file of weights for A.")]
PowerOfTwo = Annotated[
    bool, typer.Option("--power-of-two", help="Round scales to powers of two: outputs stay bitwise the same.")
]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Argument of the factory, such as width=64. Repeatable.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that lies in a checkpoint's folder.")]
Train = Annotated[bool | None, typer.Option("--train/--eval", help="Mode of the model; evaluation by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")]
Report = Annotated[Path | None, typer.Option(help="Write a report with pictures: .html or .png.")]
