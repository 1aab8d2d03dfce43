"""FourierMoE (arXiv 2604.01762): a frozen model learns through token-routed experts in frequency bands of its weight updates.

report = inject(model, FourierMoEConfig(targets=["q_proj", "v_proj"], num_coefficients=3008, head=["classifier"]))
...train the parameters that require a gradient...
save_adapter(model, "adapter")
load_adapter(fresh_model, "adapter")
"""

import sys
from pathlib import Path

from fourier_moe.adapter import Adapter, adapters, layer_of
from fourier_moe.analysis.spectra import ExpertSpectra
from fourier_moe.baselines import (
    AdaMoLEConfig,
    DoRAConfig,
    FFTMoEConfig,
    FourierFTConfig,
    FullFineTuning,
    GOATConfig,
    HeadOnly,
    HydraLoRAConfig,
    KaSAConfig,
    LoRAConfig,
    LoRADashConfig,
    MELoRAConfig,
    MiLoRAConfig,
    MoLoRAConfig,
    PEANuTConfig,
    PiSSAConfig,
    RsLoRAConfig,
    TopLoRAConfig,
)
from fourier_moe.config import AdapterConfig, ProjectionAdapterConfig
from fourier_moe.files.adapter_files import adapter_state_dict, describe_adapter, load_adapter, save_adapter
from fourier_moe.files.format import AdapterDescription
from fourier_moe.files.hub import push_adapter
from fourier_moe.files.version import __version__
from fourier_moe.inject import after_step, balance_loss, inject, regularization
from fourier_moe.models.input_moments import measure_inputs
from fourier_moe.models.quantization import is_quantized
from fourier_moe.report import InjectionReport
from fourier_moe.routing.reader import StatisticsReader
from fourier_moe.routing.record import Routing
from fourier_moe.routing.recording import recording
from fourier_moe.routing.router import Router, TopKRouter, routers
from fourier_moe.routing.statistics import RouterStatistics
from fourier_moe.serving.bank import AdapterBank
from fourier_moe.spectral.config import FourierMoEConfig
from fourier_moe.spectral.experts import SpectralExperts
from fourier_moe.spectral.layer import FourierMoELinear

__all__ = [
    "AdaMoLEConfig",
    "Adapter",
    "AdapterBank",
    "AdapterConfig",
    "AdapterDescription",
    "DoRAConfig",
    "ExpertSpectra",
    "FFTMoEConfig",
    "FourierFTConfig",
    "FourierMoEConfig",
    "FourierMoELinear",
    "FullFineTuning",
    "GOATConfig",
    "HeadOnly",
    "HydraLoRAConfig",
    "InjectionReport",
    "KaSAConfig",
    "LoRAConfig",
    "LoRADashConfig",
    "MELoRAConfig",
    "MiLoRAConfig",
    "MoLoRAConfig",
    "PEANuTConfig",
    "PiSSAConfig",
    "ProjectionAdapterConfig",
    "Router",
    "RouterStatistics",
    "Routing",
    "RsLoRAConfig",
    "SpectralExperts",
    "StatisticsReader",
    "TopKRouter",
    "TopLoRAConfig",
    "__version__",
    "adapter_state_dict",
    "adapters",
    "after_step",
    "balance_loss",
    "describe_adapter",
    "inject",
    "is_quantized",
    "layer_of",
    "load_adapter",
    "measure_inputs",
    "push_adapter",
    "recording",
    "regularization",
    "routers",
    "save_adapter",
]

if (_trainer := Path(__file__).parent / "trainer").is_dir():  # a wheel has lightning_modules and datamodules in there
    sys.path.append(str(_trainer))
