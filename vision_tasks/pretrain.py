"""``python -m vision_tasks.pretrain``: a hub of five small encoders of one architecture."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import Dataset

from hubrl import cli
from hubrl.architectures import find_architecture
from hubrl.encoders import Encoder
from hubrl.hub_folder import add_encoder, check_writable
from hubrl.precision import check_device
from hubrl.specs import HUB_FILE, EncoderSpec, load_hub
from vision_tasks.data import load_classification
from vision_tasks.pretexts import PRETEXTS, Pretext
from vision_tasks.training import augment

# Shape letters: N images, C H W image.

ARCHITECTURE, FEATURES_DIM = "timm:mobilenetv3_small_050", 1024
IMAGE_SIZE = 64
BATCH_SIZE = 128
LEARNING_RATE = 3e-3
SHIFT = 4  # pixels by which images are moved at random

Images = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Budget:
    """What decides how an encoder comes out, beside its pretext."""

    epochs: int
    limit: int
    seed: int

    @property
    def command(self) -> str:
        """The command of this budget, but for folders."""
        return (
            f"python -m vision_tasks.pretrain --epochs {self.epochs} --limit {self.limit} "
            f"--seed {self.seed}"
        )


@click.command("pretrain", help="Train five small encoders on Fashion-MNIST, each on something "
               "else, and make them a hub of one architecture.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the hub.")
@click.option("--epochs", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--limit", type=click.IntRange(min=10), default=20_000, show_default=True,
              help="Training images.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the data.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda ...")
def command(out: Path, root: Path | None, device: str, **numbers: Any) -> None:
    """Train the encoders that the folder doesn't have yet."""
    budget = Budget(**numbers)
    with cli.user_errors():
        on = check_device("--device", device)
        check_writable(out)
        missing = [name for name in PRETEXTS if not _is_there(out, name, budget)]
        if not missing:
            print(f"hub {out} has them all")
            return
        data = load_classification("fashion-mnist", root, IMAGE_SIZE, budget.limit, budget.seed)
        images, targets = _stacked(data.train)
        for name in missing:
            start = time.perf_counter()
            card, encoder, loss = pretrain(name, (images, targets), data.n_outputs, budget, on)
            tensors = encoder.trunk.cpu().to(memory_format=torch.contiguous_format).state_dict()
            add_encoder(out, card, tensors)
            print(f"{name}: loss {loss:.4g}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"hub {out}: {', '.join(load_hub(out).encoder_names)}")


def _stacked(dataset: Dataset[Any]) -> Images:
    pairs = [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]
    images, targets = (torch.stack(part) for part in zip(*pairs, strict=True))
    return images, targets


def pretrain(
    name: str, images: Images, n_classes: int, budget: Budget, device: torch.device
) -> tuple[EncoderSpec, Encoder, float]:
    """
    Train one encoder; all begin with the same random weights.

    :param name: a key of ``PRETEXTS``
    :param images: uint8 (N, 3, H, W), and their classes
    :param n_classes: of the data
    :return: its card, still without weights; the encoder; its mean loss in the last epoch
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(budget.seed)
        card = _card(name, budget)
        encoder = Encoder(card, find_architecture(card).build(card)).to(device)
        pretext = PRETEXTS[name](card.features_dim, n_classes).to(device)
        images_NCHW, targets_N = (part[pretext.rows(images[1])] for part in images)
        loss = _train(encoder, pretext, (images_NCHW, targets_N), budget.epochs)
    facts = {**card.pretraining, "images": len(targets_N), "loss": float(f"{loss:.4g}")}
    return dataclasses.replace(card, pretraining=facts), encoder, loss


def _train(encoder: Encoder, pretext: Pretext, images: Images, epochs: int) -> float:
    images_NCHW, targets_N = images
    weights = [*encoder.parameters(), *pretext.parameters()]
    optimizer = AdamW(weights, LEARNING_RATE, weight_decay=0.01)
    n_steps = epochs * math.ceil(len(targets_N) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, max(n_steps, 10))
    encoder.trunk.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    encoder.trunk.train()  # statistics of normalisation are learned here, and nowhere else
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(targets_N)).split(BATCH_SIZE):
            moved_BCHW = augment(images_NCHW[rows], flip=True, shift=SHIFT)
            batch_BCHW = moved_BCHW.to(weights[0].device, memory_format=torch.channels_last) / 255
            loss = pretext.loss(encoder, batch_BCHW, targets_N[rows].to(weights[0].device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    encoder.trunk.eval()
    return sum(losses) / len(losses)


def _card(name: str, budget: Budget) -> EncoderSpec:
    return EncoderSpec(
        name=name,
        architecture=ARCHITECTURE,
        features_dim=FEATURES_DIM,
        image_size=(IMAGE_SIZE, IMAGE_SIZE),
        channels=3,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        license="MIT",
        source=budget.command,
        pretraining={
            "objective": PRETEXTS[name].objective,
            "data": "fashion-mnist, the training part without the validation images",
            "epochs": budget.epochs,
            "seed": budget.seed,
        },
    )


def _is_there(out: Path, name: str, budget: Budget) -> bool:
    """
    :raises ValueError: if the folder has an encoder of this name that was made in another way
    """
    if not (out / HUB_FILE).exists():
        return False
    cards = {spec.name: spec for spec in load_hub(out).encoders}
    if name in cards and cards[name].source != budget.command:
        raise ValueError(
            f"out {out} has an encoder {name!r} of `{cards[name].source}`, not of "
            f"`{budget.command}`: give another folder"
        )
    return name in cards


if __name__ == "__main__":
    cli.run(command, "python -m vision_tasks.pretrain")
