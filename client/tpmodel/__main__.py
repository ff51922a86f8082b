"""`python -m tpmodel` is the `tpmodel` command."""

from tpmodel.cli import main

main()
