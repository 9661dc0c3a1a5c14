"""``python -m vision_tasks.landmarks``: trains and tests a method on faces with landmarks."""

from __future__ import annotations

from pathlib import Path

from hubrl import cli
from vision_tasks.command import vision_command
from vision_tasks.config import VisionConfig
from vision_tasks.data import LANDMARKS, LandmarkData, load_landmarks
from vision_tasks.tasks import Landmarks


def load_data(config: VisionConfig) -> tuple[LandmarkData, Landmarks]:
    """
    The images of a run, and their landmarks as a task.

    :raises ValueError: if the configuration moves images, but not their landmarks
    """
    data = config.data
    if data.flip or data.shift:
        raise ValueError(
            "data.flip and data.shift would leave the landmarks where they were: set them to "
            "false and 0"
        )
    root = Path(data.root) if data.root else None
    images = load_landmarks(data.name, root, data.image_size, data.limit, config.train.seed)
    return images, Landmarks(images.n_outputs // 2, images.eyes)


command = vision_command("landmarks", load_data, list(LANDMARKS))

if __name__ == "__main__":
    cli.run(command, "python -m vision_tasks.landmarks")
