"""Torchvision's networks: names and shapes of their state_dicts, and logits for weights drawn by NumPy.

Run where torch and torchvision are, `python tests/support/torchvision_reference.py` writes what the tests compare with:
`torchvision.json`. The tests need neither. Made with torch 2.13.0 and torchvision 0.28.0.
"""

import json
from pathlib import Path

import numpy as np

NETWORKS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "densenet121",
    "efficientnet_b0",
    "vgg11_bn",
    "googlenet",
)
OPTIONS = {"googlenet": {"aux_logits": False, "init_weights": False}}
CLASSES, IMAGES = 10, (2, 3, 64, 64)
FILE = Path(__file__).with_name("torchvision.json")


def draw(shapes, seed=0):
    """A state_dict: outputs stay near 1 in size, and running statistics are not those of a fresh layer."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.integers(-127, 128, shape, np.int8) / np.float32(127)  # quick, for there are 10⁸
        kind = name.rpartition(".")[2]
        if len(shape) > 1:
            values *= np.float32(np.sqrt(6 / np.prod(shape[1:])))
        elif kind in ("running_var", "weight"):
            values = 1 + values / 2
        elif kind == "num_batches_tracked":
            values = np.array(7)
        else:
            values /= 10
        tensors[name] = values
    return tensors


def images():
    return np.random.default_rng(1).normal(size=IMAGES).astype(np.float32)


def reference(name):
    """(shapes, logits) of torchvision's network, computed in float64."""
    import torch
    import torchvision

    model = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES, **OPTIONS.get(name, {}))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({key: torch.as_tensor(value) for key, value in draw(shapes).items()})
    with torch.no_grad():
        logits = model.double().eval()(torch.as_tensor(images()).double())
    return shapes, [[float(f"{value:.9g}") for value in row] for row in logits.tolist()]


def main():
    found = {}
    for name in NETWORKS:
        shapes, logits = reference(name)
        found[name] = {"shapes": shapes, "logits": logits}
    FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
