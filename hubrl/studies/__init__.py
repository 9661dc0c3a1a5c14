"""What ``hubrl study`` is made of: engines, results, statistics, figures, report."""
