"""A sweep's report beyond the terminal.

- `study`: the Optuna study that the trials stand for, and parameter importances.
- `layers`: what each trial selects in each layer.
- `figures`: plots of a report, as plotly figures.
- `page`: all of it as one HTML file that needs no network.
"""
