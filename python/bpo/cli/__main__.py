"""``python -m bpo.cli``."""

import sys

from bpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
