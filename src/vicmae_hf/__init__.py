"""ViC-MAE in Hugging Face Transformers style. Importing the package registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
)

from .configuration_vicmae import ViCMAEConfig
from .modeling_vicmae import (
    ViCMAEForImageClassification,
    ViCMAEForPreTraining,
    ViCMAEForVideoClassification,
    ViCMAEModel,
)


AutoConfig.register("vicmae", ViCMAEConfig)
AutoModel.register(ViCMAEConfig, ViCMAEModel)
AutoModelForPreTraining.register(ViCMAEConfig, ViCMAEForPreTraining)
AutoModelForImageClassification.register(ViCMAEConfig, ViCMAEForImageClassification)
AutoModelForVideoClassification.register(ViCMAEConfig, ViCMAEForVideoClassification)

__version__ = "0.1.0"

__all__ = [
    "ViCMAEConfig",
    "ViCMAEForImageClassification",
    "ViCMAEForPreTraining",
    "ViCMAEForVideoClassification",
    "ViCMAEModel",
]
