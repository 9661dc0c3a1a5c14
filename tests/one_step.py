"""One training step of hub-pathway in this process, or in each that ``torchrun`` started.

Usage: one_step.py HUB FOLDER; the gradients of all weights go to FOLDER/gradients.safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_images import SIZE, quadrant_data, small_vision_config

from hubrl.signals import StopSignal
from hubrl.specs import load_hub
from vision_tasks import distributed
from vision_tasks.methods import Settings, build_method
from vision_tasks.tasks import Classification
from vision_tasks.training import Trainer

if __name__ == "__main__":
    hub, folder = Path(sys.argv[1]), Path(sys.argv[2])
    distributed.join()
    config = small_vision_config(hub, train__epochs=1, train__batch_size=24, data__flip=False)
    settings = Settings(config.train.seed, SIZE)
    method = build_method("hub-pathway", load_hub(hub), Classification(4), settings)
    torch.manual_seed(1)
    with torch.no_grad():  # noise is of a process' own, and would change the routing
        method.model.pathway.generator.noise_scale.bias.fill_(-1e4)
        torch.nn.init.normal_(method.model.pathway.generator.scores.weight, std=0.3)
    Trainer(method, quadrant_data(24), config, folder).run(StopSignal())
    if distributed.rank() == 0:
        gradients = {
            name: weight.grad if weight.grad is not None else torch.zeros_like(weight)
            for name, weight in method.named_parameters()
        }
        save_file(gradients, folder / "gradients.safetensors")
