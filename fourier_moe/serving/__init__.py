"""Trained adapters in use: several on one model, merged, exported as LoRAs."""
