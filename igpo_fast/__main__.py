"""``python -m igpo_fast`` is the command ``igpo-fast``."""

import sys


def main() -> None:
    """Run the command line, or exit with a line if a package that it needs is missing (the kernels alone need
    fewer)."""
    try:
        from igpo_fast.cli import main as command
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install 'igpo-fast[train]'", file=sys.stderr)
        sys.exit(2)
    command()


if __name__ == "__main__":
    main()
