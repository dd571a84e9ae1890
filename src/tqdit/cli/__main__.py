"""`python -m tqdit.cli VERB`."""

import sys

from tqdit.cli import main

sys.exit(main())
