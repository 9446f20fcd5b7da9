"""`python -m slurm`: the same as the console script `xlstm-slurm`."""

from xlstm_io.installed import check_installed

if __name__ == "__main__":
    check_installed()
    from slurm.cli import main

    main()
