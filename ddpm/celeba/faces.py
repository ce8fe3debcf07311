r"""Drawn faces: a data set that needs no download, in CelebA's attribute names.

    python -m ddpm.celeba.faces FOLDER --count 8000      writes what `train.py --data drawn` trains on

A face is drawn by Pillow four times too large and then averaged down, so that its edges are soft. Each attribute of a
caption is drawn large, as in a caricature, so that it can still be seen at 64 x 64 and behind a VAE. Everything that
the attributes leave open (background, skin within its range, eyes, clothes, position) follows from the seed. Points
are complex numbers in units of one sixty-fourth of the picture, x to the right and y down: one complex multiplication
tilts and scales a shape, one addition moves it."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from ddpm.celeba.captions import ATTRIBUTES, FACIAL_HAIR, consistent
from ddpm.celeba.lists import TEST, TRAIN, VALID
from ddpm.tools.command import Parser, exit_code
from ddpm.tools.errors import UserError
from ddpm.tools.files import new_folder

VISIBLE_NAMES = """
    Bald Black_Hair Blond_Hair Brown_Hair Gray_Hair Bangs Straight_Hair Wavy_Hair No_Beard Mustache Goatee
    Bushy_Eyebrows Pale_Skin Rosy_Cheeks Smiling Mouth_Slightly_Open Eyeglasses Wearing_Earrings Wearing_Hat
    Wearing_Lipstick Wearing_Necklace Wearing_Necktie Male Young
"""
VISIBLE: tuple[str, ...] = tuple(VISIBLE_NAMES.split())
PER_ROW = 4  # neighbours that share one row of attributes, and so one caption to embed
SUPERSAMPLING = 4

Colour = tuple[int, ...]  # red, green, blue and perhaps alpha, 0..255
Seed = int | Sequence[int]

WHITE = (255, 255, 255)
INK = (44, 34, 48)
PALETTE = {  # the seed picks one of each, in this order
    "background": ("#7cc6c3", "#f2a391", "#a8a4e0", "#8fc1e8", "#f0b7c6", "#9fd0a5", "#6f9fc8", "#e7c9a9"),
    "cloth": ("#e4574c", "#3f6fb5", "#2f8f83", "#8756a8", "#f08a3c", "#d84f86", "#4a4f7c", "#f4f1ea"),
    "suit": ("#2d3550", "#3b3f46", "#4d3f4a", "#27414f"),
    "tie": ("#d0312d", "#2456a6", "#1e8a5a", "#e08a1e", "#7a3b93"),
    "hat": ("#d8433b", "#2f62a8", "#f2b233", "#2f8f6b", "#7a4a9a", "#3a3d49"),
    "iris": ("#5b3a24", "#3d7a4c", "#3573b5", "#7a5a2c", "#44525f"),
    "lipstick": ("#d3123f", "#c2155d", "#e0282e", "#a3123f"),
    "pale skin": ("#ffe9dc", "#fde6da", "#fcebe4"),
    "skin": ("#f3c096", "#e5a97b", "#cf9064", "#b67a50", "#9c6442"),
}
HAIRS = {  # in light, in shadow
    "Black_Hair": ("#2d2936", "#1a1722"),
    "Blond_Hair": ("#f3cf6b", "#d29d48"),
    "Brown_Hair": ("#6e3c1c", "#4e2813"),
    "Gray_Hair": ("#b9bcc6", "#8e92a2"),
}
RED_HAIR = ("#c0552b", "#933c20")  # where no colour is stated
OF_BALD = ("Black_Hair", "Brown_Hair", "Gray_Hair")  # brows and beard


def rgb(text: str) -> Colour:
    r"""'#rrggbb' as (red, green, blue)."""
    return tuple(bytes.fromhex(text[1:]))


def mix(a: Colour, b: Colour, fraction: float) -> Colour:
    r"""The colour at `fraction` (0..1) of the way from `a` to `b`."""
    return tuple(round(p + fraction * (q - p)) for p, q in zip(a, b, strict=True))


@cache
def spline(n: int, steps: int = 5) -> np.ndarray:
    r"""Matrix (n * steps, n) that draws a closed Catmull-Rom curve through n points."""
    s = np.arange(steps) / steps
    weights = (-s + 2 * s**2 - s**3, 2 - 5 * s**2 + 3 * s**3, s + 4 * s**2 - 3 * s**3, s**3 - s**2)
    matrix = np.zeros((n, steps, n))
    for point in range(n):
        for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
            matrix[point, :, (point + offset) % n] += weight / 2
    return matrix.reshape(n * steps, n)


CIRCLE = np.exp(2j * np.pi * np.arange(24) / 24)
ALONG = np.linspace(0, 1, 9)
BULGE = 4j * ALONG * (1 - ALONG)  # a parabola: i in the middle, which is down


def mirrored(*right: complex) -> list[complex]:
    r"""A closed outline from its right half, top to bottom; points on the axis are not doubled."""
    return [*right, *(-p.conjugate() for p in reversed(right) if p.real)]


@dataclass
class Pen:
    r"""Draws shapes given in the picture's units: a point z comes to lie at pixel origin + turn * z."""

    opaque: ImageDraw.ImageDraw
    glaze: ImageDraw.ImageDraw  # for colours with alpha; slower
    origin: complex
    turn: complex
    sides: tuple[int, ...] = (1,)  # -1 draws the mirror image

    def moved(self, by: complex) -> "Pen":
        return replace(self, origin=self.origin + self.turn * by)

    def both_sides(self) -> "Pen":
        return replace(self, sides=(-1, 1))

    def pixels(self, points: ArrayLike, side: int = 1) -> list[float]:
        r"""x, y, x, y, ... of points in the picture's units."""
        points = np.asarray(points, complex)
        return (self.origin + self.turn * (points if side > 0 else -points.conj())).view(float).tolist()

    def polygon(self, points: ArrayLike, fill: Colour):
        draw = self.opaque if len(fill) == 3 else self.glaze
        for side in self.sides:
            draw.polygon(self.pixels(points, side), fill=fill)

    def blob(self, points: Sequence[complex], fill: Colour):
        r"""A smooth closed shape through the points."""
        self.polygon(spline(len(points)) @ np.asarray(points), fill)

    def ellipse(self, centre: complex, rx: float, ry: float, fill: Colour):
        self.polygon(centre + rx * CIRCLE.real + 1j * ry * CIRCLE.imag, fill)

    def crescent(self, a: complex, b: complex, bend: float, thick: float, fill: Colour):
        r"""A tapered stroke from a to b whose middle hangs `bend` below the straight line."""
        line = a + (b - a) * ALONG
        upper = line + (bend - thick / 2) * BULGE
        lower = line + (bend + thick / 2) * BULGE
        self.polygon(np.concatenate([upper, lower[::-1]]), fill)

    def stroke(self, points: ArrayLike, width: float, fill: Colour):
        pixels = max(1, round(width * abs(self.turn)))
        for side in self.sides:
            self.opaque.line(self.pixels(points, side), fill=fill, width=pixels, joint="curve")


