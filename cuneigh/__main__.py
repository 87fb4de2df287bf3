"""`python -m cuneigh`."""

import sys

from cuneigh.cli import main

if __name__ == "__main__":
    sys.exit(main())
