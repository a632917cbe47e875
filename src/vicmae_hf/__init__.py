"""ViC-MAE in Hugging Face Transformers style. Importing the package registers it with the Auto classes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from .commands.evaluate import evaluate
    from .commands.features import extract_features
    from .commands.finetune import finetune
    from .commands.pretrain import pretrain

__version__ = "0.1.0"

# Functions -> their modules, which are imported when they are asked for: whoever only loads a model needs none of it.
_FUNCTIONS = {
    "evaluate": ".commands.evaluate",
    "extract_features": ".commands.features",
    "finetune": ".commands.finetune",
    "pretrain": ".commands.pretrain",
}


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ViCMAEConfig",
    "ViCMAEForImageClassification",
    "ViCMAEForPreTraining",
    "ViCMAEForVideoClassification",
    "ViCMAEImageProcessor",
    "ViCMAEImageProcessorPil",
    "ViCMAEModel",
    "ViCMAEVideoProcessor",
    "evaluate",
    "extract_features",
    "finetune",
    "pretrain",
]
