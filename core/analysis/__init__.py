"""Numbers from cached activations: arrays and tables only. Importing anything here does not import torch."""
