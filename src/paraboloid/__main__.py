"""`python -m paraboloid`."""

from paraboloid.cli import main

main(prog_name="paraboloid")
