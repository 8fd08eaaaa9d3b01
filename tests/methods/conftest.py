"""Methods without a Trainer."""

import pytest

from ssl_vit.methods.base import SSLMethod
from ssl_vit.methods.schedules import make_plan
from ssl_vit.training.trainer import build_method


@pytest.fixture
def build(pretrain_config, monkeypatch):
    """Return a function that builds a method at optimizer step 0 from overrides."""
    monkeypatch.setattr(SSLMethod, "global_step", property(lambda self: 0))
    monkeypatch.setattr(SSLMethod, "global_rank", property(lambda self: 0))

    def method(*overrides):
        config = pretrain_config(*overrides)
        return build_method(config, make_plan(config, num_images=192))

    return method
