import sys

from deltax.library.commands import main

sys.exit(main())