class Look:
    r"""What one face looks like: the attributes decide their part, and the seed everything else."""

    def __init__(self, has: Mapping[str, bool], seed: Seed):
        chance = np.random.default_rng(seed).random(24).tolist()
        self.has = has
        self.male = has["Male"]
        self.young = has["Young"]
        self.hat = has["Wearing_Hat"]
        self.bald = has["Bald"]
        self.bangs = has["Bangs"]
        self.cut = "wavy" if has["Wavy_Hair"] else "straight" if has["Straight_Hair"] else "neat"
        self.paint = {
            name: rgb(colours[int(chance.pop() * len(colours))]) for name, colours in PALETTE.items()
        }
        self.skin = self.paint["pale skin" if has["Pale_Skin"] else "skin"]
        self.shade = mix(self.skin, (150, 50, 60), 0.24)
        self.style = chance.pop()
        self.hat_style = chance.pop()
        self.neckline = chance.pop()
        self.side = 1 if chance.pop() < 0.5 else -1
        self.place = complex(32 + 2.4 * (chance.pop() - 0.5), 30.4 + 1.6 * (chance.pop() - 0.5))
        self.turn = (0.97 + 0.06 * chance.pop()) * np.exp(0.14j * (chance.pop() - 0.5))
        self.gaze = complex(1.8 * (chance.pop() - 0.5), 1.0 * (chance.pop() - 0.5))
        of_bald = HAIRS[OF_BALD[int(3 * chance.pop())]]
        unstated = of_bald if self.bald else RED_HAIR
        light, dark = next((HAIRS[name] for name in HAIRS if has[name]), unstated)
        tint = chance.pop() * 0.1
        self.hair = mix(rgb(light), INK, tint)
        self.hair_dark = mix(rgb(dark), INK, tint)
        self.hair_light = mix(self.hair, WHITE, 0.32)


