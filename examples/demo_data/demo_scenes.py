"""What the demo data show: one textured object in front of backdrops, drawn at any time of a clip.

What the object *is* (`APPEARANCES`: a shape with a texture) shows in every single frame. How it *moves* (`MOTIONS`)
shows only over time: each motion lets one of position, angle and size run forwards or backwards on a circle from a
random start, so at any instant all motions look the same. Everything else is random whatever the label, and changes
within two seconds: tints, lighting, and the backdrops, which have the same textures and small objects of the same
shapes. Two distant frames of one clip share little but the object.
"""

from math import cos, sin

import numpy as np


CLIP_SECONDS = 2.2  # a little more than the window of distant sampling, 2.13 s

# How hard it is: linear probes of the appearance on single frames (chance 12.5 %) reached 15 % on raw pixels, 40 % on
# histograms of colours and gradients, and 29 % on a small untrained ViT, which 380 steps of 64 pairs took to 53 %.
# With stronger tints and backdrops those few steps learn nothing.
BRIGHTNESS = (0.4, 0.6)
TINT = 0.15  # largest deviation of a colour channel from grey
OBJECT_CONTRAST = (0.5, 0.8)
SMALL_OBJECTS = 4  # on each backdrop
SMALL_CONTRAST = 0.3
BACKDROP_CONTRAST = (0.0, 0.25)
BACKDROP_PERIOD = (16, 40)  # of its texture, in pixels
BACKDROP_SECONDS = 0.7  # a backdrop lasts so long, and fades into the next one in the last third
SCROLL_MARGIN = 32  # pixels that a backdrop is larger than the frame, to scroll within

# Shapes map polar coordinates (radius in units of the object's, angle in radians) to a signed distance of about one
# unit per object radius, positive inside. Textures map coordinates in periods to a pattern, dark below 0, light above.
SHAPES = {
    "disc": lambda radius, angle: 0.9 - radius,
    "square": lambda radius, angle: 0.85 - radius * np.maximum(abs(np.cos(angle)), abs(np.sin(angle))),
    "triangle": lambda radius, angle: 0.55 - radius * np.cos((angle % (2 * np.pi / 3)) - np.pi / 3),
    "star": lambda radius, angle: 0.72 + 0.28 * (abs(angle * 5 / np.pi % 2 - 1) * 2 - 1) - radius,
    "cross": lambda radius, angle: np.maximum(
        np.minimum(0.33 - abs(radius * np.cos(angle)), 0.95 - abs(radius * np.sin(angle))),
        np.minimum(0.33 - abs(radius * np.sin(angle)), 0.95 - abs(radius * np.cos(angle))),
    ),
    "ring": lambda radius, angle: 0.25 - abs(radius - 0.72),
    "moon": lambda radius, angle: np.minimum(
        0.95 - radius, np.hypot(radius * np.cos(angle) - 0.5, radius * np.sin(angle)) - 0.6
    ),
    "bar": lambda radius, angle: np.minimum(0.45 - abs(radius * np.sin(angle)), 1.0 - abs(radius * np.cos(angle))),
}


def wave(phase):
    """Cosine of `phase` in periods."""
    return np.cos(2 * np.pi * phase)


TEXTURES = {
    "checked": lambda u, v: wave(u / 1.4) * wave(v / 1.4),
    "dotted": lambda u, v: wave(u) + wave(v) - 0.6,
    "striped": lambda u, v: wave(u),
    "netted": lambda u, v: np.maximum(wave(u / 1.3), wave(v / 1.3)) - 0.75,
    "zigzag": lambda u, v: wave(u + abs(v / 1.5 % 2 - 1)),
    "blotched": lambda u, v: wave(u / 2) + wave(v / 2.3 + 0.4 * wave(u / 3)) + wave((u + v) / 1.9),
    "ringed": lambda u, v: wave(np.hypot(u, v)),
    "plain": lambda u, v: u / 4,
}
APPEARANCES = {
    "checked_disc": ("disc", "checked"),
    "dotted_square": ("square", "dotted"),
    "striped_triangle": ("triangle", "striped"),
    "ringed_star": ("star", "ringed"),
    "zigzag_cross": ("cross", "zigzag"),
    "blotched_ring": ("ring", "blotched"),
    "plain_moon": ("moon", "plain"),
    "netted_bar": ("bar", "netted"),
}
# The property that runs, and which way. y points down, so a growing angle turns clockwise on the screen.
MOTIONS = {
    "moving_left": ("position", -1),
    "moving_right": ("position", 1),
    "turning_anticlockwise": ("angle", -1),
    "turning_clockwise": ("angle", 1),
    "shrinking": ("size", -1),
    "growing": ("size", 1),
}
SPEEDS = {"position": (0.3, 0.5), "angle": (0.17, 0.3), "size": (0.5, 0.8)}  # turns of the circle per second


def pick(random, options):
    return options[random.integers(len(options))]


def random_palette(random, contrast):
    """Two colours, dark and light, (2, 3) in 0..1, whose brightness differs by `contrast`."""
    brightness = random.uniform(*BRIGHTNESS) + np.array([-contrast / 2, contrast / 2])
    tint = random.uniform(-TINT, TINT, (2, 3))
    return np.clip(brightness[:, None] + tint - tint.mean(axis=1, keepdims=True), 0, 1).astype(np.float32)


def turn(x, y, angle):
    return x * cos(angle) + y * sin(angle), y * cos(angle) - x * sin(angle)


def paint(texture, u, v, palette):
    """Colours, (3, H, W), of a texture at coordinates in periods."""
    share = np.clip(0.5 + 3 * TEXTURES[texture](u, v), 0, 1)
    first, second = palette[:, :, None, None]
    return first + share * (second - first)


