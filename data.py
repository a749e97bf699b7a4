"""
Where samples come from, text to tokens, and the views and masks that the device makes of them.

    source = open_source("train-{00000..00041}.tar", canvas=256)          # or a folder of class folders, or None: built in
    stream = SampleStream(source, batch_size=1024, tokenize=ClipBPE(), context_length=77, seed=0, n_workers=8)
    for batch in make_loader(stream, n_workers=8): ...                     # images uint8 (b, 3, 256, 256), tokens, labels

The host decodes; all randomness of a step (crops, colours, masks) is drawn on the device from (seed, step), for the global
batch, of which rank r takes every W-th sample: the number of ranks changes nothing.
"""
import glob
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
import sys
import shutil
import tarfile
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from losses import barrier, gather_objects, rank, world_size
from vtp import constant, download, normalize, write_atomically

# ----------------------------------------------------------------------------------------------------------------------
# The built-in set: procedural scenes with captions
#
# A scene is one large object (its shape is the label), sometimes a second, small one, on a background. Everything but the
# shape is drawn without looking at the shape, at a given size every shape covers the same area, and object and background
# swap light and dark freely: so pixel values say little about the label, although anyone can see it. Most objects are
# large, central and nearly upright, so that a small DiT learns to draw them in minutes.
#
# Lengths are fractions of the image side, the origin is the image's centre, y points up. Pixels are made with + - * / sqrt,
# floor, abs, min and max alone, which IEEE 754 rounds the same way everywhere.
# ----------------------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star", "heart",
          "cross", "ring", "crescent", "arrow", "hourglass")
TURN = 0.03                                                       # largest turn either way: 11 degrees

COLOURS = {"red": (.86, .13, .13), "orange": (.97, .53, .08), "yellow": (.97, .87, .20),
           "green": (.15, .60, .20), "teal": (.10, .66, .66), "blue": (.14, .27, .86),
           "purple": (.50, .16, .66), "pink": (.98, .60, .76), "brown": (.45, .27, .12),
           "black": (.07, .07, .08), "white": (.96, .96, .95), "grey": (.56, .56, .57)}
COLOUR_NAMES, RGB = tuple(COLOURS), np.array(list(COLOURS.values()))
# Two colours may meet in one scene if they are far enough apart (green weighs most to the eye).
CONTRAST = np.sqrt(((RGB[:, None] - RGB[None]) ** 2 * [.30, .45, .25]).sum(-1)) > 0.33
LUMINANCE = RGB @ [.30, .59, .11]

PATTERNS = ("plain", "stripes", "dots", "checks", "gradient", "clouds")
TEXTURES = ("plain", "plain", "stripes", "dots", "checks")        # on an object
BACKGROUNDS = ("plain", "plain", "stripes", "checks", "gradient", "clouds")  # behind it
PATTERN_WORDS = {"plain": ("plain",), "stripes": ("striped",), "dots": ("dotted", "spotted"),
                 "checks": ("checked",), "gradient": ("shaded", "fading"),
                 "clouds": ("cloudy", "misty")}
SIZE_WORDS = (("small", "little"), (), ("large", "big"))          # a middle size is not named
PLACE_WORDS = {(-1, 1): ("at the top left", "in the upper left"), (0, 1): ("at the top", "near the top"),
               (1, 1): ("at the top right", "in the upper right"), (-1, 0): ("on the left", "at the left"),
               (0, 0): ("in the centre", "in the middle"), (1, 0): ("on the right", "at the right"),
               (-1, -1): ("at the bottom left", "in the lower left"),
               (0, -1): ("at the bottom", "near the bottom"),
               (1, -1): ("at the bottom right", "in the lower right")}
# Where the main object is, seen from the second, by where the second is.
RELATION_WORDS = {(0, 1): ("below", "under", "beneath"), (0, -1): ("above", "over"),
                  (-1, 0): ("right of", "to the right of"), (1, 0): ("left of", "to the left of")}
LONGEST_CAPTION = 62                                              # bytes


def uniforms(indices, split, seed, count):
    """Random numbers that depend on (seed, split, index, column) only: splitmix64 as a counter hash.
    indices: N integers >= 0. Returns float64 (N, count) in [0, 1)."""
    def mix(z):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
    golden = np.uint64(0x9E3779B97F4A7C15)
    stream = np.array([2 * seed + {"train": 0, "val": 1}[split] + 1], dtype=np.uint64)
    key = mix(mix(stream * golden) + np.asarray(indices).astype(np.uint64) * golden)
    columns = np.arange(1, count + 1, dtype=np.uint64) * golden
    return (mix(key[:, None] + columns[None]) >> np.uint64(11)) * 2.0 ** -53


