"""Other ways to fine-tune, behind the same AdapterConfig."""

from fourier_moe.baselines.full_fine_tuning import FullFineTuning
from fourier_moe.baselines.head_only import HeadOnly

__all__ = ["FullFineTuning", "HeadOnly"]
