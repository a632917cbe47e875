"""
Takes the pictures of docs/demo_page.md, of the demo's model and of a classifier made from it:

    python tests/demo/take_screenshots.py

It needs outputs/demo and data/demo (`make pretrain`), outputs/classifier (docs/serving.md has its command), Chromium,
and `pip install -e ".[demo]" playwright`.
"""

import sys
from pathlib import Path

from browsing import MISSING, browsed, served, show
from PIL import Image


ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
DATA = ROOT / "data" / "demo"
VIDEO = DATA / "appearance" / "eval" / "blotched_ring" / "016.mp4"
IMAGE = DATA / "images" / "train" / "dotted_square" / "004.jpg"
PHONE = {"width": 400, "height": 1280, "is_mobile": True, "has_touch": True}


def take(page, name: str, full_page: bool = True) -> None:
    """Writes the page, with few colours, so that the documentation stays small."""
    page.wait_for_timeout(500)  # until the marks of progress have faded
    path = IMAGES / f"demo_page_{name}.png"
    page.screenshot(path=path, full_page=full_page)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    if MISSING:
        sys.exit(f"error: not installed: {', '.join(MISSING)}")
    folder = (DATA / "images" / "eval").relative_to(ROOT)
    with served("outputs/demo", "--folder", folder) as address:
        with browsed(address) as page:
            show(page, VIDEO)
            take(page, "video")
        with browsed(address, **PHONE) as page:
            show(page, IMAGE)
            take(page, "phone", full_page=False)
    with served("outputs/classifier") as address, browsed(address) as page:
        show(page, VIDEO)
        take(page, "classes")


if __name__ == "__main__":
    main()
