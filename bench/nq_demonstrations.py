"""Demonstrations for a warm start, from questions whose supporting passage is known (``steps[].passage_id``).

    python bench/nq_demonstrations.py --config configs/smollm2-nq.yaml OUT.jsonl [section.key=value ...]

Each searches for its question, is shown the supporting passage as the run would show it, and gives an accepted answer
that stands there. Questions without one are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from igpo_fast.config import Config, load
from igpo_fast.data.load import Data, load_data
from igpo_fast.data.tokenizer import load_tokenizer
from igpo_fast.rollouts.dialect import TagsDialect, unquote
from igpo_fast.rollouts.tools.search import SEARCH_TOOL
from igpo_fast.types import Question, ToolResult, search_for


def demonstrations(config: Config, count: int) -> Iterator[dict]:
    """At most ``count`` trajectories of training questions, as rows with messages in the dialect ``tags``."""
    data: Data = load_data(config)
    passages = {passage.id: passage for passages in data.collections.values() for passage in passages}
    budgets = dict(max_passage_tokens=config.search.max_passage_tokens, max_answer_tokens=64, max_answers=1)
    dialect = TagsDialect(load_tokenizer(config, data), (SEARCH_TOOL,), **budgets)
    made = (row for question in data.train if (row := _demonstration(question, passages, dialect)))
    yield from (row for row, _ in zip(made, range(count), strict=False))


def _demonstration(question: Question, passages: dict, dialect: TagsDialect) -> dict | None:
    call = (search_for(question.question),)
    passage = passages.get(question.steps[0].get("passage_id")) if question.steps else None
    _, shown = dialect.response(call, (ToolResult((passage,) if passage else ()),))
    answer = next((answer for answer in question.answers if answer in shown), None)
    if answer is None:
        return None
    messages = [
        {"role": "assistant", "content": unquote(dialect.write(call))},
        {"role": "tool", "content": shown},
        {"role": "assistant", "content": f"<answer> {answer} </answer>"},
    ]
    return {"question": question.question, "answers": list(question.answers), "messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for igpo-fast train")
    args = parser.parse_args()
    rows = list(demonstrations(load(args.config, args.overrides), args.count))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} demonstrations in {args.output}")


if __name__ == "__main__":
    main()
