"""`python -m data_prep`, which is also the console script `xlstm-data`."""

import sys

if __name__ == "__main__":
    # Here, because every worker process imports this module, and needs no command.
    from data_prep.cli import main

    sys.exit(main())
