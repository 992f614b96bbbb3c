"""Train the bundled model from Debian's emoji font: ``python -m scc_fast.tiny.train``.

Under 30 minutes on 2 cores. After an interruption the same command continues from the last
checkpoint with the same pictures. assets/artwork.png is bundled; --font draws it again.

Recipe: cross-entropy against the prompts of all K classes, AdamW, cosine schedule, and patch
dropout for the first 70 %.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scc_fast.tiny import data

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
VOCABULARY, CONTEXT = 4096, 16
PROMPTS = (
    "{}",
    "a {}",
    "a picture of a {}",
    "a photo of a {}",
    "an emoji of a {}",
    "this is a photo of a {}.",
    "a small drawing of a {}",
)
MODEL_CONFIG = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": data.SIZE,
        "patch_size": 8,
        "width": 192,
        "layers": 4,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": 128,
        "heads": 4,
        "layers": 2,
    },
}


def draw_artwork(font_file: Path) -> None:
    """Render every class of classes.json from the font into one RGBA sheet of 72 px tiles."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(font_file), 109)  # the font's only bitmap size
    points = json.loads((data.ASSETS / "classes.json").read_text())["classes"]
    rows = math.ceil(len(points) / data.COLUMNS)
    sheet = Image.new("RGBA", (data.COLUMNS * data.TILE, rows * data.TILE))
    for index, (point, name) in enumerate(points.items()):
        tile = Image.new("RGBA", (160, 160))
        draw = ImageDraw.Draw(tile)
        draw.text((12, 12), chr(int(point, 16)), font=font, embedded_color=True)
        box = tile.getbbox()
        if box is None:
            raise ValueError(f"{font_file} has no picture for U+{point} ({name})")
        tile = tile.crop(box)
        side = max(tile.size)
        square = Image.new("RGBA", (side, side))
        square.paste(tile, ((side - tile.width) // 2, (side - tile.height) // 2))
        square = square.resize((data.TILE, data.TILE), Image.Resampling.LANCZOS)
        column, row = index % data.COLUMNS, index // data.COLUMNS
        sheet.paste(square, (column * data.TILE, row * data.TILE))
    sheet.save(data.ASSETS / "artwork.png", optimize=True)


def cut_vocabulary() -> None:
    """Write the first merges of open_clip's byte-pair file, for 4096 tokens."""
    import open_clip

    full = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    header_and_merges = VOCABULARY - 2 * 256 - 2 + 1
    lines = gzip.decompress(full.read_bytes()).decode().split("\n")[:header_and_merges]
    packed = gzip.compress("\n".join(lines).encode(), mtime=0)
    (data.ASSETS / "merges.txt.gz").write_bytes(packed)


def write_config() -> None:
    """Write the model's open_clip configuration."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    config = {
        "model_cfg": MODEL_CONFIG,
        "preprocess_cfg": {
            "mean": list(OPENAI_DATASET_MEAN),
            "std": list(OPENAI_DATASET_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (data.ASSETS / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _schedule(step: int, steps: int, peak: float) -> float:
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _text_features(model: nn.Module, tokenizer: Callable[[list[str]], Tensor], step: int) -> Tensor:
    """Unit embeddings (K, D) of all classes, with prompts drawn for this step."""
    draw = random.Random(step)
    prompts = [draw.choice(PROMPTS).format(name) for name in data.class_names()]
    return model.encode_text(tokenizer(prompts), normalize=True)  # type: ignore[operator]


def _save(path: Path, state: dict) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(
    steps: int, batch: int, peak: float, checkpoint: Path, save_every: float = 60.0
) -> nn.Module:
    """Train from the last checkpoint or the start; returns the model in eval mode.

    Checkpoints are written atomically every `save_every` seconds.
    """
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL_CONFIG)
    tokenizer = SimpleTokenizer(str(data.ASSETS / "merges.txt.gz"), context_length=CONTEXT)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    first, settings = 0, {"steps": steps, "batch": batch, "peak": peak}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{checkpoint} was made with {state['settings']}, not {settings}: remove it or "
                "give another --checkpoint"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    visual = model.visual
    saved = time.monotonic()
    for step in _progress(range(first, steps), steps):
        # Half the patches cost half and teach nearly as much.
        visual.patch_dropout = (
            open_clip.transformer.PatchDropout(0.5) if step < 0.7 * steps else nn.Identity()
        )
        model.train()
        torch.manual_seed(step)  # patch dropout alone draws from torch's generator
        images, labels = data.generate("train", range(step * batch, (step + 1) * batch))
        for group in optimizer.param_groups:
            group["lr"] = _schedule(step, steps, peak)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.encode_image(_normalise(images), normalize=True)
            text = _text_features(model, tokenizer, step)
        logits = model.logit_scale.exp() * features.float() @ text.float().T
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 50 == 0:
            hits = (logits.argmax(1) == labels).float().mean()
            print(f"step {step} loss {loss.item():.3f} accuracy {hits:.3f}", flush=True)
        if time.monotonic() - saved > save_every:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            _save(checkpoint, {**state, "step": step + 1, "settings": settings})
            saved = time.monotonic()
    visual.patch_dropout = nn.Identity()
    return model.eval()


def _normalise(images: Tensor) -> Tensor:
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean = torch.tensor(OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    return (images - mean) / torch.tensor(OPENAI_DATASET_STD).view(1, 3, 1, 1)


def _progress(todo: range, total: int) -> Iterator[int]:
    from rich.progress import track

    yield from track(todo, "training", total=total, completed=total - len(todo))


def write_samples(count: int = 16) -> None:
    """Write pictures of the split "samples" as PNG files named after their class."""
    from PIL import Image

    images, labels = data.generate("samples", range(4 * count))
    folder = data.ASSETS / "samples"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    written: set[str] = set()
    for image, label in zip(images, labels.tolist(), strict=True):
        name = data.class_names()[label].replace(" ", "_")
        if name not in written and len(written) < count:
            pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(folder / f"{name}.png", optimize=True)
            written.add(name)


def main(argv: list[str] | None = None) -> None:
    """Draw, train, write the assets."""
    parser = argparse.ArgumentParser(prog="python -m scc_fast.tiny.train", description=__doc__)
    parser.add_argument("--font", type=Path, help="draw the artwork again, from this font")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak-lr", type=float, default=1e-3)
    parser.add_argument("--checkpoint", type=Path, default=Path("tiny-training.pt"))
    options = parser.parse_args(argv)
    sheet = data.ASSETS / "artwork.png"
    if options.font is not None or not sheet.exists():
        font = options.font or FONT
        if not font.exists():
            parser.error(f"--font {font} does not exist: apt-get install fonts-noto-color-emoji")
        draw_artwork(font)
    cut_vocabulary()
    write_config()
    model = train(options.steps, options.batch, options.peak_lr, options.checkpoint)
    from safetensors.torch import save_file

    half = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    partial = data.ASSETS / "open_clip_model.partial"
    save_file(half, partial)
    partial.chmod(0o644)  # safetensors files are private by default
    os.replace(partial, data.ASSETS / "open_clip_model.safetensors")
    write_samples()
    options.checkpoint.unlink(missing_ok=True)
    print(f"wrote {data.ASSETS}")


if __name__ == "__main__":
    main()
