"""Speed and memory, compared with baselines and the ideal; results are checked first."""
