"""`python -m smidgen.cli`, the same as the command `smidgen`."""

import sys

from smidgen.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
