"""Estimates what a training takes, and trains nothing: `plan.py` puts together what `survey.py` reads of the data,
`trial.py` measures of the model, and `costs.py` computes.
"""
