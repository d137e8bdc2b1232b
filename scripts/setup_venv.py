"""Make a virtual environment and install kronfold in it, with the small CPU build of torch where there is no GPU.

Usage: python3 scripts/setup_venv.py DIRECTORY [EXTRA ...]      (needs nothing but Python)
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        here = platform.python_version()
        sys.exit(f"kronfold needs Python 3.10 to 3.13; this is {here}. Try: make PYTHON=python3.12")
    place, extras = Path(sys.argv[1]).resolve(), sys.argv[2:]
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.exists():
        print(f"creating {place}", flush=True)
        venv.create(place, with_pip=True)
    install_torch(python)
    target = str(ROOT) + (f"[{','.join(extras)}]" if extras else "")
    pip(python, "install", "--editable", target)


def install_torch(python: Path) -> None:
    """The default build of torch brings gigabytes of CUDA libraries; take it only where a GPU can use them."""
    if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0:
        return
    if has_nvidia_gpu() or sys.platform == "darwin":
        pip(python, "install", "torch")
        return
    for where in ([], ["--extra-index-url", CPU_INDEX]):
        if pip(python, "install", f"torch=={TORCH}+cpu", *where, check=False) == 0:
            return
    print("No CPU build of torch is on offer here; taking the default one (large, with CUDA libraries).", flush=True)
    pip(python, "install", "torch")


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def pip(python: Path, *arguments: str, check: bool = True) -> int:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    print("pip " + " ".join(arguments), flush=True)
    code = subprocess.run(command, stderr=None if check else subprocess.DEVNULL).returncode
    if check and code != 0:
        sys.exit(f"pip failed (exit code {code}); the lines above say why.")
    return code


if __name__ == "__main__":
    main()
