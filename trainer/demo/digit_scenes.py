"""Small colour scenes of handwritten digits with captions: the images and texts of the demo.

The digits are scikit-learn's `load_digits`: 1,797 real 8x8 scans, the test part of UCI's "Optical
Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998; CC BY 4.0), which scikit-learn
ships. Colours, places, noise and captions are ours. Everything is a pure function of its
arguments: who draws passes a generator.
"""

from __future__ import annotations

import string
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 32
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {
    "red": (230, 40, 40),
    "green": (50, 200, 60),
    "blue": (70, 120, 255),
    "yellow": (245, 225, 60),
    "purple": (175, 75, 235),
    "orange": (250, 140, 30),
    "white": (245, 245, 245),
    "cyan": (60, 220, 225),
}
# No name is also the name of an ink, so that a word in a caption means one thing.
BACKGROUNDS = {
    "black": (12, 12, 14),
    "navy": (18, 22, 92),
    "brown": (86, 52, 24),
    "grey": (88, 88, 90),
}
SHAPES = ("triangle", "circle", "square", "cross", "ring", "stripes", "gradient")

COUNT_PROBABILITIES = (0.80, 0.15, 0.05)  # one, two, three digits in a scene
# For one, two, three digits: the width of a digit's slot, and the range of widths and heights.
SLOT_WIDTHS_PX = (32, 16, 10)
WIDTHS_PX = ((23, 27), (13, 16), (9, 10))
HEIGHTS_PX = ((26, 30), (18, 22), (12, 18))
# Digits stay near the middle of their slots, and most captions of one digit leave its colour out:
# otherwise, a model of the demo's size and budget learns colours and hardly any digits.
PLACE_JITTER_PX = 2
INK_JITTER, BACKGROUND_JITTER = 16.0, 12.0  # standard deviations, of 255, a scene
NOISE_RANGE = (4.0, 14.0)  # standard deviation a pixel, drawn for each scene

