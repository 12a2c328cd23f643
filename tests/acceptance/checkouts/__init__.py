"""Public example repositories whose losses are tagged as they are."""
