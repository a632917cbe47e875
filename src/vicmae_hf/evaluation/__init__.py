"""Takes a trained model and labelled data, gives accuracies, features, predictions and pictures. It trains no encoder.

Uses the model, `data/media`, `data/sources`, `data/samples`, `training` (its settings and schedules) and `reports`.
"""
