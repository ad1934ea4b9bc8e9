"""`python -m sparse_lm`: the command `sparse-lm`."""

from sparse_lm.cli import main

main()