def draw_hair_behind(pen: Pen, look: Look):
    r"""Hair that hangs behind face and neck: a woman's, by cut; a man's only when straight or wavy."""
    if look.bald:
        return
    both = pen.both_sides()
    if look.male:
        if look.cut != "neat":
            pen.blob(mirrored(-21j, 11 - 19j, 16.5 - 9j, 16.8 + 3j, 14.5 + 12j, 6 + 15j), look.hair_dark)
    elif look.cut == "straight":
        pen.polygon(mirrored(-19j, 11 - 18j, 16.6 - 8j, 17.6 + 8j, 18.6 + 29j, 8 + 29j), look.hair_dark)
        both.polygon([16.6 - 8j, 18.6 + 29j, 13.5 + 29j, 12 - 4j], look.hair)
    elif look.cut == "wavy":
        for y, x, r in ((-9, 12.5, 7), (-1, 15.5, 6), (7, 15, 6.6), (15, 16.5, 6.6), (22.5, 15, 6.8)):
            both.ellipse(x + 1j * y, r, r * 0.95, look.hair_dark)
            both.ellipse(x + 0.6 + 1j * (y - 1), r * 0.78, r * 0.7, look.hair)
        pen.polygon([-12, 12, 12 + 24j, -12 + 24j], look.hair_dark)
    elif look.style < 0.5 and not look.hat:
        pen.ellipse(-22.2j, 6.6, 6, look.hair_dark)
        pen.ellipse(-22.8j, 5.6, 4.9, look.hair)
        pen.crescent(-3.2 - 24j, 3.2 - 24j, -1.4, 1.4, look.hair_light)
    else:
        pen.blob(mirrored(-21j, 11 - 19j, 17 - 9j, 18.4 + 4j, 17 + 15j, 8 + 16.5j), look.hair_dark)
        both.blob([14 - 12j, 18 - 4j, 17.4 + 14j, 12.6 + 15j, 12 - 3j], look.hair)


def draw_clothes(pen: Pen, look: Look):
    r"""Shoulders, neck and a neckline; with a necktie a suit, a white shirt and the tie."""
    tie = look.has["Wearing_Necktie"]
    wide = 25 if look.male else 20.5
    neck = 7.2 if look.male else 5.4
    cloth = look.paint["suit" if tie else "cloth"]
    pen.blob(mirrored(20.5j, neck + 20.8j, wide - 6 + 23.5j, wide + 27j, wide + 2.5 + 40j), cloth)
    if tie:
        pen.polygon([-neck - 1.5 + 20.5j, neck + 1.5 + 20.5j, 5 + 40j, -5 + 40j], WHITE)
    elif look.neckline < 0.4:
        pen.crescent(-neck - 3 + 21.6j, neck + 3 + 21.6j, 5, 10.5, mix(cloth, WHITE, 0.45))
    depth = 27 if look.neckline > 0.7 else 24.6
    pen.polygon(mirrored(8j, neck + 8j, neck + 21j, 3.4 + (depth - 1) * 1j, depth * 1j), look.skin)
    pen.blob(mirrored(8j, neck + 10j, neck + 17j, 3 + 21.6j, 22.2j), look.shade)
    if tie:
        colour = look.paint["tie"]
        both = pen.both_sides()
        both.polygon([neck + 0.5 + 20j, neck + 4 + 22j, 5 + 40j], mix(cloth, WHITE, 0.16))
        both.polygon([neck + 19j, neck + 2 + 21.5j, 4.5 + 27j, 23.4j], WHITE)
        pen.polygon([-2.2 + 23.4j, 2.2 + 23.4j, 3.6 + 36j, -3.6 + 36j], colour)
        pen.polygon([-2.7 + 22.6j, 2.7 + 22.6j, 1.7 + 26.2j, -1.7 + 26.2j], mix(colour, INK, 0.3))
        pen.polygon([-1.6 + 28.5j, 2.4 + 26.6j, 2.6 + 28.2j, -1.9 + 30.4j], mix(colour, WHITE, 0.5))


def draw_necklace(pen: Pen, look: Look):
    r"""A string of pearls, or a chain with a pendant."""
    x = np.linspace(-1, 1, 9)
    beads = (x * 8.2 + 1j * (25.6 - 4.6 * x**2)).tolist()
    if look.style < 0.5:
        for bead in beads:
            pen.ellipse(bead + 0.3j, 1.35, 1.35, (150, 120, 140))
            pen.ellipse(bead, 1.1, 1.1, (255, 250, 240))
    else:
        pen.stroke(beads, 1.1, (240, 180, 30))
        pen.ellipse(27.4j, 2.1, 2.4, (170, 110, 10))
        pen.ellipse(27.2j, 1.6, 1.9, (255, 214, 70))


