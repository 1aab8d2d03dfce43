"""One small config of every method that has no router, for `support.models.Transformer`."""

from fourier_moe import (
    DoRAConfig,
    FourierFTConfig,
    KaSAConfig,
    LoRAConfig,
    LoRADashConfig,
    MELoRAConfig,
    MiLoRAConfig,
    PEANuTConfig,
    PiSSAConfig,
    RsLoRAConfig,
    TopLoRAConfig,
)

TARGETS = ["q_proj", "v_proj"]
COMMON = {"targets": TARGETS, "head": ["classifier"]}
KASA = KaSAConfig(**COMMON, r=4, alpha=8, beta=0.3, gamma=0.2, seed=3)
MILORA = MiLoRAConfig(**COMMON, r=4, alpha=8)
DASH = LoRADashConfig(**COMMON, r=4, alpha=8, num_directions=5, start=3, seed=3)
TOP = TopLoRAConfig(**COMMON, r=4, alpha=8, seed=3)
MELORA = MELoRAConfig(**COMMON, r=2, num_blocks=4, alpha=8, seed=3)
LORA_RELATIVES = [KASA, MILORA, DASH, TOP, MELORA]
PEFT_LIBRARY = [
    LoRAConfig(**COMMON, r=4, alpha=8, seed=3),
    LoRAConfig(**COMMON, r=2, dropout=0.3),
    RsLoRAConfig(**COMMON, r=4, alpha=8, seed=3),
    DoRAConfig(**COMMON, r=4, seed=3),
    PiSSAConfig(**COMMON, r=4, alpha=8),
    FourierFTConfig(**COMMON, num_coefficients=40, scaling=20.0, seed=3),
    PEANuTConfig(**COMMON, r=4, depth=1, scaling=2.0, seed=3),
]
