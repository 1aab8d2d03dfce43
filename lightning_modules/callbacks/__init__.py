"""Callbacks: monitoring, spectral sensitivity, and the files that a run leaves."""

from lightning_modules.callbacks.monitoring.dashboard import Dashboard
from lightning_modules.callbacks.monitoring.router_load import RouterLoad
from lightning_modules.callbacks.monitoring.spectral_occupancy import SpectralOccupancy
from lightning_modules.callbacks.monitoring.throughput import Throughput
from lightning_modules.callbacks.results.adapter_checkpoint import AdapterCheckpoint
from lightning_modules.callbacks.results.evaluation_report import EvaluationReport
from lightning_modules.callbacks.results.predictions import PredictionsWriter
from lightning_modules.callbacks.results.training_history import TrainingHistory
from lightning_modules.callbacks.sensitivity.spectral_sensitivity import SpectralSensitivity

__all__ = [
    "AdapterCheckpoint",
    "Dashboard",
    "EvaluationReport",
    "PredictionsWriter",
    "RouterLoad",
    "SpectralOccupancy",
    "SpectralSensitivity",
    "Throughput",
    "TrainingHistory",
]
