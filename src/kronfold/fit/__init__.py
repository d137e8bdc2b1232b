"""The one way from a model, a plan and calibration to a compressed model."""
