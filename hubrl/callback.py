"""``PathwayCallback``: the pathway's statistics in SB3's log, and schedules moved along."""

from __future__ import annotations

import math
import warnings
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import nn

from hubrl.combined import HubCombinedExtractor
from hubrl.extractor import HubFeaturesExtractor


class PathwayCallback(BaseCallback):
    """
    Logs ``pathway/...`` of a model with ``HubFeaturesExtractor`` and moves its schedule along.

    For each rollout it logs ``pathway/usage_<encoder>``, ``pathway/probability_<encoder>``,
    ``pathway/entropy``, ``pathway/exploration_loss`` and ``pathway/exploration_coef``, each a mean
    over the updates since the last rollout. With an ``exploration_coef`` that is a schedule, it is
    required. It warns, once, of a collapse: for ``collapse_steps`` agent steps nearly all of the
    pathway probability belonged to one encoder, so that the hub is not used.

    Where several extractors learn, these are means over them, and each one's own are logged beside
    them: ``pathway/<place>/usage_<encoder>``, the place being ``pi`` and ``vf``, or ``actor`` and
    ``critic``, of networks that don't share, and the key of an image in a Dict. They are left out
    of the console's table, where SB3 cuts names at 36 characters.

    It also warns of layers behind the features that don't fit.

    :param collapse_steps: agent steps after which a collapse is warned of
    """

    def __init__(self, collapse_steps: int = 50_000) -> None:
        super().__init__()
        self._collapse_steps = collapse_steps

    def _on_training_start(self) -> None:
        """
        :raises ValueError: if the model has no ``HubFeaturesExtractor``
        """
        modules = list(self.model.policy.modules())
        self._extractors = [m for m in modules if isinstance(m, HubFeaturesExtractor)]
        if not self._extractors:
            raise ValueError(
                "PathwayCallback needs a model whose features_extractor_class is "
                "HubFeaturesExtractor or HubCombinedExtractor, set in policy_kwargs"
            )
        advice = _advice_on_layers(self.model)
        if advice is not None:
            warnings.warn(advice, stacklevel=2)
        self._places = places(self.model.policy)
        for extractor in self._extractors:
            if extractor.spread_at not in (None, math.inf):  # a run may count its steps anew
                extractor.spread_at = min(extractor.spread_at, self.num_timesteps)
        self._tell_progress()

    def _on_rollout_start(self) -> None:
        self._tell_progress()
        for place, extractor in self._places.items():
            statistics = extractor.statistics()
            if statistics:
                statistics["exploration_coef"] = extractor.exploration_coef
                self._notice_collapse(extractor, statistics)
            for name, value in statistics.items():
                self.logger.record_mean(f"pathway/{name}", value)
                if len(self._places) > 1:
                    self.logger.record_mean(f"pathway/{place}/{name}", value, ("stdout", "log"))

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._tell_progress()

    def _on_training_end(self) -> None:
        self._on_rollout_start()
        for extractor in self._extractors:
            extractor.progress_remaining = None  # another run needs its own callback

    def _notice_collapse(
        self, extractor: HubFeaturesExtractor, statistics: dict[str, float]
    ) -> None:
        hub = extractor.pathway.hub
        shares = {name: statistics[f"probability_{name}"] for name in hub.encoder_names}
        top = extractor.pathway.collapsed_to(shares)
        if top is None:
            extractor.spread_at = self.num_timesteps
            return
        if extractor.spread_at is None:
            extractor.spread_at = self.num_timesteps
        since = extractor.spread_at
        if self.num_timesteps - since < self._collapse_steps:
            return
        extractor.spread_at = math.inf  # one warning is enough
        coef = extractor.exploration_coef
        warnings.warn(
            f"pathway collapse: encoder {top!r} has {shares[top]:.0%} of the pathway probability "
            f"since step {since:,.0f}; raise exploration_coef (now {coef:g}), "
            f"or take the encoder alone, which is cheaper: hub {hub.name}:{top}",
            stacklevel=2,
        )

    def _tell_progress(self) -> None:
        # SB3 moves its own on after a rollout has ended, and not where a run begins.
        remaining = 1.0 - self.num_timesteps / max(self.model._total_timesteps, 1)
        for extractor in self._extractors:
            extractor.progress_remaining = remaining


def _advice_on_layers(model: BaseAlgorithm) -> str | None:
    """What is wrong with the layers behind the features; None if nothing is."""
    kwargs: dict[str, Any] = model.policy_kwargs
    if isinstance(model, OffPolicyAlgorithm) and hasattr(model.policy, "critic"):
        layers = kwargs.get("net_arch")
        layers = layers.get("qf") if isinstance(layers, dict) else layers
        if layers is not None and not layers:
            return (
                "net_arch leaves the critic without layers, linear in features and action, so that "
                "the same action is best for all observations: give qf layers, or leave net_arch "
                "out of policy_kwargs (of hubrl train: algorithm.net_arch)"
            )
    elif kwargs.get("net_arch") is None and getattr(model.policy, "net_arch", None):
        if any(isinstance(module, HubCombinedExtractor) for module in model.policy.modules()):
            return None  # numbers beside images need layers
        return (
            "SB3 has added two layers of 64 units behind the hub's features, as it does not behind "
            "its own NatureCNN: give net_arch=[] among policy_kwargs, or the layers that you want"
        )
    return None


def places(policy: nn.Module) -> dict[str, HubFeaturesExtractor]:
    """
    The extractors of a policy that learn, by network and key of a Dict: ``critic/camera``.

    Target networks are built the same way, but never learn: they have nothing to tell.
    """
    found: dict[str, HubFeaturesExtractor] = {}
    for path, module in policy.named_modules():
        network = _network(policy, path)
        if network.endswith("_target"):
            continue
        if isinstance(module, HubCombinedExtractor):
            for key, extractor in module.image_extractors.items():
                found[f"{network}/{key}".lstrip("/")] = extractor
        elif isinstance(module, HubFeaturesExtractor) and module not in found.values():
            found[network] = module
    return found


def _network(policy: nn.Module, path: str) -> str:
    """``pi`` of SB3's ``pi_features_extractor``, ``actor`` of ``actor.features_extractor``."""
    network = path.partition("features_extractor")[0].rstrip("._")
    other = getattr(policy, "vf_features_extractor", None)
    # An unshared one is listed under its first name, which says nothing.
    is_one_of_two = other is not None and other is not getattr(policy, "features_extractor", None)
    return "pi" if is_one_of_two and not network else network
