"""
What is measured of a tokenizer, and every picture.

Here: what train_tokenizer.py shows while it trains, on held-out data: PSNR of reconstructions, image-text retrieval, linear
and k-NN accuracy on latents, each beside what chance gives, the picture of reconstructions and the curves of a run.
"""
import json
import math
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import draw_boxes, gaussian_blur, load_evaluation_set, resample, step_generator
from losses import barrier, gather_objects, rank
from vtp import denormalize, normalize, write_atomically

# ----------------------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------------------

def psnr(images, references, data_range=1.0):
    """Peak signal-to-noise ratio in dB of each image: (B, C, H, W) twice, of that data range -> (B,)."""
    mse = ((images.float() - references.float()) ** 2).flatten(1).mean(dim=1)
    return 10 * torch.log10(data_range ** 2 / mse)


def retrieval(image_features, text_features, captions):
    """Image-text retrieval: features (n, D), L2-normalised, row i of both from sample i -> dict of top-1 shares.

    A hit is a sample with the same caption, since a set may hold the same caption twice; chance is what a random pick hits.
    """
    ids = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    ids = torch.tensor([ids[c] for c in captions])
    similarity = image_features.float() @ text_features.float().T
    return dict(image_to_text=(ids[similarity.argmax(dim=1)] == ids).float().mean().item(),
                text_to_image=(ids[similarity.argmax(dim=0)] == ids).float().mean().item(),
                retrieval_chance=(ids[:, None] == ids).float().mean().item())


def balanced_accuracy(predictions, labels):
    """Mean over the classes that occur of the share of a class that is right; chance is 1 / number of classes."""
    return torch.stack([(predictions[labels == c] == c).float().mean() for c in labels.unique()]).mean().item()


def knn_predict(train_features, train_labels, features, k=20, temperature=0.07):
    """k-nearest-neighbour classes by cosine, votes weighted by exp(cosine / temperature) (DINO): (n, D) -> (n,)."""
    train_features, features = (F.normalize(f.float(), dim=1) for f in (train_features, features))
    similarity, nearest = (features @ train_features.T).topk(min(k, len(train_features)), dim=1)
    votes = torch.zeros(len(features), int(train_labels.max()) + 1).scatter_add(1, train_labels[nearest], (similarity / temperature).exp())
    return votes.argmax(dim=1)


