"""The paper's method: frequencies, experts, the routed spectral product, and the projection that holds them."""
