"""List the slow tests in tests/slow_tests.txt, from a log of all tests with their durations:

    python -m pytest --durations=0 --durations-min=0.1 > durations.log
    python scripts/slow_tests.py durations.log

A test function is slow where one of its cases took more than 0.7 s, or brought a fixture of more than 2 s into being.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINE = re.compile(r"([0-9.]+)s (call|setup|teardown)\s+tests/(\S+?::\w+)")
LIMITS = {"call": 0.7, "setup": 2.0, "teardown": 2.0}


def main() -> None:
    found = LINE.findall(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if not found:
        sys.exit(f"{sys.argv[1]} holds no durations; run pytest with --durations=0 --durations-min=0.1.")
    slow = sorted({name for seconds, kind, name in found if float(seconds) > LIMITS[kind]})
    place = Path(__file__).parent.parent / "tests" / "slow_tests.txt"
    place.write_text("\n".join(slow) + "\n", encoding="utf-8")
    print(f"{len(slow)} slow test functions in {place.name}")


if __name__ == "__main__":
    main()
