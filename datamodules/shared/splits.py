"""The splits of a data set, by the names that they have in all families."""

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PREDICT = "predict"  # what `predict` goes through: one of them, or files without labels