def draw_head(pen: Pen, look: Look):
    r"""Ears, the face in shadow and, a little smaller, the face in light."""
    man = (14.2 - 6j, 14.2 + 3j, 13 + 11.5j, 7.6 + 18.2j, 19.6j)
    woman = (13.7 - 6j, 13.6 + 2.5j, 11 + 11j, 5.2 + 17.4j, 19.2j)
    outline = np.array(mirrored(-17.8j, 9.4 - 15.6j, *(man if look.male else woman)))
    both = pen.both_sides()
    both.ellipse(14 + 2.2j, 2.8, 3.7, look.shade)
    both.ellipse(14 + 1.8j, 2.0, 2.8, look.skin)
    pen.blob(outline, look.shade)
    pen.blob(outline * 0.955 - 0.3 - 0.5j, look.skin)
    if look.bald and not look.hat:
        pen.ellipse(-5 - 13j, 4.6, 2, mix(look.skin, WHITE, 0.5))


def draw_age(pen: Pen, look: Look):
    r"""Lines on the forehead, under the eyes and beside the mouth."""
    line = mix(look.shade, (90, 30, 40), 0.22)
    both = pen.both_sides()
    both.crescent(3.2 + 4.6j, 9.4 + 4.4j, 1.2, 1.0, line)
    both.crescent(4.2 + 6.6j, 7.4 + 12j, 0.1, 1.5, line)
    both.stroke([4.2 + 6.6j, 6.4 + 9j, 7.4 + 12j], 0.7, line)
    both.crescent(10.6 - 0.4j, 12.8 - 1.2j, 0, 0.8, line)
    if not (look.bangs or look.hat):
        pen.crescent(-6 - 9.6j, 6 - 9.6j, -0.7, 0.9, line)
        pen.crescent(-4.6 - 7.4j, 4.6 - 7.4j, -0.6, 0.9, line)


def draw_cheeks(pen: Pen, look: Look):
    both = pen.both_sides()
    both.ellipse(8.8 + 7.0j, 4.8, 4.0, (238, 44, 74, 100))
    both.ellipse(8.8 + 7.0j, 3.6, 2.9, (238, 44, 74, 105))


def draw_eyes(pen: Pen, look: Look):
    r"""White, iris, pupil, highlight and lid; a smile raises the lower lids, women have lashes."""
    rx = 2.9 if look.male else 3.2
    ry = (2.3 if look.male else 2.9) - (0 if look.young else 0.5)
    lid = 1.1 if look.male else 1.8
    for side in (-1, 1):
        eye = side * 6.1 + 0.6j
        pen.ellipse(eye, rx, ry, WHITE)
        pen.ellipse(eye, 2.0, min(2.1, ry), look.paint["iris"])
        pen.ellipse(eye, 1.1, 1.2, INK)
        pen.ellipse(eye - 0.7 - 0.8j, 0.75, 0.75, WHITE)  # light comes from the left
        pen.crescent(eye - rx - 0.4 + 0.2j, eye + rx + 0.4 + 0.2j, -ry, lid, INK)
        if look.has["Smiling"]:
            pen.crescent(eye - rx - 0.2 + 1j * ry, eye + rx + 0.2 + 1j * ry, -0.3, 1.9, look.skin)
    if not look.male:
        eye = 6.1 + 0.6j
        pen.both_sides().polygon([eye + 1.8 - 2.2j, eye + 4.9 - 2.6j, eye + 3.2 - 0.2j], INK)


def draw_brows(pen: Pen, look: Look):
    bushy = look.has["Bushy_Eyebrows"]
    thick = (4.2 if bushy else 1.6) - (0 if look.male else 0.3)
    colour = mix(look.hair_dark, INK, 0.7 if bushy else 0.3)
    height = -4.4j if look.male else -4.9j
    both = pen.both_sides()
    both.crescent(2.7 + height, 10 + height + 0.5j, -0.9 if look.male else -1.5, thick, colour)
    if bushy:
        both.crescent(1.8 + height, 7.6 + height - 0.4j, -0.3, thick, colour)


def draw_nose(pen: Pen, look: Look):
    size = 2.9 if look.male else 2.1
    pen.crescent(-size + 5.6j, size + 5.6j, 1.3, 1.7, mix(look.shade, (120, 30, 40), 0.18))
    pen.ellipse(-0.3 + 4.2j, 0.9, 1.3, mix(look.skin, WHITE, 0.35))


