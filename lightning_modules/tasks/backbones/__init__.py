"""Pretrained models: loading them from open_clip and Hugging Face."""