def draw_parameters(indices, split, seed=0):
    """Everything that defines the scenes, as a dict of arrays with first axis N. seed: an integer >= 0.
    Shapes, colours and patterns are positions in the tables above; x, y, radius and period are
    fractions of the image side; turns are fractions of a full turn; *_rgb are in [0, 1]."""
    u = iter(uniforms(indices, split, seed, 120).T)
    span = lambda low, high: low + (high - low) * next(u)
    choose = lambda table: (next(u) * len(table)).astype(np.int64)
    among = lambda allowed: np.where(allowed, np.stack([next(u) for _ in COLOURS], 1), -1).argmax(1)
    jitter = lambda: np.stack([span(-.04, .04) for _ in range(3)], 1) + span(-.04, .04)[:, None]
    p = {"pair": next(u) < 0.15}                                  # is there a second object?
    pair = p["pair"]

    # Colours. The object may be the lighter or the darker one; both objects differ from the background.
    p["shape"], p["colour"] = choose(SHAPES), choose(COLOURS)
    p["ground_colour"] = among(CONTRAST[p["colour"]])
    not_main = np.arange(len(COLOURS)) != p["colour"][:, None]
    p["shape2"], p["colour2"] = choose(SHAPES), among(CONTRAST[p["ground_colour"]] & not_main)

    def shade(base, name, strength):                              # a second tone of the same colour
        pole = np.where(LUMINANCE[p[name]] < 0.30, 1.0, 0.0)[:, None]
        return base + strength * (pole - base)
    for name, strength in (("colour", .28), ("colour2", .28), ("ground_colour", .14)):
        p[name + "_rgb"] = np.clip(RGB[p[name]] + jitter(), 0, 1)
        p[name + "_rgb2"] = shade(p[name + "_rgb"], name, strength)
    # The outline is darker on a light background and lighter on a dark one.
    p["light_outline"] = LUMINANCE[p["ground_colour"]] < 0.45

    # Patterns.
    p["texture"] = np.array([PATTERNS.index(t) for t in TEXTURES])[choose(TEXTURES)]
    p["ground"] = np.array([PATTERNS.index(t) for t in BACKGROUNDS])[choose(BACKGROUNDS)]
    for name, low, high in (("texture", .14, .18), ("ground", .18, .32)):
        p[name + "_turn"], p[name + "_period"] = next(u), span(low, high)
        p[name + "_phase"] = np.stack([next(u) for _ in range(4)], 1)
        p[name + "_waves"] = np.stack([span(-3, 3) for _ in range(8)], 1).reshape(-1, 4, 2)

    # Sizes and places. radius is that of the circle with the object's area. One object alone stands in the centre
    # or, if it is small, in one of 3 x 3 places; of two, the main one makes room for the second in one of 8 directions.
    p["size"] = np.where(pair, 1, np.array([0, 1, 1, 1, 2, 2, 2])[choose(range(7))])
    p["radius"] = np.where(pair, span(.235, .255), np.array([.21, .28, .33])[p["size"]] + span(-.01, .01))
    p["radius2"] = span(.098, .118)
    place = choose(PLACE_WORDS)
    eight = choose(range(8))
    place = np.where(pair, eight + (eight >= 4), np.where(p["size"] == 0, place, 4))
    p["place"] = np.stack([place % 3 - 1, place // 3 - 1], 1)     # of the second object if there is one
    room = np.where(pair, -1, 1) * (.5 - 1.40 * p["radius"])
    for axis, name in enumerate("xy"):
        step = p["place"][:, axis]
        p[name] = np.where(step == 0, span(-.03, .03), step * room * span(.7, 1))
        p[name + "2"] = np.where(step == 0, span(-.12, .12), step * span(.335, .36))
    for name in ("turn", "turn2"):
        p[name] = span(-TURN, TURN)
    p["wording"] = np.stack([next(u) for _ in range(20)], 1)
    return p


def distance(shape, x, y):
    """Signed distance to the outline of SHAPES[shape], negative inside, for coordinates x, y (any shape,
    in units in which the shape has the area pi, that of the unit circle). Exact along straight edges
    and arcs; corners are mitred."""
    name, ax, ay = SHAPES[shape], np.abs(x), np.abs(y)
    if name == "circle":
        return np.sqrt(x * x + y * y) - 1
    if name == "square":
        return np.maximum(ax, ay) - .886
    if name == "triangle":
        y = y + .39                                               # centre the box around it
        return np.maximum(.866 * ax + .5 * y, -y) - .778
    if name == "star":                                            # fold the ten mirror images onto one edge
        fold = 2 * np.maximum(.8090 * ax - .5878 * y, 0)
        ax, y = ax - .8090 * fold, y + .5878 * fold
        fold = 2 * np.maximum(-.8090 * ax - .5878 * y, 0)
        ax, y = np.abs(ax + .8090 * fold), y + .5878 * fold
        return .8845 * ax + .4666 * y - .669
    if name == "heart":                                           # a square on its corner and two discs
        y = y + .1
        return np.minimum((ax + np.abs(y) - .938) * .7071, np.sqrt((ax - .469) ** 2 + (y - .469) ** 2) - .663)
    if name == "cross":
        return np.maximum(np.minimum(ax, ay) - .415, np.maximum(ax, ay) - 1.153)
    if name == "ring":
        return np.abs(np.sqrt(x * x + y * y) - .928) - .269
    if name == "crescent":
        x = x - .2
        return np.maximum(np.sqrt(x * x + y * y) - 1.352, .988 - np.sqrt((x - .676) ** 2 + y * y))
    if name == "arrow":                                           # points right
        head = np.maximum(.7071 * (x + ay - 1.4), -.05 - x)
        return np.minimum(head, np.maximum(ay - .4, np.abs(x + .65) - .7))
    if name == "hourglass":
        return np.maximum(ay - 1.2, .8575 * (ax - .294) - .5145 * ay)


def pattern(kind, x, y, turn, period, phase, waves, size):
    """PATTERNS[kind] on coordinates x, y (N, size, size) as a mask in [0, 1], edges one pixel wide.
    turn, period (N,), phase (N, 4), waves (N, 4, 2): see draw_parameters."""
    name = PATTERNS[kind]
    each = lambda v: v.astype(np.float32)[:, None, None]          # one number per sample
    cos, sin, period32 = each(np.cos(2 * np.pi * turn)), each(np.sin(2 * np.pi * turn)), each(period)
    across = cos * x + sin * y
    along = cos * y - sin * x
    if name == "gradient":
        return np.clip(across + np.float32(.5), 0, 1)
    if name == "clouds":                                          # soft waves in four random directions
        total = np.float32(.5)
        for k in range(4):
            t = each(waves[:, k, 0]) * x + each(waves[:, k, 1]) * y + each(phase[:, k])
            t = 2 * (t - np.floor(t)) - 1
            total = total + np.float32(.75) * t * (1 - np.abs(t))  # parabolas that look like a sine
        return np.clip(total, 0, 1)
    a, b = across / period32 + each(phase[:, 0]), along / period32 + each(phase[:, 1])
    a, b = np.abs(a - np.floor(a) - np.float32(.5)), np.abs(b - np.floor(b) - np.float32(.5))
    if name == "dots":
        return np.clip(np.float32(.5) + size * period32 * (np.float32(.3) - np.sqrt(a * a + b * b)), 0, 1)
    a = np.clip(2 * size * period32 * (a - np.float32(.25)), -1, 1)
    if name == "stripes":
        return (1 + a) / 2
    b = np.clip(2 * size * period32 * (b - np.float32(.25)), -1, 1)
    return (1 + a * b) / 2                                        # checks


def draw_images(p, size):
    """Draw the scenes of draw_parameters. Returns uint8 (N, 3, size, size), RGB in 0..255."""
    n = len(p["shape"])
    line = (np.arange(size, dtype=np.float32) + np.float32(.5)) / np.float32(size) - np.float32(.5)
    x, y = np.broadcast_to(line[None], (size, size)), np.broadcast_to(-line[:, None], (size, size))
    tint = lambda rgb: rgb.astype(np.float32)[:, :, None, None]

    def mask_of(name, rows):                                      # pattern masks, grouped by kind
        mask = np.zeros((len(rows), size, size), np.float32)
        for kind in np.unique(p[name][rows]):
            at = np.flatnonzero(p[name][rows] == kind)
            if PATTERNS[kind] != "plain":
                values = (p[name + end][rows[at]] for end in ("_turn", "_period", "_phase", "_waves"))
                mask[at] = pattern(kind, x, y, *values, np.float32(size))
        return mask[:, None]

    rows = np.arange(n)
    first, second = tint(p["ground_colour_rgb"]), tint(p["ground_colour_rgb2"])
    images = first + (second - first) * mask_of("ground", rows)

    for end, rows in (("2", np.flatnonzero(p["pair"])), ("", rows)):  # the main object comes last: in front
        for shape in np.unique(p["shape" + end][rows]):
            at = rows[p["shape" + end][rows] == shape]
            each = lambda v: v[at].astype(np.float32)[:, None, None]
            turn, radius = 2 * np.pi * p["turn" + end], p["radius" + end]
            cos, sin = each(np.cos(turn) / radius), each(np.sin(turn) / radius)
            dx, dy = x - each(p["x" + end]), y - each(p["y" + end])
            d = distance(shape, cos * dx + sin * dy, cos * dy - sin * dx) * each(radius)
            cover = np.clip(np.float32(.5) - d * np.float32(size), 0, 1)[:, None]
            rim = np.clip(np.float32(.5) + (d + np.float32(.018)) * np.float32(size), 0, 1)[:, None]
            colour = tint(p[f"colour{end}_rgb"][at])
            outline = colour + np.float32(.5) * (each(p["light_outline"])[..., None] - colour)
            if not end:
                colour = colour + (tint(p["colour_rgb2"][at]) - colour) * mask_of("texture", at)
            colour = colour + (outline - colour) * rim
            images[at] += (colour - images[at]) * cover
    return (images * np.float32(255) + np.float32(.5)).astype(np.uint8)


def write_caption(p, i):
    """A true English phrase about scene i of draw_parameters, at most LONGEST_CAPTION bytes. It always
    names the main object's colour and shape, that object first; other attributes are left out at times."""
    u = iter(p["wording"][i].tolist())
    one_of = lambda words: words[int(next(u) * len(words))] if words else ""
    sometimes = lambda share, word: word if next(u) < share else ""
    join = lambda *words: " ".join(word for word in words if word)
    a = lambda words: ("an " if words.startswith((*"aeiou", "hour")) else "a ") + words
    colour, shape, place = COLOUR_NAMES[p["colour"][i]], SHAPES[p["shape"][i]], tuple(p["place"][i].tolist())
    ground, pair = COLOUR_NAMES[p["ground_colour"][i]], p["pair"][i]
    worth = lambda kind: .5 if PATTERNS[kind] != "plain" else .1  # "plain" is said seldom
    say = {"opening": one_of(("", "", "", "", "there is", "here is", "picture of", "an image of")),
           "ground_texture": sometimes(worth(p["ground"][i]), one_of(PATTERN_WORDS[PATTERNS[p["ground"][i]]])),
           "size2": one_of(("", "small", "tiny", "little")),
           "size": sometimes(.5, one_of(SIZE_WORDS[p["size"][i]])),
           "ground": sometimes(.5, one_of(("on {} background", "on {}", "against {}"))),
           "texture": sometimes(worth(p["texture"][i]), one_of(PATTERN_WORDS[PATTERNS[p["texture"][i]]])),
           "place": sometimes(.3 if place == (0, 0) else .7, one_of(PLACE_WORDS[place]))}
    template, relation = int(next(u) * 8), one_of(RELATION_WORDS.get(place, ("",)))
    relation, beside = sometimes(.75, relation), one_of(("with", "and", "next to"))

    def phrase():
        size, texture, at = say["size"], say["texture"], say["place"]
        thing, behind = a(join(size, texture, colour, shape)), join(say["ground_texture"], ground)
        on = say["ground"].format(a(behind) if "background" in say["ground"] else behind)
        if pair:
            other = a(join(say["size2"], COLOUR_NAMES[p["colour2"][i]], SHAPES[p["shape2"][i]]))
            if relation:
                return join(say["opening"], thing, relation, other, on)
            return join(say["opening"], thing, "with" if at else beside, other, at, on)
        if template == 0 and at:
            return at + ", " + join(thing, on)
        if template == 1 and on:
            return join(a(behind), "background with", thing, at)
        if template == 2:
            return ", ".join(words for words in (join(colour, shape), size, texture, at, on) if words)
        if template == 3:
            return join("the", size, shape, at, "is", colour, texture and "and " + texture, on)
        return join(say["opening"], thing, *((at, on) if template < 6 else (on, at)))

    for detail in list(say):
        if len(phrase()) > LONGEST_CAPTION:
            say[detail] = ""                                      # too long: say less
    return phrase()


def render_scenes(indices, split, size=64, seed=0):
    """Scenes number `indices` (N integers >= 0) of `split` ("train" or "val"; separate streams).
    Returns images uint8 (N, 3, size, size), captions (list of N str), labels int64 (N,) in 0..9
    (positions in SHAPES). Scene i depends on (seed, split, i) only; size changes just the sharpness."""
    indices = np.asarray(indices)
    images, captions = np.empty((len(indices), 3, size, size), np.uint8), []
    labels = np.empty(len(indices), np.int64)
    for start in range(0, len(indices), 64):                      # small steps stay in the processor's cache
        part = slice(start, start + 64)
        p = draw_parameters(indices[part], split, seed)
        images[part], labels[part] = draw_images(p, size), p["shape"]
        captions += [write_caption(p, i) for i in range(len(p["shape"]))]
    return images, captions, labels


# ----------------------------------------------------------------------------------------------------------------------
# Text to tokens
# ----------------------------------------------------------------------------------------------------------------------

BYTE_VOCAB = 259                      # padding 0, bytes 1 to 256, start 257, end 258
CLIP_VOCAB = 49408
CLIP_BPE_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
CLIP_BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
TEMPLATES = ("a photo of a {}", "a picture of a {}", "an image of a {}", "a good photo of a {}", "a close-up photo of a {}",
             "a small {}", "a large {}", "{}")


def _pad(token_lists, context_length, start, end):
    """[start, ..., end] of each text, cut to fit (the end token always stays), padded with 0 -> LongTensor (n, context_length)."""
    tokens = torch.zeros(len(token_lists), context_length, dtype=torch.long)
    for row, ids in zip(tokens, token_lists):
        ids = [start, *ids[:context_length - 2], end]
        row[:len(ids)] = torch.tensor(ids)
    return tokens


def byte_tokenizer(texts, context_length=77):
    """UTF-8 bytes as tokens -> LongTensor (n, context_length): for small models, where a vocabulary would be most of the weights."""
    return _pad([[b + 1 for b in text.encode()] for text in texts], context_length, 257, 258)


class ClipBPE:
    """CLIP's tokenizer: tok(list of str, context_length=77) -> LongTensor (n, context_length).

    path: bpe_simple_vocab_16e6.txt.gz; None fetches it (checked) into the torch hub cache. Equal to CLIP's for every text
    that ftfy, which CLIP runs first and this does not, leaves as it is.
    """

    def __init__(self, path=None):
        if path is None:
            path = download(CLIP_BPE_URL, os.path.join(torch.hub.get_dir(), "checkpoints", "bpe_simple_vocab_16e6.txt.gz"), CLIP_BPE_SHA256)
        with gzip.open(path, "rt", encoding="utf-8") as f:
            merges = [tuple(line.split()) for line in f.read().split("\n")[1:CLIP_VOCAB - 2 - 512 + 1]]
        # every byte gets a printable character: itself where it is one, else the next code points from 256 on
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = [b for b in range(256) if b not in printable]
        self.byte_chars = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        symbols = list(self.byte_chars.values())
        symbols += [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.words = {w: (self.ids[w],) for w in ("<|startoftext|>", "<|endoftext|>")}
        letters, numbers = _category_ranges("L"), _category_ranges("N")     # \p{L} and \p{N}, which re does not have
        self.pattern = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
                                  rf"[{letters}]+|[{numbers}]|[^\s{letters}{numbers}]+", re.IGNORECASE)

    def encode_word(self, word):
        """Token ids of one word: merge the neighbouring pair of lowest rank until none is left."""
        if word not in self.words:
            parts = [self.byte_chars[b] for b in word.encode()]
            parts[-1] += "</w>"
            while len(parts) > 1:
                best = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
                if best not in self.ranks:
                    break
                merged, i = [], 0
                while i < len(parts):
                    if tuple(parts[i:i + 2]) == best:
                        merged.append(parts[i] + parts[i + 1])
                        i += 2
                    else:
                        merged.append(parts[i])
                        i += 1
                parts = merged
            self.words[word] = tuple(self.ids[p] for p in parts)
        return self.words[word]

    def __call__(self, texts, context_length=77):
        cleaned = (re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip().lower() for text in texts)
        token_lists = [[i for word in self.pattern.findall(text) for i in self.encode_word(word)] for text in cleaned]
        return _pad(token_lists, context_length, CLIP_VOCAB - 2, CLIP_VOCAB - 1)


def _category_ranges(category):
    """The characters whose Unicode category starts with a letter, as ranges for a regular expression's [...]."""
    members = "".join("x" if unicodedata.category(chr(c))[0] == category else " " for c in range(sys.maxunicode + 1))
    return "".join(f"{chr(m.start())}-{chr(m.end() - 1)}" for m in re.finditer("x+", members))


def make_tokenizer(text_vocab_size, bpe_path=None):
    """The text tokenizer that a model's text_vocab_size means: 259 bytes, 49,408 CLIP's BPE. ValueError for any other."""
    if text_vocab_size == BYTE_VOCAB:
        return byte_tokenizer
    if text_vocab_size == CLIP_VOCAB:
        return ClipBPE(bpe_path)
    raise ValueError(f"no text tokenizer has a vocabulary of {text_vocab_size}: {BYTE_VOCAB} means bytes, {CLIP_VOCAB} CLIP's BPE")


# ----------------------------------------------------------------------------------------------------------------------
# Images to canvases
# ----------------------------------------------------------------------------------------------------------------------

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")


def load_canvas(file, canvas, draft=False):
    """An image file (path or binary file) -> uint8 array (3, canvas, canvas).

    Rotated as EXIF says, transparent pixels on white, any mode to RGB; halved with a box filter while the short side is at
    least twice the canvas, bicubic to the canvas, centre crop (the protocol of METHOD section 7). draft: let a JPEG decode
    at reduced scale first, which is much faster and slightly different. Raises what Pillow raises on a broken file.
    """
    image = Image.open(file)
    if draft:
        image.draft("RGB", (2 * canvas, 2 * canvas))    # JPEG only; never below what the box filter would leave
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    while min(image.size) >= 2 * canvas:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != canvas:
        scale = canvas / min(image.size)
        image = image.resize((max(canvas, round(image.width * scale)), max(canvas, round(image.height * scale))), Image.Resampling.BICUBIC)
    left, top = (image.width - canvas) // 2, (image.height - canvas) // 2
    return np.asarray(image.crop((left, top, left + canvas, top + canvas))).transpose(2, 0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Sources. Each has `class_names` (or None), `name`, and
#   read(reader, n_readers, ...): where training samples come from;   first(n): the fixed order that evaluation takes.
# A sample is (canvas uint8 (3, C, C), caption, label), label -1 where there is none.
# ----------------------------------------------------------------------------------------------------------------------

def _digest(*parts):
    """A short fingerprint of strings, numbers and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update((part if isinstance(part, bytes) else str(part).encode()) + b"\0")
    return digest.hexdigest()[:16]


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason that is counted."""


class BuiltinSource:
    """The procedural set, rendered once into memory. split: "train" or "val" (held out: another random stream)."""

    is_stream = False
    class_names = list(SHAPES)

    def __init__(self, size, canvas, split="train"):
        self.name = f"built-in scenes ({split}, {size:,})"
        self.images, self.captions, self.labels = render_scenes(np.arange(size), split, canvas)

    def __len__(self):
        return len(self.images)

    def fingerprint(self):
        return _digest("built-in", len(self), self.images[:64].tobytes())

    def load(self, index, draft, rng):
        return self.images[index], self.captions[index], int(self.labels[index])


class FolderSource:
    """A folder of class folders of images. The caption is a sidecar NAME.txt, else the class name in a random template."""

    is_stream = False

    def __init__(self, folder, canvas, class_names=None, folders=None):
        """folders: class folders in the order of their labels, those of the training set for held-out data; default: sorted."""
        self.canvas, self.name = canvas, folder
        here = sorted(e.name for e in os.scandir(folder) if e.is_dir())
        unknown = set(here) - set(folders or here)
        if unknown:
            raise ValueError(f"{folder} has class folders that the training data lacks: {', '.join(sorted(unknown)[:5])}")
        self.folders = folders = folders or here
        self.files = [(os.path.join(root, f), label) for label, name in enumerate(folders)
                      for root, _, names in sorted(os.walk(os.path.join(folder, name), followlinks=True)) for f in sorted(names)
                      if f.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
        if not self.files:
            raise ValueError(f"{folder} holds no images in class folders (CLASS/NAME.jpg and the like), nor tars")
        if class_names is not None and len(class_names) != len(folders):
            raise ValueError(f"{len(class_names)} class names for the {len(folders)} class folders of {folder}")
        self.class_names = class_names or [name.replace("_", " ") for name in folders]

    def __len__(self):
        return len(self.files)

    def fingerprint(self):
        """Names and order of the files; not their content, which would take as long as to read them all."""
        start = len(os.path.join(self.name, ""))
        return _digest("folder", *(f"{path[start:]} {label}" for path, label in self.files))

    def load(self, index, draft, rng):
        path, label = self.files[index]
        try:
            image = load_canvas(path, self.canvas, draft)
        except Exception as error:     # Pillow's decoders raise almost anything on a broken file
            raise BadSample(f"broken image ({type(error).__name__})") from error
        sidecar = os.path.splitext(path)[0] + ".txt"
        if os.path.exists(sidecar):
            with open(sidecar, encoding="utf-8", errors="replace") as f:
                return image, f.read().strip(), label
        return image, TEMPLATES[rng.integers(len(TEMPLATES))].format(self.class_names[label]), label


class TarSource:
    """WebDataset tars, streamed: KEY.jpg (or another image), KEY.txt or KEY.json (field caption) and, optionally, KEY.cls.

    label: "cls", or a field of KEY.json; a label is a number, or one of class_names.
    """

    is_stream = True

    def __init__(self, paths, canvas, class_names=None, label="cls", shuffle_buffer=1024, needs_caption=True):
        self.paths, self.canvas, self.class_names, self.label = paths, canvas, class_names, label
        self.shuffle_buffer, self.needs_caption = shuffle_buffer, needs_caption
        self.name = f"{len(paths)} tars, {os.path.basename(paths[0])} ..."

    def fingerprint(self):
        return _digest("tars", self.label, str(self.class_names), *(f"{os.path.basename(p)} {os.path.getsize(p)}" for p in self.paths))

    def shard(self, path, skipped, only_names=False):
        """The samples of one tar as {extension: bytes}; what cannot be read is counted in `skipped` (a Counter).

        only_names: None instead of the bytes, which are then not read.
        """
        sample, key = {}, None
        try:
            with tarfile.open(path, "r:*" if only_names else "r|*") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    if sample and (folder, stem) != key:
                        yield sample
                        sample = {}
                    key = (folder, stem)
                    sample[extension.lower()] = None if only_names else tar.extractfile(member).read()
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            skipped[f"cut-off or unreadable tar {os.path.basename(path)} ({type(error).__name__})"] += 1
            return          # the sample in hand may be incomplete
        if sample:
            yield sample

    def decode(self, sample, draft):
        """{extension: bytes} -> (canvas, caption, label). Raises BadSample."""
        extension = next((e for e in sample if e.rpartition(".")[2] in IMAGE_EXTENSIONS), None)
        if extension is None:
            raise BadSample("no image")
        fields = {}
        if "json" in sample:
            try:
                fields = json.loads(sample["json"])
            except ValueError:
                fields = None
            if not isinstance(fields, dict):
                raise BadSample("broken .json")
        caption = sample["txt"].decode(errors="replace").strip() if "txt" in sample else str(fields.get("caption") or "").strip()
        if not caption and self.needs_caption:
            raise BadSample("no caption")
        label = sample.get("cls", b"").decode(errors="replace").strip() if self.label == "cls" else fields.get(self.label, "")
        try:
            label = -1 if label == "" else self.class_names.index(label) if self.class_names and label in self.class_names else int(label)
        except (ValueError, TypeError, OverflowError):
            raise BadSample("label is neither a number nor one of the class names") from None
        try:
            return load_canvas(io.BytesIO(sample[extension]), self.canvas, draft), caption, label
        except Exception as error:     # Pillow's decoders raise almost anything on a broken file
            raise BadSample(f"broken image ({type(error).__name__})") from error


def expand_paths(pattern):
    """Brace ranges {000..123}, brace lists {a,b} and globs -> the sorted files they mean."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match:
        span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
        choices = [str(i).zfill(len(span[1])) for i in range(int(span[1]), int(span[2]) + 1)] if span else match[1].split(",")
        return [path for c in choices for path in expand_paths(pattern[:match.start()] + c + pattern[match.end():])]
    return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]


def find_tars(pattern):
    """The tars that a glob or brace pattern means. FileNotFoundError if there is none, or one that a brace names is missing."""
    paths = expand_paths(pattern)
    missing = [p for p in paths if not os.path.isfile(p)]
    if not paths or missing:
        raise FileNotFoundError(f"no data at {missing[0] if missing else pattern!r}: expected a folder of class folders, or tars by glob "
                                "or brace pattern such as 'train-{00000..00041}.tar' (in quotes, or the shell expands it)")
    return paths


def open_source(data, canvas, split="train", train_size=8192, classnames=None, label="cls", needs_caption=True, folders=None):
    """The source that --data means: None (the built-in set), a folder of class folders, or tars by glob or brace pattern.

    classnames: a file with a class name on each line, in the order of the labels; folders: as in FolderSource. Raises FileNotFoundError or ValueError.
    """
    names = None
    if classnames:
        with open(classnames, encoding="utf-8") as f:
            names = [line.strip() for line in f if line.strip()]
    if data is None:
        return BuiltinSource(train_size if split == "train" else 2048, canvas, split)
    if os.path.isdir(data):
        tars = sorted(glob.glob(os.path.join(data, "*.tar")))
        return TarSource(tars, canvas, names, label, needs_caption=needs_caption) if tars else FolderSource(data, canvas, names, folders)
    return TarSource(find_tars(data), canvas, names, label, needs_caption=needs_caption)


# ----------------------------------------------------------------------------------------------------------------------
# The loader: reproducible from the seed, and each batch says where it stands
# ----------------------------------------------------------------------------------------------------------------------

def permutation(seed, epoch, n):
    """The order of n things in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


class SampleStream(torch.utils.data.IterableDataset):
    """Endless batches of this rank's share of the global batch, as dicts of

        images uint8 (b, 3, C, C), tokens int64 (b, L) or None, labels int64 (b,),
        position: (role, state) of the reader that made it,   skipped: {reason: how many samples it has skipped so far}

    A source with random access: global batch s takes places [s B, (s + 1) B) of an endless shuffled sequence, rank r every
    W-th of them, whatever W. Tars: reader k of n (ranks x workers) takes every n-th shard of an epoch's random order, or
    every n-th sample of all shards where those are fewer, and shuffles blocks of `shuffle_buffer` samples.

    position: {"batches": number of batches done, "states": {role: state}}, as `advance` keeps it, to go on from there.
    """

    def __init__(self, source, batch_size, tokenize, context_length, seed, n_workers, position=None, max_skipped=0.1):
        self.source, self.global_batch, self.tokenize, self.context_length, self.seed = source, batch_size, tokenize, context_length, seed
        self.rank, self.world = rank(), world_size()
        self.roles = max(n_workers, 1)
        self.position = position or {"batches": 0, "states": {}}
        self.max_skipped = max_skipped
        if source.is_stream and self.position["batches"] and self.position.get("readers") != self.roles * self.world:
            raise ValueError(f"the run read its tars with {self.position.get('readers')} readers (ranks x workers), now there are "
                             f"{self.roles * self.world}: resume with the same number of each")

    def advance(self, position, batch):
        """The position after this batch."""
        role, state = batch["position"]
        return {"batches": position["batches"] + 1, "states": {**position["states"], role: state}, "readers": self.roles * self.world}

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        done = self.position["batches"]
        # the loader asks workers in turn from worker 0 on, so the worker that comes first takes the role that is next
        role = ((info.id if info else 0) + done) % self.roles
        if self.source.is_stream:
            yield from self.stream_batches(role, self.position["states"].get(role))
        else:
            skipped = Counter(self.position["states"].get(role) or {})
            for step in itertools.count(done):
                if step % self.roles == role:
                    yield self.indexed_batch(step, role, skipped)

    def collate(self, samples, role, state, skipped):
        images, captions, labels = zip(*samples)
        return dict(images=torch.from_numpy(np.stack(images)), labels=torch.tensor(labels),
                    tokens=self.tokenize(captions, self.context_length) if self.tokenize else None,
                    position=(role, state), skipped=dict(skipped))

    def check(self, skipped, n_good):
        n_bad = sum(skipped.values())
        if n_bad > 10 and n_bad > self.max_skipped * (n_bad + n_good):
            raise RuntimeError(f"{n_bad} of {n_bad + n_good} samples of {self.source.name} could not be used, more than the share of "
                               f"{self.max_skipped} that --max_skipped allows: {dict(skipped)}")

    def indexed_batch(self, step, role, skipped):
        n, samples = len(self.source), []
        for place in range(step * self.global_batch + self.rank, (step + 1) * self.global_batch, self.world):
            epoch, i = divmod(place, n)
            if epoch != getattr(self, "epoch", None):
                self.epoch, self.order = epoch, permutation(self.seed, epoch, n)
            index = int(self.order[i])
            for attempt in range(n):      # a broken sample is replaced by the next one
                try:
                    rng = np.random.default_rng([self.seed, epoch, index])
                    samples.append(self.source.load((index + attempt) % n, True, rng))
                    break
                except BadSample as reason:
                    skipped[str(reason)] += 1
                    self.check(skipped, step // self.roles * (self.global_batch // self.world) + len(samples))
            else:
                raise RuntimeError(f"{self.source.name}: not one of {n} samples can be used: {dict(skipped)}")
        return self.collate(samples, role, dict(skipped), skipped)

    def stream_batches(self, role, state):
        reader, n_readers = role * self.world + self.rank, self.roles * self.world
        batch, n_good, skipped = [], state[4] if state else 0, Counter()
        for sample, place in self.stream_samples(reader, n_readers, state, skipped):
            try:
                batch.append(self.source.decode(sample, True))
            except BadSample as reason:
                skipped[str(reason)] += 1
                self.check(skipped, n_good)
                continue
            n_good += 1
            if len(batch) == self.global_batch // self.world:
                yield self.collate(batch, role, (*place, n_good, dict(skipped)), skipped)
                batch = []

    def stream_samples(self, reader, n_readers, state, skipped):
        """Undecoded samples in this reader's order, each with where it stands: (epoch, shard, sample in shard) at which its
        block starts, and its place in the block plus one."""
        *start, offset, _, known_skips = state or (0, 0, 0, 0, 0, None)
        in_order = self.samples_in_order(reader, n_readers, *start, skipped)
        while True:
            block = []
            for sample, end in in_order:
                if sample is None:                  # a block does not cross the end of an epoch
                    break
                block.append(sample)
                if len(block) == self.source.shuffle_buffer:
                    break
            if known_skips is not None:             # a resumed block was counted when it was first read
                skipped.clear()
                skipped.update(known_skips)
                known_skips = None
            if not block and start[1:] == [0, 0]:
                raise RuntimeError(f"{self.source.name}: a whole epoch had no sample for reader {reader} of {n_readers}: {dict(skipped)}")
            order = np.random.default_rng([self.seed, reader, *start]).permutation(len(block))
            for place in range(offset, len(block)):
                yield block[order[place]], (*start, place + 1)
            start, offset = list(end), 0

    def samples_in_order(self, reader, n_readers, epoch, shard, first, skipped):
        """This reader's samples as they lie in its shards, each with the place (epoch, shard, sample) after it; None ends an epoch."""
        paths = self.source.paths
        while True:
            order = permutation(self.seed, epoch, len(paths))
            by_shard = len(paths) >= n_readers
            mine = order[reader::n_readers] if by_shard else order
            for k in range(shard, len(mine)):
                for i, sample in enumerate(self.source.shard(paths[mine[k]], skipped)):
                    if i >= first and (by_shard or i % n_readers == reader):
                        yield sample, (epoch, k, i + 1)
                first = 0
            epoch, shard = epoch + 1, 0
            yield None, (epoch, 0, 0)


def make_loader(stream, n_workers, pin_memory=False):
    """Batches of a SampleStream, made by n_workers processes ahead of time (0: in this one)."""
    return torch.utils.data.DataLoader(stream, batch_size=None, num_workers=n_workers, pin_memory=pin_memory,
                                       prefetch_factor=4 if n_workers else None, persistent_workers=n_workers > 0)


def load_evaluation_set(source, n, seed=0, whole=False):
    """This rank's share of n samples in a fixed order (whole: all of them) -> images uint8 (m, 3, C, C), captions, labels int64 (m,).

    Sources with random access: a random subset that depends on the seed alone; tars: the first n samples
    of shards in random order. Unusable
    samples are left out. Raises RuntimeError where nothing is left.
    """
    reasons, (first, every) = Counter(), (0, 1) if whole else (rank(), world_size())

    def samples():
        if source.is_stream:
            shards = permutation(seed, 0, len(source.paths))      # tars are often written class by class
            everything = (s for k in shards for s in source.shard(source.paths[k], reasons))
            for sample in itertools.islice(everything, first, n, every):
                yield lambda: source.decode(sample, False)
        else:
            for index in permutation(seed, 0, len(source))[:n][first::every]:
                yield lambda: source.load(int(index), False, np.random.default_rng([seed, int(index)]))
    good = []
    for load in samples():
        try:
            good.append(load())
        except BadSample as reason:
            reasons[str(reason)] += 1
    if not good:
        raise RuntimeError(f"no usable sample for evaluation in {source.name}: {dict(reasons)}")
    images, captions, labels = zip(*good)
    return torch.from_numpy(np.stack(images)), list(captions), torch.tensor(labels)


# ----------------------------------------------------------------------------------------------------------------------
# Views, made on the device for the whole batch at once
# ----------------------------------------------------------------------------------------------------------------------

def step_generator(seed, step, device):
    """The generator of everything that a training step draws: for the global batch, whatever the number of ranks."""
    state = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator(device).manual_seed(state)


def _local(draws):
    """This rank's samples of draws for the global batch, whose last axis counts samples: every W-th."""
    return draws[..., rank()::world_size()]


def draw_boxes(uniform, area):
    """Random crops as torchvision's RandomResizedCrop draws them: aspect 3/4 to 4/3, the first of 10 tries that fits.

    uniform (22, B) in [0, 1); area: (lowest, highest) share of the image. -> boxes (4, B): left, top, width, height as
    shares of the side. If none fits: the whole image.
    """
    areas = area[0] + (area[1] - area[0]) * uniform[:10]
    aspects = torch.exp(math.log(4 / 3) * (2 * uniform[10:20] - 1))
    widths, heights = (areas * aspects).sqrt(), (areas / aspects).sqrt()
    fits = (widths <= 1) & (heights <= 1)
    first = fits.int().argmax(dim=0, keepdim=True)
    any_fits = fits.any(dim=0)
    width, height = (torch.where(any_fits, v.gather(0, first)[0], 1.0) for v in (widths, heights))
    x, y = uniform[20:22]
    return torch.stack((x * (1 - width), y * (1 - height), width, height))


def resampling_matrix(start, length, in_size, out_size, flip=None):
    """Bicubic resampling of a span of a line as a matrix (B, out_size, in_size), antialiased as Pillow's resize(box=...).

    start, length (B,) in pixels; flip (B,) bool mirrors the output.
    """
    scale = (length / out_size)[:, None, None]
    stretch = scale.clamp(min=1)                              # the kernel widens where the image shrinks
    places = torch.arange(out_size, device=start.device).view(1, -1, 1) + 0.5
    if flip is not None:
        places = torch.where(flip[:, None, None], out_size - places, places)
    centres = start[:, None, None] + places * scale
    x = (torch.arange(in_size, device=start.device).view(1, 1, -1) + 0.5 - centres).abs() / stretch
    # Keys' cubic kernel with a = -1/2
    weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))
    return weights / weights.sum(dim=-1, keepdim=True)


def resample(images, boxes, out_size, flip=None):
    """Crop and resize images (B, 3, C, C) to n crops of each, (n B, 3, out_size, out_size), crop by crop.

    boxes (4, n B) in shares of the side, a box for each crop, and flip (n B,) bool. Two matrix products, in which the
    crops of an image stand below each other, so that the image itself is read once and never repeated.
    """
    B, C = len(images), images.shape[-1]
    n = boxes.shape[1] // B
    left, top, width, height = boxes * C
    rows = resampling_matrix(top, height, C, out_size).view(n, B, out_size, C)
    columns = resampling_matrix(left, width, C, out_size, flip).view(n, B, out_size, C)
    x = rows.transpose(0, 1).reshape(B, 1, n * out_size, C) @ images                             # (B, 3, n out, C)
    x = x.view(B, 3, n, out_size, C) @ columns.permute(1, 0, 3, 2)[:, None]                      # (B, 3, n, out, out)
    return x.permute(2, 0, 1, 3, 4).reshape(n * B, 3, out_size, out_size)


def clip_view(canvases, generator, batch_size, size):
    """CLIP's and the decoder's view: uint8 canvases (b, 3, C, C) -> normalised (b, 3, size, size).

    A bicubic random crop of area 0.9 to 1.0, no flip (OpenCLIP); batch_size is global.
    """
    boxes = draw_boxes(_local(torch.rand(22, batch_size, generator=generator, device=canvases.device)), (0.9, 1.0))
    return normalize(resample(canvases.float() / 255, boxes, size).clamp(0, 1))


LUMA = (0.2989, 0.587, 0.114)      # brightness of RGB (ITU-R 601, as torchvision)


def shift_hue(x, shift):
    """Rotate the hue of RGB (B, 3, H, W) in [0, 1] by shift (B, 1, 1, 1), in turns, through HSV."""
    value, lowest = x.amax(dim=1), x.amin(dim=1)
    chroma = value - lowest
    r, g, b = x.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))   # in sixths of a turn
    hue = hue + 6 * shift[:, 0]
    corners = constant((5.0, 3.0, 1.0), x.device).view(3, 1, 1)
    k = (corners + hue[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def colour_jitter(x, uniform, strengths=(0.4, 0.4, 0.2, 0.1), probability=0.8, grey_probability=0.2):
    """Brightness, contrast, saturation and hue jitter in random order, then greyscale; each sample by its own draws.

    x (B, 3, H, W) in [0, 1], uniform (10, B). Of the four, all but hue blend the image with a reference (black, its mean
    brightness, its grey version): an affine map of RGB, so one product serves whichever of them a sample has next. Hue costs
    most and is done once: the blends that come before it, then it, then the others.
    """
    apply, is_grey, factors, keys = uniform[0] < probability, uniform[1] < grey_probability, uniform[2:6], uniform[6:10]
    order = keys[:3].argsort(dim=0)                                             # (3, B): which blend comes first, second, third
    before_hue = keys[:3].gather(0, order) < keys[3]
    strength = constant(strengths, x.device)[:, None]
    changes = torch.where(apply, strength * (2 * factors - 1), 0.0)             # factor - 1; 0 changes nothing
    luma, identity = constant(LUMA, x.device), torch.eye(3, device=x.device)
    to_grey = luma.expand(3, 3)
    shape, x = x.shape, x.flatten(2)                                            # (B, 3, H W)
    for is_due in (before_hue, ~before_hue):
        for kind, due in zip(order, is_due):
            change = torch.where(due, changes[:3].gather(0, kind[None])[0], 0.0)[:, None, None]
            kind = kind[:, None, None]
            # x + change (x - reference), the reference being 0, the mean of luma x, or luma x
            matrix = identity * (1 + change) - torch.where(kind == 2, change, 0.0) * to_grey
            offset = torch.where(kind == 1, -change, 0.0) * (x.mean(dim=2) @ luma)[:, None, None]
            x = torch.baddbmm(offset.expand(-1, 3, 1), matrix, x).clamp_(0, 1)
        if is_due is before_hue:
            x = shift_hue(x.view(shape), changes[3].view(-1, 1, 1, 1)).flatten(2)
    return (torch.where(is_grey[:, None, None], to_grey, identity) @ x).view(shape)


def gaussian_blur(x, sigma):
    """9-tap Gaussian blur with reflected borders of (B, 3, S, S), each sample by its own sigma (B,) in pixels; 0: none."""
    S, taps = x.shape[-1], torch.arange(-4, 5, device=x.device)
    kernel = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)                           # (B, 9)
    source = torch.arange(S, device=x.device)[:, None] + taps                   # (S, 9): where each tap reads
    period = max(2 * (S - 1), 1)
    source = source.abs() % period
    source = torch.minimum(source, period - source)
    matrix = x.new_zeros(len(x), S, S).scatter_add(2, source.expand(len(x), -1, -1), kernel[:, None].expand(-1, S, -1))[:, None]
    return matrix @ x @ matrix.transpose(-2, -1)


def augment(canvases, uniform, size, area, blur_rates, solarize_rates):
    """DINOv2's n crops of each sample: canvases (b, 3, C, C) in [0, 1] -> normalised (n b, 3, size, size), crop by crop.

    uniform (36, n, b) in [0, 1); blur_rates and solarize_rates: n probabilities. Crop and flip; colour jitter and greyscale;
    blur; solarise.
    """
    rate = lambda rates: constant(rates, canvases.device)[:, None].expand(-1, len(canvases)).flatten()      # (n b,)
    uniform = uniform.flatten(1)
    boxes, u = draw_boxes(uniform[:22], area), uniform[22:]
    x = resample(canvases, boxes, size, flip=u[0] < 0.5).clamp(0, 1)
    x = colour_jitter(x, u[1:11])
    x = gaussian_blur(x, torch.where(u[11] < rate(blur_rates), 0.1 + 1.9 * u[12], 0.0))
    if any(solarize_rates):
        x = torch.where((u[13] < rate(solarize_rates)).view(-1, 1, 1, 1) & (x >= 128 / 255), 1 - x, x)
    return normalize(x)


def ssl_views(canvases, generator, batch_size, global_size, local_size, n_local):
    """DINOv2's crops: uint8 canvases (b, 3, C, C) -> (2b, 3, G, G) and (n_local b, 3, L, L), crop by crop, normalised.

    2 global crops (area 0.32 to 1) and n_local local ones (0.05 to 0.32). Blur: 1.0, 0.1 and 0.5, the rates that the paper
    of DINO states; DINOv2's published code has them inverted (0, 0.9, 0.5). batch_size is global.
    """
    canvases, device = canvases.float() / 255, canvases.device
    uniform = lambda n: _local(torch.rand(36, n, batch_size, generator=generator, device=device))
    return (augment(canvases, uniform(2), global_size, (0.32, 1.0), (1.0, 0.1), (0.0, 0.2)),
            augment(canvases, uniform(n_local), local_size, (0.05, 0.32), n_local * (0.5,), n_local * (0.0,)))


# ----------------------------------------------------------------------------------------------------------------------
# Masks in blocks, with exact counts
# ----------------------------------------------------------------------------------------------------------------------

def draw_mask_counts(generator, batch_size, n_patches, ratio=(0.1, 0.5)):
    """How many patches of each global crop are masked: (2, B) int64, for the global batch. B must be even.

    Half of the 2B crops are masked, the i-th of them with a share uniform in the i-th of B equal slices of `ratio`
    (DINOv2). Slices i and B - 1 - i are drawn as mirror images, so their counts add up to a constant, and go to two of the
    four crops of samples j and j + B/2: whatever rank holds these two, its number of masked patches never changes.
    """
    half, (low, high), device = batch_size // 2, ratio, generator.device
    slices = torch.arange(half, device=device) + torch.rand(half, generator=generator, device=device)
    share = low + (high - low) * slices / batch_size
    pair_total = round((low + high) * n_patches)
    first = (share * n_patches).round().long()
    counts = torch.stack((first, pair_total - first, torch.zeros_like(first), torch.zeros_like(first)))      # (4, B/2)
    counts = counts[:, torch.randperm(half, generator=generator, device=device)]                           # pairs over samples
    counts = counts.gather(0, torch.rand(4, half, generator=generator, device=device).argsort(dim=0))      # and over their crops
    return counts.view(2, 2, half).flatten(1)


def draw_masks(generator, batch_size, grid, ratio=(0.1, 0.5), n_rounds=16):
    """Block masks of this rank's global crops: (2b, H*W) bool, crop by crop, exactly b round((low + high) H W) / 2 of it True.

    As DINOv2: blocks of 4 patches to what is left of the count, log-uniform aspect 0.3 to 1/0.3, taken if they add
    something and not too much. It stops where 10 tries fail; here n_rounds blocks are tried for all crops at once, and
    patches at the edge of what is masked make up the rest. batch_size is global.
    """
    (H, W), device = grid, generator.device
    counts = _local(draw_mask_counts(generator, batch_size, H * W, ratio)).flatten()                       # (2b,)
    uniform = _local(torch.rand(n_rounds, 4, 2, batch_size, generator=generator, device=device)).flatten(2)
    noise = _local(torch.rand(H * W, 2, batch_size, generator=generator, device=device)).flatten(1).T      # (2b, H*W)
    rows, columns = (torch.arange(n, device=device) for n in (H, W))
    masks = torch.zeros(len(counts), H, W, dtype=torch.bool, device=device)
    left = counts
    for area, aspect, y, x in uniform:
        area = 4 + area * (left - 4).clamp(min=0)
        aspect = torch.exp(math.log(1 / 0.3) * (2 * aspect - 1))
        height, width = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        top, leftmost = (y * (H - height + 1)).long(), (x * (W - width + 1)).long()
        block = ((rows >= top[:, None]) & (rows < (top + height)[:, None]))[:, :, None] & ((columns >= leftmost[:, None]) & (columns < (leftmost + width)[:, None]))[:, None]
        added = (block & ~masks).sum(dim=(1, 2))
        accept = (height < H) & (width < W) & (added <= left)
        masks = masks | (block & accept[:, None, None])
        left = left - torch.where(accept, added, 0)
    # what is missing: unmasked patches, those with most masked neighbours first
    padded = F.pad(masks.float(), (1, 1, 1, 1))
    neighbours = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    score = torch.where(masks.flatten(1), -1.0, neighbours.flatten(1) + noise)
    position = score.argsort(dim=1, descending=True).argsort(dim=1)
    return masks.flatten(1) | (position < left[:, None])


# ----------------------------------------------------------------------------------------------------------------------
# Cached latents: each image and its mirror image, encoded once
#
#   latents.bin     (rows, 2, d, h, w) bfloat16 or float32, memory-mapped; row i is sample i of the source, [i, 1] mirrored
#   labels.npy      int64 (rows,), -1 where the sample has none or could not be used: such rows are never drawn
#   cache.json      shape, dtype, class names, and the fingerprint that tells whether the cache is that of these settings
#   latents_stats.pt    {'mean', 'std'} of shape (1, d, 1, 1), the format of the authors' files
# ----------------------------------------------------------------------------------------------------------------------

class RowReader(torch.utils.data.IterableDataset):
    """This rank's samples of a source, each once: (row, canvas, label), the row being its place in the whole source.

    Readers (ranks x workers) split them as SampleStream does. counts: samples in each tar, from count_samples. A sample
    that cannot be used comes as (-1, reason, -1).
    """

    def __init__(self, source, counts, n_workers):
        self.source, self.counts, self.roles = source, counts, max(n_workers, 1)
        self.rank, self.world = rank(), world_size()

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        reader, n_readers = (info.id if info else 0) * self.world + self.rank, self.roles * self.world
        for row, load in (self.tar_samples if self.source.is_stream else self.indexed_samples)(reader, n_readers):
            try:
                image, _, label = load()
                yield row, torch.from_numpy(np.ascontiguousarray(image)), label
            except BadSample as reason:
                yield -1, str(reason), -1

    def indexed_samples(self, reader, n_readers):
        for row in range(reader, len(self.source), n_readers):
            yield row, lambda: self.source.load(row, False, np.random.default_rng([0, row]))

    def tar_samples(self, reader, n_readers):
        starts = np.concatenate(([0], np.cumsum(self.counts)))
        by_shard = len(self.counts) >= n_readers
        for k in range(reader if by_shard else 0, len(self.counts), n_readers if by_shard else 1):
            samples = self.source.shard(self.source.paths[k], Counter())         # what is broken has been counted already
            for i, sample in enumerate(itertools.islice(samples, int(self.counts[k]))):
                if by_shard or i % n_readers == reader:
                    yield int(starts[k]) + i, lambda: self.source.decode(sample, False)

    @staticmethod
    def collate(samples):
        """-> rows (b,), images uint8 (b, 3, C, C) or None, labels (b,), reasons of the samples left out."""
        good, reasons = [s for s in samples if s[0] >= 0], [s[1] for s in samples if s[0] < 0]
        images = torch.stack([s[1] for s in good]) if good else None
        return torch.tensor([s[0] for s in good]), images, torch.tensor([s[2] for s in good]), reasons


def count_samples(source):
    """Samples in each tar of a source, or None for one with random access; and what this rank, looking at its share, found broken."""
    skipped = Counter()
    if not source.is_stream:
        return None, skipped
    counts = np.zeros(len(source.paths), np.int64)
    for k in range(rank(), len(counts), world_size()):
        counts[k] = sum(1 for _ in source.shard(source.paths[k], skipped, only_names=True))
    return sum(gather_objects(counts)), skipped


def write_latent_cache(folder, source, encode, latent_shape, fingerprint, dtype="bf16", batch_size=256, n_workers=0, max_skipped=0.1, progress=lambda n: None):
    """Encode a whole source and its mirror images into folder, by all ranks together -> {reason: samples left out}.

    encode: uint8 (b, 3, C, C) on the host -> latents (b, *latent_shape). The folder appears under its name when it is complete.
    progress: called with the number of samples done. Raises RuntimeError if more than the share max_skipped cannot be used.
    """
    unfinished = folder.rstrip("/") + ".unfinished"
    counts, skipped = count_samples(source)
    n_rows = len(source) if counts is None else int(counts.sum())
    shape = (n_rows, 2, *latent_shape)
    paths = [os.path.join(unfinished, name) for name in ("latents.bin", "labels.npy")]
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.makedirs(unfinished)
        np.memmap(paths[0], _MEMORY_TYPES[dtype][0], "w+", shape=shape).flush()
        np.save(paths[1], np.full(n_rows, -1, np.int64))
    barrier()
    latents, labels = np.memmap(paths[0], _MEMORY_TYPES[dtype][0], "r+", shape=shape), np.load(paths[1], mmap_mode="r+")
    reader = RowReader(source, counts, n_workers)
    for rows, images, classes, reasons in torch.utils.data.DataLoader(reader, batch_size=batch_size, num_workers=n_workers, collate_fn=RowReader.collate):
        skipped.update(reasons)
        if images is not None:
            pair = torch.stack((encode(images), encode(images.flip(-1))), dim=1).cpu()          # (b, 2, d, h, w)
            latents[rows.numpy()] = pair.to(_MEMORY_TYPES[dtype][1]).view(_MEMORY_TYPES[dtype][2]).numpy()
            labels[rows.numpy()] = classes.numpy()
        progress(len(rows) + len(reasons))
    latents.flush()
    labels.flush()
    skipped = sum(gather_objects(skipped), Counter())
    usable = np.load(paths[1]) >= 0
    if sum(skipped.values()) > max_skipped * n_rows:
        raise RuntimeError(f"{sum(skipped.values())} of {n_rows} samples of {source.name} could not be used, more than the share of {max_skipped} "
                           f"that --max_skipped allows: {dict(skipped)}")
    if not usable.any():
        raise RuntimeError(f"no sample of {source.name} has a class, which a class-conditional model needs: class folders, .cls files, or --label")
    if rank() == 0:
        rows = np.flatnonzero(usable)
        some = rows[np.linspace(0, len(rows) - 1, min(len(rows), 10_000)).astype(np.int64)]      # the authors take 10,000 as well
        x = torch.from_numpy(latents[some, 0]).view(_MEMORY_TYPES[dtype][1]).double()
        std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
        write_atomically(os.path.join(unfinished, "latents_stats.pt"), lambda f: torch.save({"mean": mean.float(), "std": std.float()}, f))
        about = dict(shape=shape, dtype=dtype, class_names=source.class_names, fingerprint=fingerprint, skipped=dict(skipped))
        write_atomically(os.path.join(unfinished, "cache.json"), lambda f: f.write(json.dumps(about, indent=2).encode()))
        os.rename(unfinished, folder)
    barrier()
    return dict(skipped)


# --cache_dtype -> type on disk (NumPy has no bfloat16), type of the latents, the same bits as a type that NumPy has
_MEMORY_TYPES = {"bf16": (np.int16, torch.bfloat16, torch.int16), "fp32": (np.float32, torch.float32, torch.float32)}


def read_latent_stats(path):
    """{'mean', 'std'} of shape (1, d, 1, 1), as LightningDiT and this project write them -> the two tensors, fp32."""
    stats = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(stats, dict) or not {"mean", "std"} <= set(stats) or stats["mean"].ndim != 4:
        raise ValueError(f"{path} is not a file of latent statistics: expected {{'mean', 'std'}} of shape (1, d, 1, 1)")
    return stats["mean"].float(), stats["std"].float()


def is_latent_cache(folder):
    """Has write_latent_cache finished this folder?"""
    return os.path.isfile(os.path.join(folder, "cache.json"))


class LatentCache:
    """A folder that write_latent_cache has made. fingerprint: what it must be; ValueError names what differs."""

    def __init__(self, folder, fingerprint=None):
        with open(os.path.join(folder, "cache.json"), encoding="utf-8") as f:
            about = json.load(f)
        differs = [k for k, v in (fingerprint or {}).items() if about["fingerprint"].get(k) != v]
        if differs:
            raise ValueError(f"the latents in {folder} were made with another {' and '.join(differs)}: choose another --cache, or delete that folder")
        memory_type, self.dtype, _ = _MEMORY_TYPES[about["dtype"]]
        self.latents = np.memmap(os.path.join(folder, "latents.bin"), memory_type, "r", shape=tuple(about["shape"]))
        labels = np.load(os.path.join(folder, "labels.npy"))
        self.rows = np.flatnonzero(labels >= 0)
        self.labels, self.class_names, self.skipped = labels, about["class_names"], about["skipped"]
        self.num_classes = max(int(labels.max()) + 1, len(self.class_names or ()))
        self.mean, self.std = read_latent_stats(os.path.join(folder, "latents_stats.pt"))
        self.ahead = ThreadPoolExecutor(1)
        self.next = None

    def __len__(self):
        return len(self.rows)

    def read(self, step, batch_size, seed):
        """This rank's share of global batch `step`, drawn from an endless shuffled sequence -> latents (b, 2, d, h, w), labels (b,)."""
        places, n = np.arange(step * batch_size + rank(), (step + 1) * batch_size, world_size()), len(self.rows)
        rows = np.empty_like(places)
        for epoch in np.unique(places // n):
            if epoch != getattr(self, "epoch", None):
                self.epoch, self.order = epoch, permutation(seed, int(epoch), n)
            here = places // n == epoch
            rows[here] = self.rows[self.order[places[here] % n]]
        return torch.from_numpy(self.latents[rows]).view(self.dtype), torch.from_numpy(self.labels[rows])

    def batch(self, step, batch_size, seed):
        """The same, with the next step's batch read in the meantime."""
        wanted, following = (step, batch_size, seed), (step + 1, batch_size, seed)
        pending = self.next[1] if self.next is not None and self.next[0] == wanted else self.ahead.submit(self.read, *wanted)
        self.next = (following, self.ahead.submit(self.read, *following))
        return pending.result()
