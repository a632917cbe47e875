"""ViC-MAE in Hugging Face Transformers style. Importing the package registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
)

from .configuration_vicmae import ViCMAEConfig
from .image_processing_vicmae import ViCMAEImageProcessor, ViCMAEImageProcessorPil
from .modeling_vicmae import (
    ViCMAEForImageClassification,
    ViCMAEForPreTraining,
    ViCMAEForVideoClassification,
    ViCMAEModel,
)
from .video_processing_vicmae import ViCMAEVideoProcessor


# So `AutoModel.from_pretrained` and its like find these classes by `model_type`, and ask nobody to trust remote code.
AutoConfig.register("vicmae", ViCMAEConfig)
AutoModel.register(ViCMAEConfig, ViCMAEModel)
AutoModelForPreTraining.register(ViCMAEConfig, ViCMAEForPreTraining)
AutoModelForImageClassification.register(ViCMAEConfig, ViCMAEForImageClassification)
AutoModelForVideoClassification.register(ViCMAEConfig, ViCMAEForVideoClassification)
AutoImageProcessor.register(
    ViCMAEConfig, image_processor_classes={"torchvision": ViCMAEImageProcessor, "pil": ViCMAEImageProcessorPil}
)
AutoVideoProcessor.register(ViCMAEConfig, ViCMAEVideoProcessor)

__version__ = "0.1.0"

__all__ = [
    "ViCMAEConfig",
    "ViCMAEForImageClassification",
    "ViCMAEForPreTraining",
    "ViCMAEForVideoClassification",
    "ViCMAEImageProcessor",
    "ViCMAEImageProcessorPil",
    "ViCMAEModel",
    "ViCMAEVideoProcessor",
]
