"""`python bench/` and `python -m bench`."""

import sys
from pathlib import Path

if not __package__:  # `python bench/` puts bench/ itself first on the path; the package's parent belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
