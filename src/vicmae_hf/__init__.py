"""ViC-MAE in Hugging Face Transformers style. Importing the package registers it with the Auto classes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoBackbone,
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


class _Backbone:
    """Stands for `ViCMAEBackbone` at `AutoBackbone`, and imports it when it is built: pretraining needs none of it."""

    config_class = ViCMAEConfig

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> "ViCMAEBackbone":
        return __getattr__("ViCMAEBackbone").from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args, **kwargs) -> "ViCMAEBackbone":
        return __getattr__("ViCMAEBackbone")._from_config(*args, **kwargs)


AutoBackbone.register(ViCMAEConfig, _Backbone)

if TYPE_CHECKING:
    from .backbone_vicmae import ViCMAEBackbone
    from .commands.evaluate import evaluate
    from .commands.features import extract_features
    from .commands.finetune import finetune
    from .commands.pretrain import pretrain
    from .commands.probe import probe

__version__ = "0.1.0"

# Names -> their modules, which are imported when they are asked for: whoever only loads a model needs none of it.
_LAZY = {
    "ViCMAEBackbone": ".backbone_vicmae",
    "evaluate": ".commands.evaluate",
    "extract_features": ".commands.features",
    "finetune": ".commands.finetune",
    "pretrain": ".commands.pretrain",
    "probe": ".commands.probe",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ViCMAEBackbone",
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
    "probe",
]
