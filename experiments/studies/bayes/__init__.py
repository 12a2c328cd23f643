"""The study of posteriors: calibration, strange inputs, active learning."""
