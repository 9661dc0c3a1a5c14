"""``python -m vision_tasks.landmarks``: trains and tests a method on faces with landmarks."""

from __future__ import annotations

from hubrl import cli
from vision_tasks.command import vision_command
from vision_tasks.data import LANDMARKS

command = vision_command("landmarks", LANDMARKS)

if __name__ == "__main__":
    cli.run(command, "python -m vision_tasks.landmarks")