def draw_mouth(pen: Pen, look: Look):
    r"""Smiling or not, open or not: four mouths, in the lips' natural colour or in lipstick."""
    painted = look.has["Wearing_Lipstick"]
    smiling = look.has["Smiling"]
    lips = look.paint["lipstick"] if painted else mix(look.skin, (168, 52, 62), 0.5)
    full = 1.0 if painted else 0.0
    dark = (92, 20, 34)
    if smiling and look.has["Mouth_Slightly_Open"]:
        pen.crescent(-8.6 + 8.8j, 8.6 + 8.8j, 3.2, 7.2 + 1.6 * full, lips)
        pen.crescent(-7.8 + 9.2j, 7.8 + 9.2j, 3.2, 5.8, dark)
        pen.crescent(-7.2 + 9.4j, 7.2 + 9.4j, 1.7, 3.0, WHITE)
    elif smiling:
        pen.crescent(-7.6 + 8.8j, 7.6 + 8.8j, 4.2, 3.0 + 2 * full, lips)
        pen.crescent(-8.6 + 8.0j, 8.6 + 8.0j, 4.5, 2.4, dark)
    elif look.has["Mouth_Slightly_Open"]:
        pen.ellipse(11.8j, 3.9 + 0.3 * full, 3.1 + 0.5 * full, lips)
        pen.ellipse(11.8j, 2.9, 2.1, dark)
        pen.crescent(-2.4 + 10.8j, 2.4 + 10.8j, -0.1, 1.5, WHITE)
    else:
        pen.crescent(-4.4 + 11.3j, 4.4 + 11.3j, -0.4, 1.4 + 1.4 * full, lips)
        pen.crescent(-4.2 + 11.4j, 4.2 + 11.4j, 1.0, 2.0 + 1.2 * full, lips)
        pen.crescent(-4.7 + 11.3j, 4.7 + 11.3j, 0.35, 0.9, dark)


def draw_beard(pen: Pen, look: Look):
    r"""A mustache, a goatee, both; and where neither is stated and No_Beard is false, a full beard."""
    colour = mix(look.hair_dark, (50, 24, 20), 0.42)  # dark edge, light middle: seen on every skin
    if look.has["5_o_Clock_Shadow"]:
        pen.blob(mirrored(20j, 7.5 + 18.4j, 13 + 11.5j, 13.6 + 5j, 6.4 + 7.2j, 6.6j), (*look.hair_dark, 70))
    if not any(look.has[name] for name in FACIAL_HAIR):
        inner = (9.6 + 6.6j, 6.4 + 8.2j, 7.9j)
        pen.blob(mirrored(21.4j, 8.2 + 19.6j, 13.6 + 12j, 14.2 + 2j, 12.6 + 1.6j, *inner), colour)
        pen.blob(mirrored(20.6j, 6 + 19j, 9 + 14j, 5 + 16.4j, 16.6j), look.hair)
    if look.has["Goatee"]:
        pen.blob(mirrored(14.4j, 3.6 + 14.2j, 4.8 + 17j, 2.6 + 21.4j, 22.4j), colour)
        pen.blob(mirrored(15.6j, 2.2 + 15.8j, 2.6 + 18j, 19.8j), look.hair)
    if look.has["Mustache"]:
        for side in (-1, 1):
            tip = side * 7.6 + 10.6j
            pen.blob([side * 0.2 + 7.2j, side * 3.6 + 7j, tip, side * 4 + 11.2j, 10.2j], colour)
            pen.crescent(side * 0.4 + 8.3j, side * 6.8 + 10.3j, -0.4, 1.7, look.hair)


def draw_hair(pen: Pen, look: Look):
    r"""Hair before the face: the crown with its hairline (or bangs), locks and a highlight."""
    if look.bald:
        return
    quiff = (look.side * 4 - 1.6j) * (look.male and look.style < 0.5)
    crown = [-14.6 + 0j, -15.9 - 9j, -10 - 18.6j, -21j + quiff, 10 - 18.6j, 15.9 - 9j, 14.6 + 0j]
    part = 4.5 * look.side
    if look.bangs:
        line = [12.6 - 3.4j, 8 - 5.8j, 2.6 - 6.6j, -2.6 - 6.6j, -8 - 5.8j, -12.6 - 3.4j]
    elif look.male:
        line = [12.9 - 4j, 11.6 - 10j, 4 - 13j + quiff / 2, -4 - 13j + quiff / 2, -11.6 - 10j, -12.9 - 4j]
    else:
        line = [12.9 - 2j, 10.6 - 8.6j, part + 3.2 - 12.6j, part - 15.6j, part - 3.2 - 12.6j]
        line += [-10.6 - 8.6j, -12.9 - 2j]
    if look.cut == "wavy" and not look.hat:
        for curl in (-13 - 9j, -10.5 - 15j, -5 - 19j, 1.5 - 20j, 8 - 17.5j, 12.6 - 11.5j):
            pen.ellipse(curl, 4.6, 4.3, look.hair_dark)
            pen.ellipse(curl + 0.2 - 0.4j, 3.9, 3.6, look.hair)
    if look.hat:
        line = [0.93 * p.real + 1j * p.imag + 1.6j for p in line]
    pen.blob([*crown, *(p * 0.97 + 1.5j for p in line)], look.shade)
    pen.blob(crown + line, look.hair)
    draw_locks(pen, look)
    if not look.hat:
        pen.crescent(-9.5 - 14.4j, 7.5 - 16.4j, -2.4, 2.0, look.hair_light)


