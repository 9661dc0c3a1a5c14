"""Pathway generators: networks from images to the scores of the encoders (torch only)."""

from __future__ import annotations

import functools
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hubrl.encoders import is_frozen, orthogonal_init
from hubrl.precision import fast_layout

# Shape letters: B batch, M encoders to choose from, D features, N whatever a row has, C H W image,
# R rows of the batch that are observed.


class PathwayGenerator(nn.Module):
    """
    A small network from images to the scores of the encoders, always in float32.

    Its first layer projects patches that leave out no pixel, since a ball may be 2x2; of 14 pixels,
    for which the gradient is three times as fast as for 4 or 12 on a CPU.
    A game's images have nearly all pixels in common, so it looks at what differs from the mean
    image, and standardises its features: else all images have nearly the same scores.
    Of a stack of 4 or more grey frames it sees every second one, the newest among them: neighbours
    have little to add to a choice, and it takes less than half the time.
    Routing starts as a random function of the image and little noise: similar images activate the
    same encoders from the first step. (Scores of zero, where noise alone decides, hid from PPO what
    the encoders see: on Breakout at 20,000 steps the value function explained 0.28 of the returns'
    variance instead of 0.82; one seed each.)
    Hub-Pathway uses a ResNet-10 at 224 px and a second one for the noise; for small observations
    this light network, whose two heads give scores and noise scales, is our choice.

    :param channels: input channels
    :param image_size: (height, width) in pixels
    :param n_choices: number of scores, M
    """

    PATCH = 14
    SCORE_GAIN = 1.0
    NOISE_START = -2.0  # before the softplus, which makes it 0.13
    MIN_VARIANCE = 1e-4  # of a feature, lest one that hardly ever changed explodes

    def __init__(self, channels: int, image_size: tuple[int, int], n_choices: int) -> None:
        super().__init__()
        height, width = ((-size % self.PATCH + 1) // 2 for size in image_size)
        channels = len(range(channels)[self._seen(channels)])
        self.patches = nn.Conv2d(
            channels, 16, self.PATCH, stride=self.PATCH, padding=(height, width)
        )
        with torch.no_grad():
            n_features = self.patches(torch.zeros(1, channels, *image_size)).numel()
        self.hidden = nn.Linear(n_features, 64)
        orthogonal_init(self)
        self.image_mean = RunningMean(channels, *image_size)
        self.feature_mean = RunningMean(64)
        self.feature_square = RunningMean(64)
        self.feature_square.running_mean.fill_(1.0)  # until known, a variance of 1
        self.scores = nn.Linear(64, n_choices)
        self.noise_scale = nn.Linear(64, n_choices)
        nn.init.orthogonal_(self.scores.weight, self.SCORE_GAIN)
        nn.init.zeros_(self.scores.bias)
        nn.init.zeros_(self.noise_scale.weight)
        nn.init.constant_(self.noise_scale.bias, self.NOISE_START)

    def forward(self, images_BCHW: Tensor, noise_BM: Tensor | None) -> Tensor:
        """
        Scores (B, M): ``g(x) + noise * softplus(n(x))``.

        :param images_BCHW: uint8 in 0..255 or float in 0..1
        :param noise_BM: standard normal numbers; None for ``g(x)`` alone
        """
        images_BCHW = images_BCHW[:, self._seen(images_BCHW.shape[1])]
        with torch.autocast(images_BCHW.device.type, enabled=False):
            patches_BCHW = self._patches(images_BCHW)
            features_BD = self._standardise(self.hidden(patches_BCHW.relu().flatten(1)).relu())
            scores_BM: Tensor = self.scores(features_BD)
            if noise_BM is not None:
                scores_BM = scores_BM + noise_BM * F.softplus(self.noise_scale(features_BD))
        return scores_BM

    @staticmethod
    def _seen(channels: int) -> slice:
        """Channels are grey frames unless they come in threes."""
        is_grey_stack = channels >= 4 and channels % 3 != 0
        return slice((channels - 1) % 2, None, 2) if is_grey_stack else slice(None)

    def _patches(self, images_BCHW: Tensor) -> Tensor:
        """Projected patches of images less the mean image; linear, so each is projected alone."""
        # Dividing the weights instead of the pixels saves a pass over the batch.
        scale = 255.0 if images_BCHW.dtype == torch.uint8 else 1.0
        if not is_frozen(self):
            self.image_mean.observe(images_BCHW, scale)
        layer = self.patches
        project = functools.partial(F.conv2d, stride=layer.stride, padding=layer.padding)
        patches_BCHW = project(images_BCHW.float(), layer.weight / scale, layer.bias)
        return patches_BCHW - project(self.image_mean.running_mean[None], layer.weight)

    def _standardise(self, features_BD: Tensor) -> Tensor:
        # Features of whole images would tell of something else.
        if self.training and not is_frozen(self):
            is_mean_known = self.image_mean.n_rows > 0
            self.feature_mean.observe(features_BD, counts=is_mean_known)
            self.feature_square.observe(features_BD.square(), counts=is_mean_known)
        mean_D = self.feature_mean.running_mean
        variance_D = self.feature_square.running_mean - mean_D.square()
        return (features_BD - mean_D) * variance_D.clamp(min=self.MIN_VARIANCE).rsqrt()


class EvenGenerator(PathwayGenerator):
    """
    The same network, which begins with nearly equal scores and much noise.

    So an image activates other encoders in each epoch, and every encoder learns from all images
    while the generator finds out what each is good for; Shazeer et al. 2017 (arXiv 1701.06538)
    begin with scores of zero, too. It is for images that are seen more than once, of which
    ``PathwayGenerator`` leaves each encoder the same share throughout.
    """

    SCORE_GAIN = 0.05
    NOISE_START = 2.0  # before the softplus, which makes it 2.1


class UniformGenerator(nn.Module):
    """
    The same score for all encoders: what a generator that learns nothing is worth, for comparisons.

    Arguments as of ``PathwayGenerator``.
    """

    def __init__(self, channels: int, image_size: tuple[int, int], n_choices: int) -> None:
        super().__init__()
        self.n_choices = n_choices

    def forward(self, images_BCHW: Tensor, noise_BM: Tensor | None) -> Tensor:
        """Scores (B, M), zero."""
        return torch.zeros(images_BCHW.shape[0], self.n_choices, device=images_BCHW.device)


class ResNet10Generator(nn.Module):
    """
    The paper's: a ResNet-10 for the scores and a second one for the noise, always in float32.

    That of the noise runs where there is noise, in training, and costs nothing otherwise. Sizes
    follow from the parameters and FLOPs in the supplement of Hub-Pathway (arXiv 2206.03726).
    ``BatchNorm`` is plain, which is ours, as the paper's is not known: in training an image's
    scores depend on its batch. So it is for image tasks; ``HubFeaturesExtractor`` refuses it, since
    an agent must find its rollout's routing again in its update.

    :param channels: input channels
    :param image_size: (height, width) in pixels, at least 33 each: the last stage of smaller ones
        has a single pixel, of which a batch of one image has no variance
    :param n_choices: number of scores, M
    :raises ValueError: if the images are smaller
    """

    MIN_SIZE = 33

    def __init__(self, channels: int, image_size: tuple[int, int], n_choices: int) -> None:
        super().__init__()
        if min(image_size) < self.MIN_SIZE:
            raise ValueError(
                f"generator is 'resnet10', but the images have {image_size[0]}x{image_size[1]} px, "
                f"allowed: at least {self.MIN_SIZE}x{self.MIN_SIZE}; take generator 'small'"
            )
        self.scores = ResNet10(channels, n_choices)
        self.noise_scale = ResNet10(channels, n_choices)

    def forward(self, images_BCHW: Tensor, noise_BM: Tensor | None) -> Tensor:
        """
        Scores (B, M): ``g(x) + noise * softplus(n(x))``.

        :param images_BCHW: uint8 in 0..255 or float in 0..1
        :param noise_BM: standard normal numbers; None for ``g(x)`` alone
        """
        layout = fast_layout(images_BCHW)
        floats_BCHW = images_BCHW.to(torch.float32, memory_format=layout)
        if images_BCHW.dtype == torch.uint8:
            floats_BCHW.div_(255.0)
        with torch.autocast(images_BCHW.device.type, enabled=False):
            scores_BM: Tensor = self.scores(floats_BCHW)
            if noise_BM is not None:
                scores_BM = scores_BM + noise_BM * F.softplus(self.noise_scale(floats_BCHW))
        return scores_BM


class ResNet10(nn.Module):
    """
    ResNet-18 (He et al. 2016, arXiv 1512.03385) with one block in each stage instead of two.

    :param channels: input channels
    :param n_outputs: of the linear layer at its end
    """

    def __init__(self, channels: int, n_outputs: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.stages = nn.Sequential(
            ResidualBlock(64, 64, stride=1),
            ResidualBlock(64, 128, stride=2),
            ResidualBlock(128, 256, stride=2),
            ResidualBlock(256, 512, stride=2),
        )
        self.linear = nn.Linear(512, n_outputs)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Outputs (B, O)."""
        # At inference images don't depend on each other, and half of them take half of the memory,
        # which would else be more than any encoder takes.
        is_whole = self.training or torch.is_grad_enabled()
        parts = (images_BCHW,) if is_whole else images_BCHW.chunk(2)
        return torch.cat([self._outputs(part_RCHW) for part_RCHW in parts])

    def _outputs(self, images_RCHW: Tensor) -> Tensor:
        features_RD = self.stages(self.stem(images_RCHW)).mean(dim=(2, 3))
        outputs_RO: Tensor = self.linear(features_RD)
        return outputs_RO


class ResidualBlock(nn.Module):
    """
    Two convolutions and a way around them.

    :param channels: input channels
    :param width: output channels
    :param stride: of the first convolution
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """(B, width, H / stride, W / stride)."""
        sums_BCHW: Tensor = self.convolutions(maps_BCHW)
        sums_BCHW += self.shortcut(maps_BCHW)
        return sums_BCHW.relu_()


GeneratorClass = type[PathwayGenerator] | type[ResNet10Generator] | type[UniformGenerator]

#: Where the scores come from.
GENERATORS: dict[str, GeneratorClass] = {
    "small": PathwayGenerator,
    "even": EvenGenerator,
    "resnet10": ResNet10Generator,
    "uniform": UniformGenerator,
}

#: With these an image's scores depend on its batch.
BATCH_GENERATORS = frozenset({"resnet10"})


class RunningMean(nn.Module):
    """
    Mean of rows that are observed in training mode; it counts only from when that mode is left.

    So an observation's scores don't depend on the rest of its batch, nor change from when an SB3
    agent collects, which is in evaluation mode, to the end of its update.

    :param shape: of a row
    """

    HORIZON = 8192  # rows after which older ones fade
    EVERY = 8  # this share of a batch's rows is enough

    running_mean: Tensor
    n_rows: Tensor
    pending_sum: Tensor
    n_pending: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("n_rows", torch.zeros(()))
        self.register_buffer("pending_sum", torch.zeros(shape))
        self.register_buffer("n_pending", torch.zeros(()))

    def observe(self, rows_BN: Tensor, scale: float = 1.0, counts: Tensor | bool = True) -> None:
        """
        Take note of rows, (B, ...), divided by ``scale``; nothing outside of training.

        :param counts: whether to; a tensor on a GPU is not waited for
        """
        if self.training and torch.is_grad_enabled():
            some_RN = rows_BN.detach()[:: self.EVERY]
            self.pending_sum += some_RN.float().sum(dim=0) / scale * counts
            self.n_pending += len(some_RN) * counts

    def train(self, mode: bool = True) -> Self:
        """Leaving training mode, take up what was observed in it."""
        if self.training and not mode:
            self._take_up()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if not self.training:  # it may have been saved in the middle of training
            self._take_up()

    def _take_up(self) -> None:
        if self.n_pending == 0:
            return
        self.n_rows += self.n_pending
        share = self.n_pending / self.n_rows.clamp(max=self.HORIZON)
        self.running_mean.lerp_(self.pending_sum / self.n_pending, share.clamp(max=1.0))
        self.pending_sum.zero_()
        self.n_pending.zero_()
