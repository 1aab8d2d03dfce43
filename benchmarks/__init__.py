"""Speed and memory of FourierMoE, side by side with its peers; see README.md."""