def draw_locks(pen: Pen, look: Look):
    r"""Strands by which the cuts and the bangs differ."""
    if look.bangs:
        for x in (-8.4, -4.2, 0, 4.2, 8.4):
            low = -6.4 + 0.022 * x * x
            pen.polygon([0.86 * x + (low - 5) * 1j, x + 0.7 + low * 1j, x - 0.7 + low * 1j], look.hair_dark)
    both = pen.both_sides()
    if look.male and look.cut == "straight":
        both.polygon([12.4 - 9j, 16 - 9j, 16.8 + 8j, 12.6 + 9.4j], look.hair)
        both.polygon([14.2 - 6j, 14.8 - 6j, 15.2 + 8j, 14.4 + 8j], look.hair_dark)
    if look.male and look.cut == "wavy":
        for y in (-5, 1.5, 7.5):
            both.ellipse(15 + 1j * y, 3.4, 3.6, look.hair_dark)
            both.ellipse(15.2 + 1j * (y - 0.5), 2.6, 2.7, look.hair)


def draw_earrings(pen: Pen, look: Look):
    r"""Hoops or drops, before the hair so that they always show."""
    gold = (255, 208, 60)
    lobe = 14.8 + 7.2j
    both = pen.both_sides()
    if look.neckline < 0.5:
        for side in (-1, 1):
            hoop = side * 14.8 + 7.2j + 1.6j + 2.5 * CIRCLE[[*range(24), 0]]
            pen.stroke(hoop + 0.3j, 1.9, (120, 66, 10))
            pen.stroke(hoop, 1.2, gold)
    else:
        both.ellipse(lobe, 1.1, 1.1, gold)
        both.blob([lobe, lobe + 2.3 + 3.8j, lobe + 6j, lobe - 2.3 + 3.8j], (16, 96, 120))
        both.blob([lobe + 0.8j, lobe + 1.6 + 3.6j, lobe + 5j, lobe - 1.6 + 3.6j], (60, 214, 208))


def draw_glasses(pen: Pen, look: Look):
    frame = (34, 30, 44) if look.neckline < 0.6 else (150, 30, 48)
    for side in (-1, 1):
        lens = side * 6.4 + 0.9j + 5.0 * CIRCLE.real + 4.4j * CIRCLE.imag
        pen.polygon(lens, (255, 255, 255, 50))
        pen.stroke(np.append(lens, lens[:2]), 1.2, frame)
        pen.stroke([side * 11.4 - 0.2j, side * 14.6 - 0.8j], 1.2, frame)
    pen.crescent(-1.8 + 0.4j, 1.8 + 0.4j, -0.6, 1.8, frame)


def draw_hat(pen: Pen, look: Look):
    r"""A knitted cap with a bobble, a peaked cap, or a hat with a brim."""
    colour = look.paint["hat"]
    dark = mix(colour, INK, 0.35)
    light = mix(colour, WHITE, 0.4)
    dome = [-16.4 - 8j, -15.4 - 17j, -8 - 23.4j, -24.6j, 8 - 23.4j, 15.4 - 17j, 16.4 - 8j, -7j]
    if look.hat_style < 0.34:
        pen.ellipse(-25j, 4.2, 4.0, light)
        pen.blob(dome, colour)
        pen.blob([-17 - 8j, -16.6 - 13.4j, -15.4j, 16.6 - 13.4j, 17 - 8j, -9.4j], light)
    elif look.hat_style < 0.67:
        pen.blob(dome, colour)
        pen.blob([-16.6 - 8j, -14 - 12.2j, -13.2j, 14 - 12.2j, 16.6 - 8j, look.side * 6 - 5.8j], dark)
        pen.crescent(-9 - 18j, 4 - 20.6j, -1.4, 1.6, light)
    else:
        pen.polygon([-15.6 - 9j, -13 - 21.4j, -5 - 23.8j, -21.8j, 5 - 23.8j, 13 - 21.4j, 15.6 - 9j], colour)
        pen.polygon([-15.8 - 9j, -14.8 - 14j, 14.8 - 14j, 15.8 - 9j], dark)
        pen.blob([-23 - 8.6j, -13 - 11.6j, 13 - 11.6j, 23 - 8.6j, 13 - 7.2j, -13 - 7.2j], colour)
        pen.crescent(-21 - 8.2j, 21 - 8.2j, 0.4, 1.4, dark)


