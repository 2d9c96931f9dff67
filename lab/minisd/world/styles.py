"""The world's artists: each turns a composed picture into its own colours and its own structure.

An artist takes ``rgb`` [SIZE, SIZE, 3] float32 in [0, 1], ``mask`` [SIZE, SIZE] (how much of a pixel
is object) and draws of its own, and returns rgb of the same shape and range. All pixels are worked on at once
by numpy and scipy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates, zoom

from lab.minisd.world.dice import Dice, Field

Artist = Callable[[Field, Field, Dice], Field]
SIZE = 64  # pixels of a picture's side; the structure of every style is drawn for it
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_rows, _cols = np.mgrid[:SIZE, :SIZE].astype(np.float32)  # row and column of every pixel


def luma(rgb: Field) -> Field:
    """Compute the brightness [s, s] of rgb."""
    return rgb @ _LUMA


def blur(field: Field, sigma: float) -> Field:
    """Apply a Gaussian blur over the two image axes."""
    return gaussian_filter(field, (sigma, sigma, 0)[: field.ndim], mode="nearest", truncate=2.5)


def smooth_noise(dice: Dice, cells: int) -> Field:
    """Draw noise [SIZE, SIZE] in about [0, 1] that varies over ``SIZE / cells`` pixels."""
    coarse = zoom(
        dice.grid(cells + 1, cells + 1), SIZE / cells, order=1, grid_mode=True, mode="nearest"
    )
    return blur(coarse[:SIZE, :SIZE], SIZE / cells / 3)


def _top(rgb: Field) -> Field:
    """The largest channel [s, s, 1]; numpy's own maximum over so short an axis is slow."""
    return np.maximum(np.maximum(rgb[..., :1], rgb[..., 1:2]), rgb[..., 2:])


def _slope(field: Field) -> Field:
    """Length of the central-difference gradient [s, s]."""
    padded = np.pad(field, 1, mode="edge")
    return np.hypot(padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1])


def _mix(below: Field, above: object, amount: Field) -> Field:
    return below + (np.asarray(above, np.float32) - below) * amount[..., None]


def _lines(rgb: Field, mask: Field) -> Field:
    """Where a pen would draw the object: thin dark strokes, and the rim of what is black all
    over.
    """
    light = luma(rgb)
    strokes = np.clip((blur(light, 1.8) - light) * 4.5, 0, 1) + np.clip(_slope(light) - 0.45, 0, 1)
    near = np.clip(blur(mask, 1.0) * 3, 0, 1)
    return np.clip(strokes * near + 0.5 * _slope(mask), 0, 1)


def _fills(rgb: Field) -> Field:
    """The picture without its black contours: every dark pixel takes the colour around it."""
    weight = np.clip((_top(rgb) - 0.2) * 5, 0.002, 1)
    near = blur(rgb * weight, 1.2) / blur(weight[..., 0], 1.2)[..., None]
    return rgb * weight + near * (1 - weight)


def _vivid(rgb: Field, boost: float) -> Field:
    """More saturated colours; grey stays grey."""
    grey = rgb.mean(-1, keepdims=True)
    return np.clip(grey + (rgb - grey) * boost, 0, 1)


def _tones(values: Field, stops: Sequence[Sequence[float]]) -> Field:
    """Colour values [s, s] in [0, 1] by a scale through evenly spaced colours."""
    at, colours = np.linspace(0, 1, len(stops)), np.array(stops, np.float32)
    return np.stack([np.interp(values, at, colours[:, c]) for c in range(3)], -1).astype(np.float32)


def mosaic(rgb: Field, mask: Field, dice: Dice) -> Field:
    """Square stones of 4 pixels, each of one colour, in light grout that darkens along the
    contours.
    """
    tile = 4
    n = SIZE // tile
    flat = _mix(0.35 * rgb + 0.45, _vivid(0.8 * _fills(rgb) + 0.2 * rgb, 1.9), mask)
    stones = flat.reshape(n, tile, n, tile, 3).mean((1, 3)) * (0.86 + 0.28 * dice.grid(n, n, 1))
    stones = np.round(np.clip(stones, 0, 1) * 6) / 6
    joint = np.where((_rows % tile == 0) | (_cols % tile == 0), np.float32(0.5), np.float32(0))
    wall = _mix(stones.repeat(tile, 0).repeat(tile, 1), (0.93, 0.87, 0.72), joint)
    return _mix(wall, (0.22, 0.13, 0.10), 0.6 * _lines(rgb, mask))


