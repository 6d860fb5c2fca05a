"""Clustered Head Attention: cheaper inference by sharing attention between heads that agree."""
