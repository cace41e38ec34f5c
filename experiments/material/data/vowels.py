"""Japanese vowels: short utterances of different lengths by nine speakers."""

import functools
import lzma
from pathlib import Path

import numpy as np

from experiments.material.data import Split, checked

FOLDER = Path(__file__).parent / "files"
SHA256 = {
    "TRAIN": "54eedcaea118cd7c5517b2937dd36dab85174ff29d967ee163694a3456575d51",
    "TEST": "1b2e51722075efdf5cd0514417ee5288c3a484c749f41a070b21c8fb4d3b24bf",
}
LONGEST = 29


@functools.cache
def load_vowels() -> Split:
    """Sequences of 12 coefficients, and who spoke: 270 to train on and 370 to test on, the source's own split.

    Inputs are (sequences, mask): (n, 29, 12) float32, zero after each sequence's end, and (n, 29, 1) bool, True
    where there is data; lengths are 7 to 29. Labels (n,) int32, 0 to 8.

    Source: files/README.md.

    Raises:
      ValueError: a file is not the one these experiments were written for (SHA-256).
    """
    train, test = (read(part) for part in SHA256)
    return Split(*train, *test)


def read(part: str) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """(sequences, mask) and labels of one file: a line each, channels between colons, the label last."""
    path = FOLDER / f"JapaneseVowels_{part}.ts.xz"
    text = lzma.decompress(checked(path, SHA256[part], "check the file out afresh")).decode()
    lines = text.partition("@data")[2].split()
    sequences = np.zeros((len(lines), LONGEST, 12), np.float32)
    mask = np.zeros((len(lines), LONGEST, 1), bool)
    labels = np.zeros(len(lines), np.int32)
    for i, line in enumerate(lines):
        *channels, label = line.split(":")
        values = np.array([channel.split(",") for channel in channels], np.float32).T
        sequences[i, : len(values)] = values
        mask[i, : len(values)] = True
        labels[i] = int(label) - 1
    return (sequences, mask), labels