def neon(rgb: Field, mask: Field, dice: Dice) -> Field:
    """Glowing contours in the object's own hues on a black wall."""
    fills = _fills(rgb)
    low = -_top(-fills)
    spread = _top(fills) - low
    lamp = np.asarray(
        dice.pick([(1.0, 0.15, 0.75), (0.1, 0.9, 1.0), (0.35, 1.0, 0.25)]), np.float32
    )
    hue = (fills - low) / np.maximum(spread, 1e-3)
    grey = np.clip(1 - spread * 4, 0, 1)
    hue = hue * (1 - grey) + lamp * grey
    lines = _lines(rgb, mask)[..., None]
    glow = blur(lines[..., 0], 2.2)[..., None]
    wall = np.array([0.03, 0.01, 0.07], np.float32)
    # summed from the left: another order changes pixels of MiniSD's training data
    light = wall + 0.9 * hue * glow + lines * (0.72 * hue + 0.3) + 0.16 * hue * mask[..., None]
    return np.clip(light, 0, 1)


def blueprint(rgb: Field, mask: Field, dice: Dice) -> Field:
    """White lines and pale tints on blue paper with a grid."""
    paper = np.array([0.07, 0.22, 0.56], np.float32) * (0.9 + 0.2 * dice.uniform())
    step, shift = 8, int(dice.uniform(0, 8))
    grid = np.where(
        ((_rows + shift) % step == 0) | ((_cols + shift) % step == 0),
        np.float32(0.28),
        np.float32(0),
    )
    out = _mix(np.broadcast_to(paper, rgb.shape), (0.75, 0.88, 1.0), grid * (1 - 0.8 * mask))
    out = _mix(out, (0.55, 0.75, 0.98), 0.5 * mask * luma(_fills(rgb)))
    return _mix(out, (0.97, 0.99, 1.0), _lines(rgb, mask))


def halftone(rgb: Field, mask: Field, dice: Dice) -> Field:
    """A screen of dots at 45 degrees per printing ink: pure inks on paper, as in old comics."""
    pitch, phase = 4.0 * np.sqrt(2), dice.uniform(0, 2 * np.pi)
    screen = 0.5 + 0.25 * (
        np.cos(2 * np.pi * (_cols + _rows) / pitch + phase)
        + np.cos(2 * np.pi * (_cols - _rows) / pitch + phase)
    )
    ink = 1 - _vivid(rgb, 1.3)
    dots = np.clip((ink - screen[..., None].astype(np.float32)) * 5 + 0.5, 0, 1)
    return np.array([1.0, 0.97, 0.88], np.float32) * (1 - 0.92 * dots)


def sunset(rgb: Field, mask: Field, dice: Dice) -> Field:
    """The object in evening colours before bands of sky and a sun cut by stripes."""
    height = np.floor(_rows / 6) * 6 / SIZE
    top, low = np.array([0.36, 0.10, 0.46], np.float32), np.array([1.0, 0.48, 0.22], np.float32)
    sky = top + (low - top) * height[..., None]
    cy, cx, radius = dice.uniform(26, 40), dice.uniform(20, 44), dice.uniform(20, 25)
    sun = np.clip(radius - np.hypot(_rows - cy, _cols - cx), 0, 1)
    sun = sun * np.where(
        (_rows > cy) & ((_rows - np.floor(cy)) % 6 < 2), np.float32(0), np.float32(1)
    )
    sky = _mix(sky, (1.0, 0.86, 0.35), sun)
    stops = [[0.13, 0.03, 0.22], [0.42, 0.08, 0.40], [0.83, 0.22, 0.36], [1.0, 0.62, 0.42]]
    return _mix(sky, _tones(luma(rgb), stops), np.clip(mask * 1.2, 0, 1))


