"""How much of the usual networks gets a block: counts, costs and the page."""
