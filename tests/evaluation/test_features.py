"""Embeddings of files."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from tiny_features import table as features_of
from tiny_models import shake, tiny_config
from transformers import (
    AutoImageProcessor,
    AutoVideoProcessor,
    LlavaOnevisionVideoProcessor,
    VideoMAEConfig,
    VideoMAEModel,
    ViTImageProcessor,
)
from video_files import numbered_frames, write_video

from vicmae_hf import ViCMAEForPreTraining, ViCMAEForVideoClassification, ViCMAEModel
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.media.video import open_video
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.data.sources.sources import open_source
from vicmae_hf.errors import InputError
from vicmae_hf.evaluation.feature_files import check_feature_file, write_features
from vicmae_hf.evaluation.features import (
    build_feature_views,
    embed_views,
    extract_embeddings,
    load_encoder,
    pooled,
)
from vicmae_hf.processors import build_processors, read_image_range
from vicmae_hf.video_processing_vicmae import sample_frame_indices


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Two videos, a picture and a broken file, in two folders."""
    root = tmp_path_factory.mktemp("media")
    for name in ("a", "b"):
        (root / name).mkdir()
    write_video(root / "a" / "0.mp4", numbered_frames(20, 40, 56), fps=15)
    write_video(root / "b" / "1.mp4", numbered_frames(31, 48, 40, seed=1), fps=15)
    Image.fromarray(numbered_frames(7, 30, 44)[-1]).save(root / "b" / "2.png")
    (root / "a" / "broken.mp4").write_bytes(b"no video")
    return root


def save_model(folder, model_class=ViCMAEModel, **settings):
    model = shake(model_class(tiny_config(**settings))).eval()
    model.save_pretrained(folder)
    for processor in build_processors(model.config):
        processor.save_pretrained(folder)
    return model


def embed(folder, source, pooling, **options):
    model, processor = load_encoder(str(folder), pooling)
    views = build_feature_views(source, processor, MediaLoader(), pooling=pooling, **options)
    return extract_embeddings(Accelerator(cpu=True), model, views, batch_size=3, num_workers=0)


@pytest.mark.parametrize(
    ("model_class", "pooling"),
    [(ViCMAEForPreTraining, "cls"), (ViCMAEForPreTraining, "mean"), (ViCMAEForVideoClassification, "mean")],
)
def test_frame_pooling_is_the_mean_over_frames_of_the_image_encoder(model_class, pooling, media, tmp_path):
    model = save_model(tmp_path, model_class, pooling=pooling)
    source = open_source(media)
    features = embed(tmp_path, source, "frame", num_frames=5)
    assert [source[index].name for index in features.indices.tolist()] == [
        str(media / name) for name in ("a/0.mp4", "b/1.mp4", "b/2.png")
    ]
    assert [failure["path"] for failure in features.failures] == [str(media / "a" / "broken.mp4")]
    processor = AutoImageProcessor.from_pretrained(tmp_path)

    def encode(frames):
        with torch.no_grad():
            return model.vicmae(processor(list(frames), return_tensors="pt").pixel_values).pooler_output

    for row, name in enumerate(["a/0.mp4", "b/1.mp4"]):
        with open_video(media / name) as video:
            middles = [int((part + 0.5) / 5 * video.num_frames) for part in range(5)]
            expected = encode(video.get_frames(middles)).mean(0)
        torch.testing.assert_close(features.embeddings[row], expected, atol=1e-5, rtol=1e-4)
    picture = np.array(Image.open(media / "b" / "2.png"))
    torch.testing.assert_close(features.embeddings[2], encode([picture])[0], atol=1e-5, rtol=1e-4)


def test_views_may_be_kept_one_by_one_and_repeat_where_a_video_has_too_few_frames(tmp_path, monkeypatch):
    """Each frame's embedding in the order of time, computed again from the file."""
    (tmp_path / "media").mkdir()
    write_video(tmp_path / "media" / "0.mp4", numbered_frames(20, 40, 56), fps=15)
    write_video(tmp_path / "media" / "1.mp4", numbered_frames(3, 40, 56, seed=1), fps=15)
    Image.fromarray(numbered_frames(7, 30, 44)[-1]).save(tmp_path / "media" / "2.png")
    save_model(tmp_path / "model", pooling="mean")
    model, processor = load_encoder(str(tmp_path / "model"), "frame")
    views = build_feature_views(
        open_source(tmp_path / "media"), processor, MediaLoader(), pooling="frame", num_frames=4
    )
    accelerator, sent = Accelerator(cpu=True), []

    def gather(parts):  # of one process
        sent.extend(value for _, outputs in parts[0][0] for value in outputs["embeddings"])
        return parts

    monkeypatch.setattr("vicmae_hf.evaluation.collecting.gather_object", gather)
    with torch.no_grad():
        features = embed_views(
            accelerator, pooled(accelerator, [model.eval()]), views, batch_size=12, num_workers=0, average=False
        )
    # Pickling a tensor takes its whole storage, which three files of a batch must not share.
    assert [value.untyped_storage().nbytes() for value in sent] == [4 * 16 * count for count in (4, 3, 1)]
    # Four views of each file, of which only different ones are there.
    assert features.embeddings.shape == (4 + 3 + 1, 16)
    assert features.rows.tolist() == [[0, 1, 2, 3], [4, 5, 5, 6], [7] * 4]
    embeddings = torch.cat(list(features.blocks()))
    middles = {"0.mp4": [2, 7, 12, 17], "1.mp4": [0, 1, 1, 2], "2.png": [0, 0, 0, 0]}
    for row, (name, indices) in zip(embeddings, middles.items(), strict=True):
        with open_source(tmp_path / "media")[list(middles).index(name)].open("pyav") as reader:
            frames = list(reader.get_frames(indices))
        with torch.no_grad():
            expected = model(processor(frames, return_tensors="pt").pixel_values).pooler_output
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)


