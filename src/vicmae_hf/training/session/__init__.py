"""What every training script has around its training."""
