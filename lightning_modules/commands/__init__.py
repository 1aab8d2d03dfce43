"""The commands of train.py in addition to Lightning's own."""
