"""`python -m qsvd`."""

from qsvd.cli import main

main()
