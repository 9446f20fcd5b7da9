"""`python -m data_prep`, which is also the console script `xlstm-data`."""

import sys

from data_prep.cli import main

if __name__ == "__main__":
    sys.exit(main())