def sketch(rgb: Field, mask: Field, dice: Dice) -> Field:
    """Grey pencil: contours, hatching where it is dark, the grain of white paper."""
    light = luma(_fills(rgb) * 0.5 + rgb * 0.5)
    rising = ((_cols + _rows) % 4 < 1.5) * np.clip((0.72 - light) * 3, 0, 1)
    falling = ((_cols - _rows) % 4 < 1.5) * np.clip((0.40 - light) * 4, 0, 1)
    hatch = np.clip(rising + falling, 0, 1) * np.clip(mask, 0, 1) * 0.55
    pressure = 0.75 + 0.25 * dice.grid(SIZE, SIZE)
    pencil = np.clip(_lines(rgb, mask) * 0.85 + hatch, 0, 0.9) * pressure
    paper = 0.97 - 0.05 * dice.grid(SIZE, SIZE)
    out = paper * (1 - pencil) + 0.16 * pencil
    return np.repeat(out[..., None], 3, -1).astype(np.float32)


def watercolor(rgb: Field, mask: Field, dice: Dice) -> Field:
    """Pale washes without contours, darker where they dry at the rim, on paper that shows at the
    border.
    """
    dy, dx = smooth_noise(dice, 12) - 0.5, smooth_noise(dice, 12) - 0.5
    at = np.stack([_rows + 5 * dy, _cols + 5 * dx])
    fills = _fills(rgb) * 0.75 + rgb * 0.25
    wash = np.stack(
        [map_coordinates(fills[..., c], at, order=1, mode="nearest") for c in range(3)], -1
    )
    rim = np.clip(_slope(map_coordinates(mask, at, order=1, mode="nearest")), 0, 1)
    bloom = smooth_noise(dice, 8) - 0.5
    depth = (0.68 + 0.9 * bloom + 0.35 * rim)[..., None]
    out = 1 - (1 - _vivid(wash, 1.25)) * np.clip(depth, 0.25, 1.1)
    out = out * (1 - 0.5 * _lines(rgb, mask)[..., None])
    border = np.minimum(
        np.minimum(_cols, SIZE - 1 - _cols), np.minimum(_rows, SIZE - 1 - _rows)
    ) + 14 * (smooth_noise(dice, 10) - 0.5)
    paper = np.clip(1 - (border - 3) / 3, 0, 1)
    return np.clip(_mix(out.astype(np.float32), (0.98, 0.97, 0.94), paper), 0, 1)


def stained_glass(rgb: Field, mask: Field, dice: Dice) -> Field:
    """Panes of one bright colour each, in black lead; panes end where the object does."""
    cell = 11
    n = SIZE // cell + 2
    jitter = dice.grid(2, n, n)
    gy, gx = np.mgrid[:n, :n].astype(np.float32)
    cy, cx = (
        ((g + j - np.float32(0.75)) * cell).ravel() for g, j in zip((gy, gx), jitter, strict=True)
    )
    pane = np.argmin((_rows[..., None] - cy) ** 2 + (_cols[..., None] - cx) ** 2, -1)
    pane = pane * 2 + (mask > 0.5)
    flat = pane.ravel()
    fills = _fills(rgb).reshape(-1, 3)
    count = np.maximum(np.bincount(flat, minlength=2 * n * n), 1)
    colour = (
        np.stack([np.bincount(flat, fills[:, c], 2 * n * n) for c in range(3)], -1) / count[:, None]
    )
    colour = _vivid(np.clip(colour, 0, 1).astype(np.float32) ** 0.65, 2.0) * (
        0.8 + 0.3 * dice.grid(2 * n * n, 1)
    )
    glass = np.clip(colour, 0.02, 1)[pane]
    edge = np.zeros((SIZE, SIZE), np.float32)
    edge[:, 1:] = pane[:, 1:] != pane[:, :-1]
    edge[1:] = np.maximum(edge[1:], pane[1:] != pane[:-1])
    painted = 0.8 * _lines(rgb, mask) * mask
    return _mix(glass, (0.04, 0.04, 0.05), np.maximum(edge, painted))


