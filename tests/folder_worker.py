"""What saved folders give, through Transformers alone. As a program it runs where `vicmae_hf` can't be imported:

python folder_worker.py FOLDERS     writes FOLDERS/outputs.safetensors, and saves loaded models and processors again
"""

import importlib.abc
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    pipeline,
)


class HiddenPackage(importlib.abc.MetaPathFinder):
    """Makes `import vicmae_hf` fail as where it is not installed."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "vicmae_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def compute(folders: Path, **trust: bool) -> dict[str, torch.Tensor]:
    """Outputs of the folders "pretrained", "image" and "video" for the inputs beside them."""
    inputs = load_file(folders / "inputs.safetensors")
    video, picture = str(folders / "video.mp4"), str(folders / "picture.png")
    folder = folders / "pretrained"
    outputs = {}
    with torch.no_grad():
        model = AutoModel.from_pretrained(folder, **trust).eval()
        outputs["image features"] = model(inputs["images"]).pooler_output
        outputs["clip features"] = model(inputs["clips"]).last_hidden_state
        model = AutoModel.from_pretrained(folder, image_size=[24, 16], num_frames=8, **trust).eval()
        outputs["features after resampling"] = model(inputs["images"]).last_hidden_state
        model = AutoModelForPreTraining.from_pretrained(folder, **trust).eval()
        output = model(inputs["clips"][:, :2], noise=inputs["noise"])
        outputs |= {"loss": output.loss, "logits": output.logits, "contrastive loss": output.contrastive_loss}
        for auto_class in (AutoModelForImageClassification, AutoModelForVideoClassification):
            # The classifier is new, and random.
            torch.manual_seed(0)
            model = auto_class.from_pretrained(folder, tubelet_size=4, **trust).eval()
            outputs[auto_class.__name__] = model(inputs["clips"]).logits
    image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
    outputs["image pixels"] = image_processor(inputs["picture"], return_tensors="pt").pixel_values
    video_processor = AutoVideoProcessor.from_pretrained(folder, **trust)
    views = {"do_sample_frames": True, "num_frames": 4, "num_clips": 2, "num_crops": 3}
    outputs["video pixels"] = video_processor(video, return_tensors="pt", **views).pixel_values
    for task, path in [("image-classification", picture), ("video-classification", video)]:
        results = pipeline(task, str(folders / task), **trust)(path)
        scores = {result["label"]: result["score"] for result in results}
        outputs[task] = torch.tensor([scores[label] for label in sorted(scores)])
    features = pipeline("image-feature-extraction", str(folder), **trust)(picture)
    outputs["image-feature-extraction"] = torch.tensor(features)
    return {name: tensor.contiguous() for name, tensor in outputs.items()}


def main(folders: Path) -> None:
    trust = {"trust_remote_code": True}
    save_file(compute(folders, **trust), folders / "outputs.safetensors")
    model = AutoModelForPreTraining.from_pretrained(folders / "pretrained", **trust)
    model.save_pretrained(folders / "again")
    model.vicmae.save_pretrained(folders / "encoder")
    for auto_class in (AutoImageProcessor, AutoVideoProcessor):
        auto_class.from_pretrained(folders / "pretrained", **trust).save_pretrained(folders / "again")
    print([name for name in sys.modules if name.startswith("vicmae_hf")], type(model).__module__.partition(".")[0])


if __name__ == "__main__":
    sys.meta_path.insert(0, HiddenPackage())
    main(Path(sys.argv[1]))
