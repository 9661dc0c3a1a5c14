"""``python -m vision_tasks.classification``: trains and tests a method on labelled images."""

from __future__ import annotations

from hubrl import cli
from vision_tasks.command import vision_command
from vision_tasks.data import CLASSIFICATION

command = vision_command("classification", CLASSIFICATION)

if __name__ == "__main__":
    cli.run(command, "python -m vision_tasks.classification")
