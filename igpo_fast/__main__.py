"""``python -m igpo_fast`` is the command ``igpo-fast``."""

import sys


def main() -> None:
    """The command line, or a line where what it needs is not installed: the kernels alone need less."""
    try:
        from igpo_fast.cli import main as command
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install 'igpo-fast[train]'", file=sys.stderr)
        sys.exit(2)
    command()


if __name__ == "__main__":
    main()
