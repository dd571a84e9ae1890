"""`python -m tqdit VERB`."""

import sys

from tqdit.cli.main import main

sys.exit(main())