def test_clip_pooling_is_the_clip_encoder(media, tmp_path):
    model = save_model(tmp_path, ViCMAEForVideoClassification)
    features = embed(tmp_path, open_source(media), "clip", num_frames=4, frames_per_second=5)
    processor = AutoVideoProcessor.from_pretrained(tmp_path)
    for row, (name, num_frames) in enumerate([("a/0.mp4", 20), ("b/1.mp4", 31)]):
        with open_video(media / name) as video:
            frames = video.get_frames(sample_frame_indices(num_frames, 4, fps=5, video_fps=15)[0])
        with torch.no_grad():
            expected = model.vicmae(processor(frames, return_tensors="pt").pixel_values).pooler_output[0]
        torch.testing.assert_close(features.embeddings[row], expected, atol=1e-5, rtol=1e-4)


def test_files_of_features_hold_names_and_classes(media, tmp_path):
    source = open_labelled(media)
    embeddings = torch.randn(3, 5)
    failures = [{"path": source[1].name, "error": "broken"}]
    features = replace(features_of(embeddings), indices=torch.tensor([0, 2, 3]), failures=failures)
    files = [str(media / name) for name in ("a/0.mp4", "b/1.mp4", "b/2.png")]

    write_features(tmp_path / "new" / "features.parquet", source, features, {"pooling": "frame"})
    table = pyarrow.parquet.read_table(tmp_path / "new" / "features.parquet")
    assert table["file"].to_pylist() == files
    assert table["class"].to_pylist() == ["a", "b", "b"]
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), embeddings.numpy())
    assert json.loads(table.schema.metadata[b"settings"]) == {"pooling": "frame"}
    record = tmp_path / "new" / "features.parquet.bad_files.jsonl"
    assert json.loads(record.read_text()) == {"path": str(media / "a" / "broken.mp4"), "error": "broken"}

    write_features(tmp_path / "features.safetensors", source, features, {"pooling": "frame"})
    with safe_open(tmp_path / "features.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("embeddings"), embeddings)
        assert file.get_tensor("labels").tolist() == [0, 1, 1]
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
    assert metadata == {"files": files, "class_names": ["a", "b"], "settings": {"pooling": "frame"}}

    unlabelled = open_source(media)
    write_features(tmp_path / "new" / "features.parquet", unlabelled, replace(features, failures=[]), {})
    assert pyarrow.parquet.read_table(tmp_path / "new" / "features.parquet").column_names == ["file", "embedding"]
    assert not record.exists()
    with pytest.raises(
        InputError, match=r"features\.npy: expected a name that ends in \.parquet, \.csv or \.safetensors"
    ):
        check_feature_file("features.npy")


@pytest.mark.parametrize("pooling", ["frame", "clip"])
def test_a_checkpoint_of_a_run_takes_the_processors_of_its_folder(tmp_path, pooling):
    ViCMAEModel(tiny_config()).save_pretrained(tmp_path / "checkpoint-3")
    for processor in build_processors(tiny_config(), image_range="0,100"):
        processor.save_pretrained(tmp_path)
    _, processor = load_encoder(str(tmp_path / "checkpoint-3"), pooling)
    assert processor.image_range == "0,100"
    assert read_image_range(str(tmp_path / "checkpoint-3")) == "0,100"
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "copy")  # the folder around it need not be its run's
    with pytest.raises(InputError, match=r"no encoder can be loaded from there: .*processor"):
        load_encoder(str(tmp_path / "copy"), pooling)
    other = LlavaOnevisionVideoProcessor() if pooling == "clip" else ViTImageProcessor()
    other.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"checkpoint-3: expected .* of ViC-MAE, got {type(other).__name__}"):
        load_encoder(str(tmp_path / "checkpoint-3"), pooling)


def test_only_whole_encoders_of_this_package_are_loaded(tmp_path):
    VideoMAEModel(
        VideoMAEConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "videomae")
    with pytest.raises(InputError, match="expected a ViC-MAE checkpoint, got one of videomae"):
        load_encoder(str(tmp_path / "videomae"), "frame")
    ViCMAEModel(tiny_config()).save_pretrained(tmp_path / "vicmae")
    with pytest.raises(InputError, match=r"no encoder can be loaded from there: .*processor"):
        load_encoder(str(tmp_path / "vicmae"), "frame")
    with pytest.raises(InputError, match=r"nothing: no encoder .*: there is no such file or folder"):
        load_encoder(str(tmp_path / "nothing"), "clip")
