"""``HubFeaturesExtractor``: a hub of pretrained encoders inside any Stable-Baselines3 agent."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self, SupportsFloat

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from hubrl.aggregation import Standardised
from hubrl.cuda_graphs import Recorded
from hubrl.encoders import Casts, check_image_shape
from hubrl.generators import BATCH_GENERATORS, GENERATORS
from hubrl.losses import attach_loss
from hubrl.pathway import HubPathway, PathwayOutput, TopK, number_activated
from hubrl.replay import FeatureCache, RoutingReplay
from hubrl.specs import HubSpec, closest, load_hub

# Shape letters: B batch, E encoders, C H W image, O features out,
# R rows of the batch that activate one encoder, D its features.

#: Algorithms that can't train a hub, and why.
UNFIT_ALGORITHMS: Mapping[str, str] = {
    "trpo": "it differentiates the KL divergence too, which would count the exploration loss "
    "twice; use PPO",
    "ars": "it learns without gradients, so that no encoder and no pathway generator would learn; "
    "use PPO",
}


class HubFeaturesExtractor(BaseFeaturesExtractor):
    """
    Features of the activated encoders of a hub, for ``policy_kwargs`` of any SB3 agent.

    Pretrained weights survive SB3's ``ortho_init``. The exploration loss reaches the pathway
    generator by itself: it is attached to the features wherever gradients are computed, once for
    each backward pass and unscaled, so it counts again in each where gradients are accumulated.
    On-policy agents explore pathways while they collect: the generator's noise is fixed for each
    observation of a rollout, and with it the activated encoders, until the next rollout begins
    (routing replay), so the update sees the routing of the rollout. Features of frozen encoders are
    kept as long: ``top_k`` times the encoder's features_dim numbers for each observation of a
    rollout. ``predict`` is free of noise. Only the ``forward`` of the agent's own policy in SB3's
    own ``collect_rollouts`` counts as collecting: a loop of your own collects without noise, as
    ``predict`` does. Off-policy agents have noise only where they compute gradients. CrossQ's
    critic sees observations and next observations in one batch: both have noise there, and the
    exploration loss is that of the whole batch. The rows with which RecurrentPPO pads its sequences
    activate no encoder and count in no mean.

    On a GPU a hub whose encoders are all of hubrl's own architectures runs as CUDA graphs, for up
    to 8 sizes of a batch. All its encoders run on all rows then, with weight 0 where they are not
    activated, and nothing is kept. An encoder that no row of a batch activates gets a gradient of
    0, not none: Adam's momentum still moves it.

    Give ``net_arch=[]`` beside it to PPO, A2C, DQN and their kin: SB3 adds two layers of 64 to any
    extractor but its own. Not to SAC, TD3, DDPG, TQC and CrossQ: a critic without layers is linear
    in features and action, so that the same action is best for all observations.

    :param observation_space: images, channel first, uint8 or float in 0..1
    :param hub: a name, ``NAME:ENCODER``, a folder, a YAML file or a ``HubSpec``
    :param top_k: encoders activated for each observation, 1..E; ``"auto"``: 2, or 1 for a hub of
        one
    :param always_active: names of encoders that are among them for each observation, fewer than
        ``top_k``; ``"auto"``: those of the hub's card, if they are fewer, or where it names none
        the first encoder, unless ``top_k`` is 1 or all; ``hubrl hubs rank`` tells which may suit
        your environment
    :param exploration_coef: weight of the pathway exploration loss; a number or
        ``{"start": a, "end": b}``, linear over the run (needs ``hubrl.PathwayCallback``)
    :param features_dim: length of the features
    :param aggregation: how features become one vector: ``concat``, a block of a linear layer for
        each encoder; ``sum``, one layer for all; or ``auto``: ``sum`` where the encoders' features
        have one length
    :param standardise: bring each encoder's features to one scale before, by running means over the
        observations that are trained on
    :param generator: where the pathway weights come from: ``small``, the pathway generator, or
        ``uniform``: all encoders run with equal weights, or ``even``, for comparisons
    :param freeze: names of encoders whose weights don't learn, ``"all"``, or ``"chosen"`` for all
        that aren't always active
    :param freeze_layers: first layers of each encoder that don't learn
    :param random_init: random encoders of the same size, without the hub's knowledge
    :param precision: what encoders compute in: ``float32``, ``bfloat16``, or ``auto`` for the
        faster one on this machine
    :raises ValueError: if an argument is out of its range, the hub cannot take the observations, or
        the algorithm can't train a hub (TRPO, ARS)
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        hub: str | Path | HubSpec = "atari5",
        top_k: TopK = "auto",
        exploration_coef: float | Mapping[str, float] = 0.01,
        features_dim: int = 512,
        aggregation: str = "auto",
        standardise: bool = True,
        always_active: Collection[str] | str = "auto",
        generator: str = "small",
        freeze: Collection[str] | str = (),
        freeze_layers: int = 0,
        random_init: bool = False,
        precision: str = "auto",
    ) -> None:
        super().__init__(observation_space, features_dim)
        _refuse_unfit_algorithm()
        _refuse_batch_generator(generator)
        hub = load_hub(hub, weights=not random_init)
        _check_space(observation_space, hub)
        top_k = number_activated(top_k, hub)
        channels, height, width = observation_space.shape
        self.pathway = HubPathway(
            hub,
            top_k,
            always_active=steady_encoders(always_active, top_k, hub),
            generator=generator,
            image_shape=(channels, height, width),
            features_dim=features_dim,
            aggregation=aggregation,
            standardise=standardise,
            freeze=freeze,
            freeze_layers=freeze_layers,
            pretrained=not random_init,
            precision=precision,
        )
        self.replay = RoutingReplay(len(hub.encoders))
        self.progress_remaining: float | None = None
        #: When the pathway was last seen to use several encoders, in agent steps of the run;
        #: ``PathwayCallback`` looks. Infinity once it has warned.
        self.spread_at: float | None = None
        self._coef = _schedule(exploration_coef)
        self._statistics: deque[Tensor] = deque(maxlen=1000)
        self._casts = Casts()
        self._cache = FeatureCache()
        self._is_range_known = False
        self._recorded_look = Recorded(self, HubFeaturesExtractor._look)
        self._recorded_collection = Recorded(self, HubFeaturesExtractor._collect_densely)
        self._recorded_lesson = Recorded(self, HubFeaturesExtractor._learn_densely)

    @property
    def exploration_coef(self) -> float:
        """
        The coefficient at this point of the run.

        :raises ValueError: if it is a schedule and nothing tells the run's progress
        """
        start, end = self._coef
        if start == end:
            return start
        if self.progress_remaining is None:
            raise ValueError(
                "exploration_coef is a schedule, but nothing tells the extractor the run's "
                "progress: call learn(..., callback=hubrl.PathwayCallback()), or give one number"
            )
        # The last rollout may pass the end of the run.
        return end + (start - end) * max(self.progress_remaining, 0.0)

    def forward(self, observations_BCHW: Tensor) -> Tensor:
        """
        Features (B, O) float32.

        In training mode and with grad enabled, the exploration loss is attached.
        """
        if not self._is_range_known:
            self._is_range_known = _check_range(observations_BCHW)
        if torch.is_grad_enabled():
            if self.training:
                features_BO, loss = self._learn_unpadded(observations_BCHW)
                return attach_loss(features_BO, self.exploration_coef * loss)
        elif _is_collecting():
            return self._collect(observations_BCHW)
        elif self._fits_a_graph(observations_BCHW):
            return self._recorded_look(self, observations_BCHW)[0]
        # A trace has one batch's dispatch in it for ever.
        dispatch = not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        return self.pathway.route(observations_BCHW, noise_BE=None, dispatch=dispatch).features

    def train(self, mode: bool = True) -> Self:
        """SB3 collects in evaluation mode: entering it begins a new rollout."""
        if self.training and not mode:
            self.replay.next_rollout()
            self._forget()
        return super().train(mode)

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """Everything but SB3's ``ortho_init``, which would overwrite the pretrained weights."""
        if getattr(fn, "func", fn) is BasePolicy.init_weights:
            return self
        return super().apply(fn)

    def statistics(self) -> dict[str, float]:
        """
        Means over the updates since the last call, 1,000 at most; empty if there were none.

        ``usage_<encoder>`` is the encoder's share of all activations, ``probability_<encoder>`` its
        mean pathway probability, 0 for one that is always active, ``entropy`` that of a single
        observation's pathway probabilities in nats, ``exploration_loss`` is unweighted.
        """
        if not self._statistics:
            return {}
        means = torch.stack(list(self._statistics)).mean(dim=0).tolist()
        self._statistics.clear()
        encoders = self.pathway.hub.encoder_names
        names = [f"{what}_{name}" for what in ("usage", "probability") for name in encoders]
        return dict(zip([*names, "entropy", "exploration_loss"], means, strict=True))

    def _load_from_state_dict(self, *args: Any) -> None:
        """A rollout that was cut short has no update, and other weights make other features."""
        super()._load_from_state_dict(*args)
        self.replay.forget()
        self._forget()

    def _forget(self) -> None:
        """What weights were cast to, and the features of frozen encoders."""
        self._casts = Casts()
        self._cache.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for recorded in (self._recorded_look, self._recorded_collection, self._recorded_lesson):
            recorded.clear()  # buffers and shared encoders may have moved
        return self

    def _fits_a_graph(self, observations_BCHW: Tensor) -> bool:
        """
        Whether a CUDA graph is recorded: on a GPU, with encoders of our own architectures alone.

        Their kernels take less time than their launches, even where all run on all rows.
        """
        return observations_BCHW.is_cuda and all(e.is_small for e in self.pathway.encoders)

    def _look(self, observations_BCHW: Tensor) -> tuple[Tensor, ...]:
        output = self.pathway.route(observations_BCHW, None, dispatch=False)
        return (output.features,)

    def _collect_densely(self, observations_BCHW: Tensor) -> tuple[Tensor, ...]:
        hash_B = self.replay.hash(observations_BCHW)
        noise_BE = self.replay.noise(hash_B)
        output = self.pathway.route(observations_BCHW, noise_BE, dispatch=False)
        return output.features, hash_B, output.activated

    def _learn_densely(
        self, observations_BCHW: Tensor, hash_B: Tensor, activated_BK: Tensor
    ) -> tuple[Tensor, ...]:
        noise_BE = self.replay.noise(hash_B)
        output = self.pathway.route(observations_BCHW, noise_BE, activated_BK, dispatch=False)
        features_BO, weights_BE, activated_BK, probabilities_BE, loss = output
        others = weights_BE.detach(), activated_BK, probabilities_BE.detach()
        return features_BO, *others, loss, _statistics(output)

    def _collect(self, observations_BCHW: Tensor) -> Tensor:
        if self._fits_a_graph(observations_BCHW):
            features_BO, hash_B, activated_BK = self._recorded_collection(self, observations_BCHW)
            self.replay.remember(hash_B, activated_BK)
            return features_BO
        hash_B = self.replay.hash(observations_BCHW)

        def encode(i: int, rows_R: Tensor) -> Tensor:
            features_RD = self.pathway.encode(i, observations_BCHW, rows_R, self._casts)
            if self.pathway.encoders[i].is_frozen:
                self._cache.store(i, hash_B[rows_R], features_RD)
            return features_RD

        noise_BE = self.replay.noise(hash_B)
        output = self.pathway.route(observations_BCHW, noise_BE, casts=self._casts, encode=encode)
        self.replay.remember(hash_B, output.activated)
        return output.features

    def _learn_unpadded(self, observations_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Features, zero for padding, and the exploration loss of the other rows."""
        rows_R = _rows_without_padding()
        if rows_R is None:
            output = self._learn(observations_BCHW)
            return output.features, output.exploration_loss
        output = self._learn(observations_BCHW[rows_R])
        features_BO = output.features.new_zeros(len(observations_BCHW), self.features_dim)
        return features_BO.index_copy(0, rows_R, output.features), output.exploration_loss

    def _learn(self, observations_BCHW: Tensor) -> PathwayOutput:
        hash_B = self.replay.hash(observations_BCHW)
        activated_BK = self.replay.recall(hash_B)
        if activated_BK is None and isinstance(self.pathway.aggregator, Standardised):
            self.pathway.aggregator.take_up()  # no rollout's features must stay as they were
        if self._fits_a_graph(observations_BCHW):
            if activated_BK is None:  # a recording takes tensors: the scores choose all
                activated_BK = hash_B.new_full((len(hash_B), self.pathway.top_k), -1)
            outputs = self._recorded_lesson(self, observations_BCHW, hash_B, activated_BK)
            self._statistics.append(outputs[-1].detach().clone())
            return PathwayOutput(*outputs[:-1])

        def encode(i: int, rows_R: Tensor) -> Tensor:
            known_RD = None
            if self.pathway.encoders[i].is_frozen:
                known_RD = self._cache.find(i, hash_B[rows_R])
            return (
                self.pathway.encode(i, observations_BCHW, rows_R) if known_RD is None else known_RD
            )

        noise_BE = self.replay.noise(hash_B)
        output = self.pathway.route(observations_BCHW, noise_BE, activated_BK, encode=encode)
        self._statistics.append(_statistics(output))
        return output


def steady_encoders(
    names: Collection[str] | str, top_k: int, hub: HubSpec
) -> Collection[str] | str:
    """
    The encoders that an agent has always active, by default one at least.

    Ours. An agent of which all encoders are chosen for each observation learned Breakout no faster
    than one from scratch, with 0.6 of the return that it has on the way with one of them always
    active (one seed): what it reads changes with each choice.

    :param names: as of ``HubFeaturesExtractor``
    """
    if names == "auto" and not hub.always_active and top_k in range(2, len(hub.encoders)):
        return hub.encoder_names[:1]
    return names


def _statistics(output: PathwayOutput) -> Tensor:
    """Usage and mean probability of each encoder, entropy and exploration loss."""
    probabilities_BE = output.probabilities.detach()
    indices_E = torch.arange(probabilities_BE.shape[1], device=probabilities_BE.device)
    usage_E = (output.activated[..., None] == indices_E).float().mean(dim=(0, 1))
    entropy = torch.special.entr(probabilities_BE).sum(dim=1).mean()
    scalars = torch.stack([entropy, output.exploration_loss.detach()])
    return torch.cat([usage_E, probabilities_BE.mean(dim=0), scalars])


def _is_collecting() -> bool:
    """
    Whether an on-policy agent collects a rollout, rather than predicts.

    Both happen in evaluation mode and without grad, and nothing but the callers tells them apart:
    SB3 collects with the ``forward`` of the algorithm's policy in its ``collect_rollouts``, and
    predicts with the policy's ``get_distribution``; opponents that play within its environment are
    other policies. What is collected is kept until the next rollout; for another loop over a policy
    that would be for ever.
    """
    policies: list[BasePolicy] = []
    for frame in _calls():
        caller, name = frame.f_locals.get("self"), frame.f_code.co_name
        if isinstance(caller, BaseAlgorithm):
            own = getattr(caller.policy, "_orig_mod", caller.policy)  # within torch.compile's
            return name == "collect_rollouts" and any(policy is own for policy in policies)
        is_sampled = name == "forward" and not frame.f_locals.get("deterministic")
        if is_sampled and isinstance(caller, BasePolicy):
            policies.append(caller)
    return False


def _rows_without_padding() -> Tensor | None:
    """
    The rows of a minibatch that are no padding, (R,); None for all.

    RecurrentPPO pads its sequences to one length and gives the policy no word of it: only its own
    minibatch has the mask.
    """
    for frame in _calls():
        mask_B = getattr(frame.f_locals.get("rollout_data"), "mask", None)
        if mask_B is not None:
            rows_R: Tensor = mask_B.nonzero().flatten()
            return None if len(rows_R) == len(mask_B) else rows_R
    return None


def _refuse_unfit_algorithm() -> None:
    """Nothing but the call stack tells an extractor for which algorithm it is built."""
    for frame in _calls():
        algorithm = frame.f_locals.get("self")
        if isinstance(algorithm, BaseAlgorithm):
            for name in (base.__name__.lower() for base in type(algorithm).__mro__):
                if name in UNFIT_ALGORITHMS:
                    raise ValueError(f"{name.upper()} can't train a hub: {UNFIT_ALGORITHMS[name]}")
            return


def _calls() -> Iterator[FrameType]:
    """What called the function that asks, the innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _refuse_batch_generator(name: str) -> None:
    allowed = [key for key in GENERATORS if key not in BATCH_GENERATORS]
    if name not in GENERATORS:
        raise ValueError(
            f"generator is {name!r}{closest(name, allowed)}, allowed: {', '.join(allowed)}"
        )
    if name in BATCH_GENERATORS:
        raise ValueError(
            f"generator is {name!r}, which is for image tasks: by its BatchNorm an observation's "
            "routing depends on its batch, and an update would not find the rollout's again; "
            f"allowed: {', '.join(allowed)}"
        )


def _schedule(coef: float | Mapping[str, float]) -> tuple[float, float]:
    """The coefficient's first and last value."""
    ends = coef if isinstance(coef, Mapping) else {"start": coef, "end": coef}
    if set(ends) != {"start", "end"} or not all(map(_is_coef, ends.values())):
        raise ValueError(
            f"exploration_coef is {coef!r}, allowed: a number of at least 0, or "
            "{'start': a, 'end': b} with two of them, linear over the run"
        )
    return float(ends["start"]), float(ends["end"])


def _is_coef(value: object) -> bool:
    return isinstance(value, SupportsFloat) and 0 <= float(value) < math.inf


def _check_space(space: spaces.Space[Any], hub: HubSpec) -> None:
    if isinstance(space, spaces.Dict):
        raise ValueError(
            "observation space is a Dict, but HubFeaturesExtractor takes images alone: use "
            "hubrl.HubCombinedExtractor, with MultiInputPolicy"
        )
    if isinstance(space, spaces.Box) and len(space.shape) == 3 and space.is_bounded():
        low, high = space.low.min(), space.high.max()
        if space.dtype != np.uint8:
            _refuse(float(low), float(high), f"observation space is {space.dtype} and its bounds")
    for spec in hub.encoders:
        check_image_shape(spec, space.shape or ())


def _check_range(observations: Tensor) -> bool:
    """Whether they tell their range: whole numbers, as black images are, don't."""
    if observations.dtype == torch.uint8:
        return True
    low, high = (bound.item() for bound in observations.aminmax())
    _refuse(low, high, "observations")
    return bool((observations != observations.round()).any())


def _refuse(low: float, high: float, what: str) -> None:
    """
    :raises ValueError: if images other than uint8 leave 0..1
    """
    if low < 0.0 or high > 1.0:
        raise ValueError(
            f"{what} reach {low if low < 0.0 else high:.4g}, but float images must lie in 0..1: "
            "give uint8 images in 0..255, which SB3 divides by 255 (normalize_images=True, its "
            "default), or divide them in a wrapper that tells the bounds 0 and 1; VecNormalize "
            "must leave images as they are (norm_obs=False; norm_obs_keys without a Dict's images)"
        )
