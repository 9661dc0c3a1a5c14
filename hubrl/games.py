"""The environments of a run, giving the images that its hub asks for."""

from __future__ import annotations

from collections.abc import Iterable

from stable_baselines3.common.vec_env import VecEnv

from agents.config import MaskablePPOSection, RecurrentPPOSection, RunConfig
from envs import ImageFormat, make_vec_env, with_action_masks
from hubrl.specs import EncoderSpec, load_hub


def make_env(config: RunConfig, n_envs: int, *, training: bool = False) -> VecEnv:
    """
    The environments of a run, giving the images that its hub asks for.

    :param training: clipped rewards and a lost life as an end, in Atari
    """
    vec_env = make_vec_env(
        config.env.id,
        n_envs,
        seed=config.train.seed,
        sticky=config.env.sticky,
        training=training,
        # Where a life is lost an LSTM begins anew, as it did while it learned; games stay whole.
        lives_end=training or isinstance(config.algorithm, RecurrentPPOSection),
        image=image_format(config.hub.name),
        timeout=config.env.timeout,
    )
    return (
        with_action_masks(vec_env) if isinstance(config.algorithm, MaskablePPOSection) else vec_env
    )


def image_format(hub: str) -> ImageFormat:
    """
    Colour where all encoders want it, else a stack of grey images; as large as the largest.

    :raises ValueError: if three grey frames would look like a colour to an encoder
    """
    if hub == "none":
        return ImageFormat()
    encoders = load_hub(hub, weights=False).encoders
    size = max(max(spec.image_size) for spec in encoders)
    min_size = -(-size // 2)  # as check_image_shape
    n_frames = max(spec.n_frames for spec in encoders)
    stacks = [spec.channels for spec in encoders if spec.channels != 3]
    if stacks:
        stack = max(n_frames, *stacks)
        _check_stack(hub, encoders, stack)
        return ImageFormat(size=size, grey=True, stack=stack, min_size=min_size)
    return ImageFormat(size=size, grey=False, stack=n_frames, min_size=min_size)


def _check_stack(hub: str, encoders: Iterable[EncoderSpec], stack: int) -> None:
    """Encoders of one frame take channels by threes for colours."""
    newest = [s.name for s in encoders if s.frames != "each" and s.channels in (1, 3)]
    if newest and stack % 3 == 0:
        raise ValueError(
            f"hub {hub!r} asks for a stack of {stack} grey frames, of which encoder {newest[0]!r}, "
            "which sees one frame, would take three for red, green and blue; leave it out, "
            f"or give its card frames: each, n_frames: {stack} and {stack} times its features_dim"
        )
