"""Speed and memory, beside baselines and the ideal; nothing is reported that is not checked."""
