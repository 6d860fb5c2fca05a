"""Clustering of heads: tensors in, tensors out; knows no model."""
