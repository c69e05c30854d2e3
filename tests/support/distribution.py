"""Check the sdist and the wheel in this folder, and the wheel that is installed where nothing but torch and numpy is.

Run by `make dist` with the Python of a bare environment.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

NEEDED = ["numpy", "torch"]
COMPILERS = ["c++", "g++", "clang++"]
FILES = ["py.typed", "native/program.cpp", "native/passes.hpp", "cli/terminal.py", "training/enorm.py"]
ABSENT = ["rich", "typer", "matplotlib", "safetensors"]


def check_archives(folder: Path) -> Path:
    """What the archives hold and say of themselves; returns the wheel."""
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (place,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        said = Parser().parsestr(archive.read(place).decode())
    tops = {name.partition("/")[0] for name in names} - {place.partition("/")[0]}
    assert tops == {"equinorm", "equinorm_command.py"}, tops
    assert {f"equinorm/{name}" for name in FILES} <= set(names)
    assert not [name for name in names if "__pycache__" in name]
    kernels = [name for name in names if name.startswith("equinorm/native/shipped/")]
    assert len(kernels) == (0 if wheel.name.endswith("-none-any.whl") else 5), kernels
    assert kernels or not any(map(shutil.which, COMPILERS)) or sys.platform not in ("linux", "darwin")
    assert any(name.endswith("licenses/LICENSE") for name in names)
    needed = [line for line in said.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(re.split(r"[^\w-]", line)[0] for line in needed) == NEEDED, needed
    assert said["Description-Content-Type"] == "text/markdown"
    assert len(said.get_payload()) > 1000
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in names if name.startswith("equinorm")} - {place, *kernels} <= {
        name.removeprefix("src/") for name in held
    } | {name for name in names if ".dist-info/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= held
    assert not [name for name in held if name.startswith(("tests", "benchmarks", ".venv"))]
    return wheel


def check_kernels(wheel: Path) -> None:
    """Kernels that came with the wheel run where there is no compiler; without any the library does."""
    import torch

    import equinorm
    from equinorm import native

    os.environ["PATH"] = ""
    os.environ.pop("CXX", None)
    assert native.are_shipped() == (not wheel.name.endswith("-none-any.whl"))
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    hook = equinorm.ENorm(torch.optim.SGD(net.parameters(), lr=0.1), net, (torch.randn(2, 8),))
    for _ in range(30):
        hook.cycle_()
    assert hook.residual() < 1e-5
    assert bool(hook._step._recording.compute.native) == native.are_shipped()


def check_library() -> None:
    """The library finds, balances and shows; what it cannot do without more packages says which."""
    import torch

    import equinorm

    assert not [name for name in ABSENT if importlib.util.find_spec(name)]
    assert "site-packages" in equinorm.__file__
    assert equinorm.__version__ == metadata.version("equinorm")
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    x = torch.randn(2, 8)
    balanced = equinorm.balance(net, (x,))
    assert equinorm.deviation(net, balanced, (x,)) < 1e-5
    assert equinorm.equivalence(net, balanced, (x,)).equivalent
    record = equinorm.balance_(net, (x,))
    assert record.converged
    assert record.to_dict()["converged"] is True
    assert "<table>" in record._repr_html_()
    try:
        record.plot()
        said = "a picture without matplotlib"
    except equinorm.EquinormError as error:
        said = str(error)
    assert said == "pictures need matplotlib, which is not installed: pip install 'equinorm[cli]'.", said
    command = Path(sys.executable).with_name("equinorm")
    for start in ([str(command)], [sys.executable, "-m", "equinorm.cli"]):
        done = subprocess.run([*start, "demo"], capture_output=True, text=True)
        assert done.returncode == 2, done
        assert "pip install 'equinorm[cli]'" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def main() -> None:
    wheel = check_archives(Path.cwd())
    check_library()
    check_kernels(wheel)
    with zipfile.ZipFile(wheel) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    sys.stdout.write(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB, {size / 1024:.0f} KiB unpacked\n")


if __name__ == "__main__":
    main()
