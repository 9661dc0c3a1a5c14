"""``PathwayCallback``: the pathway's statistics in SB3's log, and schedules moved along."""

from __future__ import annotations

from stable_baselines3.common.callbacks import BaseCallback

from hubrl.extractor import HubFeaturesExtractor


class PathwayCallback(BaseCallback):
    """
    Logs ``pathway/...`` of a model with ``HubFeaturesExtractor`` and moves its schedule along.

    For each rollout it logs ``pathway/usage_<encoder>``, ``pathway/entropy``,
    ``pathway/exploration_loss`` and ``pathway/exploration_coef``, each a mean over the updates
    since the last rollout. With an ``exploration_coef`` that is a schedule, it is required.
    """

    def _on_training_start(self) -> None:
        """
        :raises ValueError: if the model has no ``HubFeaturesExtractor``
        """
        modules = list(self.model.policy.modules())
        self._extractors = [m for m in modules if isinstance(m, HubFeaturesExtractor)]
        if not self._extractors:
            raise ValueError(
                "PathwayCallback needs a model whose features_extractor_class is "
                "HubFeaturesExtractor, set in policy_kwargs"
            )
        self._tell_progress()

    def _on_rollout_start(self) -> None:
        self._tell_progress()
        # Target networks are built the same way, but never learn: they have nothing to tell.
        for extractor in self._extractors:
            statistics = extractor.statistics()
            if statistics:
                statistics["exploration_coef"] = extractor.exploration_coef
            for name, value in statistics.items():
                self.logger.record_mean(f"pathway/{name}", value)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._tell_progress()

    def _on_training_end(self) -> None:
        self._on_rollout_start()

    def _tell_progress(self) -> None:
        for extractor in self._extractors:
            extractor.progress_remaining = self.model._current_progress_remaining
