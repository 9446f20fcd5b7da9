"""`python -m data_prep`, which is also the console script `xlstm-data`."""

import sys

from xlstm_io.installed import check_installed

if __name__ == "__main__":
    check_installed()
    # Here, because every worker process imports this module, and needs no command.
    from data_prep.cli import main

    sys.exit(main())
