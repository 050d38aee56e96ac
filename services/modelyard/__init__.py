"""Modelyard takes a trained model to where it is used and tells you how it does there."""

__version__ = "0.1.0"
