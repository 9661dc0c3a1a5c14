"""``model-soup``: encoders of one architecture, fine-tuned alone; their weights are averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from hubrl.specs import HubSpec
from vision_tasks.distributed import agreed
from vision_tasks.methods.ensembles import EnsembleI
from vision_tasks.methods.method import Batches, Settings
from vision_tasks.methods.same_architecture import check_same_architecture
from vision_tasks.tasks import Task

# Shape letters: B batch, E encoders, O outputs, C H W image.


class ModelSoup(EnsembleI):
    """
    The greedy soup of Wortsman et al. (ICML 2022, arXiv 2203.05482).

    The models learn as in ``ensemble-i``, but their heads start alike. At the end of each epoch
    they are added to the mean of weights in the order of their validation scores, each if the mean
    gets no worse by it; a checkpoint has all of them. Deviation: there the models are one
    pretrained model, fine-tuned in several ways; here each was pretrained in a way of its own, so
    that a mean of their weights may well be worth nothing, and the soup be the best model. Running
    statistics of normalisation are averaged as weights are.

    :raises ValueError: if the hub's encoders differ in architecture
    """

    is_member_E: Tensor

    def __init__(self, hub: HubSpec, task: Task, settings: Settings) -> None:
        check_same_architecture("model-soup", hub)
        super().__init__(hub, task, settings)
        first, *others = (model.head for model in self.predictors().values())
        for head in others:
            head.load_state_dict(first.state_dict())
        self.register_buffer("is_member_E", torch.ones(len(self.models), dtype=torch.bool))

    def choose(self, batches: Batches) -> None:
        """Choose the soup's members by their score on the validation images."""
        n, sign = len(self.models), 1.0 if self.task.is_more_better else -1.0
        alone_EE = torch.eye(n, dtype=torch.bool)
        scores = [sign * self._score(alone_E, batches) for alone_E in alone_EE]
        best, *others = sorted(range(n), key=lambda i: -scores[i])
        members_E, score = alone_EE[best], scores[best]
        for i in others:
            more_E = members_E | alone_EE[i]
            with_it = sign * self._score(more_E, batches)
            if with_it >= score:
                members_E, score = more_E, with_it
        self.is_member_E.copy_(members_E)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Outputs (B, O) of the soup."""
        return self.soup(images_BCHW, self.is_member_E)

    def results(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The soup's outputs, and those of each encoder's model."""
        return {"": self(images_BCHW), **self.outputs(images_BCHW)}

    @torch.no_grad()
    def soup(self, images_BCHW: Tensor, is_member_E: Tensor) -> Tensor:
        """
        Outputs (B, O) of the model with the members' mean weights.

        :param is_member_E: bool, at least one is true
        """
        models = [m for m, is_in in zip(self.models.values(), is_member_E, strict=True) if is_in]
        states = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in models]
        means = {
            name: torch.stack([state[name] for state in states]).mean(dim=0)
            for name, tensor in states[0].items()
            if tensor.is_floating_point()
        }
        outputs_BO: Tensor = torch.func.functional_call(models[0], means, (images_BCHW,))
        return outputs_BO

    @torch.no_grad()
    def _score(self, is_member_E: Tensor, batches: Batches) -> float:
        pairs = [(self.soup(images, is_member_E).cpu(), y.cpu()) for images, y in batches()]
        outputs_NO, targets_N = (torch.cat(part) for part in zip(*pairs, strict=True))
        return agreed(self.task.scores(outputs_NO, targets_N)[self.task.metric])
