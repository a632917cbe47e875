"""The models in the hands of Transformers' Trainer, PEFT, torch.export, and Accelerate's device maps."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import random_tensor, shake, tiny_config
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from vicmae_hf import (
    ViCMAEForImageClassification,
    ViCMAEForPreTraining,
    ViCMAEForVideoClassification,
    ViCMAEModel,
)


HEADS = [ViCMAEForImageClassification, ViCMAEForVideoClassification]
ALL_CLASSES = [*HEADS, ViCMAEForPreTraining]


class Samples(Dataset):
    """Twelve inputs of a model class, to be learned by heart."""

    def __init__(self, model_class):
        if model_class is ViCMAEForPreTraining:
            # Brighter to the left or to the right, which any visible patch gives away.
            slopes = torch.arange(16) * torch.tensor([-0.1, 0.1] * 6)[:, None]
            views = slopes[:, None, None, None, :].expand(-1, 2, 3, 16, -1)
            self.samples = [{"pixel_values": view} for view in views]
        else:
            shape = (3, 16, 16) if model_class is ViCMAEForImageClassification else (4, 3, 16, 16)
            pixel_values = random_tensor(12, *shape)
            self.samples = [{"pixel_values": pixels, "labels": i % 3} for i, pixels in enumerate(pixel_values)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def build_trainer(model_class, output_dir, model=None, **settings):
    torch.manual_seed(0)
    data = Samples(model_class)
    # Without labels the evaluation has to be told by which inputs it can tell that there is a loss.
    label_names = ["pixel_values"] if model_class is ViCMAEForPreTraining else None
    defaults = {"max_steps": 30, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "logging_steps": 1}
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        **{**defaults, **settings},
        label_names=label_names,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = model or model_class(tiny_config(hidden_dropout_prob=0.05, contrastive_weight=0.01))
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


# Trainer


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_trainer_trains_evaluates_and_resumes(model_class, tmp_path):
    trainer = build_trainer(model_class, tmp_path / "whole", save_steps=15)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert trainer.evaluate()["eval_loss"] < 0.7 * before

    # The first half, then the second in a new trainer with other weights: as in one go.
    checkpoint = tmp_path / "whole" / "checkpoint-15"
    assert (checkpoint / "modeling_vicmae.py").exists()
    resumed = build_trainer(model_class, tmp_path / "resumed", model=shake(model_class(trainer.model.config)))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    loaded = model_class.from_pretrained(tmp_path / "whole" / "checkpoint-30").state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("model_class", HEADS)
def test_trainer_accumulates_gradients_to_those_of_the_whole_batch(model_class, tmp_path):
    start = shake(model_class(tiny_config()))

    def train_one_step(**settings):
        model = copy.deepcopy(start)
        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, **settings}
        trainer = build_trainer(model_class, tmp_path, model=model, lr_scheduler_type="constant", **settings)
        trainer.train()
        return model.state_dict()

    whole = train_one_step(per_device_train_batch_size=12)
    parts = train_one_step(per_device_train_batch_size=3, gradient_accumulation_steps=4)
    assert (whole["classifier.weight"] - start.classifier.weight).abs().max() > 1e-3
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-6, rtol=1e-5)


# PEFT


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def change_by_reversal(model, clips):
    with torch.no_grad():
        return (model.eval()(clips).logits - model(clips.flip(1)).logits).abs().max().item()


@pytest.mark.parametrize("trains_positions", [False, True])
def test_lora_sees_the_order_of_frames_if_it_trains_the_temporal_positions(trains_positions, tmp_path):
    """The line of docs/hub.md, on a video classifier as it starts from a frame encoder: without temporal positions."""
    shake(ViCMAEModel(tiny_config(), video=False)).save_pretrained(tmp_path / "frames")
    base = ViCMAEForVideoClassification.from_pretrained(tmp_path / "frames")
    start = copy.deepcopy(base.state_dict())
    saved = ["classifier", "vicmae.embeddings"] if trains_positions else ["classifier"]
    model = get_peft_model(base, LoraConfig(**LORA, modules_to_save=saved))
    clips = random_tensor(4, 4, 3, 16, 16)
    # Pairs that differ in their order alone.
    inputs = {"pixel_values": torch.cat([clips, clips.flip(1)]), "labels": torch.arange(8) // 4}
    losses = train_with_adam(model, inputs, lambda output: output.loss)
    assert (losses[-1] < 0.1) == trains_positions
    change = change_by_reversal(model, clips)
    assert (change > 1) if trains_positions else (change < 1e-4)
    model.save_pretrained(tmp_path / "adapter")
    fresh = ViCMAEForVideoClassification(tiny_config())
    fresh.load_state_dict(start)
    reloaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert change_by_reversal(reloaded, clips) == pytest.approx(change, rel=1e-4, abs=1e-6)


def train_with_adam(model, inputs, loss_of, num_steps=30):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(num_steps):
        loss = loss_of(model(**inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_lora_wraps_the_encoder_trains_and_reloads(tmp_path):
    base = shake(ViCMAEModel(tiny_config())).eval()
    start = copy.deepcopy(base.state_dict())
    inputs, target = {"pixel_values": random_tensor(6, 3, 16, 16)}, random_tensor(6, 16, seed=1)
    model = get_peft_model(base, LoraConfig(**LORA))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Two layers, q and v, two factors each.
    assert len(trainable) == 8
    assert all("lora_" in name and (".q_proj." in name or ".v_proj." in name) for name in trainable)
    losses = train_with_adam(model, inputs, lambda output: (output.pooler_output - target).square().mean())
    assert losses[-1] < 0.9 * losses[0]

    model.eval()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    model.save_pretrained(tmp_path / "adapter")
    fresh = ViCMAEModel(tiny_config()).eval()
    fresh.load_state_dict(start)
    with torch.no_grad():
        plain = fresh(**inputs).last_hidden_state
        reloaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        assert torch.equal(reloaded(**inputs).last_hidden_state, expected)
        assert (expected - plain).abs().max() > 0.1
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
        # Merged it is a plain model again, code and all.
        merged.save_pretrained(tmp_path / "merged")
        loaded = ViCMAEModel.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(loaded(**inputs).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_class", HEADS)
def test_lora_trains_a_classifier_with_its_new_head(model_class, tmp_path):
    base = shake(model_class(tiny_config())).eval()
    start = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, LoraConfig(**LORA, modules_to_save=["classifier"]))
    trainer = build_trainer(model_class, tmp_path / "run", model=model)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.8 * before
    frozen = model.get_base_model().vicmae.layers[0].attention.k_proj.weight
    assert torch.equal(frozen, start["vicmae.layers.0.attention.k_proj.weight"])
    model.save_pretrained(tmp_path / "adapter")

    fresh = model_class(tiny_config())
    fresh.load_state_dict(start)
    reloaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert build_trainer(model_class, tmp_path, model=reloaded).evaluate()["eval_loss"] == pytest.approx(after)


# torch.export, dtypes, devices (test_modeling_vicmae.py compiles the encoder)


@pytest.mark.parametrize("shape", [(3, 3, 16, 16), (3, 4, 3, 24, 16)])
def test_the_encoder_is_exported_for_any_batch_size(shape):
    model = shake(ViCMAEModel(tiny_config(pooling="mean"))).eval()
    program = torch.export.export(
        model,
        args=(),
        kwargs={"pixel_values": random_tensor(*shape)},
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        strict=False,
    )
    for batch_size in (1, 3, 5):
        inputs = random_tensor(batch_size, *shape[1:], seed=batch_size)
        with torch.no_grad():
            output, expected = program.module()(pixel_values=inputs), model(inputs)
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(output.pooler_output, expected.pooler_output, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_the_compiled_encoder_takes_any_batch_size():
    model = shake(ViCMAEModel(tiny_config(pooling="mean"))).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch_size in (2, 3, 5):
        inputs = random_tensor(batch_size, 3, 16, 16, seed=batch_size)
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(inputs).last_hidden_state, model(inputs).last_hidden_state, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("model_class", [ViCMAEModel, *ALL_CLASSES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_load_where_a_device_map_puts_them(model_class, dtype, tmp_path):
    shake(model_class(tiny_config(num_hidden_layers=6))).save_pretrained(tmp_path / "model")
    inputs = {"pixel_values": random_tensor(2, 2, 3, 16, 16)}
    if model_class is ViCMAEForPreTraining:
        inputs["noise"] = random_tensor(2, 2, 16, seed=1)
    # Loaded as saved, and with positions resampled on the way.
    for changes in ({}, {"image_size": 24, "num_frames": 8}):
        expected = model_class.from_pretrained(tmp_path / "model", **changes).eval()
        loaded = model_class.from_pretrained(tmp_path / "model", dtype=dtype, device_map="auto", **changes).eval()
        assert loaded.dtype == dtype
        # As on a machine without the memory for the whole: two thirds of it, and the rest on the disk.
        size = sum(parameter.numel() * dtype.itemsize for parameter in expected.parameters())
        split = model_class.from_pretrained(
            tmp_path / "model",
            dtype=dtype,
            device_map="auto",
            max_memory={"cpu": size * 2 // 3},
            offload_folder=tmp_path / "offload",
            **changes,
        ).eval()
        assert set(split.hf_device_map.values()) == {"cpu", "disk"}
        tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
        with torch.no_grad():
            values = expected(**inputs)[0]
            for model in (loaded, split):
                torch.testing.assert_close(model(**inputs)[0].float(), values, **tolerance)


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "disk"},
        {"vicmae.embeddings": "disk", "vicmae.layers": "cpu", "vicmae.layernorm": "cpu", "classifier": "cpu"},
    ],
)
def test_embeddings_that_are_fitted_on_loading_may_go_to_the_disk(device_map, tmp_path):
    shake(ViCMAEForVideoClassification(tiny_config())).save_pretrained(tmp_path / "model")
    changes = {"image_size": [24, 16], "num_frames": 8}
    whole = ViCMAEForVideoClassification.from_pretrained(tmp_path / "model", **changes).eval()
    split = ViCMAEForVideoClassification.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", **changes
    ).eval()
    assert split.vicmae.embeddings.temporal_position_embeddings.is_meta
    assert split.vicmae.embeddings.patch_embeddings.projection.weight.is_meta
    with torch.no_grad():
        for inputs in (random_tensor(2, 8, 3, 24, 16), random_tensor(2, 3, 24, 16)):
            assert torch.equal(split(inputs).logits, whole(inputs).logits)


def test_a_saved_half_precision_model_says_so(tmp_path):
    shake(ViCMAEModel(tiny_config())).to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert ViCMAEModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert ViCMAEModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
