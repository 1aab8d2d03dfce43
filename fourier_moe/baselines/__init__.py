"""Other ways to fine-tune, behind the same AdapterConfig."""

from fourier_moe.baselines.fft_moe import FFTMoEConfig
from fourier_moe.baselines.lora_mixtures import AdaMoLEConfig, GOATConfig, HydraLoRAConfig, MoLoRAConfig
from fourier_moe.baselines.lora_relatives import LoRADashConfig, MELoRAConfig, TopLoRAConfig
from fourier_moe.baselines.peft_library import DoRAConfig, FourierFTConfig, LoRAConfig, PEANuTConfig, RsLoRAConfig
from fourier_moe.baselines.singular import KaSAConfig, MiLoRAConfig, PiSSAConfig
from fourier_moe.baselines.whole_model import FullFineTuning, HeadOnly

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
