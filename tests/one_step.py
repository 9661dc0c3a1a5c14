"""One training step of hub-pathway in this process, or in each that ``torchrun`` started.

Usage: one_step.py HUB FOLDER; the gradients of all weights go to FOLDER/gradients.safetensors, and
with them, as "idle", how far the weights of the hub's last encoder went, which no image activates,
and what the generator's running means came to.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_images import SIZE, quadrant_data, small_vision_config
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hubrl.signals import StopSignal
from hubrl.specs import load_hub
from vision_tasks import distributed
from vision_tasks.methods import Settings, build_method
from vision_tasks.tasks import Classification
from vision_tasks.training import Trainer

if __name__ == "__main__":
    hub, folder = Path(sys.argv[1]), Path(sys.argv[2])
    distributed.join()
    config = small_vision_config(hub, train__epochs=1, train__batch_size=32, data__flip=False)
    settings = Settings(config.train.seed, SIZE)
    method = build_method("hub-pathway", load_hub(hub), Classification(4), settings)
    torch.manual_seed(1)
    with torch.no_grad():  # noise is of a process' own, and would change the routing
        method.model.pathway.generator.noise_scale.bias.fill_(-1e4)
        torch.nn.init.normal_(method.model.pathway.generator.scores.weight, std=0.3)
        method.model.pathway.generator.scores.bias[-1] = -1e4
    idle = list(method.model.pathway.encoders[-1].weights)
    before = [weight.detach().clone() for weight in idle]
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        for name, weight in method.named_parameters():
            none = torch.zeros_like(weight)
            gradients[name] = none if weight.grad is None else weight.grad.clone()

    register_optimizer_step_pre_hook(keep)
    Trainer(method, quadrant_data(32), config, folder).run(StopSignal())
    if distributed.rank() == 0:
        went = [(now.detach() - then).abs().max() for now, then in zip(idle, before, strict=True)]
        gradients["idle"] = torch.stack(went).max()
        generator = method.model.pathway.generator
        for name in ("image_mean", "feature_mean"):
            for key, buffer in getattr(generator, name).named_buffers():
                gradients[f"{name}.{key}"] = buffer
        save_file(gradients, folder / "gradients.safetensors")
