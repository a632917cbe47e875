"""`export_features.py` as users run it."""

import json

import numpy as np
from launching import run_together
from safetensors import safe_open
from tiny_models import shake, tiny_config
from torch import no_grad
from video_files import numbered_frames, write_video

from vicmae_hf import ViCMAEForPreTraining
from vicmae_hf.data.media.video import open_video
from vicmae_hf.processors import build_processors


def test_two_processes_embed_a_folder(tmp_path):
    model = shake(ViCMAEForPreTraining(tiny_config())).eval()
    model.save_pretrained(tmp_path / "model")
    processors = build_processors(model.config)
    for processor in processors:
        processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data" / "bee").mkdir(parents=True)
    (tmp_path / "data" / "empty").mkdir()
    (tmp_path / "data" / "notes.txt").touch()
    files = [str(tmp_path / "data" / "bee" / f"{index}.mp4") for index in range(5)]
    for index, file in enumerate(files):
        write_video(file, numbered_frames(9 + index, seed=index))
    (tmp_path / "data" / "bee" / "5.mp4").write_bytes(b"no video")
    flags = ["--model_name_or_path", tmp_path / "model", "--data", tmp_path / "data", "--dataloader_num_workers", "0"]
    flags += ["--pooling", "frame", "--num_frames", "1", "--labelled", "--output", tmp_path / "features.safetensors"]
    process = run_together("export_features.py", *flags)
    assert process.returncode == 0, process.stderr
    assert "5 embeddings of 16 numbers" in process.stdout
    assert f"1 unreadable file (listed in {tmp_path / 'features.safetensors.bad_files.jsonl'})." in process.stdout
    for said in ("6 videos, 0 images.", "1 folders without videos or images", "1 files were not read: .txt 1"):
        assert process.stderr.count(said) == 1, said  # and not once for each process
    with safe_open(tmp_path / "features.safetensors", "np") as contents:
        embeddings, labels = contents.get_tensor("embeddings"), contents.get_tensor("labels")
        metadata = contents.metadata()
    assert json.loads(metadata["files"]) == files
    assert json.loads(metadata["settings"])["pooling"] == "frame"
    assert labels.tolist() == [0] * 5
    for index, file in enumerate(files):
        with open_video(file) as video:
            frame = video.get_frames([video.num_frames // 2])
        with no_grad():
            expected = model.vicmae(processors[0](list(frame), return_tensors="pt").pixel_values).pooler_output[0]
        np.testing.assert_allclose(embeddings[index], expected.numpy(), rtol=1e-4, atol=1e-5)
