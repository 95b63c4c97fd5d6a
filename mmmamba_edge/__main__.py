"""`python -m mmmamba_edge VERB`."""

import sys

from mmmamba_edge.cli import main

sys.exit(main())