def negative(rgb: Field, mask: Field, dice: Dice) -> Field:
    """Inverted colours under an orange film base, perforated strips above and below."""
    out = (1 - rgb) * np.array([1.0, 0.86, 0.70], np.float32)
    strip = np.where((_rows < 8) | (_rows >= SIZE - 8), np.float32(1), np.float32(0))
    out = _mix(out, (0.09, 0.05, 0.03), strip)
    row = np.minimum(_rows, SIZE - 1 - _rows)
    hole = (row >= 2) & (row < 6) & ((_cols + int(dice.uniform(0, 8))) % 8 < 4)
    return _mix(out, (0.98, 0.95, 0.88), hole.astype(np.float32))


def engraving(rgb: Field, mask: Field, dice: Dice) -> Field:
    """Green lines that swell in the dark and wave over the paper, as on a banknote."""
    light = luma(_fills(rgb) * 0.6 + rgb * 0.4)
    wave = 1.6 * np.sin(_cols / 7 + dice.uniform(0, 6.28))
    body = mask > 0.4
    screen = 0.5 + 0.5 * np.cos(
        2 * np.pi * np.where(body, (_cols + _rows) / 1.41, _rows + wave) / 4
    )
    dark = np.where(body, 0.80 - 0.75 * light, 0.22)
    ink = np.clip((dark - (1 - screen)) * 4 + 0.5, 0, 1).astype(np.float32) * np.where(
        body, 1, 0.6
    ).astype(np.float32)
    ink = np.maximum(ink, _lines(rgb, mask))
    paper = np.broadcast_to(np.array([0.88, 0.95, 0.82], np.float32), rgb.shape)
    return _mix(paper, (0.03, 0.30, 0.20), ink)


def poster(rgb: Field, mask: Field, dice: Dice) -> Field:
    """Four flat inks, as in a screen print, before rays that spread from the object."""
    light = luma(_vivid(_fills(rgb), 1.2) * 0.8 + rgb * 0.2)
    inks = np.array(
        [[0.05, 0.12, 0.27], [0.80, 0.13, 0.13], [0.30, 0.62, 0.64], [0.97, 0.91, 0.76]], np.float32
    )
    tone = inks[np.clip((light * 4).astype(int), 0, 3)]
    angle = np.arctan2(_rows - dice.uniform(24, 44), _cols - dice.uniform(20, 44))
    rays = np.floor((angle + dice.uniform(0, np.pi)) / (2 * np.pi) * 20) % 2
    paper = _mix(np.broadcast_to(inks[3], rgb.shape), inks[2], rays.astype(np.float32) * 0.8)
    out = _mix(paper, tone, (mask > 0.5).astype(np.float32))
    return _mix(out, inks[0], (_lines(rgb, mask) > 0.4).astype(np.float32))


def pointillism(rgb: Field, mask: Field, dice: Dice) -> Field:
    """Round dabs of pure, scattered hues on light canvas, where contours only shine through."""
    cell = 4
    n = SIZE // cell
    drawn = _mix(_fills(rgb), (0.12, 0.08, 0.25), 0.8 * _lines(rgb, mask))
    hue = drawn.reshape(n, cell, n, cell, 3).mean((1, 3)) + 0.4 * (dice.grid(n, n, 3) - 0.5)
    hue = _vivid(np.clip(hue, 0, 1), 1.4)
    centre = 1.5 + 1.4 * (dice.grid(2, n, n) - 0.5)
    dy, dx = (c.repeat(cell, 0).repeat(cell, 1) for c in centre)
    dab = np.clip(2.5 - np.hypot(_rows % cell - dy, _cols % cell - dx), 0, 1)
    canvas = _mix(np.full_like(rgb, 0.94), drawn, 0.7 * mask)
    return _mix(canvas, hue.repeat(cell, 0).repeat(cell, 1), dab)


