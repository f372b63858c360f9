"""``python -m bpo``, and so ``accelerate launch -m bpo``: the ``bpo`` command."""

import sys

from bpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
