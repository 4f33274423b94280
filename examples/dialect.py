"""A dialect: Search-R1's tags with instructions of one's own, in German.

igpo-fast train --config configs/quickstart.yaml model.tokenizer=bpe rollout.dialect=examples/dialect.py:german
"""

from dataclasses import replace

from igpo_fast.rollouts.dialect import FULL, TagsDialect


def german(tokenizer, functions, **options):
    wording = replace(
        FULL,
        system="Beantworte die Frage. Suche mit <search>Anfrage</search>, antworte mit <answer>Antwort</answer>.\n\n",
        question="Frage: {}\n",
        hint="\nSchreibe <search>Anfrage</search> oder <answer>Antwort</answer>.\n",
        before="<think>Jetzt weiß ich genug.</think>\n<answer>",
    )
    return TagsDialect(tokenizer, functions, wording=wording, **options)
