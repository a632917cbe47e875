"""Pictures and model cards. Takes the metrics, settings and results of a run; gives PNG files and a README.md.

Uses the model (to draw reconstructions) and the normalisation of `data/samples`.
"""
