"""Text as windows of characters."""

import dataclasses
from typing import ClassVar

import numpy as np

from experiments.datasets.arrays import Examples
from experiments.errors import ConfigError, DataError

TRAIN_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class TextDataset(Examples):
    """Windows of a text, one after the other, and the characters that follow.

    ``x [n, context]`` holds numbers of characters, int32; ``y[i, t]`` is the character
    after ``x[i, t]``. The first nine tenths of the text are for training; the test set
    is the rest, usually called validation set.
    """

    noun: ClassVar[str] = "windows"

    vocabulary: str  # the characters by their numbers

    @property
    def context(self) -> int:
        """Characters of a window."""
        return self.x_train.shape[1]


def make_text(
    name: str, title: str, source: str, text: str, context: int
) -> TextDataset:
    """Numbers the characters of a text, splits it by position and cuts windows."""
    vocabulary = "".join(sorted(set(text)))
    if len(vocabulary) < 2:
        raise DataError(f"{source}: {len(vocabulary)} different characters.")
    numbers = {character: number for number, character in enumerate(vocabulary)}
    tokens = np.fromiter((numbers[c] for c in text), np.int32, len(text))
    middle = int(TRAIN_SHARE * len(tokens))
    parts = tokens[:middle], tokens[middle:]
    shortest = min(map(len, parts))
    if shortest <= context:
        raise ConfigError(
            f"net.context is {context}; {title} has a part of only {shortest} "
            "characters, and a window needs one more than it is long."
        )
    train, test = (windows(part, context) for part in parts)
    return TextDataset(name, title, source, *train, *test, vocabulary=vocabulary)


def windows(tokens: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts windows that do not overlap; what is left at the end is dropped.

    Args:
        tokens: numbers of the characters, ``[n]``.
        context: characters of a window.
    """
    count = (len(tokens) - 1) // context
    shape = count, context
    return (
        tokens[: count * context].reshape(shape),
        tokens[1 : count * context + 1].reshape(shape),
    )
