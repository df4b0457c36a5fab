"""``TRPO`` under its old name: for scripts that should learn as with sb3_contrib, only faster and safer.

.. code-block:: python

    from sb3_trpo_ext.compat import TRPO  # was: from sb3_contrib import TRPO
"""

from __future__ import annotations

from typing import Any

from sb3_trpo_ext.algorithms.archives import SB3_CONTRIB_SETTINGS
from sb3_trpo_ext.algorithms.trpo import TRPOExt
from sb3_trpo_ext.checks import with_defaults


class TRPO(TRPOExt):
    """:class:`~sb3_trpo_ext.TRPOExt` with the settings of ``sb3_contrib.TRPO``, whose arguments it takes as they are.

    The KL is averaged over action dimensions, so ``target_kl`` and ``cg_damping`` keep their numbers; minibatch Adam
    fits the critic; any improvement is accepted; Gaussian actions start with a standard deviation of 1. From the same
    weights and the same rollout it takes the step that sb3_contrib takes.

    Three differences stay: the KL is KL(π_old ‖ π_θ) in the line search, too; a step that fails its checks leaves the
    policy as it was; and ``sub_sampling_factor`` thins the Fisher product alone, not the whole batch.

    All arguments are those of :class:`~sb3_trpo_ext.TRPOExt`. These four have other defaults:

    :param kl_reduction: ``"mean"``, over action dimensions
    :param critic: ``"adam"``
    :param line_search_accept_ratio: 0, which accepts any improvement
    :param initial_std: None, SB3's start
    """

    @with_defaults(TRPOExt, {**SB3_CONTRIB_SETTINGS, "initial_std": None})
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
