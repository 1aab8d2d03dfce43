"""What all task families share: loaders, sampling, tokenizers, caches, checks."""
