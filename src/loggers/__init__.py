"""Loggers of metrics: CSV tables, Weights & Biases, TensorBoard, trackio and MLflow.

Beyond Lightning's interface a logger may have `log_table(key, columns, data)`, `log_histograms(values, step)`,
`alert(title, text, step)` and `log_figures(figures)`, the result of the run; callbacks use those that are there.
"""
