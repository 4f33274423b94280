"""Warm start: supervised fine-tuning on demonstrations, kept for the next run with the same settings.

They are imperfect ones made from questions, or trajectories from files (demonstrations.py). A made-up one is written in
the run's own dialect and answered by its own tools, so that the policy learns format and loop from the tokens that it
will meet in rollouts. Its mistakes leave room for reinforcement learning.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from igpo_fast import __version__
from igpo_fast.config import Config
from igpo_fast.contents import contents, sources
from igpo_fast.data.load import Data, sources_of
from igpo_fast.data.world import CLEAN, HARD, NOISY, Demonstration, Noise
from igpo_fast.data.worlds import WORLDS
from igpo_fast.demonstrations import NONE_GIVEN, PROMPT, RESPONSE, WRITTEN, Demonstrations, joined
from igpo_fast.errors import InputError, ToolError
from igpo_fast.files import atomic_folder, check_manifest, check_writable, write_manifest
from igpo_fast.model import load
from igpo_fast.rollouts.dialect import Dialect
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.rollouts.tools.lookup import Lookup
from igpo_fast.rollouts.tools.search import Bm25Search
from igpo_fast.rollouts.tools.visit import Visit
from igpo_fast.types import ANSWER, Question, answer_with, search_for
from igpo_fast.update.learner import Learner
from igpo_fast.update.policy import SupervisedInputs
from igpo_kernels import RolloutTokens, Tree, pack

Progress = Callable[[int, int, float], None]
"""(done, total, loss per token of the last step)"""


def steps_of(config: Config) -> int:
    return config.sft.clean_steps + config.sft.noisy_steps + config.sft.hard_steps + config.sft.steps


def warm_start(
    config: Config,
    lm: PreTrainedModel,
    tokenizer,
    dialect: Dialect,
    data: Data,
    tools: Tools,
    progress: Progress,
    given: Demonstrations = NONE_GIVEN,
) -> PreTrainedModel:
    """The warm-started model, from ``run.cache`` if these settings were trained before, or trained now.

    Args:
        given: what ``sft.demonstrations`` holds.
    Returns:
        ``lm``, trained, or the cached model.
    Raises:
        InputError: the cached model is damaged.
        StorageError: run.cache cannot be written; raised before the training, which would be lost.
    """
    if not steps_of(config):
        return lm
    cache = Path(config.run.cache)
    folder = cache / f"sft-{_fingerprint(config, tokenizer, data)}"
    if not folder.exists():
        check_writable(cache)
        train(config, lm, dialect, data, tools, progress, given)
        with atomic_folder(folder, owner=f".{os.getpid()}") as temporary:
            lm.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            write_manifest(temporary)
    check_manifest(folder, f"delete {folder}, and the warm start is trained again")
    # Read back even if just trained, so that the first run and later ones start from the same bytes.
    dtype = getattr(torch, config.train.precision)
    source = f"the cached warm start {folder}; delete it"
    return load(str(folder), dtype=dtype, device=str(lm.device), check=False, source=source)


def _fingerprint(config: Config, tokenizer, data: Data) -> str:
    """A digest of everything on which the warm start depends; files count by their content, not their path."""
    paths = {"model": {"path", "tokenizer"}, "data": {"train", "eval", "corpus"}, "sft": {"demonstrations"}}
    sections = {
        name: getattr(config, name).model_dump(exclude=paths.get(name)) for name in ("model", "data", "world", "sft")
    }
    # Demonstrations of the made-up world search in process, those of other questions with the run's own search.
    url = {"url"} if config.data.source != "world" else set()
    sections["search"] = config.search.model_dump(include={"top_k", "max_passage_tokens"} | url)
    sections["tools"] = config.tools.model_dump(include={"calls", "limits", "max_characters", "max_tokens"})
    rollout = config.rollout.model_dump(include={"tools", "dialect", "system", "thinking", "max_turns", "max_tokens"})
    words = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template)
    others = ("data.eval", "algorithm.", "rollout.engine")
    held = {k: v for k, v in (sources(config) | contents(config)).items() if not k.startswith(others)}
    text = repr(
        (
            sections,
            rollout,
            config.algorithm.wrapper,
            config.train.seed,
            config.train.precision,
            __version__,
            words,
            held,
        )
    )
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=6)
    if config.data.source != "world":  # eval.questions decides which of them are trained on
        for question in data.train:
            digest.update(repr(question).encode(errors="surrogatepass"))
    return digest.hexdigest()


def train(
    config: Config,
    lm: PreTrainedModel,
    dialect: Dialect,
    data: Data,
    tools: Tools,
    progress: Progress | None = None,
    given: Demonstrations = NONE_GIVEN,
) -> None:
    """AdamW on the demonstrations, one packed batch per step, in place; the learning rate falls linearly to 0."""
    total = steps_of(config)
    learner = Learner(
        lm, backend=config.model.kernels, lr=config.sft.lr, factor=lambda step: 1 - step / total,
    )  # fmt: skip
    for step, batch in enumerate(chain(_batches(config, dialect, data, tools), _given(config, given))):
        loss = demonstration_loss(learner, batch, config.sft.response_weight)
        learner.backward(loss)
        learner.step()
        if progress:
            progress(step + 1, total, float(loss.detach()))


def demonstration_loss(
    learner: Learner, batch: list[tuple[np.ndarray, np.ndarray]], response_weight: float
) -> torch.Tensor:
    """Weighted mean of the negative log-likelihood of the tokens after the prompts.

    Args:
        batch: per demonstration its tokens and their authors, int [L].
    """
    plan = pack([Tree([RolloutTokens(i, ids, writer)]) for i, (ids, writer) in enumerate(batch)])
    weights = np.where(plan.turn == WRITTEN, 1.0, response_weight).astype(np.float32)
    return learner(plan, SupervisedInputs(weights)).loss


async def write(
    demonstration: Demonstration, dialect: Dialect, tools: Tools, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """A demonstration as a rollout of the run's dialect and tools, cut to ``max_tokens``: tokens and their authors, int
    [L]."""
    question = demonstration.question
    pieces = [(dialect.prompt(question), PROMPT)]
    async with tools.open(question) as opened:
        for action in demonstration.turns:
            if action.tool not in (ANSWER, *dialect.functions):
                raise InputError(
                    f"warm start: demonstrations call {action.tool}, which rollout.tools lacks; add it, or set "
                    "sft.clean_steps, sft.noisy_steps and sft.hard_steps to 0"
                )
            pieces.append((dialect.encode(dialect.write((action,))), WRITTEN))
            if action.tool == ANSWER:
                continue
            (result,) = await opened.call((action,))
            if result.failure:
                raise ToolError(
                    f"warm start: a call of {action.tool} failed for good ({result.failure}); see that the tool answers"
                )
            pieces.append((dialect.response((action,), (result,))[0], RESPONSE))
    ids, writer = joined(pieces)
    return ids[:max_tokens], writer[:max_tokens]


def _batches(config: Config, dialect: Dialect, data: Data, tools: Tools) -> Iterator[list]:
    """One batch of written demonstrations per step."""
    settings = config.sft
    if not (settings.clean_steps or settings.noisy_steps or settings.hard_steps):
        return
    rng = random.Random(f"{config.train.seed}/sft")
    if config.data.source == "world":
        kind, most = WORLDS[config.world.kind], config.rollout.max_turns
        worlds = kind.make_worlds(config.world, "sft")
        known = Data((), (), **sources_of(config, worlds))
        search = Bm25Search(known.collections, config.search.top_k)
        tools = tools.with_others(search, Visit(known.collections), Lookup(known.tables))

        def draw(noise: Noise) -> Demonstration:
            world = rng.choice(worlds)
            return kind.demonstrate(rng.choice(world.questions), world, noise, rng, max_turns=most)
    else:
        answered = [question for question in data.train if question.answers]
        if not answered:
            raise InputError("sft: no question has an answer to demonstrate; set its steps to 0")
        draw = lambda noise: _from_steps(answered, noise, rng)  # noqa: E731
    phases = ((settings.clean_steps, CLEAN), (settings.noisy_steps, NOISY), (settings.hard_steps, HARD))

    async def written(noise: Noise) -> list:
        try:
            max_tokens = config.rollout.max_tokens
            return [await write(draw(noise), dialect, tools, max_tokens) for _ in range(settings.batch_size)]
        finally:
            await tools.aclose()

    for steps, noise in phases:
        for _ in range(steps):
            yield asyncio.run(written(noise))


def _given(config: Config, given: Demonstrations) -> Iterator[list]:
    """One batch of the files' demonstrations per step: all of them once, in random order, before any comes again."""
    rng = random.Random(f"{config.train.seed}/demonstrations")
    order = []
    for _ in range(config.sft.steps):
        while len(order) < config.sft.batch_size:
            order += rng.sample(given.written, len(given.written))
        batch, order = order[: config.sft.batch_size], order[config.sft.batch_size :]
        yield batch


def _from_steps(questions: Sequence[Question], noise: Noise, rng: random.Random) -> Demonstration:
    """A demonstration from a question's decomposition (MuSiQue's ``#1`` is the first step's answer); a question
    without sub-questions is searched for itself. Mistakes use other questions."""
    question, other = rng.choice(questions), rng.choice(questions)
    turns, found = [], []
    for step in question.steps or ({},):
        if found and rng.random() < noise.early_stop:
            break
        query = step.get("question", question.question)
        for number, answer in enumerate(found, start=1):
            query = query.replace(f"#{number}", answer)
        turns.append(search_for(other.question if rng.random() < noise.wrong_query else query))
        found.append(step.get("answer", ""))
        if "question" not in step:
            break
    answer = other.answers[0] if rng.random() < noise.wrong_answer else question.answers[0]
    return Demonstration(question, (*turns, answer_with(answer)))
