"""Any image environment of Gymnasium as an SB3 VecEnv of the images that a hub's card asks for."""

from __future__ import annotations

import difflib
import functools
import importlib
import math
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import (
    FrameStackObservation,
    GrayscaleObservation,
    ReshapeObservation,
    ResizeObservation,
    TransformObservation,
)
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnv

from envs.atari import AtariVecEnv, is_atari
from envs.episodes import RecordedEpisodes, described
from envs.seeds import check_seed

MINIGRID_PREFIXES = ("MiniGrid-", "BabyAI-")
MINIGRID_TILE = 8  # pixels of a cell, as its wrapper has it; more where images would be too small
GREY_CHANNELS, COLOUR_CHANNELS = 1, 3


@dataclass(frozen=True)
class ImageFormat:
    """
    The observations that an agent gets: (stack * channels, size, size) uint8, newest image last.

    :param size: height and width, in pixels
    :param grey: one channel for an image instead of red, green and blue, which are equal where the
        environment observes grey images
    :param stack: number of successive images in an observation
    :param min_size: height and width below which the environment's own images are refused, in
        pixels; smaller ones would be blurs of ``size``
    :raises ValueError: if a number is below 1
    """

    size: int = 84
    grey: bool = True
    stack: int = 4
    min_size: int = 1

    def __post_init__(self) -> None:
        for name in ("size", "stack", "min_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but at least 1 is needed")


def make_vec_env(
    env_id: str,
    n_envs: int,
    *,
    seed: int = 0,
    sticky: float = 0.0,
    training: bool = True,
    lives_end: bool | None = None,
    image: ImageFormat = ImageFormat(),
    timeout: float | None = None,
) -> VecEnv:
    """
    Make the environments of a run; true returns are in ``infos[i]["episode"]`` of finished ones.

    :param env_id: ``ALE/Name-v5``, or any registered environment that observes images;
        ``module:Name-v0`` imports a module that registers it. Of MiniGrid and BabyAI it is the
        image alone, without the mission, which some tasks can't be solved without
    :param n_envs: number of environments
    :param seed: seed of the run; each episode starts from ``episode_seed(seed, index, episode)``,
        in Atari from that of its block of 32 and the games before it in the block
    :param sticky: probability that an Atari emulator repeats the last action, per frame
    :param training: in Atari, report a lost life as an end and the reward's sign as the reward
    :param lives_end: in Atari, report a lost life as an end; None: as ``training`` says
    :param image: format of the observations
    :param timeout: seconds that a step or a reset may take, see ``RecordedEpisodes``; Atari's
        emulators don't hang, and have none
    :raises ValueError: if the id is unknown or an argument does not fit the environment
    """
    check_seed(seed)
    if n_envs < 1:
        raise ValueError(f"n_envs is {n_envs}, but at least 1 is needed")
    env_id = env_id.removeprefix("ale_py:")  # as Gymnasium takes it, too
    if is_atari(env_id):
        return AtariVecEnv(
            env_id,
            n_envs,
            seed=seed,
            sticky=sticky,
            life_loss_ends_episode=training if lives_end is None else lives_end,
            clip_reward=training,
            grey=image.grey,
            frame_stack=image.stack,
            screen_size=image.size,
        )
    if sticky > 0.0:
        raise ValueError(f"sticky is {sticky}, but {env_id} is no Atari game: only 0 is allowed")
    check_registered(env_id)

    def make(i: int) -> gym.Env[Any, Any]:
        env = _make_images(env_id, image)
        return _to_format(RecordedEpisodes(Monitor(env), seed, i, timeout), image)

    return DummyVecEnv([functools.partial(make, i) for i in range(n_envs)])


def check_registered(env_id: str) -> None:
    """
    Find the environment in Gymnasium's registry, importing the module that its id names.

    :raises ValueError: if there is none (the message has the closest ids), or if it is an Atari
        game under an id that brings a frame skip of its own
    """
    module, _, name = env_id.rpartition(":")
    if env_id.startswith(MINIGRID_PREFIXES):
        module = "minigrid"
    if module:
        _import(module, env_id)
    if name not in gym.registry:
        ids = [known for known, spec in gym.registry.items() if not _is_old_atari(known, spec)]
        closest = difflib.get_close_matches(name, ids, n=3, cutoff=0.6)
        hint = f"closest: {', '.join(closest)}" if closest else "e.g. ALE/Breakout-v5"
        if module:
            hint = f"{module!r} was imported, but has registered none of this name; {hint}"
        raise ValueError(f"env {env_id!r} is not registered in Gymnasium ({hint})")
    if _is_old_atari(name, gym.registry[name]):
        raise ValueError(
            f"env {env_id!r} has its own frame skip, and here 4 frames are skipped already: "
            "use the game's id ALE/Name-v5"
        )