def paper_cut(rgb: Field, mask: Field, dice: Dice) -> Field:
    """Flat sheets with a white rim and soft shadows, before wavy layers of one hue."""
    hue = 0.35 + 0.5 * dice.grid(3)
    out = np.broadcast_to(np.clip(hue + 0.15, 0, 1), rgb.shape)
    for layer in range(3):
        wave = 5 * np.sin(_cols / dice.uniform(6, 12) + dice.uniform(0, 6.28))
        edge = _rows - 18 - 14 * layer - wave
        out = out * (1 - 0.35 * np.exp(-np.clip(-edge, 0, None) / 2) * (edge < 0))[..., None]
        out = _mix(out, hue * (0.95 - 0.2 * layer), np.clip(edge, 0, 1))
    sheet = np.clip(blur(mask, 1.6) * 5, 0, 1)
    shade = np.pad(blur(sheet, 1.5), ((4, 0), (3, 0)))[:-4, :-3]
    out = _mix(out * (1 - 0.55 * shade * (1 - sheet))[..., None], (0.99, 0.98, 0.96), sheet)
    flat = np.round(_vivid(_fills(rgb), 1.2) * 4) / 4
    out = _mix(out, flat, np.clip(mask * 1.5 - 0.3, 0, 1))
    return _mix(out, flat * 0.55, 0.8 * np.clip(_lines(rgb, mask), 0, 1) * mask)


def thermal(rgb: Field, mask: Field, dice: Dice) -> Field:
    """False colours of a heat camera: a warm object, yellow to red, before cold blue."""
    stops = [
        [0.02, 0.00, 0.16],
        [0.25, 0.00, 0.55],
        [0.75, 0.05, 0.45],
        [0.98, 0.45, 0.05],
        [1.0, 0.85, 0.10],
        [1.0, 1.0, 0.85],
    ]
    cold = 0.06 + 0.22 * luma(rgb)
    body = 0.50 + 0.45 * luma(_fills(rgb)) - 0.45 * _lines(rgb, mask)
    heat = cold + (body - cold) * mask + 0.12 * blur(mask, 3.0) * (1 - mask)
    heat = blur(heat, 0.6) + 0.04 * (smooth_noise(dice, 16) - 0.5)
    return _tones(heat, stops)


def chalk(rgb: Field, mask: Field, dice: Dice) -> Field:
    """Grainy coloured chalk on a green board with wiped traces."""
    board = np.array([0.10, 0.23, 0.17], np.float32) * (0.9 + 0.2 * dice.uniform())
    wiped = np.clip(smooth_noise(dice, 5) - 0.45, 0, 1)
    out = _mix(np.broadcast_to(board, rgb.shape), (0.75, 0.80, 0.76), 0.25 * wiped)
    grain = np.clip(1.5 * dice.grid(SIZE, SIZE), 0.15, 1)
    strokes = np.where((_cols + 2 * _rows) % 5 < 3, np.float32(0.75), np.float32(0.2))
    colour = 0.35 + 0.65 * _vivid(_fills(rgb), 1.4)
    out = _mix(out, colour, mask * strokes * grain)
    return _mix(out, (0.96, 0.96, 0.92), np.clip(_lines(rgb, mask) * 1.2, 0, 1) * grain)


