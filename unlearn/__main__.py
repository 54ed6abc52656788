"""`python -m unlearn`, the same as the console script."""

from unlearn.cli.main import main

main()
