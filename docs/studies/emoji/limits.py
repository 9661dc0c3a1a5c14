"""
What fewer than all models of an ensemble reach, by the choice of a finished run of ensemble-i.

    python docs/studies/emoji/limits.py RUN

Test accuracy in percent of each pair's mean prediction, of all models', and of an oracle that
takes a model that is right wherever one is. No choice of two models that knows less than the
oracle can be expected to reach more than the best pair by much, and nothing here was trained for
choosing.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vision_tasks.methods.ensembles import EnsembleI
from vision_tasks.runs import load_run

# Shape letters: M models, N images, O classes.


def main(folder: Path) -> None:
    """Print the accuracies."""
    run = load_run(folder)
    assert isinstance(run.method, EnsembleI), f"{folder} is no run of ensemble-i"
    method = run.method.eval()
    chosen_MNO, chosen_N = predictions(method, run.data.validation)
    test_MNO, test_N = predictions(method, run.data.test)
    pairs = list(itertools.combinations(range(len(test_MNO)), 2))
    by_validation = max(pairs, key=lambda pair: accuracy(chosen_MNO[list(pair)], chosen_N))
    names = list(method.models)
    tests = {pair: accuracy(test_MNO[list(pair)], test_N) for pair in pairs}
    is_right_MN = test_MNO.argmax(dim=2) == test_N
    print(f"pairs of {len(names)}: mean {sum(tests.values()) / len(pairs):.1f}")
    print(f"best by validation, {' + '.join(names[i] for i in by_validation)}: "
          f"{tests[by_validation]:.1f}")  # fmt: skip
    print(f"best by test, for comparison alone: {max(tests.values()):.1f}")
    print(f"all {len(names)}: {accuracy(test_MNO, test_N):.1f}")
    print(f"some model is right: {100 * is_right_MN.any(dim=0).double().mean():.1f}")


@torch.inference_mode()
def predictions(method: EnsembleI, images: Dataset[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Probabilities (M, N, O) of each model, and the classes (N,)."""
    batches = [
        (torch.stack(list(method.outputs(images_BCHW).values())).softmax(dim=2), targets_B)
        for images_BCHW, targets_B in DataLoader(images, 128)
    ]
    probabilities, targets = zip(*batches, strict=True)
    return torch.cat(probabilities, dim=1), torch.cat(targets)


def accuracy(probabilities_MNO: Tensor, targets_N: Tensor) -> float:
    """Of the models' mean prediction, in percent."""
    is_right_N = probabilities_MNO.mean(dim=0).argmax(dim=1) == targets_N
    return 100.0 * float(is_right_N.double().mean())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