def _import(module: str, env_id: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # it may do anything
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise ValueError(
                f"env {env_id!r} needs the module {module!r}, which Python doesn't find: install "
                "its package, or give the folder that it lies in: PYTHONPATH=FOLDER hubrl ..."
            ) from None
        raise ValueError(
            f"env {env_id!r}: importing {module!r} failed ({described(error)})"
        ) from error


def _is_old_atari(name: str, spec: gym.envs.registration.EnvSpec) -> bool:
    return spec.entry_point == "ale_py.env:AtariEnv" and not is_atari(name)


def _make_images(env_id: str, image: ImageFormat) -> gym.Env[Any, Any]:
    try:
        env: gym.Env[Any, Any] = gym.make(env_id, disable_env_checker=True)
    except gym.error.Error as error:  # such as a package that is missing
        raise ValueError(f"env {env_id!r} can't be made: {error}") from None
    except Exception as error:  # of a stranger's code
        raise ValueError(f"env {env_id!r} can't be made ({described(error)})") from error
    if env_id.rpartition(":")[2].startswith(MINIGRID_PREFIXES):
        from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper

        cells = min(env.unwrapped.width, env.unwrapped.height)  # type: ignore[attr-defined]
        tile = max(MINIGRID_TILE, math.ceil(image.min_size / cells))
        env = ImgObsWrapper(RGBImgObsWrapper(env, tile))  # type: ignore[no-untyped-call]
    _check_image(env_id, env.observation_space, image)
    return env


def _check_image(env_id: str, space: gym.Space[Any], image: ImageFormat) -> None:
    """Only (H, W), (H, W, 1) and (H, W, 3) uint8 of 0..255 are images without a doubt."""
    is_image = (
        isinstance(space, gym.spaces.Box)
        and space.dtype == np.uint8
        and (space.low == 0).all()
        and (space.high == 255).all()
        and (
            len(space.shape) == 2
            or (len(space.shape) == 3 and space.shape[2] in (GREY_CHANNELS, COLOUR_CHANNELS))
        )
    )
    if not is_image:
        raise ValueError(
            f"env {env_id!r} observes {space}, but only images are allowed: "
            "a Box of 0..255, uint8, (height, width), (height, width, 1) or (height, width, 3); "
            "wrap it so that it observes what it renders (gymnasium's AddRenderObservation)"
        )
    assert space.shape is not None
    if min(space.shape[:2]) < image.min_size:
        raise ValueError(
            f"env {env_id!r} observes images of {space.shape[0]}x{space.shape[1]} px, but at "
            f"least {image.min_size}x{image.min_size} px are needed, half of what the hub's "
            "encoders were trained on: render larger observations"
        )


def _to_format(env: gym.Env[Any, Any], image: ImageFormat) -> gym.Env[Any, Any]:
    """Gymnasium's wrappers from (H, W), (H, W, 1) or (H, W, 3) to the format."""
    if image.grey and _has_colour(env.observation_space):
        env = GrayscaleObservation(env)
    own_channels = COLOUR_CHANNELS if _has_colour(env.observation_space) else GREY_CHANNELS
    channels = GREY_CHANNELS if image.grey else COLOUR_CHANNELS
    shape = (channels, image.size, image.size)
    env = ResizeObservation(env, (image.size, image.size))
    env = ReshapeObservation(env, (image.size, image.size, own_channels))
    env = TransformObservation(
        env,
        lambda observation: np.broadcast_to(observation.transpose(2, 0, 1), shape),
        gym.spaces.Box(0, 255, shape, np.uint8),
    )
    env = FrameStackObservation(env, image.stack, padding_type="zero")
    return ReshapeObservation(env, (image.stack * channels, image.size, image.size))


def _has_colour(space: gym.Space[Any]) -> bool:
    return space.shape is not None and space.shape[2:] == (COLOUR_CHANNELS,)