def knitting(rgb: Field, mask: Field, dice: Dice) -> Field:
    """Rows of V-shaped stitches of wool, each of one colour, on a plain jumper."""
    cell = 4
    drawn = _mix(_vivid(_fills(rgb), 1.3), (0.10, 0.07, 0.09), 0.75 * _lines(rgb, mask))
    wool = np.asarray(
        dice.pick([(0.62, 0.12, 0.16), (0.13, 0.30, 0.26), (0.80, 0.76, 0.66)]), np.float32
    )
    drawn = _mix(np.broadcast_to(wool, rgb.shape), drawn, mask)
    # a stitch takes the colour under it; both arms of its V rise from the middle of the cell
    rows = ((_rows - np.abs(_cols % cell - 1.5)) // 2 * 2 + 1).clip(0, SIZE - 1).astype(int)
    columns = (_cols // cell * cell + 2).clip(0, SIZE - 1).astype(int)
    soft = blur(drawn, 0.8)
    yarn = soft[rows, columns]
    depth = (_rows - np.abs(_cols % cell - 1.5)) % 2
    shade = 1.08 - 0.42 * (depth < 0.75) - 0.22 * (_cols % cell == 0)
    fuzz = 0.92 + 0.16 * dice.grid(SIZE, SIZE)
    return np.clip(yarn * (shade * fuzz)[..., None], 0, 1).astype(np.float32)


def terracotta(rgb: Field, mask: Field, dice: Dice) -> Field:
    """A black figure with incised lines on orange clay, between two borders, as on a Greek vase."""
    clay = np.array([0.84, 0.47, 0.24], np.float32) * (0.92 + 0.12 * dice.uniform())
    out = np.broadcast_to(clay, rgb.shape) * (0.94 + 0.1 * smooth_noise(dice, 8))[..., None]
    light = luma(_fills(rgb))
    figure = _mix(np.full_like(rgb, 0.09), (0.55, 0.20, 0.12), (light > 0.72) * np.float32(0.75))
    out = _mix(out, figure, np.clip(mask * 1.4 - 0.2, 0, 1))
    out = _mix(out, (0.95, 0.62, 0.36), 0.9 * np.clip(_lines(rgb, mask) * 1.3, 0, 1) * mask)
    row, phase = np.minimum(_rows, SIZE - 1 - _rows), int(dice.uniform(0, 8))
    key = (_cols + phase) % 8
    border = (row < 1) | (row == 6) | ((row > 1) & (row < 5) & (key < 4))
    border &= ~((row == 3) & (key > 0) & (key < 3))
    return _mix(out, (0.08, 0.06, 0.06), border.astype(np.float32)).astype(np.float32)


def glitch(rgb: Field, mask: Field, dice: Dice) -> Field:
    """A broken screen: bands of rows slide sideways, red and blue part, every other row is dark."""
    n = SIZE // 4
    slide = np.where(dice.grid(n) < 0.35, (dice.grid(n) - 0.5) * 22, 0).repeat(4)[:, None]
    drawn = _vivid(_mix(rgb, (0.05, 0.02, 0.10), 0.5 * _lines(rgb, mask)), 1.4)
    parts = []
    for channel, shift in enumerate((3, 0, -3)):
        columns = np.floor(_cols - slide - shift).astype(int) % SIZE
        parts.append(drawn[_rows.astype(int), columns, channel])
    out = np.stack(parts, -1) * np.where(_rows % 2 == 0, 1.0, 0.62)[..., None]
    tint = np.array([1.0, 0.82, 1.08], np.float32)
    return np.clip(out * tint, 0, 1).astype(np.float32)


def gold_relief(rgb: Field, mask: Field, dice: Dice) -> Field:
    """Beaten gold: the object as a relief, lit from one side."""
    height = blur(mask, 1.5) * 1.6 + 0.8 * luma(_fills(rgb)) * mask - 0.9 * _lines(rgb, mask)
    padded = np.pad(height, 1, mode="edge")
    angle = dice.uniform(-0.6, 0.6) - 2.2
    dx, dy = padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]
    lit = 0.5 + 0.55 * (dx * np.cos(angle) + dy * np.sin(angle))
    lit = lit + 0.08 * (dice.grid(SIZE, SIZE) - 0.5)
    return _tones(lit, [[0.20, 0.10, 0.02], [0.80, 0.58, 0.16], [1.0, 0.96, 0.68]])


def x_ray(rgb: Field, mask: Field, dice: Dice) -> Field:
    """A pale translucent body with bright rims in blue darkness."""
    inner = 0.22 + 0.5 * (1 - luma(_fills(rgb)))
    value = mask * inner + 0.75 * _lines(rgb, mask) + 0.25 * blur(mask, 2.5)
    value = value + 0.05 * (dice.grid(SIZE, SIZE) - 0.5)
    return _tones(value, [[0.01, 0.02, 0.06], [0.25, 0.45, 0.62], [0.93, 0.98, 1.0]])
