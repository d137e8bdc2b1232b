#!/usr/bin/env bash
# Build the wheel, install it where the checkout is not, and run a command of it there.
# Usage: scripts/try_wheel.sh VENV SCRATCH      (the libraries are those of VENV, so that nothing is downloaded twice)
set -euo pipefail
venv=$(cd "$1" && pwd) scratch=$2
mkdir -p "$scratch"
"$venv/bin/python" -m pip --quiet --disable-pip-version-check wheel --no-deps --wheel-dir "$scratch" .
"$venv/bin/python" -m venv "$scratch/env"
site=$("$scratch/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$scratch/env/bin/python" -m pip --quiet --disable-pip-version-check install --no-deps "$scratch"/kronfold-*.whl
libraries=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Last on the path, and without its .pth files: the checkout that VENV is linked to stays out of sight.
echo "import sys; sys.path.append('$libraries')" > "$site/libraries.pth"
cd "$scratch"
"$scratch/env/bin/python" - <<'PY'
import pathlib
import sys

import kronfold

place = pathlib.Path(kronfold.__file__).resolve()
assert place.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"kronfold comes from {place}, not from the wheel"
PY
"$scratch/env/bin/kronfold" demo --heal-tokens 20000 -o demo
