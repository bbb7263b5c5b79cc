"""What a config.yaml may say: the models, the check that names every mistake, the files made from them."""

from cryodrgn_pipeline.config.check import load_config
from cryodrgn_pipeline.config.models import Config

__all__ = ["Config", "load_config"]
