"""`python -m trtforge` is `trtforge`."""

from trtforge.cli import main

main()
