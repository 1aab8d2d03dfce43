"""Other ways to fine-tune, behind the same AdapterConfig."""

from fourier_moe.baselines.fft_moe import FFTMoEConfig
from fourier_moe.baselines.full_fine_tuning import FullFineTuning
from fourier_moe.baselines.head_only import HeadOnly
from fourier_moe.baselines.low_rank_methods import LoRADashConfig, MELoRAConfig, TopLoRAConfig
from fourier_moe.baselines.peft_methods import DoRAConfig, FourierFTConfig, LoRAConfig, PEANuTConfig, RsLoRAConfig
from fourier_moe.baselines.routed_methods import AdaMoLEConfig, GOATConfig, HydraLoRAConfig, MoLoRAConfig
from fourier_moe.baselines.singular_methods import KaSAConfig, MiLoRAConfig, PiSSAConfig

__all__ = [
    "AdaMoLEConfig",
    "DoRAConfig",
    "FFTMoEConfig",
    "FourierFTConfig",
    "FullFineTuning",
    "GOATConfig",
    "HeadOnly",
    "HydraLoRAConfig",
    "KaSAConfig",
    "LoRAConfig",
    "LoRADashConfig",
    "MELoRAConfig",
    "MiLoRAConfig",
    "MoLoRAConfig",
    "PEANuTConfig",
    "PiSSAConfig",
    "RsLoRAConfig",
    "TopLoRAConfig",
]
