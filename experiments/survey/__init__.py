"""The survey: curvature matrices of many networks during training, as one table."""
