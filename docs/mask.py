"""Draws a packed group and its mask: ``python docs/mask.py > docs/mask.svg``.

Two rollouts of one question share the prompt and their first turn; an answer is forced after every prefix. The picture
is made from the plan and from the block lists that attention visits.
"""

import numpy as np

from igpo_kernels import ANSWER, DECISION, Branch, RolloutTokens, Tree, pack
from igpo_kernels.tree_attention.blocks import block_lists
from igpo_kernels.tree_attention.reference import visible

CELL, BLOCK, LEFT, TOP = 11, 8, 130, 64
COLOURS = {
    "prompt": "#9aa4ae",
    "shared turn": "#7b68b5",
    "rollout 0": "#2878b5",
    "rollout 1": "#c8553d",
    "answer": "#e3a72f",
}
FULL, MASKED, NEVER = "#bfd8ac", "#f1f1ec", "#ffffff"
PROMPT, TURN, ANSWER_TOKENS = 7, 5, 3


def group():
    """The plan, and the role of each packed token."""
    shared = PROMPT + TURN
    names = ["prompt"] * PROMPT + ["shared turn"] * TURN
    rollouts, of_token = [], {}
    for index, turns in enumerate((2, 1)):
        length = shared + turns * TURN
        own = np.arange(length) + 100 * (index + 1)
        ids = np.where(np.arange(length) < shared, np.arange(length), own)
        boundaries = np.array([PROMPT, *range(shared, length, TURN), length])
        rollouts.append(RolloutTokens(index, ids, np.where(np.arange(length) < PROMPT, -1, 0), boundaries))
        of_token |= {int(i): names[n] if n < shared else f"rollout {index}" for n, i in enumerate(ids)}
    answer = np.arange(ANSWER_TOKENS + 1) + 500
    of_token |= dict.fromkeys(answer.tolist(), "answer")
    plan = pack([Tree(rollouts, [Branch(answer, 1, len(answer))])])
    return plan, [of_token[i] for i in plan.input_ids.tolist()]


def rectangle(x, y, width, height, fill, **more):
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}"{extra}/>'


def text(x, y, words, **more):
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x}" y="{y}"{extra}>{words}</text>'


def draw() -> str:
    plan, names = group()
    mask, n = visible(plan, None, "cpu").numpy(), plan.n_tokens
    size = n * CELL
    shapes = [rectangle(0, 0, "100%", "100%", "#ffffff")]
    lists = block_lists(plan, None, BLOCK, BLOCK)
    for fill, masked in ((FULL, False), (MASKED, True)):
        for tile in range(len(lists.order)):
            for block in lists.columns(tile, masked):
                width, height = (min(BLOCK, n - at * BLOCK) * CELL for at in (block, tile))
                shapes.append(rectangle(LEFT + block * BLOCK * CELL, TOP + tile * BLOCK * CELL, width, height, fill))
    for q in range(n):
        for k in range(n):
            if mask[q, k]:
                shapes.append(rectangle(LEFT + k * CELL + 1, TOP + q * CELL + 1, CELL - 2, CELL - 2, COLOURS[names[k]]))
    for i, name in enumerate(names):
        shapes.append(rectangle(LEFT - CELL - 4, TOP + i * CELL + 1, CELL - 2, CELL - 2, COLOURS[name]))
        shapes.append(rectangle(LEFT + i * CELL + 1, TOP - CELL - 4, CELL - 2, CELL - 2, COLOURS[name]))
    for at in range(0, n + BLOCK, BLOCK):
        end = min(at, n) * CELL
        line = 'stroke="#b9b9b4" stroke-width="0.7"'
        shapes.append(f'<line x1="{LEFT}" y1="{TOP + end}" x2="{LEFT + size}" y2="{TOP + end}" {line}/>')
        shapes.append(f'<line x1="{LEFT + end}" y1="{TOP}" x2="{LEFT + end}" y2="{TOP + size}" {line}/>')
    start = 0
    for i in range(1, n + 1):
        if i == n or names[i] != names[start]:
            middle = TOP + (start + i) / 2 * CELL + 4
            shapes.append(text(LEFT - CELL - 10, middle, names[start], text_anchor="end"))
            start = i
    title = "A packed group: queries down, the keys they see across"
    shapes.append(text(LEFT, 20, title, font_weight="bold"))
    shapes.append(text(LEFT, 38, f"one pass over {n} tokens, where separate passes read {separate(plan)}"))
    legend = TOP + size + 24
    for x, fill, words in (
        (0, FULL, "full block: no mask"),
        (170, MASKED, "masked block"),
        (300, NEVER, "never visited"),
    ):
        shapes.append(rectangle(LEFT + x, legend - 10, 12, 12, fill, stroke="#b9b9b4"))
        shapes.append(text(LEFT + x + 18, legend, words))
    frame = f'width="{LEFT + size + 20}" height="{legend + 16}" font-family="sans-serif" font-size="12" fill="#333"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>', *shapes, "</svg>"])


def separate(plan) -> int:
    """Tokens that separate passes would read: one per prefix of each rollout, and one for its decisions."""
    total = 0
    for rollout in np.unique(plan.rollout):
        mine = plan.rollout == rollout
        ends = plan.position_ids[plan.row] + 1
        decisions, answers = mine & (plan.kind == DECISION), mine & (plan.kind == ANSWER)
        total += int(ends[decisions].max())
        total += sum(int(ends[answers & (plan.turn == turn)].max()) for turn in np.unique(plan.turn[answers]))
    return total


if __name__ == "__main__":
    print(draw())
