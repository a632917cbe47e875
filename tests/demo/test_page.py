"""The page of `vicmae demo`, in a real browser: what a visitor does and sees, and that nothing reaches the network."""

import base64
import io
import json
import os
import urllib.request

import pytest
import torch
from browsing import MISSING, browsed, served, show, wait_for_other
from demo_checkpoints import CLASS_NAMES, save
from PIL import Image
from video_files import numbered_frames, write_video

from vicmae_hf import ViCMAEForImageClassification, ViCMAEForPreTraining, ViCMAEImageProcessor


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]

# Notes every address that a process of Python would connect to. Python runs a module of this name when it starts.
WATCH = """
import os, socket

def note(place):
    with open(os.environ["NOTED_ADDRESSES"], "a") as file:
        file.write(f"{place}\\n")

connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo
socket.socket.connect = lambda self, place: (note(place), connect(self, place))[1]
socket.socket.connect_ex = lambda self, place: (note(place), connect_ex(self, place))[1]
socket.getaddrinfo = lambda host, *rest, **options: (note(host), getaddrinfo(host, *rest, **options))[1]
"""
LOOPBACK = ("('127.0.0.1', ", "127.0.0.1", "localhost")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uploads")
    for seed, name in enumerate(("one.png", "two.png")):
        Image.fromarray(numbered_frames(1, 64, 64, seed=seed)[0]).save(folder / name)
    write_video(folder / "video.mp4", numbered_frames(40, 64, 64))
    (folder / "notes.mp4").write_text("no video at all")
    Image.new("RGB", (8, 8)).save(folder / "${7*7}<img src=x onerror=alert(1)>.png")
    return folder


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Environment of a process whose connections are noted in a file, and which keeps its uploads in a folder."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "sitecustomize.py").write_text(WATCH)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    (folder / "temporary").mkdir()
    proxy = "http://127.0.0.1:9"  # nobody listens there
    return {
        "PYTHONPATH": path,
        "NOTED_ADDRESSES": str(folder / "addresses.txt"),
        "TMPDIR": str(folder / "temporary"),
        "http_proxy": proxy,
        "HTTP_PROXY": proxy,
        "HF_HUB_OFFLINE": "0",  # which other tests set
        "GRADIO_SHARE": "True",
        "GRADIO_ANALYTICS_ENABLED": "True",
        "GRADIO_SERVER_NAME": "127.0.0.1",
    }


def noted(watched):
    with open(watched["NOTED_ADDRESSES"]) as file:
        return [line.strip() for line in file]


def sources(page, section):
    return page.eval_on_selector_all(f"#{section} img", "images => images.map(image => image.src)")


def captions(page, section):
    return page.locator(f"#{section} figcaption").all_inner_texts()


def open_picture(source):
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def slide(page, share):
    """Drags the slider to a share of its length."""
    box = page.locator("#ratio input[type=range]").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()


