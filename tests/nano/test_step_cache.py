"""The step cache on the embedded model: half of the steps, and nearer to all of them than as few plain ones."""

from __future__ import annotations

import numpy as np

from longcat_core.generate.pipeline import Pipeline
from longcat_core.generate.request import GenerateRequest


def test_half_the_steps_and_hardly_another_video():
    pipeline, computed = Pipeline.load(), []

    def frames(**settings) -> np.ndarray:
        request = GenerateRequest("a red circle moves right on a blue background", seed=0, **settings)
        return pipeline.generate(request, lambda step: computed.append(not step.reused)).frames

    every = frames()
    assert sum(computed) == 50
    computed.clear()
    cached = frames(step_cache=0.05)
    count = sum(computed)
    plain = frames(steps=count)
    assert 10 < count < 25 and len(computed) == 50 + count
    near, far = (20 * np.log10(255 / np.sqrt(((other - every.astype(float)) ** 2).mean())) for other in (cached, plain))
    # Measured: 46.3 and 40 dB.
    assert near > 42 and near > far + 3