def draw_face(attributes: ArrayLike | Mapping[str, bool], seed: Seed, size: int = 64) -> np.ndarray:
    r"""Draw the face that has these attributes; contradictions are resolved by `captions.consistent`.

    Args:
        attributes: 40 zeros and ones in the order of `ATTRIBUTES`, or a mapping name -> bool (missing: no).
        seed: whatever `np.random.default_rng` takes; the seed alone decides what the attributes leave open.
        size: side of the picture in pixels, at least 16.

    Returns:
        (size, size, 3) uint8, RGB. Same arguments, same bytes.

    Raises:
        ValueError: not 40 attributes, an unknown name, or a size below 16.

    >>> draw_face({"Male": True, "Eyeglasses": True}, seed=0).shape
    (64, 64, 3)
    """
    if size < 16:
        raise ValueError(f"expected a size of at least 16 pixels, got {size}")
    look = Look(dict(zip(ATTRIBUTES, consistent(attributes).tolist(), strict=True)), seed)
    side = SUPERSAMPLING * size
    image = Image.new("RGB", (side, side), look.paint["background"])
    page = Pen(ImageDraw.Draw(image), ImageDraw.Draw(image, "RGBA"), origin=0, turn=side / 64)
    page.ellipse(32 + 31j, 28.5, 28.5, mix(look.paint["background"], WHITE, 0.22))  # a disc of light
    page.ellipse(32 + 31j, 22.5, 22.5, mix(look.paint["background"], WHITE, 0.36))
    draw_person(page.moved(look.place), look)
    return np.asarray(image.reduce(SUPERSAMPLING))


def draw_person(body: Pen, look: Look):
    r"""Draw from back to front: a straight body, a tilted head, features that look a little aside."""
    has = look.has
    head = replace(body, turn=body.turn * look.turn)
    features = head.moved(look.gaze)
    draw_hair_behind(head, look)
    draw_clothes(body, look)
    if has["Wearing_Necklace"]:
        draw_necklace(body, look)
    draw_head(head, look)
    if has["Rosy_Cheeks"]:
        draw_cheeks(features, look)
    if not look.young:
        draw_age(features, look)
    if not has["No_Beard"]:
        draw_beard(head, look)
    draw_nose(features, look)
    draw_mouth(features, look)
    draw_eyes(features, look)
    draw_hair(head, look)
    draw_brows(features, look)
    if has["Eyeglasses"]:
        draw_glasses(features, look)
    if look.hat:
        draw_hat(head, look)
    if has["Wearing_Earrings"]:
        draw_earrings(head, look)


def random_attributes(rng: np.random.Generator) -> np.ndarray:
    r"""A consistent row (40,) uint8 that states what `draw_face` shows; invisible attributes are 0.

    Mustache or Goatee means No_Beard = 0; a man with neither and No_Beard = 0 has a full beard. Under a hat
    there are no bangs, and the colour shows at the sides.
    """

    def maybe(probability: float) -> bool:
        return bool(rng.random() < probability)

    male = maybe(0.5)
    young = maybe(0.65)
    hat = maybe(0.18)
    bald = maybe(0.24 if male else 0.06) and not hat
    gray = 0.13 if young else 0.46
    colour = rng.choice(list(HAIRS), p=[(1 - gray) / 3] * 3 + [gray])
    cut = rng.choice(["Straight_Hair", "Wavy_Hair", "neat"], p=[0.3, 0.3, 0.4])
    beard = rng.choice(["No_Beard", "Mustache", "Goatee", "both", "full"], p=[0.4, 0.17, 0.15, 0.08, 0.2])
    probabilities = {"Mouth_Slightly_Open": 0.4, "Smiling": 0.5, "Eyeglasses": 0.25, "Rosy_Cheeks": 0.22}
    probabilities |= {"Pale_Skin": 0.22, "Bushy_Eyebrows": 0.3 if male else 0.15}
    probabilities |= {"Wearing_Lipstick": 0.03 if male else 0.5, "Wearing_Earrings": 0.08 if male else 0.4}
    probabilities |= {"Wearing_Necktie": 0.35 if male else 0.06}
    has = {name: maybe(probability) for name, probability in probabilities.items()}
    has["Bangs"] = maybe(0.35) and not (bald or hat)
    has["Wearing_Necklace"] = maybe(0.09 if male else 0.4) and not has["Wearing_Necktie"]
    has |= {"Male": male, "Young": young, "Wearing_Hat": hat, "Bald": bald}
    has |= {colour: not bald, cut: not bald}
    has["No_Beard"] = beard == "No_Beard" or not male
    has["Mustache"] = beard in ("Mustache", "both") and male
    has["Goatee"] = beard in ("Goatee", "both") and male
    return np.array([has.get(name, False) for name in ATTRIBUTES], dtype=np.uint8)


