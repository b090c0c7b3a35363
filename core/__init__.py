"""EM Microscope: why does a model fine-tuned on narrow bad data turn broadly misaligned?"""

__version__ = "0.1.0"
