"""`python -m raypipe` is `raypipe`."""

import sys

from raypipe.cli.verbs import main

sys.exit(main())
