"""The same training on one process and on two, whatever the strategy."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from fourier_moe import FourierMoEConfig, adapter_state_dict, save_adapter
from lightning_modules import AdaptationModule
from lightning_modules.optimization import Optimization, ParameterGroup
from lightning_modules.strategies.sharding import ShardedBaseStrategy
from support.language_models import TinyLanguageModel, collate, example

ADAPTER = FourierMoEConfig(
    targets=["q_proj", "v_proj", "down_proj"],
    num_coefficients=40,
    shared_coefficients=12,
    num_experts=4,
    densities=[1, 2, 1, 1],
    balance_weight=0.5,
    normalize_input="moments",
    router_features=6,
)
RATES = Optimization(experts=ParameterGroup(0.02), router=ParameterGroup(0.01), schedule="cosine", warmup_ratio=0.1)
EPOCHS, STEPS_PER_EPOCH = 4, 5
MICRO_BATCHES = 4  # of one optimizer step, all processes together
STEPS_BEFORE_CHECKPOINT = (EPOCHS - 1) * STEPS_PER_EPOCH
CHECKPOINT = f"step={STEPS_BEFORE_CHECKPOINT}.ckpt"
STRATEGIES = {"ddp": lambda: "ddp", "fsdp": ShardedBaseStrategy}


class MicroBatches(L.LightningDataModule):
    """The same padded micro-batches whatever the number of processes, dealt out to them in turn; others in every epoch."""

    def train_dataloader(self):
        rank, size = self.trainer.global_rank, self.trainer.world_size
        first = self.trainer.current_epoch * STEPS_PER_EPOCH * MICRO_BATCHES
        numbers = range(first, first + STEPS_PER_EPOCH * MICRO_BATCHES)
        batches = [collate([example(m, 7 * m), example(m * m, 3), example(11 + m, 2)], extra=m % 3) for m in numbers]
        return DataLoader(batches[rank::size], batch_size=None)


class Llama(TinyLanguageModel):
    def __init__(self, base_dtype):
        super().__init__()
        self.base_dtype = base_dtype

    def build(self, num_classes=None, class_names=None):
        return super().build().to(self.base_dtype).train()


class Losses(L.Callback):
    """The loss of every micro-batch of this process."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)


class AddAsTwoProcessesDo(L.Callback):
    """Sums the gradients of even and odd micro-batches apart before their sum. In float32 the order of addition shows."""

    def __init__(self):
        self.sums = []

    def on_after_backward(self, trainer, module):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients = [parameter.grad for parameter in trained]
        self.sums.append(gradients)
        for parameter in trained:
            parameter.grad = None
        if len(self.sums) == MICRO_BATCHES:
            first, second, third, fourth = self.sums
            for parameter, *parts in zip(trained, first, second, third, fourth, strict=True):
                parameter.grad = (parts[0] + parts[2]) + (parts[1] + parts[3])
            self.sums = []


def fit(
    directory, strategy="auto", *callbacks, base_dtype=torch.bfloat16, checkpoint=None, adapter=ADAPTER, rates=RATES, **options
):
    """One run: the losses of this process's micro-batches and the adapter's state. The adapter and the checkpoint before the
    last epoch are left in `directory`."""
    torch.manual_seed(0)
    size = 1 if strategy == "auto" else 2
    module = AdaptationModule(Llama(base_dtype), adapter, rates, activation_checkpointing=True)
    losses = Losses()
    saving = ModelCheckpoint(directory, "{step}", every_n_epochs=EPOCHS - 1)
    trainer = L.Trainer(
        default_root_dir=directory,
        callbacks=[losses, *callbacks, *([] if checkpoint else [saving])],
        accelerator="cpu",
        devices=size,
        strategy=STRATEGIES[strategy]() if size > 1 else strategy,
        accumulate_grad_batches=MICRO_BATCHES // size,
        gradient_clip_val=0.1,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": EPOCHS, "enable_checkpointing": checkpoint is None, **options},
    )
    trainer.fit(module, MicroBatches(), ckpt_path=checkpoint)
    if trainer.is_global_zero:
        save_adapter(module.model, directory)
    return losses.values, {key: value.clone() for key, value in adapter_state_dict(module.model).items()}


def together(first, second):
    """The losses of two processes in the order of the micro-batches."""
    return [loss for pair in zip(first, second, strict=True) for loss in pair]
