"""Steps and seconds to a target fixed by tuned first-order runs; see ``study``."""
