"""Make the demo's pretrained tower again: python examples/digits_tower/pretrain.py

A CLIP-style vision transformer (digits_vit.json) learns to tell the digits 0-4 apart on the training half of the bundled
handwritten digits, without ever seeing the digits 5-9 or a test image. The head is thrown away; the tower is written, in
half precision, to digits_vit.safetensors beside this file. Takes about two minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from datamodules import ImageDataModule
from lightning_modules.tasks import ImageClassification

FOLDER = Path(__file__).parent
CLASSES = 5
EPOCHS = 40


def main() -> None:
    torch.manual_seed(0)
    data = ImageDataModule("digits", image_size=8, num_workers=0, validation_fraction=0.1)
    data.setup("fit")
    images, labels = _stack(data, data.train_dataloader())
    held_out, held_out_labels = _stack(data, data.val_dataloader())
    task = ImageClassification(str(FOLDER / "digits_vit.json"), pretrained=None)
    model = task.build(num_classes=CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(32):
            shifts = torch.randint(-1, 2, (2,)).tolist()
            loss = F.cross_entropy(model(images[rows].roll(shifts, (2, 3))), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        with torch.no_grad():
            accuracy = (model(held_out).argmax(-1) == held_out_labels).float().mean()
        print(f"epoch {epoch + 1:2}: loss {loss.item():.3f}, accuracy on held-out digits 0-4 {accuracy:.3f}")
    tower = load_tower_state(model.backbone)
    save_file(tower, FOLDER / "digits_vit.safetensors")


def load_tower_state(backbone: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tower's weights in half precision; CLIP's projection, which a linear head does not use, as zeros."""
    state = {key: value.half().contiguous() for key, value in backbone.state_dict().items()}
    return state | {"proj": torch.zeros(64, 32, dtype=torch.half)}


def _stack(data: ImageDataModule, loader: torch.utils.data.DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader)
    images, labels = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label"))
    keep = labels < CLASSES
    return data.normalize(images[keep]), labels[keep]


if __name__ == "__main__":
    main()
