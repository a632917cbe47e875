"""Takes videos and images without labels; gives a pretrained model. `pretraining.py` is the page to read first.

Uses the model, `data`, `training`, `reports`, and `evaluation` (for the probe during training).
"""
