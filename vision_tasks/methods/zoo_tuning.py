"""``zoo-tuning``: one network whose layers aggregate those of all encoders for each image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hubrl.encoders import Encoder, build_encoder
from hubrl.precision import resolve_precision
from hubrl.specs import HubSpec
from vision_tasks.methods.knowledge_flow import Hook, hooked
from vision_tasks.methods.method import Batches, Losses, Method, Settings, build_head, seeded
from vision_tasks.methods.same_architecture import check_same_architecture
from vision_tasks.tasks import Task

# Shape letters: B batch, E encoders, I channels in, O channels out, C H W image.

#: Training images that give BatchNorm its statistics, or half as many.
N_SAMPLED = 2048

#: Hidden units of a gate at least: of one or two, all may be silent for all images.
MIN_HIDDEN = 16

Layer = nn.Conv2d | nn.Linear


class ZooTuning(Method):
    """
    Zoo-Tuning (Shu et al., ICML 2021, arXiv 2106.15434).

    Each convolution and each linear layer has the weights of all encoders. They are aligned by
    learned linear maps of their output channels, which start as the identity (where a kernel has
    more than one pixel, as in the authors' code), and aggregated with gates that follow from the
    mean of the layer's input: each image has a network of its own, of the cost of one encoder.

    Ours: gates are a softmax and start equal, so that networks without normalisation keep their
    scale; other weights (normalisation, tokens, layers whose weights a model reads without calling
    them) start as the encoders' mean and are learned once for all; the running statistics of
    BatchNorm are those of the aggregated network on the training images before the first step, and
    stay so, as in all methods here. The lite version is left out.

    :raises ValueError: if the hub's encoders differ in architecture
    """

    #: Images that have their own weights in memory at once in evaluation.
    CHUNK = 32

    def __init__(self, hub: HubSpec, task: Task, settings: Settings) -> None:
        check_same_architecture("zoo-tuning", hub)
        super().__init__(hub, task, settings)
        first = hub.encoders[0]
        with seeded(settings.seed, "zoo-tuning"):
            trunks = [
                build_encoder(hub, spec, pretrained=settings.pretrained).trunk
                for spec in hub.encoders
            ]
            shape = (first.channels, *first.image_size)
            names = layers_of_images(trunks[0], torch.zeros(2, *shape))
            self.encoder = Encoder(first, aggregate(trunks, names))
        modules = self.encoder.modules()
        self._layers = [layer for layer in modules if isinstance(layer, AggregatedLayer)]
        for layer in self._layers:
            layer.mark_new_weights()
        self.head = build_head(first, task, settings.seed)

    @torch.no_grad()
    def begin(self, phase: str, batches: Batches) -> None:
        """Let BatchNorm know the statistics of the aggregated network."""
        kind = nn.modules.batchnorm._BatchNorm
        norms = [layer for layer in self.encoder.modules() if isinstance(layer, kind)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
            norm.train()
        if norms:
            sample_NCHW = _mixed_sample(batches)
            # Each batch counts alike in the mean, so their sizes differ by one at most.
            n_batches = math.ceil(len(sample_NCHW) / (4 * self.CHUNK))
            for images_BCHW in sample_NCHW.tensor_split(n_batches):
                self._features(images_BCHW)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()

    def loss(self, images_BCHW: Tensor, targets_B: Tensor) -> Losses:
        """The task's loss."""
        loss = self.task.losses(self.head(self._features(images_BCHW)), targets_B).mean()
        return Losses(loss, {"task": loss})

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Outputs (B, O)."""
        chunks = [self._features(chunk_BCHW) for chunk_BCHW in images_BCHW.split(self.CHUNK)]
        outputs_BO: Tensor = self.head(torch.cat(chunks))
        return outputs_BO

    def _features(self, images_BCHW: Tensor) -> Tensor:
        dtype = resolve_precision(self.settings.precision, images_BCHW.device)
        for layer in self._layers:
            layer.n_images = len(images_BCHW) * self.encoder.spec.n_frames
        features_BD: Tensor = self.encoder(images_BCHW, dtype).float()
        return features_BD


class AggregatedLayer(nn.Module):
    """
    A convolution or linear layer whose weights are aggregated anew for each image.

    ``n_images`` says how many images a batch is of: several rows may be one's, as its windows are.

    :param layers: of the same shape, one of each encoder; the first becomes part of this one
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        assert isinstance(layers[0], Layer)
        self.n_images = 1
        self.layer = layers[0]
        for name, weight in list(self.layer.named_parameters()):
            stacked = torch.stack([layer.get_parameter(name).detach() for layer in layers])
            setattr(self.layer, name, nn.Parameter(stacked))
            getattr(self.layer, name).decays = weight.ndim > 1  # biases don't
        n_outputs, n_inputs, *kernel = self.layer.weight.shape[1:]
        n_inputs *= self.layer.groups if isinstance(self.layer, nn.Conv2d) else 1
        n_hidden = max(n_inputs // 4, MIN_HIDDEN)
        self.gates = nn.Sequential(
            nn.Linear(n_inputs, n_hidden, bias=False), nn.ReLU(), nn.Linear(n_hidden, len(layers))
        )
        for weight in self.gates[-1].parameters():
            nn.init.zeros_(weight)
        self.alignment: nn.Parameter | None = None
        if max(kernel, default=1) > 1:
            self.alignment = nn.Parameter(torch.zeros(len(layers), n_outputs, n_outputs))

    @property
    def weight(self) -> Tensor:
        """Of all encoders, (E, O, ...): some models ask a layer's weight for its device."""
        return self.layer.weight

    def mark_new_weights(self) -> None:
        """Gates and alignment are no pretrained weights: they learn as fast as heads."""
        alignment = () if self.alignment is None else (self.alignment,)
        for weight in (*self.gates.parameters(), *alignment):
            weight.is_encoder = False

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of what the layer takes: the rows of the first image, of the second, ..."""
        gates_BE = self.gate(inputs)
        weights = {
            name: torch.einsum("be,e...->b...", gates_BE, each)
            for name, each in self.aligned().items()
        }

        def one(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(self.layer, weights, (rows,))
            return output

        rows = inputs.unflatten(0, (self.n_images, -1))
        outputs: Tensor = torch.func.vmap(one)(weights, rows)
        return outputs.flatten(0, 1)

    def gate(self, inputs: Tensor) -> Tensor:
        """Shares of the encoders, (B, E), from the mean of the inputs over all places."""
        is_conv = isinstance(self.layer, nn.Conv2d)
        means = inputs.flatten(2).mean(dim=2) if is_conv else _mean_token(inputs)
        means_BI = means.unflatten(0, (self.n_images, -1)).mean(dim=1)
        gates_BE: Tensor = self.gates(means_BI).softmax(dim=1)
        return gates_BE

    def aligned(self) -> dict[str, Tensor]:
        """The layer's parameters (E, O, ...), aligned."""
        weights: dict[str, Tensor] = dict(self.layer.named_parameters())
        if self.alignment is not None:
            weight_EOX = weights["weight"].flatten(2)
            aligned_EOX = weight_EOX + self.alignment @ weight_EOX
            weights["weight"] = aligned_EOX.view_as(weights["weight"])
        return weights


@torch.no_grad()
def layers_of_images(trunk: nn.Module, images_BCHW: Tensor) -> list[str]:
    """
    Names of the convolutions and linear layers that are called on rows of images.

    Others are read by the modules around them, or called on what is the same for all images.

    :param images_BCHW: two, preprocessed
    """
    of_one, of_two = _rows(trunk, images_BCHW[:1]), _rows(trunk, images_BCHW)
    return [name for name, rows in of_one.items() if of_two[name] == [2 * n for n in rows]]


def _rows(trunk: nn.Module, images_BCHW: Tensor) -> dict[str, list[int]]:
    """By the names of layers, the rows of each of their calls."""
    rows: dict[str, list[int]] = {}

    def count(name: str) -> Hook:
        return lambda layer, inputs, output: rows.setdefault(name, []).append(len(inputs[0]))

    layers = [name for name, module in trunk.named_modules() if isinstance(module, Layer)]
    with hooked(trunk, {name: count(name) for name in layers}):
        trunk(images_BCHW)
    return rows


@torch.no_grad()
def aggregate(trunks: list[nn.Module], names: Sequence[str]) -> nn.Module:
    """
    The first trunk, some of its layers aggregated, all other weights and statistics the mean over
    the trunks.

    :param trunks: of one architecture
    :param names: of convolutions and linear layers
    """
    states = [trunk.state_dict() for trunk in trunks]
    target = trunks[0]
    for name in names:
        parent, layers = name.rpartition("."), [trunk.get_submodule(name) for trunk in trunks]
        setattr(target.get_submodule(parent[0]), parent[2], AggregatedLayer(layers))
    for name, tensor in target.state_dict().items():
        if name in states[0] and tensor.is_floating_point():
            tensor.copy_(torch.stack([state[name] for state in states]).mean(dim=0))
    return target


def _mixed_sample(batches: Batches) -> Tensor:
    """
    Some training images (N, C, H, W) in random order: a set may be sorted by classes, and batches
    of BatchNorm must not be.
    """
    kept: list[Tensor] = []
    stride = 1
    for images_BCHW, _ in batches():
        # Copies: a view would keep its whole batch.
        kept += [image_CHW.clone() for image_CHW in images_BCHW[::stride]]
        if len(kept) > N_SAMPLED:
            kept, stride = kept[::2], 2 * stride
    order_N = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
    return torch.stack([kept[i] for i in order_N.tolist()])


def _mean_token(inputs: Tensor) -> Tensor:
    return inputs if inputs.ndim == 2 else inputs.flatten(1, -2).mean(dim=1)
