"""A tagged loss and the estimators of its layers' factors."""
