"""``python -m igpo_fast`` is the command ``igpo-fast``."""

from igpo_fast.cli import main

main()
