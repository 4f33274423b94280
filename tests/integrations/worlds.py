"""The made-up world as TRL sees it: a data set, a model folder, a ``rollout_func`` that samples with our engine."""

from __future__ import annotations

from datasets import Dataset
from transformers import AutoModelForCausalLM

from igpo_fast.config import Config
from igpo_fast.rollouts.batch import rollout_groups
from igpo_fast.setup import set_up
from igpo_fast.types import Question, Rollout
from igpo_fast.update.rewards import f1_score

ARGS = dict(bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, dialect="tags")


class World:
    """Warm-started parts of a run, and rollouts of the policy that TRL trains.

    Args:
        folder: gets the model and its tokenizer.
    """

    def __init__(self, config: Config, folder):
        self.setup = set_up(config)
        self.folder, self.tokenizer = folder, self.setup.tokenizer
        self.setup.lm.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self._questions = {q.question: q for q in (*self.setup.data.train, *self.setup.data.eval)}
        self._calls = 0

    def model(self):
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32")

    def dataset(self, questions: tuple[Question, ...] | None = None) -> Dataset:
        asked = self.setup.data.train if questions is None else questions
        return Dataset.from_list([{"prompt": q.question, "answers": list(q.answers)} for q in asked])

    def sample(self, prompts: list[str], model) -> list[Rollout]:
        """A rollout per prompt; a group's prompts follow one another."""
        self.setup.lm.load_state_dict(model.state_dict())
        asked = list(dict.fromkeys(prompts))
        self._calls += 1
        groups = rollout_groups(
            self.setup.agent, [self._questions[p] for p in asked], len(prompts) // len(asked), self._calls
        )
        return [rollout for group in groups for rollout in group.rollouts]

    def __call__(self, prompts, trainer) -> dict:
        """TRL's rollout_func."""
        return for_trl(self.sample(prompts, trainer.model))


def for_trl(rollouts: list[Rollout]) -> dict:
    """What TRL's rollout_func returns."""
    masks = [(r.turn_of_token[len(r.prompt_ids) :] >= 0).astype(int).tolist() for r in rollouts]
    return {
        "prompt_ids": [r.prompt_ids.tolist() for r in rollouts],
        "completion_ids": [r.ids[len(r.prompt_ids) :].tolist() for r in rollouts],
        "logprobs": [[0.0] * len(mask) for mask in masks],
        "env_mask": masks,
        "f1": [f1_score(r.answer, r.question.answers) for r in rollouts],
    }


def f1(completions, f1, **_):
    """TRL's reward function."""
    return f1
