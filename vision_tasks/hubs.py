"""Hubs at the size of a task's images."""

from __future__ import annotations

import click

from hubrl.encoders import at_image_size, takes_channels
from hubrl.fetching.recipes import fetch_hub, fetch_line, load_cards
from hubrl.specs import EncoderSpec, HubSpec


def load_vision_hub(name: str, image_size: int, *, pretrained: bool = True) -> HubSpec:
    """
    The hub's cards, each at this size; a hub that must be fetched is fetched.

    :param name: as in ``hubrl.load_hub``
    :param image_size: pixels of both sides
    :param pretrained: False: the cards are enough, since nothing reads the weights
    :raises ValueError: if there is no such hub, its weights can't be had, or an encoder can't take
        colour images or images of this size
    """
    hub = fetch_hub(name, _say) if pretrained else load_cards(name)
    for spec in hub.encoders:
        if not takes_channels(spec, 3):
            raise ValueError(
                f"encoder {spec.name!r} of {name} takes {spec.channels} channels, but images have "
                "three colours: take a hub of image encoders, such as packaged5"
            )
    if pretrained:
        _check_linear(hub, name, image_size)
    return at_image_size(hub, image_size)


def _check_linear(hub: HubSpec, name: str, image_size: int) -> None:
    seen = {s.image_size: s.name for s in hub.encoders if s.architecture == "nature_cnn"}
    for (height, width), encoder in seen.items():
        if (height, width) != (image_size, image_size):
            fits = len(seen) == 1 and height == width
            raise ValueError(
                f"encoder {encoder!r} of {name} has a linear layer for images of {height}x{width} "
                f"px alone, not of {image_size}x{image_size}: "
                + (f"give --image-size {height}" if fits else "take others, as HUB:ENCODER")
            )


def _say(spec: EncoderSpec) -> None:
    click.echo(f"fetching {fetch_line(spec)}")
