"""A tool: a function with types and a docstring.

igpo-fast train --config configs/quickstart.yaml 'rollout.tools=[search, examples/tool.py:count_letters]'
"""


def count_letters(word: str) -> int:
    """Count the letters of a word.

    Args:
        word: The word.
    """
    return len(word)
