"""A BERT classifier small enough to train in a test, without dropout."""

from transformers import BertConfig

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BERT = BertConfig(**SIZES, max_position_embeddings=8, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
