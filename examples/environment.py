"""An environment: a class whose public methods are tools. Every rollout has an object of its own.

igpo-fast train --config configs/quickstart.yaml model.tokenizer=bpe algorithm.outcome=tools \
    rollout.tools=[examples/environment.py:Hangman]
"""


class Hangman:
    def open(self, question: dict) -> None:
        self.hidden, self.guesses = question["answers"][0], 0

    def guess(self, letter: str) -> str:
        """Ask where a letter stands in the answer.

        Args:
            letter: One letter.
        """
        self.guesses += 1
        return "".join(c if c in (letter, " ") else "_" for c in self.hidden)

    def outcome(self, answer: str | None) -> dict[str, float]:
        return {"reward": float(answer == self.hidden), "guesses": self.guesses}
