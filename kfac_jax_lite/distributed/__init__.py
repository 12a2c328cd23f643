"""Who holds and inverts what, and how it travels between devices."""
