"""FourierMoE as a tuner of ms-swift: `swift sft --external_plugins fourier_moe_swift.py --tuner_type fourier_moe`.

Copy this file and change the two settings below. Written for the interfaces of ms-swift 4.6.
"""

from swift.trainers import Seq2SeqTrainer
from swift.trainers.trainer_factory import TrainerFactory
from swift.tuner_plugin import Tuner, tuners_map

from fourier_moe import FourierMoEConfig, inject, load_adapter, save_adapter
from fourier_moe.integrations import AdapterTrainerMixin

SETTINGS = {"num_coefficients": 4096, "num_experts": 8, "top_k": 2, "balance_weight": 1e-3}  # of FourierMoEConfig
LEARNING_RATES = {"experts": 1e-2, "router": 1e-3}


class FourierMoETuner(Tuner):
    """Adapts the projections that `--target_modules` names."""

    @staticmethod
    def prepare_model(args, model):
        inject(model, FourierMoEConfig(targets=list(args.target_modules), **SETTINGS))
        return model

    @staticmethod
    def save_pretrained(model, save_directory, state_dict=None, safe_serialization=True, **kwargs):
        save_adapter(model, save_directory)

    @staticmethod
    def from_pretrained(model, model_id, **kwargs):
        load_adapter(model, model_id)
        return model


class FourierMoETrainer(AdapterTrainerMixin, Seq2SeqTrainer):
    """Adds the balance loss and rates by kind of parameters; the files of a checkpoint are ms-swift's and the tuner's."""

    def __init__(self, *, args, **kwargs):
        # ms-swift recomputes in the reentrant way unless told otherwise, and that gives the balance loss no gradient
        args.gradient_checkpointing_kwargs = {**(args.gradient_checkpointing_kwargs or {}), "use_reentrant": False}
        super().__init__(args=args, learning_rates=LEARNING_RATES, **kwargs)

    def create_optimizer_and_scheduler(self, num_training_steps):
        self.create_optimizer()  # ms-swift would ask its optimizer callback, which makes groups without rates
        self.create_scheduler(num_training_steps, self.optimizer)

    def _save(self, *args, **kwargs):
        Seq2SeqTrainer._save(self, *args, **kwargs)


tuners_map["fourier_moe"] = FourierMoETuner
TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.{FourierMoETrainer.__name__}"
