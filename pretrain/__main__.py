"""`python -m pretrain`: the same as the console script `xlstm-pretrain`."""

from pretrain.cli import main

main()