def drawn_rows(count: int, seed: int, per_row: int = PER_ROW) -> np.ndarray:
    r"""The attributes (count, 40) of pictures 0..count-1, uint8; picture i has row i // per_row.

    Row r follows from (seed, r) alone, so more pictures leave the earlier ones as they were.
    """
    if count < 0 or per_row < 1:
        raise ValueError(f"expected count >= 0 and per_row >= 1, got count {count} and per_row {per_row}")
    rows = [random_attributes(np.random.default_rng([seed, r])) for r in range(-(-count // per_row))]
    return np.repeat(np.array(rows, np.uint8).reshape(-1, len(ATTRIBUTES)), per_row, axis=0)[:count]


def drawn_split(count: int) -> np.ndarray:
    r"""The split (count,) of pictures 0..count-1, uint8: 90 % train, 5 % valid, 5 % test.

    Pictures that share a row of attributes share their split. Rows are drawn independently, so equal ones may fall
    into two splits by chance; the evaluation counts which prompts are unseen. Of fewer than 20 rows of pictures the
    last tenth is valid, which may cut a row in two, and none is test.
    """
    part = np.arange(count) // PER_ROW % 20
    split = np.where(part == 18, VALID, np.where(part == 19, TEST, TRAIN)).astype(np.uint8)
    if count < 20 * PER_ROW:
        split[-max(1, count // 10) :] = VALID
    return split


def draw_many(rows: np.ndarray, seed: int, size: int = 64, start: int = 0) -> Iterator[np.ndarray]:
    r"""Yield one (size, size, 3) picture a row; picture i = start, ... follows from (seed, i, row).

    >>> rows = drawn_rows(4, seed=0)
    >>> first, second, *_ = draw_many(rows, seed=0)
    >>> bool((second == next(draw_many(rows[1:], seed=0, start=1))).all())
    True
    """
    for i, row in enumerate(rows, start):
        yield draw_face(row, [seed, i], size)


def write_celeba(folder: str | Path, count: int, seed: int = 0, size: int = 64):
    r"""Write drawn faces as CelebA comes: img_align_celeba/, list_attr_celeba.txt, list_eval_partition.txt.

    Rows, splits and pictures are those of `dataset.drawn_pictures`, but for what JPEG rounds away.

    Raises:
        UserError: `folder` is neither new nor empty, no pictures, a size below 16, or a seed below 0.
    """
    if count < 1 or size < 16 or seed < 0:
        got = f"count {count}, size {size} and seed {seed}"
        raise UserError(f"expected count >= 1, size >= 16 and seed >= 0, got {got}")
    rows = drawn_rows(count, seed)
    names = [f"{i:06d}.jpg" for i in range(1, count + 1)]
    values = (" ".join(f"{2 * value - 1:2d}" for value in row) for row in rows.tolist())
    attributes = [str(count), " ".join(ATTRIBUTES) + " ", *map(" ".join, zip(names, values, strict=True))]
    partition = [f"{name} {part}" for name, part in zip(names, drawn_split(count), strict=True)]
    with new_folder(folder) as place:
        (place / "img_align_celeba").mkdir()
        for name, picture in zip(names, draw_many(rows, seed, size), strict=True):
            Image.fromarray(picture).save(place / "img_align_celeba" / name, quality=95, subsampling=0)
        for name, lines in (("list_attr_celeba", attributes), ("list_eval_partition", partition)):
            text = "".join(line + "\r\n" for line in lines)  # CelebA's own line ends, on every system
            (place / f"{name}.txt").write_bytes(text.encode("ascii"))


def main(argv: list[str] | None = None):
    r"""The command `python -m ddpm.celeba.faces`."""
    parser = Parser("Write the faces that `train.py --data drawn` trains on, in CelebA's layout.")
    parser.prog = "python -m ddpm.celeba.faces"
    parser.add_argument("folder", help="a new or empty folder")
    parser.add_argument("--count", type=int, default=1000, help="how many pictures [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other faces [%(default)s]")
    parser.add_argument("--size", type=int, default=64, help="side in pixels [%(default)s]")
    a = parser.parse_args(argv)
    write_celeba(a.folder, a.count, a.seed, a.size)
    print(f"{a.count} faces in {a.folder}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
