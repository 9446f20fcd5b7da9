"""`python -m experiments`: the same as the console script `xlstm-experiments`."""

from xlstm_io.installed import check_installed

if __name__ == "__main__":
    check_installed()
    from experiments.cli import main

    main()
