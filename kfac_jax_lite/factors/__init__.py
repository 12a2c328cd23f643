"""Statistics of every layer kind, and the loss that returns them."""
