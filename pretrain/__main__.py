"""`python -m pretrain`: the same as the console script `xlstm-pretrain`."""

from xlstm_io.installed import check_installed

if __name__ == "__main__":
    check_installed()
    from pretrain.cli import main

    main()
