"""Takes videos and images without labels; gives a pretrained model. `run.py` calls all, `pretraining.py` trains.

Uses the model, `data`, `training`, `reports`, and `evaluation` (for the probe during training).
"""
