"""Small runs of the scripts on small data, as users start them."""

import numpy as np
from launching import run_here
from PIL import Image
from tiny_models import tiny_overrides


QUICK = ["--warmup_epochs", 0, "--dataloader_num_workers", 0, "--per_device_train_batch_size", 4]
FROM_NOTHING = ["--config_overrides", tiny_overrides(), "--image_size", 16]


def write_images(root, names=("a/0.png", "a/1.png", "b/0.png", "b/1.png", "c/0.png", "c/1.png")):
    """Images of noise; returns the folder."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    return root


def pretrain(data, output_dir, *flags, steps=1):
    flags = [*QUICK, "--contrastive_start_epoch", 0, "--max_train_steps", steps, *flags]
    return run_here("run_pretraining.py", "--train_data", data, "--output_dir", output_dir, *flags)


def classify(data, output_dir, *flags, steps=1, method="finetune"):
    flags = [*QUICK, "--task", "image", "--method", method, "--max_train_steps", steps, *flags]
    return run_here(
        "run_classification.py", "--train_data", data, "--eval_data", data, "--output_dir", output_dir, *flags
    )


def evaluate(model, data, output_dir, *flags):
    data = ["--model_name_or_path", model, "--data", data, "--output_dir", output_dir]
    return run_here("run_evaluation.py", *data, "--dataloader_num_workers", 0, *flags)


def export(model, data, output, *flags):
    data = ["--model_name_or_path", model, "--data", data, "--output", output]
    return run_here("export_features.py", *data, "--dataloader_num_workers", 0, *flags)


def probe(model, data, output_dir):
    data = ["--model_name_or_path", model, "--train_data", data, "--eval_data", data, "--output_dir", output_dir]
    return run_here("run_linear_probe.py", *data, "--num_seeds", 1)


# Each script that opens a model, from the model, data and a folder to write into.
OPENING_A_MODEL = {
    "run_pretraining": lambda model, data, folder: pretrain(data, folder, "--model_name_or_path", model),
    "run_classification": lambda model, data, folder: classify(data, folder, "--model_name_or_path", model),
    "run_evaluation": evaluate,
    "export_features": lambda model, data, folder: export(model, data, folder / "features.parquet"),
    "run_linear_probe": probe,
}
