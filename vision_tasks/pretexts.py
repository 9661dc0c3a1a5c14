"""What encoders can learn from images of one data set: some of its classes, or a pretext."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hubrl.pretraining.objectives import info_nce

# Shape letters: B batch, D features, C H W image, P pixels of a decoded side.

#: Features (B, D) of images (B, 3, H, W), floats in 0..1.
Encode = Callable[[Tensor], Tensor]


class Pretext(nn.Module):
    """
    Something to learn without the task that an encoder is meant for; its layers are thrown away.

    :param features_dim: of the encoder, D
    :param n_classes: of the data
    """

    #: For the encoder's card.
    objective: ClassVar[str]

    def __init__(self, features_dim: int, n_classes: int) -> None:
        super().__init__()

    def rows(self, targets_B: Tensor) -> Tensor:
        """The images that take part, bool (B,): all."""
        return torch.ones_like(targets_B, dtype=torch.bool)

    @abstractmethod
    def loss(self, encode: Encode, images_BCHW: Tensor, targets_B: Tensor) -> Tensor:
        """Loss of a batch of floats in 0..1, scalar."""


class FirstClasses(Pretext):
    """Tells the classes of the first half apart, and sees no others."""

    objective = "classes of the first half"
    is_first = True

    def __init__(self, features_dim: int, n_classes: int) -> None:
        super().__init__(features_dim, n_classes)
        half = n_classes // 2
        self.classes = range(half) if self.is_first else range(half, n_classes)
        self.head = nn.Linear(features_dim, len(self.classes))

    def rows(self, targets_B: Tensor) -> Tensor:
        """Images of these classes."""
        return (targets_B >= self.classes.start) & (targets_B < self.classes.stop)

    def loss(self, encode: Encode, images_BCHW: Tensor, targets_B: Tensor) -> Tensor:
        """Cross entropy, in nats."""
        return F.cross_entropy(self.head(encode(images_BCHW)), targets_B - self.classes.start)


class OtherClasses(FirstClasses):
    """Tells the classes of the second half apart, and sees no others."""

    objective = "classes of the second half"
    is_first = False


class Rotation(Pretext):
    """By how many quarters an image was turned (Gidaris et al. 2018, arXiv 1803.07728)."""

    objective = "rotation by quarters"

    def __init__(self, features_dim: int, n_classes: int) -> None:
        super().__init__(features_dim, n_classes)
        self.head = nn.Linear(features_dim, 4)

    def loss(self, encode: Encode, images_BCHW: Tensor, targets_B: Tensor) -> Tensor:
        """Cross entropy, in nats."""
        quarters_B = torch.randint(0, 4, (len(images_BCHW),))
        pairs = zip(images_BCHW, quarters_B.tolist(), strict=True)
        turned_BCHW = torch.stack([image.rot90(quarter, (1, 2)) for image, quarter in pairs])
        return F.cross_entropy(self.head(encode(turned_BCHW)), quarters_B.to(images_BCHW.device))


class Inpainting(Pretext):
    """
    The whole image of one with a hole (Pathak et al. 2016, arXiv 1604.07379; without adversary).

    The decoder is linear, and gives a small grey image, so that the features must say it.
    """

    objective = "inpainting of a hole"
    PIXELS = 16

    def __init__(self, features_dim: int, n_classes: int) -> None:
        super().__init__(features_dim, n_classes)
        self.decoder = nn.Linear(features_dim, self.PIXELS**2)

    def loss(self, encode: Encode, images_BCHW: Tensor, targets_B: Tensor) -> Tensor:
        """Mean squared error of the small image, over its variance."""
        whole_BPP = F.adaptive_avg_pool2d(images_BCHW.mean(dim=1), self.PIXELS)
        decoded_BPP = self.decoder(encode(with_hole(images_BCHW))).view_as(whole_BPP)
        return F.mse_loss(decoded_BPP, whole_BPP) / whole_BPP.var()


class Contrast(Pretext):
    """
    Which two views are of one image, after SimCLR (Chen et al. 2020, arXiv 2002.05709).

    Simplified: views of two images are only compared across the two sets of views.
    """

    objective = "contrast of two views of each image"
    TEMPERATURE = 0.2

    def __init__(self, features_dim: int, n_classes: int) -> None:
        super().__init__(features_dim, n_classes)
        self.projection = nn.Sequential(nn.Linear(features_dim, 128), nn.ReLU(), nn.Linear(128, 64))

    def loss(self, encode: Encode, images_BCHW: Tensor, targets_B: Tensor) -> Tensor:
        """InfoNCE among the batch, in nats."""
        views_BCHW = torch.cat([random_view(images_BCHW), random_view(images_BCHW)])
        one, other = self.projection(encode(views_BCHW)).chunk(2)
        return info_nce(one[None], other[None], self.TEMPERATURE)


#: By the name of the encoder that learns from it.
PRETEXTS: dict[str, type[Pretext]] = {
    "first-classes": FirstClasses,
    "other-classes": OtherClasses,
    "rotation": Rotation,
    "inpainting": Inpainting,
    "contrast": Contrast,
}


def with_hole(images_BCHW: Tensor) -> Tensor:
    """Each image with a square of half its side, somewhere, set to the batch's mean colour."""
    n, _, height, width = images_BCHW.shape
    size = height // 2
    tops_B, lefts_B = (torch.randint(0, side - size + 1, (n, 1)) for side in (height, width))
    rows_BH, columns_BW = (
        (torch.arange(side) >= starts_B) & (torch.arange(side) < starts_B + size)
        for side, starts_B in ((height, tops_B), (width, lefts_B))
    )
    is_hole_B1HW = (rows_BH[:, :, None] & columns_BW[:, None, :])[:, None].to(images_BCHW.device)
    return torch.where(is_hole_B1HW, images_BCHW.mean(dim=(0, 2, 3), keepdim=True), images_BCHW)


def random_view(images_BCHW: Tensor) -> Tensor:
    """A part of each image, of half to all of its side; half are mirrored; brightness differs."""
    n = len(images_BCHW)
    scale_B = 0.5 + 0.5 * torch.rand(n)
    shift_B2 = (2 * torch.rand(n, 2) - 1) * (1 - scale_B[:, None])
    mirror_B = torch.randint(0, 2, (n,)) * 2 - 1
    affine_B23 = torch.zeros(n, 2, 3)
    affine_B23[:, 0, 0], affine_B23[:, 1, 1] = scale_B * mirror_B, scale_B
    affine_B23[:, :, 2] = shift_B2
    grid_BHW2 = F.affine_grid(affine_B23, list(images_BCHW.shape), align_corners=False)
    grid_BHW2 = grid_BHW2.to(images_BCHW.device)
    views_BCHW = F.grid_sample(images_BCHW, grid_BHW2, padding_mode="border", align_corners=False)
    brightness_B111 = (0.6 + 0.8 * torch.rand(n, 1, 1, 1)).to(images_BCHW.device)
    return (views_BCHW * brightness_B111).clamp(0, 1)
