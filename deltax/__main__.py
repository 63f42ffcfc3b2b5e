"""`python -m deltax` is `dx`."""

import sys

from deltax.cli import main

sys.exit(main())
