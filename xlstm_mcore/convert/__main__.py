"""`python -m xlstm_mcore.convert`."""

import sys

from xlstm_io.installed import check_installed

if __name__ == "__main__":
    check_installed()
    from xlstm_mcore.convert.cli import main

    sys.exit(main())