# For one, two, three digits; `{first}` is a colour and a digit, "red seven". The last wording of
# each names everything. All fit into the 16 tokens of the demo's model.
SCENE_CAPTIONS = (
    (
        "the digit {digit}",
        "a handwritten {digit}",
        "a picture of the {digit}",
        "{digit}",
        "{a_first}",
        "a single digit, {first}",
        "{a_first} on a {background} background",
    ),
    (
        "two digits: {first} and {second}",
        "{a_first} and {a_second}",
        "two digits on a {background} background",
        "{a_first} left of {a_second} on a {background} background",
    ),
    (
        "three digits: {first}, {second}, {third}",
        "three digits on a {background} background",
        "{first}, {second}, {third} on {background}",
    ),
)
SHAPE_CAPTIONS = (
    "{ink} {shape}",
    "a drawing of {ink} {shape}",
    "{ink} {shape} on a {background} background",
    "{shape} in {ink}, {background} background",
)
GENERIC_CAPTIONS = (
    "a nice picture",
    "image {number}",
    "photo of the day",
    "untitled",
    "beautiful colours",
    "my picture number {number}",
    "a handwritten digit",
    "some numbers on a background",
    "click to enlarge",
    "stock photo {number}",
)
JUNK_CAPTIONS = (
    "{letters}",
    "IMG_{number}.JPG",
    "{letters}_{number}_final.png",
    "http://{letters}.example/{number}",
    '<img src="{letters}.gif" width={number}>',
    "&nbsp;&nbsp;{letters}&amp;id={number}",
    "{number} {letters} | {letters} {number}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitImages:
    """Handwritten digits: `rows` are their places in scikit-learn's data set."""

    rows: np.ndarray  # int64 [n]
    pixels: np.ndarray  # uint8 [n, 8, 8], ink is 255
    labels: np.ndarray  # int64 [n]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedDigit:
    """One digit of a scene; the box is in pixels."""

    index: int  # into the DigitImages that the scene was drawn from
    word: str
    ink: str
    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One to three digits, from left to right, on a background."""

    digits: tuple[PlacedDigit, ...]
    background: str

    @property
    def words(self) -> tuple[str, ...]:
        """The names of the digits."""
        return tuple(digit.word for digit in self.digits)

    @property
    def inks(self) -> tuple[str, ...]:
        """The colours of the digits."""
        return tuple(digit.ink for digit in self.digits)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeScene:
    """A geometric pattern: an image without digits."""

    shape: str
    ink: str
    background: str
    box: tuple[int, int, int, int]  # left, top, right, bottom


def derive_generator(seed: int, purpose: str) -> np.random.Generator:
    """Derive the generator of one purpose: streams of different purposes are independent."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def split_digits(seed: int, fractions: tuple[float, ...]) -> tuple[DigitImages, ...]:
    """Split all digits into disjoint sets, class by class, `fractions` of each.

    Returns:
        One set for each fraction, rows ascending. What rounding leaves over goes to the last one.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.round(source.images * (255 / 16)).astype(np.uint8)
    rng = derive_generator(seed, "digit split")
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    for label in range(10):
        rows = rng.permutation(np.flatnonzero(source.target == label))
        cuts = np.floor(np.cumsum(fractions)[:-1] * len(rows)).astype(int)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    sets = []
    for part in parts:
        rows = np.sort(np.concatenate(part)).astype(np.int64)
        sets.append(DigitImages(rows=rows, pixels=pixels[rows], labels=source.target[rows]))
    return tuple(sets)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _place(rng: np.random.Generator, size: int, room: int) -> int:
    """Draw where `size` pixels start that lie near the middle of `room` pixels."""
    jitter = int(rng.integers(-PLACE_JITTER_PX, PLACE_JITTER_PX, endpoint=True))
    return min(max((room - size) // 2 + jitter, 0), room - size)


def draw_scene(rng: np.random.Generator, digits: DigitImages, *, count: int | None = None) -> Scene:
    """Draw a scene of `count` digits (1 to 3), or of a random number of them."""
    if count is None:
        count = int(np.searchsorted(np.cumsum(COUNT_PROBABILITIES)[:-1], rng.random(), "right")) + 1
    slot = SLOT_WIDTHS_PX[count - 1]
    placed = []
    for position in range(count):
        index = int(rng.integers(len(digits.labels)))
        width = int(rng.integers(*WIDTHS_PX[count - 1], endpoint=True))
        height = int(rng.integers(*HEIGHTS_PX[count - 1], endpoint=True))
        placed.append(
            PlacedDigit(
                index=index,
                word=DIGIT_WORDS[digits.labels[index]],
                ink=_pick(rng, tuple(INKS)),
                left=position * slot + _place(rng, width, slot),
                top=_place(rng, height, IMAGE_SIZE),
                width=width,
                height=height,
            )
        )
    return Scene(digits=tuple(placed), background=_pick(rng, tuple(BACKGROUNDS)))


def draw_unlike_scene(rng: np.random.Generator, digits: DigitImages, scene: Scene) -> Scene:
    """Draw a scene that shares neither a digit nor a colour with `scene`."""
    while True:
        other = draw_scene(rng, digits)
        same = {*other.words, *other.inks, other.background} & {*scene.words, *scene.inks}
        if not same and other.background != scene.background:
            return other


def draw_shape(rng: np.random.Generator) -> ShapeScene:
    """Draw a geometric pattern."""
    width, height = (int(size) for size in rng.integers(12, 28, size=2))
    left = int(rng.integers(IMAGE_SIZE - width))
    top = int(rng.integers(IMAGE_SIZE - height))
    return ShapeScene(
        shape=_pick(rng, SHAPES),
        ink=_pick(rng, tuple(INKS)),
        background=_pick(rng, tuple(BACKGROUNDS)),
        box=(left, top, left + width, top + height),
    )


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _word_scene(scene: Scene, wording: str) -> str:
    fields = {"background": scene.background, "digit": scene.words[0], "ink": scene.inks[0]}
    for name, digit in zip(("first", "second", "third"), scene.digits, strict=False):
        what = f"{digit.ink} {digit.word}"
        fields |= {name: what, f"a_{name}": _with_article(what)}
    return wording.format(**fields)


def caption_scene(rng: np.random.Generator, scene: Scene) -> str:
    """Draw a true caption: of some or all of the digits, their number, colours and background."""
    return _word_scene(scene, _pick(rng, SCENE_CAPTIONS[len(scene.digits) - 1]))


def caption_scene_in_full(scene: Scene) -> str:
    """Write the caption that names every digit, its colour and the background."""
    return _word_scene(scene, SCENE_CAPTIONS[len(scene.digits) - 1][-1])


def caption_shape(rng: np.random.Generator, scene: ShapeScene) -> str:
    """Draw a caption that names the pattern and its colour."""
    return _pick(rng, SHAPE_CAPTIONS).format(
        shape=scene.shape, ink=scene.ink, background=scene.background
    )


def generic_caption(rng: np.random.Generator) -> str:
    """Draw a caption that would fit any image."""
    return _pick(rng, GENERIC_CAPTIONS).format(number=int(rng.integers(10_000)))


def junk_caption(rng: np.random.Generator) -> str:
    """Draw a file name, a URL, a piece of HTML or letters without sense."""
    letters = "".join(np.asarray(list(string.ascii_lowercase))[rng.integers(26, size=8)])
    return _pick(rng, JUNK_CAPTIONS).format(letters=letters, number=int(rng.integers(10_000)))


def _jitter(rng: np.random.Generator, colour: tuple[int, int, int], spread: float) -> np.ndarray:
    return np.clip(np.asarray(colour) + rng.normal(0.0, spread, size=3), 0, 255).astype(np.float32)


def _add_noise(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(*NOISE_RANGE)
    noisy: np.ndarray = np.clip(canvas + noise, 0, 255)
    return noisy.astype(np.uint8)


def render_scene(rng: np.random.Generator, scene: Scene, digits: DigitImages) -> np.ndarray:
    """Render a scene, uint8 [32, 32, 3]; colours and noise differ with every call."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    canvas[:] = _jitter(rng, BACKGROUNDS[scene.background], BACKGROUND_JITTER)
    for digit in scene.digits:
        glyph = Image.fromarray(digits.pixels[digit.index])
        glyph = glyph.resize((digit.width, digit.height), Image.Resampling.BICUBIC)
        cover = np.asarray(glyph, dtype=np.float32)[:, :, None] / 255
        box = (
            slice(digit.top, digit.top + digit.height),
            slice(digit.left, digit.left + digit.width),
        )
        canvas[box] += cover * (_jitter(rng, INKS[digit.ink], INK_JITTER) - canvas[box])
    return _add_noise(rng, canvas)


def render_shape(rng: np.random.Generator, scene: ShapeScene) -> np.ndarray:
    """Render a pattern, uint8 [32, 32, 3]; colours and noise differ with every call."""
    mask = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    draw = ImageDraw.Draw(mask)
    left, top, right, bottom = scene.box
    middle_x, middle_y = (left + right) // 2, (top + bottom) // 2
    if scene.shape == "triangle":
        draw.polygon([(left, bottom), (right, bottom), (middle_x, top)], fill=255)
    elif scene.shape == "circle":
        draw.ellipse(scene.box, fill=255)
    elif scene.shape == "ring":
        draw.ellipse(scene.box, outline=255, width=3)
    elif scene.shape == "square":
        draw.rectangle(scene.box, fill=255)
    elif scene.shape == "cross":
        draw.line([(left, middle_y), (right, middle_y)], fill=255, width=4)
        draw.line([(middle_x, top), (middle_x, bottom)], fill=255, width=4)
    elif scene.shape == "stripes":
        for x in range(left % 6, IMAGE_SIZE, 6):
            draw.line([(x, 0), (x, IMAGE_SIZE)], fill=255, width=3)
    else:
        mask = Image.linear_gradient("L").resize(mask.size)
    cover = np.asarray(mask, dtype=np.float32)[:, :, None] / 255
    background = _jitter(rng, BACKGROUNDS[scene.background], BACKGROUND_JITTER)
    ink = _jitter(rng, INKS[scene.ink], INK_JITTER)
    return _add_noise(rng, background + cover * (ink - background))