def paste_object(canvas, shape, texture, palette, place, period, shift):
    """Draws an object onto `canvas` (3, H, W). It is cut off at top and bottom, and wraps around left and right.

    `place` is its centre's x and y and its radius in pixels, and its angle in radians; `period` of the texture is in
    pixels, its `shift` in periods.
    """
    height, width = canvas.shape[1:]
    # Python's numbers, unlike NumPy's, leave float32 arrays at float32, which is twice as fast.
    centre_x, centre_y, radius, angle, period = (float(number) for number in (*place, period))
    shift = [float(number) for number in shift]
    reach = int(min(1.25 * radius + 1, width // 2 - 1))
    rows = np.arange(max(0, int(centre_y) - reach), min(height, int(centre_y) + reach + 1))
    columns = np.arange(int(centre_x) - reach, int(centre_x) + reach + 1)
    x, y = turn((columns - centre_x).astype(np.float32), (rows - centre_y).astype(np.float32)[:, None], angle)
    colours = paint(texture, x / period - shift[0], y / period - shift[1], palette)
    distance = SHAPES[shape](np.hypot(x, y) / radius, np.arctan2(y, x))
    share = np.clip(0.5 + distance * radius, 0, 1)
    window = np.s_[:, rows[:, None], columns % width]
    canvas[window] += share * (colours - canvas[window])


def draw_backdrop(random, width, height):
    """A softly textured ground with a few small objects, (3, H, W) in 0..1."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u, v = turn(x, y, random.uniform(0, 2 * np.pi))
    period = random.uniform(*BACKDROP_PERIOD)
    shift = random.uniform(0, 9, 2).astype(np.float32)
    palette = random_palette(random, random.uniform(*BACKDROP_CONTRAST))
    canvas = paint(pick(random, list(TEXTURES)), u / period - shift[0], v / period - shift[1], palette)
    for _ in range(SMALL_OBJECTS):
        place = random.uniform((0, 0, 6, 0), (width, height, 11, 2 * np.pi))
        shape, texture = pick(random, list(SHAPES)), pick(random, list(TEXTURES))
        paste_object(canvas, shape, texture, random_palette(random, SMALL_CONTRAST), place, period=8, shift=(0, 0))
    return canvas


class Scene:
    """One object of an appearance in one motion; `draw(seconds)` gives the frame at that time."""

    def __init__(self, random, appearance, motion, width, height):
        self.shape, self.texture = APPEARANCES[appearance]
        self.running, direction = MOTIONS[motion]
        self.width, self.height = width, height
        self.speed = direction * random.uniform(*SPEEDS[self.running])
        self.start = {name: random.uniform() for name in SPEEDS}
        self.centre_y = random.uniform(0.4, 0.6) * height
        self.periods = random.uniform(3.2, 4.5)  # of the texture, over the object's diameter
        self.texture_shift = random.uniform(-1.5, 1.5, 2)
        self.wobble = random.uniform(0, 1, 5)
        self.palettes = [random_palette(random, random.uniform(*OBJECT_CONTRAST)) for _ in range(2)]
        if random.random() < 0.5:
            self.palettes = [palette[::-1] for palette in self.palettes]
        number = int(np.ceil(CLIP_SECONDS / BACKDROP_SECONDS)) + 2
        size = (width + SCROLL_MARGIN, height + SCROLL_MARGIN)
        self.backdrops = [draw_backdrop(random, *size) for _ in range(number)]
        self.backdrop_start = random.uniform()
        self.scrolls = random.uniform(-1, 1, (number, 2))  # direction and speed, per backdrop

    def place(self, seconds):
        """Where the object is: centre x and y and radius in pixels, angle in radians."""
        circle = dict(self.start)
        circle[self.running] += self.speed * seconds
        sway = wave(0.6 * seconds + self.wobble) - wave(self.wobble)
        x = (circle["position"] % 1) * self.width + 3 * sway[0]
        y = self.centre_y + 5 * sway[1]
        angle = 2 * np.pi * circle["angle"] + 0.15 * sway[2]
        radius = min(self.width, self.height) * 0.25 * 1.8 ** (circle["size"] % 1) * 1.04 ** sway[3]
        return x, y, radius, angle

    def backdrop(self, seconds):
        """What is behind the object, (3, H, W) in 0..1."""
        position = self.backdrop_start + seconds / BACKDROP_SECONDS
        index, share = int(position), max(0.0, 3 * (position % 1) - 2)
        views = []
        for i in (index, index + 1):
            across = 0.5 + 0.5 * self.scrolls[i] * np.clip(position - i - 0.5, -1, 1)
            left, top = (SCROLL_MARGIN * across).astype(int)
            views.append(self.backdrops[i][:, top : top + self.height, left : left + self.width])
        return views[0] + share * (views[1] - views[0])

    def draw(self, seconds):
        """The frame, (H, W, 3) uint8."""
        frame = self.backdrop(seconds)
        light = 0.5 - 0.5 * wave(0.45 * seconds + self.wobble[4])
        palette = self.palettes[0] + np.float32(light) * (self.palettes[1] - self.palettes[0])
        place = self.place(seconds)
        period = 2 * place[2] / self.periods
        paste_object(frame, self.shape, self.texture, palette, place, period, self.texture_shift)
        brightness = 0.85 + 0.15 * float(wave(0.8 * seconds + self.wobble[0]))
        return np.ascontiguousarray((frame * (255 * brightness)).astype(np.uint8).transpose(1, 2, 0))
