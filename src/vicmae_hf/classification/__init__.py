"""Takes a pretrained model and labelled data; gives a classifier, finetuned or linear, and its accuracy.

Uses the model, `data`, `training`, `evaluation` (to measure the accuracy) and `reports`.
"""
