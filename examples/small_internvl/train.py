"""Train the small InternVL by plain SFT on demo pictures; the same command resumes.

    python examples/small_internvl/make_model.py WORK/start
    python examples/small_internvl/train.py WORK --steps 20000
    python examples/small_internvl/export.py WORK models/small-internvl

Matrix products run in bfloat16 with float32 master weights. One process trains, one draws pictures.
"""

# B samples, L tokens, T tiles, P patches, K letters per patch, A answer tokens, V vocabulary, v vision width

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from itertools import accumulate
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from samples import LETTERS_PER_PATCH, Batch, make_batch
from torch import nn
from torch.nn import functional

from vico.prompt import load_prompt_format
from vico.tiling import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from transformers import InternVLForConditionalGeneration

NUM_LETTERS = 96
"""No letter, and codes for the printable ASCII characters."""


class Trainee(nn.Module):
    """The model and, for training only, a head that names the letters on each patch."""

    def __init__(self, model: InternVLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.letters = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, LETTERS_PER_PATCH * NUM_LETTERS))

    def forward(
        self, pixels: torch.Tensor, ids: torch.Tensor, answer: torch.Tensor, letters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean cross entropy of the answer tokens, and that of the letters on the patches.

        pixels bfloat16 [T, 3, S, S]; ids int64 [B, L]; answer bool [B, L]; letters uint8 [T, P, K].
        """
        inner = self.model.model
        if not answer.any():  # the first part of the curriculum, which trains only the vision tower
            features_TPv = inner.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
            return pixels.new_zeros(()), self.letter_loss(features_TPv, letters)
        embeddings = inner.language_model.embed_tokens(ids)
        letter_loss = embeddings.new_zeros(())
        if len(pixels):
            features_TPv = inner.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
            letter_loss = self.letter_loss(features_TPv, letters)
            side = round(features_TPv.shape[1] ** 0.5)
            grid = features_TPv.reshape(len(pixels), side, side, -1)
            shuffled = inner.pixel_shuffle(grid, scale_factor=self.model.config.downsample_ratio)
            tokens = inner.multi_modal_projector(shuffled.flatten(1, 2)).flatten(0, 1)
            mask = (ids == self.model.config.image_token_id)[..., None].expand_as(embeddings)
            embeddings = embeddings.masked_scatter(mask, tokens)
        # Padding is on the right, so the causal mask is enough to exclude it.
        hidden = inner.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        logits_AV = self.model.lm_head(hidden[:, :-1][answer[:, 1:]])
        return functional.cross_entropy(logits_AV.float(), ids[:, 1:][answer[:, 1:]]), letter_loss

    def letter_loss(self, features_TPv: torch.Tensor, letters: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy of the letters.

        Empty slots weigh 0.05, because most patches have no letter.
        """
        logits = self.letters(features_TPv).view(-1, NUM_LETTERS)
        target = letters.flatten().long()
        weight = torch.where(target > 0, 1.0, 0.05)
        losses = functional.cross_entropy(logits.float(), target, reduction="none")
        return (losses * weight).sum() / weight.sum()


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Return the learning rate: warm-up, constant, then linear to zero over the last `decay_steps`."""
    decay = (args.steps - step) / max(args.decay_steps, 1)
    return args.lr * min(1.0, (step + 1) / args.warmup_steps, max(decay, 0.0))


def draw_batches(queue: Queue[Batch], first: int, args: argparse.Namespace) -> None:
    """Draw batches in order from batch `first`; runs in a process of its own until its parent ends."""
    torch.set_num_threads(1)
    form = load_prompt_format(args.folder / "start")
    patch = json.loads((args.folder / "start/config.json").read_text())["vision_config"]["patch_size"][0]
    parent = os.getppid()
    for number in range(first, args.steps):
        part = sum(number >= end for end in accumulate(args.part_steps))
        queue.put(make_batch(args.seed, number, part, args.batch, form, patch))
        if os.getppid() != parent:
            return


def on_device(batch: Batch, device: str) -> tuple[torch.Tensor, ...]:
    """Return the arguments of `Trainee.forward` on the device."""
    mean, std = (
        torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    tiles = torch.from_numpy(batch.tiles).to(device).permute(0, 3, 1, 2)
    pixels = ((tiles / 255 - mean) / std).bfloat16()
    arrays = (batch.ids, batch.answer, batch.letters)
    return (pixels, *(torch.from_numpy(array).to(device) for array in arrays))


class MasterWeights:
    """Float32 copies of bfloat16 parameters, which AdamW updates."""

    def __init__(self, module: nn.Module, args: argparse.Namespace) -> None:
        self.named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.copies = [p.detach().float().clone() for _, p in self.named]
        module.bfloat16()
        matrices = [copy for copy in self.copies if copy.dim() > 1]
        rest = [copy for copy in self.copies if copy.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))

    def step(self, lr: float, clip: float = 1.0) -> float:
        """Update with clipped gradients; return the norm of the gradient before clipping."""
        for copy, (_, parameter) in zip(self.copies, self.named, strict=True):
            copy.grad = parameter.grad.float() if parameter.grad is not None else torch.zeros_like(copy)
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.copies, clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.write_back()
        return float(norm)

    @torch.no_grad()
    def write_back(self) -> None:
        for copy, (_, parameter) in zip(self.copies, self.named, strict=True):
            parameter.copy_(copy)

    def state(self) -> dict[str, Any]:
        names = [name for name, _ in self.named]
        return {
            "weights": dict(zip(names, self.copies, strict=True)),
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        for copy, (name, _) in zip(self.copies, self.named, strict=True):
            copy.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.write_back()


def save_checkpoint(path: Path, masters: MasterWeights, step: int, seconds: float) -> None:
    partial = path.with_suffix(".partial")
    torch.save({**masters.state(), "step": step, "seconds": seconds}, partial)
    os.replace(partial, path)


def train(args: argparse.Namespace) -> None:
    from transformers import InternVLForConditionalGeneration

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = InternVLForConditionalGeneration.from_pretrained(str(args.folder / "start"), dtype=torch.float32)
    # At these lengths the backward pass of CPU flash attention takes 5 times as long as eager attention.
    model.set_attn_implementation("eager" if args.device == "cpu" else "sdpa")
    trainee = Trainee(model).to(args.device)
    if args.compile:
        for layer in (*model.model.vision_tower.encoder.layer, *model.model.language_model.layers):
            layer.compile(dynamic=True)
    masters = MasterWeights(trainee, args)
    path, first, seconds = args.folder / "checkpoint.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=args.device)
        masters.load(state)
        first, seconds = state["step"], state["seconds"]
        print(f"resumes at step {first}", flush=True)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue(maxsize=6)
    drawer = context.Process(target=draw_batches, args=(queue, first, args), daemon=True)
    drawer.start()
    started = saved = logged = time.monotonic()
    sums, tiles = np.zeros(3), 0
    for step in range(first, args.steps):
        batch = queue.get()
        answer_loss, letter_loss = trainee(*on_device(batch, args.device))
        (answer_loss + args.letter_weight * letter_loss).backward()
        norm = masters.step(learning_rate(step, args))
        sums += (answer_loss.item(), letter_loss.item(), norm)
        tiles += len(batch.tiles)
        if (step + 1) % args.log_every == 0:
            now = time.monotonic()
            mean, rate = sums / args.log_every, args.log_every * args.batch / (now - logged)
            speed = f"samples/s {rate:.1f} tiles/s {tiles / (now - logged):.0f}"
            print(
                f"step {step + 1} answers {mean[0]:.4f} letters {mean[1]:.4f} norm {mean[2]:.2f} "
                f"lr {learning_rate(step, args):.2e} {speed}",
                flush=True,
            )
            sums, tiles, logged = np.zeros(3), 0, now
        if time.monotonic() - saved > args.save_every_s or step + 1 == args.steps:
            saved = time.monotonic()
            save_checkpoint(path, masters, step + 1, seconds + saved - started)
    drawer.terminate()


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path, help="working folder with start/ in it; checkpoints go here")
    options.add_argument("--steps", type=int, default=20_000)
    options.add_argument(
        "--part-steps",
        type=int,
        nargs=3,
        default=(5_600, 1_600, 1_600),
        help="steps of the vision tower alone, of random strings, of numbers and words; all kinds follow",
    )
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--lr", type=float, default=1.2e-3)
    options.add_argument("--warmup-steps", type=int, default=200)
    options.add_argument("--decay-steps", type=int, default=4_000)
    options.add_argument("--weight-decay", type=float, default=0.02)
    options.add_argument("--letter-weight", type=float, default=1.0)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--compile", action="store_true", help="20 %% faster after two minutes")
    options.add_argument("--device", default="cpu")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--log-every", type=int, default=50)
    options.add_argument("--save-every-s", type=float, default=60.0)
    return options


if __name__ == "__main__":
    train(parser().parse_args())
