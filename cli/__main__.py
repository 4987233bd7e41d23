"""`python -m spa_lite.cli`."""

from spa_lite.cli.main import main

main()
