"""Commands that use a trained language model: generate, chat and evaluate."""