def linear_predict(train_features, train_labels, features, penalty=1e-3):
    """Classes by a linear probe: multinomial logistic regression on standardised features, every class weighing the same.

    train_features (n, D), labels int64 (n,), features (m, D) -> (m,). Solved by L-BFGS with an L2 penalty on the weights.
    """
    mean, std = train_features.mean(dim=0), train_features.std(dim=0).clamp(min=1e-6)
    x, n_classes = ((train_features - mean) / std).float(), int(train_labels.max()) + 1
    class_weights = len(x) / (train_labels.bincount(minlength=n_classes).clamp(min=1) * n_classes)
    with torch.enable_grad():
        weight = torch.zeros(x.shape[1], n_classes, requires_grad=True)
        bias = torch.zeros(n_classes, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            loss = F.cross_entropy(x @ weight + bias, train_labels, class_weights) + penalty * (weight ** 2).sum()
            loss.backward()
            return loss
        solver.step(closure)
        return (((features - mean) / std).float() @ weight + bias).argmax(dim=1).detach()


# ----------------------------------------------------------------------------------------------------------------------
# A tokenizer on held-out data
# ----------------------------------------------------------------------------------------------------------------------

def gather_from_ranks(tensors):
    """{name: CPU tensor (m, ...)} -> the same with the rows of all ranks; numbers of rows may differ."""
    parts = gather_objects(tensors)
    return {k: torch.cat([p[k] for p in parts]) for k in tensors}


@torch.no_grad()
def run_tokenizer(model, samples, tokenize, batch_size=128, only_latents=False, bf16=False):
    """What a tokenizer makes of samples (images uint8 (m, 3, C, C), captions, labels) -> dict of CPU tensors:

    latents (m, d), the mean over patches; labels; and, unless only_latents, psnr (m,) of reconstructions clamped to [0, 1]
    (if it has a decoder), image_features and text_features (if it has a text tower). bf16: under autocast, as in training.
    """
    images, captions, labels = samples
    config, device = model.config, model.trunk.cls_token.device
    out = dict(latents=[], psnr=[], image_features=[], text_features=[])
    for start in range(0, len(images), batch_size):
        pixels = to_image_size(images[start:start + batch_size].to(device), config.image_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            cls, patches = model.features(normalize(pixels))
            latents = model.to_latents(patches, *pixels.shape[-2:])
            if config.train_reconstruction and not only_latents:
                reconstructions = model.decode(latents)
                out["psnr"].append(psnr(denormalize(reconstructions.float()).clamp(0, 1), pixels))
            if config.train_clip and not only_latents:
                tokens = tokenize(captions[start:start + batch_size], config.text_context_length).to(device)
                out["image_features"].append(F.normalize(model.project_image(cls, patches).float(), dim=-1))
                out["text_features"].append(F.normalize(model.encode_text(tokens, normalize=False).float(), dim=-1))
        out["latents"].append(latents.float().mean(dim=(2, 3)))
    return {k: torch.cat(v).cpu() for k, v in out.items() if v} | dict(labels=labels)


def to_image_size(canvases, size):
    """uint8 canvases (B, 3, C, C) -> pixels in [0, 1] (B, 3, size, size), bicubic where the sizes differ."""
    pixels = canvases.float() / 255
    if pixels.shape[-1] == size:
        return pixels
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=pixels.device)[:, None].expand(4, len(pixels))
    return resample(pixels, whole, size).clamp(0, 1)


def evaluate_tokenizer(model, held_out, gallery, tokenize, bf16=False):
    """The measures that training reports, over all ranks -> dict of floats. Each rank passes its share of both sets.

    held_out, gallery: (images uint8 (m, 3, C, C), captions, labels int64 (m,)); the classifiers learn from the gallery's
    latents (training data) and are measured on the held-out ones; without labels (-1) they are left out.
    """
    ours, known = (gather_from_ranks(run_tokenizer(model, s, tokenize, only_latents=s is gallery, bf16=bf16)) for s in (held_out, gallery))
    captions, row = [c for part in gather_objects(held_out[1]) for c in part], {}
    if "psnr" in ours:
        row["psnr"] = ours["psnr"].mean().item()
    if "image_features" in ours:
        row.update(retrieval(ours["image_features"], ours["text_features"], captions))
    has_label, is_known = ours["labels"] >= 0, known["labels"] >= 0
    if has_label.any() and is_known.any():
        train, labels = (known["latents"][is_known], known["labels"][is_known]), ours["labels"][has_label]
        row["latent_linear"] = balanced_accuracy(linear_predict(*train, ours["latents"][has_label]), labels)
        row["latent_knn"] = balanced_accuracy(knn_predict(*train, ours["latents"][has_label]), labels)
        row["accuracy_chance"] = 1 / len(labels.unique())
    return row


# ----------------------------------------------------------------------------------------------------------------------
# The judge: a small classifier of a labelled set, trained on the set itself
# ----------------------------------------------------------------------------------------------------------------------

class Judge(nn.Module):
    """A small convolutional classifier on images scaled to 64 px. Its features stand in for Inception's where that is
    foreign to the data, its classes tell whether a sample shows what its label says.

    It learns from blurred, noisy, coarsened, shifted and mirrored images, so that it answers to content and not to how sharp
    an image is.
    """

    SIDE, WIDTHS, N_FEATURES = 64, (48, 96, 192, 256), 256

    def __init__(self, n_classes):
        super().__init__()
        layers, width = [], 3
        for i, out in enumerate(self.WIDTHS):
            layers += [nn.Conv2d(width, out, 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            layers += [nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()] * (i > 0)
            width = out
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, n_classes)
        self.accuracy = math.nan         # on images that it has not learned from

    def forward(self, pixels):
        """Pixels in [0, 1] (B, 3, H, W) -> features (B, 256), logits (B, n)."""
        if pixels.shape[-2:] != (self.SIDE, self.SIDE):
            pixels = F.interpolate(pixels, (self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        features = self.body(normalize(pixels).contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))
        return features, self.head(features)

    @torch.no_grad()
    def classify(self, pixels):
        """-> predicted classes (B,)."""
        return self(pixels)[1].argmax(dim=1)


def judge_view(images, generator):
    """uint8 (B, 3, S, S) -> degraded pixels in [0, 1]: what the judge learns from."""
    B, device = len(images), images.device
    u = torch.rand(28, B, generator=generator, device=device)
    pixels = resample(images.float() / 255, draw_boxes(u[:22], (0.8, 1.0)), images.shape[-1], flip=u[22] < 0.5)
    coarse = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
    pixels = torch.where((u[23] < 0.3).view(-1, 1, 1, 1), coarse, pixels)
    pixels = gaussian_blur(pixels, torch.where(u[24] < 0.7, 2.5 * u[25], 0.0))
    noise = torch.randn(pixels.shape, generator=generator, device=device)
    return (pixels + 0.1 * u[26].view(-1, 1, 1, 1) * noise).clamp(0, 1)


def train_judge(images, labels, n_classes, device, seed=0, n_steps=200, batch_size=64, lr=3e-3):
    """A Judge of uint8 images (n, 3, S, S) and labels (n,); a fifth of them is kept back, to measure its accuracy."""
    n_train = len(images) * 4 // 5
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = Judge(n_classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=n_steps)
    for step in tqdm(range(n_steps), desc="training the judge", unit=" steps", dynamic_ncols=True):
        generator = step_generator(seed, step, device)
        rows = torch.randint(n_train, (batch_size,), generator=generator, device=device).to(images.device)
        pixels = judge_view(images[rows].to(device), generator)
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(judge(pixels)[1].float(), labels[rows].to(device), label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval().requires_grad_(False)
    predictions = [judge.classify(part.to(device).float() / 255).cpu() for part in images[n_train:].split(256)]
    judge.accuracy = (torch.cat(predictions) == labels[n_train:]).float().mean().item()
    return judge


def open_judge(path, source, n_classes, device, seed=0, most=16384):
    """The judge of a labelled source, from path, or trained now on up to `most` of its images and written there."""
    fingerprint = f"{source.fingerprint()} {n_classes} classes"
    if rank() == 0 and not (os.path.isfile(path) and torch.load(path, weights_only=True)["fingerprint"] == fingerprint):
        canvases, _, labels = load_evaluation_set(source, most, whole=True)
        usable = labels >= 0
        images = torch.cat([(to_image_size(part, Judge.SIDE) * 255).round().byte() for part in canvases[usable].split(256)])
        judge = train_judge(images, labels[usable], n_classes, device, seed)
        content = dict(judge=judge.state_dict(), accuracy=judge.accuracy, fingerprint=fingerprint)
        write_atomically(path, lambda f: torch.save(content, f))
    barrier()
    content, judge = torch.load(path, map_location=device, weights_only=True), Judge(n_classes)
    judge.load_state_dict(content["judge"])
    judge.accuracy = content["accuracy"]
    return judge.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------

def save_image(image, path):
    """Write a Pillow image as PNG, atomically."""
    write_atomically(path, lambda f: image.save(f, "PNG"))


def image_grid(rows, scale=1, gap=2):
    """Rows of images (lists of (n, 3, H, W) in [0, 1]) -> Pillow image, each row below the last, enlarged by pixels."""
    H, W = rows[0].shape[-2:]
    n = max(len(r) for r in rows)
    sheet = np.full((len(rows) * (H + gap) - gap, n * (W + gap) - gap, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate((row.clamp(0, 1) * 255).round().byte().cpu().numpy()):
            sheet[y * (H + gap):y * (H + gap) + H, x * (W + gap):x * (W + gap) + W] = image.transpose(1, 2, 0)
    return Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST)


def named_rows(images, names, scale=None, gap=2):
    """Images (rows, n, 3, H, W) in [0, 1] -> Pillow image with a name before each row."""
    scale = scale or max(1, 64 // images.shape[-1])
    grid, font = image_grid(list(images), scale, gap), ImageFont.load_default(13)
    width = int(max(font.getlength(name) for name in names)) + 12
    sheet = Image.new("RGB", (width + grid.width, grid.height), "white")
    sheet.paste(grid, (width, 0))
    for i, name in enumerate(names):
        ImageDraw.Draw(sheet).text((width - 6, ((images.shape[-2] + gap) * i + images.shape[-2] / 2) * scale), name, fill="black", font=font, anchor="rm")
    return sheet


@torch.no_grad()
def reconstruction_picture(model, images, per_row=12):
    """Inputs above reconstructions, in two double rows: images uint8 (n, 3, C, C) -> Pillow image."""
    pixels = to_image_size(images[:2 * per_row].to(model.trunk.cls_token.device), model.config.image_size)
    reconstructions = denormalize(model.decode(model.encode(normalize(pixels))).float())
    halves = [half for pair in zip(pixels.split(per_row), reconstructions.split(per_row)) for half in pair]
    return image_grid(halves, scale=max(1, 64 // model.config.image_size))


COLOURS = ("#1f6fb4", "#d9641e", "#2e9a4b", "#b8332f", "#7d55b0", "#8a6d3b", "#c2569b", "#5f6a72")


def draw_chart(lines, title, x_label="", y_label="", log_x=False, size=(440, 300)):
    """Lines {name: (xs, ys)} -> Pillow image with ticks, labels and a legend (if there is more than one line, or dashes).

    A name that starts with "chance" is drawn dashed and grey.
    """
    image = Image.new("RGB", size, "white")
    draw, font, small = ImageDraw.Draw(image), ImageFont.load_default(14), ImageFont.load_default(11)
    left, top, right, bottom = 52, 28, size[0] - 12, size[1] - 40
    points = [(x, y) for xs, ys in lines.values() for x, y in zip(xs, ys) if math.isfinite(y) and (x > 0 or not log_x)]
    draw.text((left, 6), title, fill="black", font=font)
    if not points:
        draw.text((left + 10, top + 10), "no data", fill="grey", font=small)
        return image
    place = math.log10 if log_x else float
    x_low, x_high = (f(place(x) for x, _ in points) for f in (min, max))
    y_low, y_high = (f(y for _, y in points) for f in (min, max))
    x_high += (x_high == x_low)
    margin = 0.05 * (y_high - y_low) or max(abs(y_high), 1) * 0.05
    y_low, y_high = y_low - margin, y_high + margin * (1 if len(lines) == 1 else 1 + 1.5 * len(lines))      # room for the legend

    def at(x, y):
        return (left + (place(x) - x_low) / (x_high - x_low) * (right - left), bottom - (y - y_low) / (y_high - y_low) * (bottom - top))
    for y in nice_ticks(y_low, y_high):
        draw.line([(left, at(points[0][0], y)[1]), (right, at(points[0][0], y)[1])], fill="#e4e4e4")
        draw.text((left - 5, at(points[0][0], y)[1]), f"{y:.4g}", fill="#444444", font=small, anchor="rm")
    if log_x:
        ticks = [m * 10.0 ** e for e in range(math.floor(x_low), math.ceil(x_high) + 1) for m in ((1, 2, 5) if x_high - x_low < 2 else (1,))]
        ticks = [t for t in ticks if x_low <= math.log10(t) <= x_high]
    else:
        ticks = nice_ticks(x_low, x_high)
    for x in ticks:
        draw.line([(at(x, 0)[0], bottom), (at(x, 0)[0], bottom + 4)], fill="#444444")
        draw.text((at(x, 0)[0], bottom + 6), short_number(x), fill="#444444", font=small, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="#444444")
    draw.text(((left + right) / 2, size[1] - 4), x_label, fill="#444444", font=small, anchor="mb")
    draw.text((right, 8), y_label, fill="#444444", font=small, anchor="ra")
    colours, legend = iter(COLOURS * 3), []
    for name, (xs, ys) in lines.items():
        is_chance = name.startswith("chance")
        colour = "#999999" if is_chance else next(colours)
        path = [at(x, y) for x, y in zip(xs, ys) if math.isfinite(y) and (x > 0 or not log_x)]
        for a, b in list(zip(path, path[1:]))[::2 if is_chance and len(path) > 3 else 1]:
            draw.line([a, b], fill=colour, width=1 if is_chance else 2)
        if len(path) <= 12 and not is_chance:
            for x, y in path:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        legend.append((name, colour))
    if len(legend) > 1:
        width = max(draw.textlength(name, font=small) for name, _ in legend) + 24
        # on the side where the lines leave more room at the top
        near_top = [x for x, y in (at(*p) for p in points) if y < top + 15 * len(legend)]
        is_left = 2 * sum(x < (left + right) / 2 for x in near_top) < len(near_top)
        x0 = left + 6 if is_left else right - width
        for i, (name, colour) in enumerate(legend):
            y0 = top + 8 + 15 * i
            draw.line([(x0, y0), (x0 + 14, y0)], fill=colour, width=2)
            draw.text((x0 + 19, y0), name, fill="#222222", font=small, anchor="lm")
    return image


def nice_ticks(low, high, n=5):
    """Round numbers between low and high, about n of them."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= n)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short_number(x):
    """1500 -> 1.5k, 2e9 -> 2G, 3e15 -> 3e15."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if limit <= abs(x) < 1000 * limit:
            return f"{x / limit:.3g}{unit}"
    return f"{x:.3g}"


def read_metrics(run):
    """The rows of a run's metrics.jsonl; a last line that was cut off is left out."""
    rows = []
    with open(os.path.join(run, "metrics.jsonl"), encoding="utf-8") as f:
        for line in f:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


TRAINING_PANELS = (   # title, unit, kind of row, {name on the chart: field}
    ("objectives", "", "train", {"L_clip": "loss_clip", "L_dino": "loss_dino", "L_mim": "loss_mim"}),
    ("reconstruction loss", "L1 (+ LPIPS)", "train", {"L_rec": "loss_rec"}),
    ("held-out reconstruction", "PSNR, dB", "eval", {"PSNR": "psnr"}),
    ("held-out retrieval", "top-1", "eval", {"image to text": "image_to_text", "text to image": "text_to_image", "chance": "retrieval_chance"}),
    ("class from latents", "balanced accuracy", "eval", {"linear": "latent_linear", "k-NN": "latent_knn", "chance": "accuracy_chance"}),
    ("teacher", "nats", "train", {"entropy of its targets": "teacher_entropy", "chance (uniform)": "teacher_entropy_uniform"}),
)


def training_curves(run):
    """The curves of a tokenizer's run against samples seen, from its metrics.jsonl -> Pillow image; empty panels are left out."""
    rows, charts = read_metrics(run), []
    for title, unit, kind, names in TRAINING_PANELS:
        lines = {}
        for name, field in names.items():
            points = [(r["samples"], r[field]) for r in rows if r["kind"] == kind and r.get(field) is not None]
            if points:
                lines[name] = tuple(zip(*points))
        if any(not name.startswith("chance") for name in lines):
            charts.append(draw_chart(lines, title, "samples seen", unit))
    columns = min(3, len(charts))
    sheet = Image.new("RGB", (columns * 440, -(-len(charts) // columns) * 300), "white")
    for i, chart in enumerate(charts):
        sheet.paste(chart, (i % columns * 440, i // columns * 300))
    return sheet
