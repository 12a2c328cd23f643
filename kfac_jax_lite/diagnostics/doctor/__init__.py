"""What the doctor looks for in a run."""
