"""Random small programs, run through the tagger and an oracle of their own."""