def ask_for_address(address):
    """Asks the page, as a program could, to show a file of another machine; returns whether it answers with one."""
    file = {"path": "http://nowhere.invalid/video.mp4", "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [file, 0.5], "fn_index": 0, "session_hash": "stranger"}).encode()
    request = urllib.request.Request(f"{address}gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=stranger") as stream:
        for line in stream:
            message = json.loads(line.removeprefix(b"data: ") if line.startswith(b"data: ") else b"{}")
            if message.get("msg") == "process_completed":
                return message["success"]
    return None


def test_a_visit_to_a_pretrained_model(files, watched, tmp_path):
    save(tmp_path / "model", ViCMAEForPreTraining, image_size=32)
    flags = [tmp_path / "model", "--folder", files, "--max_bad_files", 0.5, "--dataloader_num_workers", 0]
    with served(*flags, **watched) as address, browsed(address) as page:
        # What cannot be is said, and no controls are there for it.
        assert "not a classifier, so it predicts no classes" in page.inner_text("body")
        assert page.locator("#classes").count() == 0
        assert "1 of 5 files could not be read, the first: cannot decode" in page.inner_text("body")
        wait_for_other(page, "#message p", lambda: page.click("#show"))
        assert page.inner_text("#message p") == "Choose an image or a video first."

        assert show(page, files / "one.png") == "one.png"
        assert captions(page, "reconstruction") == ["image", "visible: 25%", "reconstruction", "random weights"]
        assert "borrowed from the visible ones around them, not from the truth" in page.inner_text("#reconstruction")
        frame, visible, *_ = pictures = sources(page, "reconstruction")
        hidden = [colour for count, colour in open_picture(visible).convert("RGB").getcolors(9999) if count > 500]
        assert hidden == [(0, 0, 0)]
        assert len(set(pictures)) == 4 and open_picture(frame).size == (32, 32)
        assert captions(page, "colours") == ["image", "trained", "random weights"]
        colours = sources(page, "colours")
        assert len(set(colours)) == 3 and open_picture(colours[1]).size == (8, 8)
        first, *_ = captions(page, "neighbours")
        assert first == "1.000 one.png" and len(captions(page, "neighbours")) == 8

        # Letting the slider go reconstructs again, and nothing else.
        wait_for_other(page, "#reconstruction .text", lambda: slide(page, 0.3))
        others = sources(page, "reconstruction")
        assert others[0] == pictures[0] and not set(others[1:]) & set(pictures)
        assert sources(page, "colours") == colours
        # The button, with another file, makes all of them anew.
        show(page, files / "two.png")
        assert not set(sources(page, "reconstruction")) & set(others)
        assert not set(sources(page, "colours")) & set(colours)

        assert show(page, files / "video.mp4") == "video.mp4 Showing 9 frames from 0.0 to 1.3 s."
        assert [open_picture(source).n_frames for source in sources(page, "colours")] == [9, 9, 9]
        assert captions(page, "colours") == ["video", "trained", "random weights"]

        line = show(page, files / "notes.mp4")
        assert line.startswith("cannot decode notes.mp4: pyav: ") and "vicmae-demo-" not in line
        assert sources(page, "reconstruction") == sources(page, "colours") == sources(page, "neighbours") == []

        show(page, files / "${7*7}<img src=x onerror=alert(1)>.png")
        assert "${7*7}" in "".join(captions(page, "neighbours"))
        assert all(source.startswith("data:") for source in sources(page, "neighbours"))
        assert ask_for_address(address) is False
        # What another site would ask from within a visitor's browser, that browser keeps from it.
        request = urllib.request.Request(f"{address}config", headers={"Origin": "http://example.org"})
        with urllib.request.urlopen(request) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] is None
        assert page.strays == []
    assert [place for place in noted(watched) if not place.startswith(LOOPBACK)] == []
    assert noted(watched) != []  # the process was watched
    assert os.listdir(watched["TMPDIR"]) == []  # no uploads are left


def probabilities(page):
    names, shares = (page.locator(f"#classes {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return {name: float(share.removesuffix("%")) / 100 for name, share in zip(names, shares, strict=True)}


def test_a_visit_to_a_classifier(files, tmp_path):
    model = save(tmp_path / "model", ViCMAEForImageClassification, image_size=32)
    processor = ViCMAEImageProcessor.from_pretrained(tmp_path / "model")
    with served(tmp_path / "model", "--max_upload_mib", 0.1) as address, browsed(address) as page:
        assert page.locator("#ratio, #reconstruction, #neighbours").count() == 0
        for text in ("This checkpoint has no decoder", "start the page with --folder DIR"):
            assert text in page.inner_text("body")
        found = {}
        for name in ("one.png", "two.png"):
            assert show(page, files / name) == name
            found[name] = probabilities(page)
            pixels = processor(Image.open(files / name), return_tensors="pt").pixel_values
            with torch.no_grad():
                expected = model(pixels).logits[0].softmax(-1).tolist()
            assert found[name] == pytest.approx(dict(zip(CLASS_NAMES, expected, strict=True)), abs=6e-4)
            assert list(found[name].values()) == sorted(found[name].values(), reverse=True)
        assert found["one.png"] != pytest.approx(found["two.png"], abs=0.01)

        (tmp_path / "large.mp4").write_bytes(bytes(200_000))
        page.click("#upload [aria-label=Clear]")
        page.set_input_files("#upload input[type=file]", tmp_path / "large.mp4")
        page.get_by_text('exceed the maximum allowed size of 102.4 Kb: "large.mp4"').wait_for()
        # The server, too, refuses it.
        form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="large.mp4"\r\n\r\n'
        form += bytes(200_000) + b"\r\n--x--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        with pytest.raises(urllib.error.HTTPError, match="413"):
            urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", form, headers))
