"""What trained experts and a pretrained model look like in the spectrum."""
