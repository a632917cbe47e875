"""Images and texts stand where they were placed."""

import numpy as np
import torch
from matplotlib.figure import Figure

from vicmae_hf.reports.sheets import Sheet


def test_images_stand_in_rows_and_columns():
    sheet = Sheet((10, 20), rows=2, columns=2.5, gap=0.2)  # a gap of 2 pixels
    bright = torch.full((3, 10, 20), 102, dtype=torch.uint8)
    beyond = torch.stack([torch.full((10, 20), value) for value in (-1.0, 0.5, 2.0)])
    sheet.place(bright, 0, 1)
    sheet.place(beyond, 1, 0.5, "0.123")
    expected = np.ones((24, 55, 3))
    expected[0:10, 22:42] = 0.4
    expected[12:22, 11:31] = [0, 0.5, 1]
    np.testing.assert_allclose(sheet.pixels, expected, rtol=1e-6)


def test_texts_stand_above_images():
    sheet = Sheet((10, 20), rows=2, columns=2, gap=0.2)
    sheet.place(torch.zeros(3, 10, 20), 1, 1, "0.123")
    sheet.write("trained", 0, 1)
    axes = Figure().subplots()
    sheet.draw(axes)
    placed = {text.get_text(): text.get_position() for text in axes.texts}
    assert placed == {"0.123": (22 + 10, 12 - 0.2), "trained": (22, -0.2)}
    assert len(axes.images) == 1
