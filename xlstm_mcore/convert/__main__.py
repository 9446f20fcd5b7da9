"""`python -m xlstm_mcore.convert`."""

import sys

from xlstm_mcore.convert.cli import main

sys.exit(main())
