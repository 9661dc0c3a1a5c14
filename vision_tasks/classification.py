"""``python -m vision_tasks.classification``: trains and tests a method on labelled images."""

from __future__ import annotations

from pathlib import Path

from hubrl import cli
from vision_tasks.command import vision_command
from vision_tasks.config import VisionConfig
from vision_tasks.data import CLASSIFICATION, ImageData, load_classification
from vision_tasks.tasks import Classification


def load_data(config: VisionConfig) -> tuple[ImageData, Classification]:
    """The images of a run, and their classes as a task."""
    data = config.data
    root = Path(data.root) if data.root else None
    images = load_classification(data.name, root, data.image_size, data.limit, config.train.seed)
    return images, Classification(images.n_outputs)


command = vision_command("classification", load_data, list(CLASSIFICATION))

if __name__ == "__main__":
    cli.run(command, "python -m vision_tasks.classification")
