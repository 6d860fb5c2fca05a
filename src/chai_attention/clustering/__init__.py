"""Clustering of heads: functions on tensors, independent of any model."""
