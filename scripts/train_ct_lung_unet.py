"""Train ct-lung-unet on random chests, on one CPU thread in about half an hour.

Needs ``scripts/requirements/train.txt`` in an environment of its own (PyTorch is no dependency
of the node). Usage: ``python scripts/train_ct_lung_unet.py SCRATCH [--steps 1200N] [--out FILE]``.
SCRATCH keeps the chests (about 5 MB each) and a snapshot; a run that was stopped goes on from
it. Writes the folded weights (.npz) that ``build_ct_lung_unet.py`` makes the bundle of.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.lungnet.network import LungUNet, folded  # noqa: E402
from scripts.lungnet.phantoms import Chest  # noqa: E402
from scripts.lungnet.slabs import batch  # noqa: E402
from scripts.lungnet.store import load, make  # noqa: E402

SIZE = (96, 128)
BATCH = 8
PEAK_RATE = 4e-3
HELD_OUT = 90_000
"""Seeds from here on are never trained on."""


def loss_of(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross entropy and soft Dice of the two lungs, equally."""
    share = logits.softmax(1)[:, 1:]
    wanted = nn.functional.one_hot(truth, 3).permute(0, 3, 1, 2)[:, 1:].float()
    both = (share * wanted).sum((0, 2, 3))
    dice = (2 * both + 20) / (share.sum((0, 2, 3)) + wanted.sum((0, 2, 3)) + 20)
    return nn.functional.cross_entropy(logits, truth) + (1 - dice).mean()


def dice_on(net: LungUNet, chests: list[Chest], count: int = 96) -> list[float]:
    """Dice of right and left over slabs of chests that were held out."""
    rng = np.random.default_rng(5)
    net.eval()
    hit, total = np.zeros(2), np.zeros(2)
    with torch.no_grad():
        for _ in range(count // BATCH):
            images, truth = batch(rng, chests, BATCH, SIZE)
            found = net(torch.from_numpy(images)).argmax(1).numpy()
            for side in (1, 2):
                hit[side - 1] += 2 * np.count_nonzero((found == side) & (truth == side))
                total[side - 1] += np.count_nonzero(found == side) + np.count_nonzero(truth == side)
    net.train()
    return [float(v) for v in hit / np.maximum(total, 1)]


def train(scratch: Path, out: Path, steps: int, chests: int, every: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(20)
    held = [load(p) for p in make(scratch, 4, HELD_OUT)]
    known = [load(p) for p in make(scratch, chests, 0)]
    net = LungUNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(net.parameters(), lr=PEAK_RATE / 25, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=steps, pct_start=0.15)
    first = 0
    snapshot = scratch / "snapshot.pt"
    if snapshot.exists():
        state = torch.load(snapshot, weights_only=True)
        if state["steps"] == steps:
            net.load_state_dict(state["net"])
            optimiser.load_state_dict(state["optimiser"])
            schedule.load_state_dict(state["schedule"])
            first = int(state["step"])
    began = time.monotonic()
    running = 0.0
    for step in range(first, steps):
        images, truth = batch(np.random.default_rng([step, 3]), known, BATCH, SIZE)
        loss = loss_of(net(torch.from_numpy(images)), torch.from_numpy(truth))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        running = 0.98 * (running or loss.item()) + 0.02 * loss.item()
        done = step + 1
        if done % every == 0 or done == steps:
            dice = ", ".join(f"{d:.4f}" for d in dice_on(net, held))
            print(f"step {done} of {steps}: loss {running:.4f}, Dice held out {dice}, {time.monotonic() - began:.0f} s")
            part = snapshot.with_suffix(".part")
            torch.save(
                {
                    "step": done,
                    "steps": steps,
                    "net": net.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "schedule": schedule.state_dict(),
                },
                part,
            )
            part.replace(snapshot)
            net.eval()
            np.savez(out, **folded(net))
            net.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train ct-lung-unet on random chests (PyTorch, CPU).")
    parser.add_argument("scratch", type=Path, help="folder for the chests and the snapshot")
    parser.add_argument("--out", type=Path, help="folded weights (default: weights.npz in SCRATCH)")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--chests", type=int, default=40)
    parser.add_argument("--every", type=int, default=100, help="steps between snapshots")
    given = parser.parse_args()
    train(given.scratch, given.out or given.scratch / "weights.npz", given.steps, given.chests, given.every)
